"""measure: the race between two models, the placement of nodes, and what happens when one fails.

Nothing here asserts a time. Where a ratio is asserted it is that of CPU time, with a wide margin.
"""

import functools
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewright import gate, measure
from edgewright.errors import EdgewrightError, UsageError
from edgewright.measure import host, race, summary
from edgewright.measure.race import CANDIDATE, ORIGINAL
from edgewright.recipe import parse_recipe
from edgewright.stage import Job
from edgewright.target import load_target, parse_target

WIDTH = 192
SHARES = ("int8_share", "border_share", "float_share", "other_share")


def layers(count: int, path: Path, width: int = WIDTH) -> Path:
    """A model of `count` equal MatMul + Relu layers: the work grows with the count."""
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for k in range(count):
        values = rng.normal(0, width**-0.5, (width, width)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{k}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{k}"], [f"m{k}"], f"dense_{k}"))
        nodes.append(helper.make_node("Relu", [f"m{k}"], [f"r{k}"], f"relu_{k}"))
        name = f"r{k}"
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", width]) for n in ("x", name)
    ]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    return path


def feeds(rows=(64,)):
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(n, WIDTH)).astype(np.float32)} for n in rows]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {n: layers(n, folder / f"{n}.onnx") for n in (4, 8)}


@pytest.fixture(scope="module")
def native():
    """A target that every x86 or ARM machine satisfies, in place of the stricter profiles."""
    import platform

    arch = platform.machine()
    if arch not in ("x86_64", "aarch64"):
        pytest.skip("no target of this architecture")
    raw = {"name": "here", "description": "this machine", "device": {"arch": arch}}
    return parse_target(raw)


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    """Short slices, and a lock of the test's own."""
    monkeypatch.setattr(race, "SLICE_S", 0.02)
    monkeypatch.setattr(host, "lock_path", lambda: tmp_path / "lock")


def quietly(text, done=0, total=0):
    """Progress that nobody watches."""


def test_twice_the_work_is_measured_as_slower(models, native):
    told = []
    report = measure.compare(
        models[8],
        models[4],
        feeds(),
        native,
        lambda *event: told.append(event),
        launches=1,
        seconds=1.5,
    )
    json.dumps(report, allow_nan=False)
    latency = report["latency"]
    assert latency["primary"] == "cpu"
    assert latency["ratio_low"] > 1.3
    assert latency["ratio_low"] <= latency["ratio"] <= latency["ratio_high"]
    assert latency["confidence"] == 0.95
    assert latency["launches"] == 1
    for side in (CANDIDATE, ORIGINAL):
        assert latency[side]["p50_ms"] > 0
        assert latency[side]["runs"] > 11
        assert report["load"][side]["cold_start_s"] > report["load"][side]["load_s"] > 0
        assert report["memory"][f"{side}_peak_bytes"] > report["memory"][f"{side}_cost_bytes"] > 0
    assert report["memory"]["candidate_peak_no_arena_bytes"] > 0
    assert report["memory"]["original_peak_no_arena_bytes"] > 0
    size = report["size"]
    assert size["candidate_bytes"] == models[8].stat().st_size
    assert 1.9 < size["ratio"] < 2.1
    assert report["emulated"] is False
    assert report["host"]["onnxruntime"]
    assert report["noise"]["quiet"] in (True, False)
    pairs = report["raw"]["pairs"]
    assert len(pairs) == latency["pairs"] >= 6
    assert {p["first"] for p in pairs} == {CANDIDATE, ORIGINAL}, "the order is drawn"
    assert [h["started_first"] for h in report["raw"]["heats"]] == [ORIGINAL, CANDIDATE]
    assert [text for text, *_ in told[:2]] == ["profiling", "measuring latency"]
    assert max(done for _, done, _ in told) <= max(total for _, _, total in told)


def test_the_report_follows_from_the_raw_samples(models, native):
    report = measure.compare(
        models[4], models[4], feeds(), native, quietly, launches=1, seconds=0.3
    )
    raw = json.loads(json.dumps(report["raw"]))
    heats = [
        {**heat, "pairs": [p for p in raw["pairs"] if p["heat"] == k]}
        for k, heat in enumerate(raw["heats"])
    ]
    again, _ = summary.latency(heats, "cpu", 0.95)
    assert again == report["latency"]
    assert summary.noise(heats, report["noise"]["steal_ticks"]) == report["noise"]


def test_a_model_races_itself_to_a_draw(models, native):
    sizes = feeds((16, 64, 40))
    both = models[4], models[4]
    report = measure.compare(*both, sizes, native, quietly, launches=1, seconds=4)
    latency = report["latency"]
    assert latency["ratio_low"] < 1.03
    assert latency["ratio_high"] > 0.97


def test_bounds_around_the_limit_add_launches_once(models, native, monkeypatch):
    asked = []
    monkeypatch.setattr(summary, "straddles", lambda report, border: asked.append(border) or True)
    report = measure.compare(
        models[4], models[4], feeds(), native, quietly, launches=1, seconds=0.1, limit=1.02
    )
    assert asked == [1.02]
    assert report["latency"]["launches"] == 2
    assert report["latency"]["confidence"] == pytest.approx(0.975), "two looks share the error"


