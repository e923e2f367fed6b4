"""A release beside another one: the race ends when it is decided, and strangers are refused.

Nothing here asserts a time; ratios are those of CPU time between models of 4 and of 8 layers.
"""

import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewright.build import no_recipe
from edgewright.decision import Settled
from edgewright.errors import BadInput
from edgewright.gate.demands import target_demands
from edgewright.gate.release import decide_release
from edgewright.measure import host, throughput
from edgewright.measure import release as race
from edgewright.measure.race import CandidateFailed, Pace
from edgewright.recipe import parse_recipe
from edgewright.release import Side, generate, judge, refuse_strangers, relaxed
from edgewright.runtime.session import Launch
from edgewright.target import parse_target

WIDTH = 192


def layers(count: int, path: Path) -> Path:
    """A classifier of `count` equal MatMul + Relu layers; the layers after the second are idle.

    They reach the output times 1e-30, so models of any count give one answer.
    """
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for k in range(count):
        values = rng.normal(0, WIDTH**-0.5, (WIDTH, WIDTH)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{k}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{k}"], [f"m{k}"], f"dense_{k}"))
        nodes.append(helper.make_node("Relu", [f"m{k}"], [f"r{k}"], f"relu_{k}"))
        name = f"r{k}"
    weights.append(numpy_helper.from_array(np.float32(1e-30), "tiny"))
    nodes.append(helper.make_node("Mul", [name, "tiny"], ["little"], "little"))
    nodes.append(helper.make_node("Add", ["r1", "little"], ["y"], "sum"))
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", WIDTH]) for n in ("x", "y")
    ]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {n: layers(n, folder / f"{n}.onnx") for n in (4, 8)}


@pytest.fixture(scope="module")
def here():
    """A target that every x86 or ARM machine satisfies."""
    raw = {"name": "here", "description": "this machine", "device": {"arch": platform.machine()}}
    return parse_target(raw)


@pytest.fixture(autouse=True)
def own_lock(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "lock_path", lambda: tmp_path / "lock")


FEEDS = [{"x": np.random.default_rng(1).normal(size=(64, WIDTH)).astype(np.float32)}]


def quietly(text, done=0, total=0):
    """Progress that nobody watches."""


def test_twice_the_work_fails(models, here):
    report = race.compare(models[8], models[4], FEEDS, here, Settled(), quietly)
    json.dumps(report, allow_nan=False)
    looks = report["decided"]["looks"]
    assert looks[-1]["latency"] == "FAIL"
    assert report["latency"]["launches"] == len(looks)
    assert report["latency"]["ratio_low"] > 1.3
    assert report["placement"] is None
    assert "decided before" in report["placement_reason"]
    assert report["cold_start"]["pairs"] >= 6 * len(looks)
    assert {p["first"] for h in report["raw"]["heats"] for p in h["restarts"]} <= {
        "candidate",
        "original",
    }


def test_a_model_is_no_worse_than_itself_beside_a_neighbour_that_comes_late(models, here):
    busy = [sys.executable, "-c", "while True: sum(range(100_000))"]
    started = []
    timer = threading.Timer(2.0, lambda: started.append(subprocess.Popen(busy)))
    timer.start()
    try:
        report = race.compare(models[4], models[4], FEEDS, here, Settled(budget_s=60), quietly)
    finally:
        timer.cancel()
        timer.join()
        for process in started:
            process.kill()
            process.wait()
    last = report["decided"]["looks"][-1]
    assert last["latency"] != "FAIL"
    assert (last["memory"], last["cold_start"]) == ("PASS", "PASS")
    assert 1 <= report["latency"]["launches"] <= 3
    assert report["placement"]["ok"] is True


def test_five_pairs_leave_it_open(models, here, monkeypatch):
    monkeypatch.setattr(race, "PACE", Pace(slice_s=0.005, pairs=(2, 5), restarts=3))
    report = race.compare(models[8], models[4], FEEDS, here, Settled(budget_s=0.1), quietly)
    assert len(report["decided"]["looks"]) == 1, "the budget is spent"
    assert report["decided"]["looks"][0]["latency"] == "INCONCLUSIVE"
    assert report["latency"]["ratio"] > 1.3
    assert report["latency"]["ratio_low"] is None


