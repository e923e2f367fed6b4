"""The report for people: complete, escaped, self-contained, and calm about what is missing."""

# ruff: noqa: RUF001 - the page is typeset, with a real dash and multiplication sign

import copy
import io
import json
import re
import subprocess
import sys

import pytest
from rich.console import Console

from edgewright.report import html, plots, tables, text

EVIL = "<script>alert(1)</script>&\"'{{7*7}}[red]$\\frac\u202e\x1b[2J\n]]>"


def pair(launch: int, k: int) -> dict:
    def times(base: float) -> dict:
        wall = [base * (1 + 0.01 * ((k * 7 + j * 3) % 5)) for j in range(4)]
        return {"wall_us": wall, "cpu_us": [0.98 * t for t in wall]}

    return {"launch": launch, "candidate": times(3400), "original": times(7600)}


def model(size: int, nodes: int) -> dict:
    facts = {"sha256": f"{size:064x}", "bytes": size, "nodes": nodes, "parameters": 5}
    return {**facts, "opset": 17, "operators": {"Conv": nodes}}


def stage(name: str, cached: bool = False, **report) -> dict:
    report.setdefault("notes", [])
    whole = {"seconds": 1.5, "peak_rss_bytes": 300_000_000, **report}
    return {"stage": name, "cached": cached, "report": whole}


def check(name: str, limit, value, verdict: str = "PASS", reason: str = "measured") -> dict:
    bounds = {"low": None, "high": None}
    return {"name": name, "limit": limit, "value": value, "verdict": verdict, **bounds} | {
        "reason": reason
    }