def test_no_inputs_are_a_usage_error(models, native):
    with pytest.raises(UsageError, match="at least 1 sample"):
        measure.compare(models[4], models[4], [], native, quietly)


def make_job(folder, target, candidate, original, **gate_settings):
    np.savez(folder / "calibration.npz", x=np.concatenate([f["x"] for f in feeds((1,) * 9)]))
    raw = {
        "model": {"name": "layers", "version": "1", "source": "model.onnx"},
        "data": {"calibration": "calibration.npz"},
        "gate": gate_settings,
    }
    recipe = parse_recipe(raw, folder)
    return Job(
        recipe=recipe, target=target, folder=folder, model=candidate, models={"export": original}
    )


def test_the_stage_and_the_gate_after_it(models, native, tmp_path, monkeypatch):
    brief = functools.partial(measure.compare, launches=1, seconds=1.5)
    monkeypatch.setattr(measure, "compare", brief)
    job = make_job(tmp_path, native, models[8], models[4], max_latency_ratio=1.0)
    report = measure.run(job)
    assert report["host"]["feeds"] == measure.MAX_FEEDS
    verdict = gate.run(
        Job(
            recipe=job.recipe,
            target=native,
            folder=tmp_path,
            reports={
                "validate": {"metric": None},
                "measure": report,
            },
        )
    )
    assert verdict["verdict"] == "FAIL"
    assert "slower than allowed" in verdict["checks"][1]["reason"]


def broken(path, models):
    path.write_bytes(models[4].read_bytes()[:1000])
    return path


def test_a_candidate_that_cannot_be_loaded_is_a_finding(models, native, tmp_path):
    job = make_job(tmp_path, native, broken(tmp_path / "broken.onnx", models), models[4])
    report = measure.run(job)
    assert "the runtime refused the candidate" in report["failed"]
    assert report["latency"] is None
    assert report["load"] == {"ok": False}
    assert gate.decide(job.recipe.gate, native.budget, {}, report)["verdict"] == "FAIL"


def test_a_candidate_that_cannot_take_the_inputs_is_a_finding(models, native, tmp_path):
    narrow = layers(2, tmp_path / "narrow.onnx", width=WIDTH // 2)
    report = measure.run(make_job(tmp_path, native, narrow, models[4]))
    assert "the candidate" in report["failed"]
    assert report["size"]["ratio"] < 1


def test_a_broken_original_is_an_error(models, native, tmp_path):
    bad = broken(tmp_path / "broken.onnx", models)
    with pytest.raises(EdgewrightError, match="the original") as caught:
        measure.compare(models[4], bad, feeds(), native, quietly)
    assert not isinstance(caught.value, race.CandidateFailed)


@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="QEMU is not installed")
def test_emulation_gives_placement_and_size_but_no_time(models):
    try:
        report = measure.compare(models[8], models[4], feeds(), load_target("cpu-avx2"), quietly)
    except EdgewrightError as error:
        pytest.skip(str(error))
    json.dumps(report, allow_nan=False)
    assert report["emulated"] is True
    assert report["latency"] is None
    assert report["latency_reason"] == "emulated time is not latency"
    assert report["memory"] is None
    assert report["load"] == {"ok": True}
    assert report["placement"]["ok"] is True
    assert report["placement"]["nodes_by_kind"]["float"] >= 8
    assert [report["placement"][key] for key in SHARES] == [None] * 4
    assert report["size"]["ratio"] > 1


# The parts of a race


def heat(launch, candidate_us, original_us, **more):
    """A heat of pairs with four calls each, times in microseconds."""
    pairs = [
        {
            "turn": 4 * k,
            "first": ORIGINAL,
            **{
                side: {
                    "wall_us": [t] * 4,
                    "cpu_us": [t] * 4,
                    "total_wall_s": 4e-6 * t,
                    "run_queue_s": 0.0,
                    "involuntary_switches": 0,
                }
                for side, t in ((CANDIDATE, a), (ORIGINAL, b))
            },
        }
        for k, (a, b) in enumerate(zip(candidate_us, original_us, strict=True))
    ]
    return {"launch": launch, "calls": 4, "feed_bytes": [8], "pairs": pairs, **more}


def test_the_advantage_of_starting_later_cancels():
    heats = [heat(0, [94.0] * 12, [100.0] * 12), heat(0, [100.0] * 12, [94.0] * 12)]
    report, notes = summary.latency(heats, "cpu", 0.95)
    assert report["ratio"] == pytest.approx(1.0)
    assert report["ratio_high"] == pytest.approx(1.0)
    assert notes == []


