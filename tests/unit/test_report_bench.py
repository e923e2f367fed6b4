"""What `edgewright bench` prints, and that nothing is invented where nothing was measured."""

from edgewright.report.bench import lines

SIDE = {"p50_ms": 1.5, "p90_ms": 2.0, "p99_ms": None, "p99_reason": "needs 662 calls, has 100"}
START = {"cold_start_s": 0.5, "import_s": 0.2, "load_s": 0.1, "first_run_s": 0.01}
REPORT = {
    "latency": {
        "primary": "cpu",
        "ratio": 1.1,
        "ratio_low": 1.05,
        "ratio_high": 1.15,
        "candidate": {**SIDE, "runs": 100},
        "original": {**SIDE, "runs": 100},
    },
    "memory": {
        "candidate_peak_bytes": 50_000_000,
        "candidate_cost_bytes": 10_000_000,
        "candidate_peak_no_arena_bytes": 40_000_000,
        "original_peak_bytes": 60_000_000,
        "original_cost_bytes": 20_000_000,
    },
    "load": {"ok": True, "candidate": START, "original": START},
    "noise": {"quiet": False, "reason": "fixed work varied by 9.0%"},
    "throughput": {
        "threads": [
            {"threads": 1, "per_second": 10.0, "rounds": [10.0, 9.0, 11.5]},
            {"threads": 2, "per_second": 15.0, "rounds": [14.0, 15.0, 16.0]},
        ],
        "streams": [{"streams": 1, "per_second": 10.0, "rounds": [10.0, 9.0, 11.5]}],
    },
    "energy": None,
    "energy_reason": "no energy meter can be read on this machine (RAPL powercap)",
}


def test_all_figures_have_a_line():
    rows = dict(lines(REPORT, alone=False))
    assert rows["latency of the model"] == (
        "p50 1.500 ms, p90 2.000 ms, no p99: needs 662 calls, has 100 (100 calls)"
    )
    assert rows["latency, the model / the other"] == "1.100 (1.050 to 1.150), cpu time"
    assert rows["start of the other"].startswith("cold start 500.0 ms, of it the runtime 200.0 ms")
    assert rows["peak memory of the model"] == (
        "50.0 MB, of it the model's 10.0; 40.0 MB without the arena"
    )
    assert rows["throughput, 1 thread"] == "10.0 a second (9.0 to 11.5)"
    assert rows["throughput, 2 threads"] == "15.0 a second (14.0 to 16.0)"
    assert rows["energy"].startswith("not measured: no energy meter")
    assert rows["limits in ms and bytes"] == "cannot bind here: fixed work varied by 9.0%"


def test_one_model_has_no_other():
    assert not any("the other" in name for name, _ in lines(REPORT, alone=True))


def test_emulation_says_why_there_are_no_times():
    counts = {"total": 1500, "runs": [1500, 1500, 1608], "classes": {"fmla": 0, "dot": 500}}
    other = {"total": 3000, "runs": [3000] * 3, "classes": {"fmla": 2000}}
    report = {
        "latency": None,
        "latency_reason": "emulated time is not latency",
        "instructions": {"candidate": counts, "original": other, "ratio": 0.5},
    }
    reason = ("no latency", "emulated time is not latency")
    ours = ("instructions of the model", "1,500 in 2 of 3 runs; of them dot 500")
    assert lines(report, alone=True) == [ours, reason]
    assert lines(report, alone=False) == [
        ours,
        ("instructions of the other", "3,000 in 3 of 3 runs; of them fmla 2,000"),
        ("instructions, the model / the other", "0.500"),
        reason,
    ]
    assert lines({**report, "instructions": None}, alone=True) == [reason]