def full() -> dict:
    side = {"runs": 400, "p50_ms": 3.4, "p90_ms": 3.8, "p99_ms": None}
    latency = {
        "primary": "cpu",
        "ratio": 0.4455,
        "ratio_low": 0.4421,
        "ratio_high": 0.4502,
        "confidence": 0.95,
        "statistic": "median over pairs",
        "pairs": 20,
        "launches": 2,
        "candidate": {**side, "p99_reason": "needs 662 calls, has 400"},
        "original": {**side, "p50_ms": 7.6, "p99_ms": 12.1},
    }
    placement = {
        "provider": "CPUExecutionProvider",
        "provider_share": 1.0,
        "required_share": 1.0,
        "strays": [{"name": "stray", "op": "Loop", "provider": "OtherProvider"}],
        "nodes_by_kind": {"border": 2, "float": 1, "int8": 60},
        "operators": [{"op": "QLinearConv", "kind": "int8", "count": 52, "share": 0.92}],
        "int8_share": 0.95,
        "border_share": 0.04,
        "float_share": 0.01,
        "other_share": 0.0,
    }
    measure = stage(
        "measure",
        emulated=False,
        latency=latency,
        memory={
            "candidate_peak_bytes": 77_000_000,
            "original_peak_bytes": 95_000_000,
            "ratio": 0.81,
        },
        load={"candidate": {"cold_start_s": 0.1}, "original": {"cold_start_s": 0.2}},
        size={"candidate_bytes": 3_900_000, "original_bytes": 14_000_000, "ratio": 3.9 / 14},
        placement=placement,
        noise={"quiet": False, "reason": "fixed work varied by 10 %"},
        host={"cpu": "some CPU", "cores": 2, "load_average": [1.0, 2.0]},
        raw={"pairs": [pair(k // 10, k) for k in range(20)]},
    )
    quantize = stage(
        "quantize",
        model=model(3_900_000, 370),
        scheme={"activations": "uint8", "per_channel": True},
        scope="auto",
        placement=[
            {"node": "conv1", "op": "Conv", "runs_as": "int8", "reason": ""},
            {"node": "norm1", "op": "LayerNorm", "runs_as": "float", "reason": "no int8 kernel"},
            {"node": "norm2", "op": "LayerNorm", "runs_as": "float", "reason": "no int8 kernel"},
        ],
        audit={"float_although_asked": 0},
        notes=[
            {"level": "info", "text": "a remark"},
            {"level": "warning", "text": "a warning"},
        ],
    )
    validate = stage(
        "validate",
        metric={
            "name": "top-1",
            "higher_is_better": True,
            "original": {"score": 0.718},
            "shipped": {"score": 0.7139, "retained": 0.9943},
            "stages": {"quantize": {"score": 0.7139, "retained": 0.9943}},
            "paired": {
                "samples": 400,
                "worse": 9,
                "better": 7,
                "mean_loss": 0.005,
                "mean_loss_low": -0.01,
                "mean_loss_high": 0.02,
                "sign_test_p": 0.80,
            },
        },
        agreement={"sqnr_db": {"logits": 24.3}, "samples": 400, "top1": 0.9725},
        steps=[
            {
                "stage": "quantize",
                "bytes": 3_904_496,
                "macs": 150_000_000,
                "original_macs": 300_000_000,
                "sqnr_db": 24.34,
                "top1": 0.9725,
                "cpu_ratio": 0.45,
                "retained": 0.9943,
            }
        ],
    )
    gate = stage(
        "gate",
        verdict="PASS",
        checks=[
            {**check("min_retained", 0.99, 0.9943), "low": 0.991, "high": 0.999},
            check("max_latency_ratio", 1.0, 0.4455),
            check("max_size_bytes", 4_000_000, 3_900_000),
            check("max_latency_ms", 5.0, None, "NOT JUDGED", "not quiet"),
            check("runs", None, None),
            check("baseline_max_latency_ratio", 1.0, 0.98),
        ],
    )
    return {
        "schema": "edgewright-report/1",
        "name": "demo",
        "version": "1.4.0",
        "target": "cpu",
        "verdict": "PASS",
        "stages": [
            stage("export", cached=True, model=model(14_000_000, 169)),
            quantize,
            validate,
            measure,
            gate,
            stage("bundle", bundle="demo-1.4.0-cpu.bundle.tar", sha256="c" * 64, files=[]),
        ],
        "environment": {"host": {"cpu": "some CPU"}, "versions": {"numpy": "2"}},
    }


def told(report: dict) -> str:
    """The summary as a terminal gets it."""
    console = Console(file=io.StringIO(), width=140, force_terminal=True)
    console.print(text.summary(report))
    return console.file.getvalue()


def visible(page: str) -> str:
    """The page's text without tags and styles."""
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_figures_on_the_page():
    page = visible(html.render(full()))
    for expected in (
        "PASS",
        "demo",
        "3.59× smaller",
        "14.0 MB → 3.90 MB",
        "2.24× faster",
        "0.442 to 0.450",
        "99.43 % kept",
        "top-1: 0.718 → 0.7139",
        "19 % less",
        "97.25 %",
        "95 % of the time",
        "≥ 99.00 %",
        "99.10 % to 99.90 %",
        "≤ 4.00 MB",
        "needs 662 calls, has 400",
        "no int8 kernel",
        "norm1, norm2",
        "a warning",
        "demo-1.4.0-cpu.bundle.tar",
        "c" * 64,
        "stray",
        "latency, shipped / baseline",
        "of 400 samples 9 are worse and 7 better; mean loss 0.005",
        "5 checks passed, none failed, 1 could not be judged",
    ):
        assert expected in page, expected


def test_figures_in_the_terminal():
    summary = told(full())
    for expected in ("PASS", "2.24× faster", "99.43 %", "a warning", "1 more remark", "cached"):
        assert expected in summary, expected


def test_page_is_self_contained():
    page = html.render(full())
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|img|iframe|object|embed|base|form)\b", page)
    assert not re.search(r"\bon[a-z]+\s*=|javascript:|@import|url\((?!#)", page)
    outside = [u for u in re.findall(r"https?://[^\"' )]+", page) if "www.w3.org" not in u]
    assert outside == []
    assert not re.search(r"\d{4}-\d{2}-\d{2}T\d{2}:", page), "no dates: same report, same page"


def test_ids_are_unique_and_references_resolve():
    page = html.render(full())
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    used = re.findall(r'(?:url\(|href=")#([^")]+)', page)
    assert used and set(used) <= set(names)


def evil(value):
    """The report with every text in it hostile, keys included where they are free."""
    if isinstance(value, dict):
        return {k: evil(v) for k, v in value.items()} | (
            {EVIL: 1} if "numpy" in value or "per_channel" in value else {}
        )
    if isinstance(value, list):
        return [evil(v) for v in value]
    return EVIL if isinstance(value, str) else value


def hostile() -> dict:
    report = evil(full())
    for mine, theirs in zip(full()["stages"], report["stages"], strict=True):
        theirs["stage"] = mine["stage"]
        theirs["report"].pop("verdict", None)
    return report


def test_hostile_names_are_escaped():
    page = html.render(hostile())
    assert "<script" not in page and "alert(1)</" not in page
    assert page.count("&lt;script&gt;") > 20
    assert "49" not in re.findall(r"\{\{.*?\}\}", page) and "{{7*7}}" in page
    assert "\u202e" not in page and "\x1b" not in page


def test_hostile_names_cannot_steer_the_terminal():
    console = Console(file=io.StringIO(), width=140, force_terminal=False)
    console.print(text.summary(hostile()))
    summary = console.file.getvalue()
    assert "\x1b" not in summary and "\u202e" not in summary
    assert "[red]" in summary


def paths(value, above=()):
    """All places in a nested value."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:2]))
    else:
        return
    for key, inner in items:
        yield (*above, key)
        yield from paths(inner, (*above, key))


def changed(report: dict, place, value=None, drop: bool = False) -> dict:
    report = copy.deepcopy(report)
    inner = report
    for key in place[:-1]:
        inner = inner[key]
    if drop:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return report


def test_any_part_may_be_missing_or_odd(monkeypatch):
    real = plots.draw
    monkeypatch.setattr(plots, "draw", lambda *_, **__: "<svg></svg>")  # the slow part
    report = full()
    for place in paths(report):
        html.render(changed(report, place, drop=True))
        for value in (None, "text", -1, float("nan"), [], {}, [None], True):
            odd = changed(report, place, value)
            html.render(odd)
            text.summary(odd)
    monkeypatch.setattr(plots, "draw", real)
    for key in ("cpu_us", "wall_us"):
        for times in ([], [0, 0], ["x"], None, [float("nan"), 1.0]):
            odd = full()
            for row in odd["stages"][3]["report"]["raw"]["pairs"]:
                row["candidate"][key] = times
            html.render(odd)


@pytest.mark.parametrize("count", range(6))
def test_builds_that_stopped(count):
    report = full()
    report["stages"] = report["stages"][:count]
    report["verdict"] = None if count < 5 else "PASS"
    page = visible(html.render(report))
    assert ("NO VERDICT" in page) == (count < 5)
    assert told(report)
    if count < 4:
        assert "not available" in page


def test_empty_report():
    assert "NO VERDICT" in html.render({})
    assert "NO VERDICT" in told({})


def test_emulated_targets_have_no_times():
    report = full()
    measure = report["stages"][3]["report"]
    measure.update(emulated=True, latency=None, latency_reason="emulated time is not latency")
    measure.update(memory=None, memory_reason="mostly the emulator's")
    for kind in ("int8", "border", "float", "other"):
        measure["placement"][f"{kind}_share"] = None
    page = visible(html.render(report))
    assert "emulated time is not latency" in page
    assert "mostly the emulator's" in page.replace("&#39;", "'")
    assert "60 of 63 nodes" in page and "of the executed nodes" in page


def test_instructions_stand_in_for_latency_where_a_target_is_emulated():
    report = full()
    measure = report["stages"][3]["report"]
    measure.update(emulated=True, latency=None, latency_reason="emulated time is not latency")
    classes = {"dot": 0, "fmla": 6000, "other": 4000}
    measure["instructions"] = {
        "candidate": {
            "total": 4000,
            "runs": [4000] * 5,
            "classes": {**classes, "dot": 900, "fmla": 0},
        },
        "original": {"total": 10000, "runs": [10000] * 5, "classes": classes},
        "ratio": 0.4,
        "statistic": "the most frequent",
        "emulator": "QEMU 7.2, cortex-a76",
    }
    tile = tables.tiles(report)[1]
    assert (tile.label, tile.value) == ("Instructions", "2.50× fewer")
    page = visible(html.render(report))
    assert "dot products of int8 (SDOT, UDOT)" in page and "SVE" not in page
    assert "Counted by QEMU 7.2, cortex-a76, the same number run after run" in page
    measure["instructions"]["candidate"]["runs"][4] = 4336  # a look at the clock
    assert "with small differences between runs" in visible(html.render(report))


def test_checks_of_a_release_say_which_way_and_against_which():
    checks = [
        {"name": "latency", "limit": 1.05, "value": 1.0021, "low": 0.94, "high": 1.027},
        {"name": "metric", "limit": 0.99, "value": 1.0},
        {"name": "golden_memory", "limit": 1.1, "value": 0.9987},
        {"name": "golden_min_provider_share", "limit": 1.0, "value": 1.0},
        {"name": "baseline_instructions", "limit": 1.005, "value": 1.0},
        {"name": "baseline_max_latency_ratio", "limit": 1.0, "value": 0.98},
    ]
    rows = tables.gate({"stages": [{"stage": "gate", "report": {"checks": checks}}]})
    assert [(row.label, row.limit, row.value) for row in rows] == [
        ("latency", "≤ 1.050", "1.002"),
        ("metric", "≥ 99.00 %", "100.00 %"),
        ("memory, against the golden release", "≤ 1.100", "0.999"),
        ("work on the provider, against the golden release", "≥ 100.00 %", "100.00 %"),
        ("instructions, against the baseline", "≤ 1.005", "1.000"),
        ("latency, shipped / baseline", "≤ 1.000", "0.980"),
    ]
    assert rows[0].bounds == "0.940 to 1.027"


def test_failures_are_explained_in_the_banner():
    report = full()
    report["verdict"] = "FAIL"
    row = report["stages"][4]["report"]["checks"][0]
    row.update(verdict="FAIL", reason="0.97 is below 0.99")
    assert "metric kept: 0.97 is below 0.99." in visible(html.render(report))
    assert "metric kept: 0.97 is below 0.99." in told(report)


RENDER = """
import json, sys
from edgewright.report import html
sys.stdout.buffer.write(html.render(json.load(sys.stdin)).encode())
"""


def test_same_report_same_page():
    report = full()
    expected = html.render(report)
    run = subprocess.run(
        [sys.executable, "-c", RENDER],
        input=json.dumps(report).encode(),
        env={"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C", "MPLBACKEND": "agg"},
        capture_output=True,
        check=True,
    )
    assert run.stdout.decode() == expected


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        (tables.bytes_text, 0, "0 B"),
        (tables.bytes_text, 999, "999 B"),
        (tables.bytes_text, 1000, "1.00 kB"),
        (tables.bytes_text, 3_904_496, "3.90 MB"),
        (tables.bytes_text, 999_600, "1.00 MB"),
        (tables.bytes_text, 5e12, "5000 GB"),
        (tables.bytes_text, None, "–"),
        (tables.share_text, 0.99434, "99.43 %"),
        (tables.rough_share_text, 0.004, "0.4 %"),
        (tables.seconds_text, 12.34, "12.3 s"),
        (tables.seconds_text, 185, "3 min 05 s"),
        (tables.ms_text, 0.01234, "0.0123 ms"),
        (tables.ms_text, 1234.5, "1234 ms"),
        (tables.score_text, True, "–"),
        (tables.count_text, 12345, "12\u202f345"),
    ],
)
def test_forms(form, value, expected):
    assert form(value) == expected


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.5, "2.00× faster"), (2.0, "2.00× slower"), (1.001, "as fast")]
)
def test_times(ratio, expected):
    assert tables.times_text(ratio, "faster", "slower", "as fast") == expected


def test_what_the_quantizer_tried_is_told():
    kept = {"step": "equalization", "pairs": 3, "kept": True}
    rows = [
        kept | {"sqnr_db_before": 14.7, "sqnr_db_after": 15.9},
        {"step": "rollback", "regions_in_float": 2, "retained": 0.9985},
        {"step": "correction", "correction": "<b>", "kept": False, "reason": "singular"},
        {"step": "pay", "cpu_ratio": 0.451},
    ]
    cells = [html.choice_row(row) for row in rows]
    assert cells[0] == ("equalization", "14.7 dB → 15.9 dB on held-out inputs", "kept")
    assert cells[1][1].startswith("2 regions in float: 99.85")
    assert cells[2] == ("<b>", "singular", "dropped")
    assert cells[3][1] == "0.45 of the float model's time"


def test_each_step_is_shown_against_the_original() -> None:
    report = full()
    (step,) = tables.steps(report)
    assert (step.stage, step.kept, step.same, step.top1) == (
        "quantize",
        "99.43 %",
        "24.3 dB",
        "97.25 %",
    )
    assert (step.macs, step.latency) == ("50 %", "0.450")
    exported = tables.number(tables.find(report["stages"][0], "report", "model", "bytes"))
    assert exported is not None and step.size == f"{100 * 3_904_496 / exported:.0f} %"
    assert "after each stage that changed the model" in html.render(report)


def test_compression_is_told_stage_by_stage() -> None:
    report = full()
    prune = {
        "budget": {"of": "macs", "asked": 0.6, "left": 0.598},
        "criterion": "hessian",
        "needs": "label-free",
        "allocation": "global",
        "multiple": 8,
        "groups": [{"group": "w<1>", "kind": "heads", "units": 12, "kept": 8, "reason": ""}],
        "frozen": [{"node": "n", "op": "TopK", "reason": "no rule for this operator"}],
        "tries": [{"budget": 0.5, "drop": 0.04, "kept": False}],
        "ratios": {"conv*": 0.25},
        "soft": {"way": "grow", "steps": 300},
    }
    recover = {
        "method": "compensate",
        "layers": [{"node": "a", "op": "Conv"}, {"node": "b", "op": "Conv", "reason": "odd"}],
    }
    prune |= {"compressed_bytes": [900, 500], "cpu_ratio": 1.013}
    share = {"duplicate_bytes": 10, "sent_bytes": {"before": 100, "after": 20}, "codebooks": []}
    share["training"] = {"start": {"distance": 0.5}, "best": {"distance": 0.125}}
    for name, one in (("prune", prune), ("recover", recover), ("share", share)):
        report["stages"].insert(2, {"stage": name, "cached": False, "report": one})
    page = html.render(report)
    for words in (
        "60.00 % of the macs; 59.80 % is left",
        "w&lt;1&gt;",
        "no rule for this operator",
        "costs too much",
        "1 of 2",
        "100 B before, 20 B after",
        "900 B before, 500 B with the zeros",
        "1.013",
        "0.5 by k-means, 0.125 after training",
    ):
        assert words in page, words
    assert "Compression beyond int8" not in html.render(full())