def test_a_coarse_cpu_clock_falls_back_to_wall_time():
    heats = [heat(0, [50.0] * 12, [100.0] * 12), heat(0, [50.0] * 12, [100.0] * 12)]
    for pair in heats[0]["pairs"]:
        pair[CANDIDATE]["cpu_us"] = [0.0] * 4
    report, notes = summary.latency(heats, "cpu", 0.95)
    assert report["primary"] == "wall"
    assert report["ratio"] == pytest.approx(0.5)
    assert report["cpu_ratio"] is None
    assert [n["level"] for n in notes] == ["warning"]
    assert "too coarse" in notes[0]["text"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.9, 1.0, False),
        (1.0, 1.1, True),
        (1.02, 1.1, True),
        (1.03, 1.1, False),
        (None, None, True),
    ],
)
def test_straddling_is_what_the_gate_calls_inconclusive(low, high, expected):
    assert summary.straddles({"ratio_low": low, "ratio_high": high}, 1.02) is expected


def test_quiet_needs_steady_work_and_a_free_core():
    steady = [heat(0, [1.0] * 12, [1.0] * 12, spin_s=[0.002] * 12)]
    assert summary.noise(steady, 0)["quiet"] is True
    wobbly = [heat(0, [1.0] * 12, [1.0] * 12, spin_s=[0.002, 0.0022] * 6)]
    assert summary.noise(wobbly, 0)["quiet"] is False
    for pair in steady[0]["pairs"]:
        pair[ORIGINAL]["run_queue_s"] = pair[ORIGINAL]["total_wall_s"] / 10
    found = summary.noise(steady, 0)
    assert found["quiet"] is False
    assert "5.0% of the time" in found["reason"]


def test_memory_reports_the_largest_peak_and_what_the_model_costs():
    def start(peak, load_peak):
        return {
            "peak_kib": peak,
            "rss_before_load_kib": 100,
            "peak_after_load_kib": load_peak,
            "reset": True,
        }

    heats = [
        {"start": {CANDIDATE: start(300, 150), ORIGINAL: start(500, 200)}},
        {"start": {CANDIDATE: start(310, 160), ORIGINAL: start(490, 200)}},
    ]
    no_arena = {CANDIDATE: (280, True), ORIGINAL: (450, True)}
    report, notes = summary.memory(heats, no_arena)
    assert report["candidate_peak_bytes"] == 310 << 10
    assert report["candidate_load_peak_bytes"] == 160 << 10
    assert report["candidate_peak_no_arena_bytes"] == 280 << 10
    assert report["original_peak_no_arena_bytes"] == 450 << 10
    assert report["ratio"] == pytest.approx(310 / 500)
    assert report["cost_ratio"] == pytest.approx(210 / 400)
    assert notes == []
    heats[0]["start"][ORIGINAL]["peak_kib"] = heats[1]["start"][ORIGINAL]["peak_kib"] = 0
    _, notes = summary.memory(heats, {**no_arena, ORIGINAL: (450, False)})
    assert "peaks include loading" in notes[0]["text"]
    report, _ = summary.memory(heats, no_arena)
    assert report["ratio"] is None
    assert "VmHWM" in report["reason"]


def test_sizes_of_slices_and_heats():
    assert race.calls_per_slice([0.01, 0.01]) == 4
    assert race.calls_per_slice([1e-3, 1e-3]) == 20
    assert race.calls_per_slice([1e-6, 1e-6]) == race.MAX_CALLS
    assert race.calls_per_slice([0.01, 0.3]) == 1
    assert race.warm_calls(1e-4) == race.WARM_CALLS
    assert race.warm_calls(0.1) == 10
    assert race.warm_calls(60) == 1
    assert race.memory_order(feeds((1, 1))) == [0, 1, 0]
    assert race.memory_order(feeds((1, 3, 2))) == [1, 2, 0, 1, 2]
    assert not race.finished(race.MIN_PAIRS - 1, 1.0, 1.0, 4)
    assert race.finished(race.MIN_PAIRS, 1.0, 1.0, 4)
    assert race.finished(race.MAX_PAIRS, 0.0, 1.0, 4)
    assert not race.finished(1, 99.0, 1.0, 4)
    assert race.finished(2, 2.0, 1.0, 4)
    assert not race.finished(2, 2.0, 1.0, 1)


def test_cores_alternate_in_sets_of_the_wanted_size():
    assert host.core_sets([0, 1, 2, 3], 1) == [frozenset({k}) for k in (3, 2, 1, 0)]
    assert host.core_sets([0, 1, 2, 3, 4], 2) == [frozenset({3, 4}), frozenset({1, 2})]
    assert host.core_sets([0, 1], 2) == [frozenset({0, 1})]
    assert host.core_sets([5], 8) == [frozenset({5})]


def test_one_measurement_at_a_time(monkeypatch):
    monkeypatch.setattr(host, "POLL_S", 0.01)
    waiting, inside = threading.Event(), threading.Event()

    def second():
        with host.exclusive(lambda text, done, total: waiting.set()):
            inside.set()

    thread = threading.Thread(target=second)
    with host.exclusive(quietly):
        thread.start()
        assert waiting.wait(10)
        assert not inside.is_set()
    assert inside.wait(10)
    thread.join()


def test_the_lock_follows_no_link(tmp_path, monkeypatch):
    (tmp_path / "trap").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(host, "lock_path", lambda: tmp_path / "trap")
    with pytest.raises(OSError, match="symbolic link"), host.exclusive(quietly):
        pass
    assert not (tmp_path / "elsewhere").exists()