def test_a_candidate_that_breaks_is_blamed(models, here, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(models[4].read_bytes()[:1000])
    with pytest.raises(CandidateFailed):
        race.compare(broken, models[4], FEEDS, here, Settled(), quietly)
    with pytest.raises(BadInput) as caught:
        race.compare(models[4], broken, FEEDS, here, Settled(), quietly)
    assert not isinstance(caught.value, CandidateFailed)


def test_inputs_are_generated_from_the_specs(models, tmp_path):
    generate(models[4], tmp_path / "inputs.npz")
    with np.load(tmp_path / "inputs.npz") as arrays:
        assert sorted(arrays) == [f"x__{k:03d}" for k in range(8)]
        assert arrays["x__000"].shape == (1, WIDTH)
        assert arrays["x__000"].dtype == np.float32
        assert not np.array_equal(arrays["x__000"], arrays["x__001"])


def bundle_facts(**changes):
    """What `refuse_strangers` reads of a manifest."""
    runtime = {"provider": "CPUExecutionProvider", "threads": 1}
    runtime |= {"min": "1.0", "max": "<99", "exact": "1.2.3", **changes.pop("runtime", {})}
    return {"name": "tiny", "target": "here", "runtime": runtime, **changes}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"name": "other"}, "other"),
        ({"target": "arm"}, "arm"),
        ({"runtime": {"threads": 4}}, "4 threads"),
        ({"runtime": {"provider": "CUDAExecutionProvider"}}, "CUDAExecutionProvider"),
        ({"runtime": {"min": "98.0"}}, "98.0"),
    ],
)
def test_a_baseline_of_another_kind_is_refused(here, changes, found):
    new = Side(Path("new.onnx"), bundle_facts())
    refuse_strangers(Side(Path("old.onnx"), bundle_facts()), new, Path("old"), None, here)
    with pytest.raises(BadInput, match=found):
        strange = Side(Path("old.onnx"), bundle_facts(**changes))
        refuse_strangers(strange, new, Path("old"), None, here)


def test_a_model_with_other_inputs_is_refused(models, here, tmp_path):
    other = onnx.load(str(models[4]))
    for node in other.graph.node:
        node.input[:] = ["z" if name == "x" else name for name in node.input]
    other.graph.input[0].name = "z"
    onnx.save(other, str(tmp_path / "other.onnx"))
    with pytest.raises(BadInput, match="inputs"):
        judge(models[4], tmp_path / "other.onnx", here)


def test_a_golden_release_has_a_tolerance_of_its_own():
    raw = {**no_recipe("").raw, "gate": {"tolerance": {"latency": 0.03, "golden": 0.2}}}
    recipe = parse_recipe(raw, Path("/"))
    settled = Settled(latency=0.03, golden=0.2)
    found = relaxed(recipe, settled).gate.tolerance
    assert (found.latency, found.memory, found.metric) == (0.2, 0.2, 0.02)


def test_throughput_counts_threads_and_streams(models, here, monkeypatch):
    monkeypatch.setattr(throughput, "ROUND_S", 0.05)
    cores = sorted(os.sched_getaffinity(0))[:2]
    found = throughput.throughput(models[4], FEEDS, here, Launch(), cores)
    counts = [1, 2][: len(cores)]
    assert [row["threads"] for row in found["threads"]] == counts
    assert [row["streams"] for row in found["streams"]] == counts
    assert found["threads"][0]["rounds"] == found["streams"][0]["rounds"], "the same, run once"
    for row in found["threads"] + found["streams"]:
        assert len(row["rounds"]) == 3
        assert row["per_second"] == pytest.approx(float(np.median(row["rounds"])), abs=1e-3)
        assert row["per_second"] > 0


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="this onnxruntime does not list Azure",
)
def test_a_provider_that_takes_nothing_is_found_before_the_race(models, monkeypatch):
    raw = {"name": "here", "description": "this machine", "device": {"arch": platform.machine()}}
    azure = parse_target({**raw, "runtime": {"provider": "AzureExecutionProvider"}})

    def no_race(*words, **more):
        raise AssertionError("times of the CPU are not those of Azure")

    monkeypatch.setattr(race, "run_launch", no_race)
    report = race.compare(models[4], models[4], FEEDS, azure, Settled(), quietly)
    assert report["placement"]["provider_share"] == 0
    found = decide_release(Settled(), {}, report, more=target_demands(report))
    assert found["verdict"] == "FAIL"
    failed = [c for c in found["checks"] if c["verdict"] == "FAIL"]
    assert [c["name"] for c in failed] == ["min_provider_share"]
    assert "MatMul on CPUExecutionProvider" in failed[0]["reason"]
    reasons = {c["name"]: c["reason"] for c in found["checks"]}
    for name in ("latency", "memory", "cold_start"):
        assert reasons[name].startswith("not measured: too little of the model runs on Azure")
