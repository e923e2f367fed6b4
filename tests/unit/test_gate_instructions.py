"""The gate on instruction counts: exact numbers decide, missing ones do not."""

import pytest

from edgewright import gate
from edgewright.decision import Settled
from edgewright.gate.release import decide_release
from edgewright.recipe import GateSettings
from edgewright.target import Budget

VALIDATE = {"metric": {"original": {"score": 0.9}, "shipped": {"score": 0.9, "retained": 1.0}}}


def measure(ratio=0.5, promised="dot", layers=3, dot=1000, i8mm=0, mlal=10, **more):
    """What measuring an emulated target reports, as far as the gate reads it."""
    kernels = {
        "promised": promised,
        "layers": layers,
        "executed": {"dot": dot, "i8mm": i8mm, "mlal": mlal},
    }
    counts = {
        "candidate": {"total": 1000 * ratio},
        "original": {"total": 1000},
        "ratio": ratio,
        "kernels": kernels,
    }
    placement = {"provider_share": 1.0, "required_share": 1.0, "ok": True, "provider": "CPU"}
    report = {"emulated": True, "countable": True, "instructions": counts}
    return {**report, "placement": placement, **more}


NO_BUDGET = Budget()


def judge(report, budget=NO_BUDGET, **limits):
    found = gate.decide(GateSettings(**limits), budget, VALIDATE, report)
    return found["verdict"], {c["name"]: c for c in found["checks"]}


@pytest.mark.parametrize(
    ("ratio", "limit", "verdict"),
    [
        (0.5, 0.6, "PASS"),
        (1.0, 1.0, "PASS"),
        (1.0049, 1.0, "PASS"),
        (1.0051, 1.0, "FAIL"),
        (float("nan"), 1.0, "INCONCLUSIVE"),
        (0.0, 1.0, "INCONCLUSIVE"),
    ],
)
def test_ratio_with_half_a_percent(ratio, limit, verdict):
    overall, checks = judge(measure(ratio), max_instruction_ratio=limit)
    assert checks["max_instruction_ratio"]["verdict"] == overall == verdict


def test_number_of_the_recipe_and_of_the_profile():
    assert judge(measure(0.5), max_instructions=500)[0] == "PASS"
    overall, checks = judge(measure(0.5), Budget(max_instructions=499), max_instructions=500)
    assert overall == "FAIL" and checks["max_instructions"]["limit"] == 499
    assert "500 instructions" in checks["max_instructions"]["reason"]


@pytest.mark.parametrize(
    ("facts", "verdict", "words"),
    [
        ({}, "PASS", "1,000 dot-product"),
        ({"dot": 0}, "FAIL", "the profile promises dot-product ones"),
        ({"promised": "i8mm"}, "FAIL", "the profile promises 8-bit matrix ones"),
        ({"promised": "i8mm", "i8mm": 5}, "PASS", "5 8-bit matrix"),
        ({"promised": None, "dot": 0}, "PASS", "10 widening multiply"),
        ({"promised": None}, "FAIL", "the profile's isa has no dot-product ones"),
    ],
)
def test_int8_layers_use_what_the_profile_promises(facts, verdict, words):
    overall, checks = judge(measure(**facts))
    assert checks["int8_instructions"]["verdict"] == overall == verdict
    assert words in checks["int8_instructions"]["reason"]


def test_a_model_without_int8_layers_owes_nothing():
    assert "int8_instructions" not in judge(measure(layers=0, dot=0))[1]


def test_kept_promises_alone_prove_no_quality():
    report = gate.decide(GateSettings(min_retained=None), Budget(), {}, measure())
    assert report["verdict"] == "INCONCLUSIVE"


def test_counts_that_are_missing_decide_nothing():
    nothing = {"instructions": None, "instructions_reason": "this QEMU takes no plug-in"}
    overall, checks = judge(measure(**nothing), max_instruction_ratio=1.0, max_instructions=5)
    assert overall == "INCONCLUSIVE"
    assert "takes no plug-in" in checks["max_instruction_ratio"]["reason"]
    assert "int8_instructions" not in checks


def test_where_time_is_measured_instructions_are_not_judged():
    reason = "they are counted under emulation only"
    report = measure(instructions=None, instructions_reason=reason, countable=False)
    overall, checks = judge(report, max_instruction_ratio=1.0)
    assert overall == "PASS"
    assert checks["max_instruction_ratio"]["verdict"] == "NOT JUDGED"


@pytest.mark.parametrize(("ratio", "verdict"), [(1.005, "PASS"), (1.0051, "FAIL")])
def test_a_release_is_held_to_the_last_one(ratio, verdict):
    report = decide_release(Settled(), {}, measure(ratio), same_file=True)
    found = {c["name"]: c for c in report["checks"]}
    assert found["instructions"]["verdict"] == verdict
    assert found["latency"]["verdict"] == "NOT JUDGED"
    names = [c["name"] for c in decide_release(Settled(), {}, {"emulated": False})["checks"]]
    assert "instructions" not in names
