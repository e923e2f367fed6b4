"""The gate's decision table: what passes, what fails, what stays open, and why."""

import copy
import itertools
import json
import math

import pytest

from edgewright import gate, measure
from edgewright.bundle import evidence
from edgewright.recipe import GateSettings
from edgewright.target import Budget

NO_BUDGET = Budget()
NO_LIMIT = GateSettings(min_retained=None)
VALIDATE = {
    "metric": {
        "name": "accuracy",
        "higher_is_better": True,
        "original": {"score": 0.9},
        "shipped": {"score": 0.9, "retained": 1.0},
        "stages": {},
        "paired": None,
    },
    "agreement": {"sqnr_db": {"y": 30.0}, "samples": 100, "top1": 0.98},
}
MEASURE = {
    "notes": [],
    "emulated": False,
    "latency": {
        "primary": "cpu",
        "ratio": 0.5,
        "ratio_low": 0.48,
        "ratio_high": 0.52,
        "pairs": 75,
        "candidate": {"p90_ms": 10.0, "p90_low_ms": 9.5, "p90_high_ms": 10.5, "runs": 900},
    },
    "memory": {
        "candidate_peak_bytes": 80 << 20,
        "candidate_load_peak_bytes": 60 << 20,
        "original_peak_bytes": 100 << 20,
        "ratio": 0.8,
    },
    "size": {"candidate_bytes": 3000, "original_bytes": 10000, "ratio": 0.3},
    "placement": {
        "provider": "CPUExecutionProvider",
        "provider_share": 1.0,
        "required_share": 1.0,
        "ok": True,
        "strays": [],
    },
    "noise": {"quiet": True, "reason": None},
}


def changed(report, *changes):
    """A copy of the report with values set: (path, value) with a path such as "memory.ratio"."""
    report = copy.deepcopy(report)
    for path, value in changes:
        *tables, key = path.split(".")
        table = report
        for name in tables:
            table = table[name]
        table[key] = value
    return report


def with_latency(low, value, high):
    keys = ("latency.ratio_low", "latency.ratio", "latency.ratio_high")
    return changed(MEASURE, *zip(keys, (low, value, high), strict=True))


def decide(settings, validate=VALIDATE, measured=MEASURE, budget=NO_BUDGET, explicit=()):
    return gate.decide(settings, budget, validate, measured, explicit=explicit)


def one(report, name):
    """The check of that name, there exactly once."""
    (found,) = [c for c in report["checks"] if c["name"] == name]
    return found


def limits(**settings):
    return GateSettings(**{"min_retained": None, **settings})


def test_a_good_model_passes_every_check():
    settings = GateSettings(
        min_retained=0.99,
        max_latency_ratio=1.0,
        max_size_ratio=0.5,
        max_memory_ratio=1.0,
        max_size_bytes=5000,
        max_peak_memory_bytes=100 << 20,
        max_latency_ms=20.0,
        min_agreement=0.9,
    )
    report = decide(settings)
    assert {c["verdict"] for c in report["checks"]} == {"PASS"}
    assert report["verdict"] == "PASS"
    assert report["notes"] == []
    assert len(report["checks"]) == 10
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("min_retained", {"min_retained": 1.01}),
        ("max_latency_ratio", {"max_latency_ratio": 0.4}),
        ("max_size_ratio", {"max_size_ratio": 0.2}),
        ("max_memory_ratio", {"max_memory_ratio": 0.5}),
        ("max_size_bytes", {"max_size_bytes": 2999}),
        ("max_peak_memory_bytes", {"max_peak_memory_bytes": 70 << 20}),
        ("max_latency_ms", {"max_latency_ms": 9.0}),
        ("min_agreement", {"min_agreement": 0.99}),
    ],
)
def test_every_comparator_can_fail(name, settings):
    report = decide(limits(**settings))
    assert one(report, name)["verdict"] == "FAIL"
    assert report["verdict"] == "FAIL"


@pytest.mark.parametrize(
    ("low", "value", "high", "verdict"),
    [
        (0.40, 0.50, 0.60, "PASS"),
        (0.99, 1.00, 1.02, "PASS"),  # the margin: equal models
        (0.99, 1.00, 1.03, "INCONCLUSIVE"),
        (0.90, 1.10, 1.30, "INCONCLUSIVE"),
        (1.02, 1.05, 1.08, "INCONCLUSIVE"),  # the lower bound is on the border
        (1.03, 1.05, 1.08, "FAIL"),
        (2.00, 2.10, 2.20, "FAIL"),
        (None, 0.50, None, "INCONCLUSIVE"),  # too few pairs
        (0.60, 0.50, 0.70, "INCONCLUSIVE"),  # bounds that do not enclose the ratio
    ],
)
def test_latency_ratio(low, value, high, verdict):
    report = decide(limits(max_latency_ratio=1.0), measured=with_latency(low, value, high))
    assert one(report, "max_latency_ratio")["verdict"] == verdict
    assert report["verdict"] == verdict


def test_measuring_and_judging_use_one_margin():
    assert measure.MARGIN == gate.LATENCY_MARGIN


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0, 0.0, -1.0, None, "fast", True])
@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"max_latency_ratio": 1e9}, "latency.ratio"),
        ({"max_latency_ratio": 1e9}, "latency.ratio_low"),
        ({"max_latency_ratio": 1e9}, "latency.ratio_high"),
        ({"max_memory_ratio": 1e9}, "memory.ratio"),
        ({"max_memory_ratio": 1e9}, "memory.original_peak_bytes"),
        ({"max_peak_memory_bytes": 1 << 60}, "memory.candidate_peak_bytes"),
        ({"max_size_ratio": 1e9}, "size.ratio"),
        ({"max_size_bytes": 1 << 60}, "size.candidate_bytes"),
        ({"max_latency_ms": 1e9}, "latency.candidate.p90_ms"),
        ({"max_latency_ms": 1e9}, "latency.candidate.p90_high_ms"),
    ],
)
def test_impossible_numbers_decide_nothing(settings, path, bad):
    report = decide(limits(**settings), measured=changed(MEASURE, (path, bad)))
    check = one(report, next(iter(settings)))
    assert check["verdict"] == "INCONCLUSIVE"
    assert check["reason"]
    assert report["verdict"] == "INCONCLUSIVE"
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("missing", ["latency", "memory", "size"])
def test_parts_that_are_missing_decide_nothing(missing):
    settings = limits(max_latency_ratio=1.0, max_memory_ratio=1.0, max_size_ratio=1.0)
    without = {k: v for k, v in MEASURE.items() if k != missing}
    report = decide(settings, measured=without)
    assert one(report, f"max_{missing}_ratio")["verdict"] == "INCONCLUSIVE"
    assert report["verdict"] == "INCONCLUSIVE"


EMULATED = changed(
    MEASURE,
    ("emulated", True),
    ("latency", None),
    ("latency_reason", "emulated time is not latency"),
    ("memory", None),
    ("noise", None),
)


def test_emulation_judges_no_time_and_no_memory_but_everything_else():
    settings = GateSettings(
        max_latency_ratio=1.0, max_memory_ratio=1.0, max_latency_ms=5, max_peak_memory_bytes=1
    )
    report = decide(settings, measured=EMULATED)
    for name in (
        "max_latency_ratio",
        "max_memory_ratio",
        "max_latency_ms",
        "max_peak_memory_bytes",
    ):
        assert one(report, name)["verdict"] == "NOT JUDGED"
        assert "cannot be judged under emulation" in one(report, name)["reason"]
    assert report["verdict"] == "PASS"
    assert len(report["notes"]) == 4, "what was not judged is said loudly"
    report = decide(limits(max_latency_ratio=1.0, max_size_ratio=0.2), measured=EMULATED)
    assert report["verdict"] == "FAIL"


def test_nothing_judged_is_no_pass():
    assert decide(NO_LIMIT)["verdict"] == "INCONCLUSIVE"
    assert decide(limits(max_latency_ratio=1.0), measured=EMULATED)["verdict"] == "INCONCLUSIVE"
    empty = decide(GateSettings(), validate={}, measured={})
    assert empty["verdict"] == "INCONCLUSIVE"
    assert any("no threshold could be judged" in n["text"] for n in empty["notes"])


def metric(retained, score=0.8, original=0.9, higher=True, **paired):
    return changed(
        VALIDATE,
        ("metric.higher_is_better", higher),
        ("metric.original", {"score": original}),
        ("metric.shipped", {"score": score, "retained": retained}),
        ("metric.paired", {"samples": 50, **paired} if paired else None),
    )


@pytest.mark.parametrize(
    ("validate", "verdict"),
    [
        (metric(0.99), "PASS"),
        (metric(1.20, score=1.1), "PASS"),
        (metric(0.98), "FAIL"),  # nothing speaks for chance
        # allowed loss: 0.9 * 0.01 = 0.009
        (metric(0.98, sign_test_p=0.30, mean_loss_low=-0.01), "INCONCLUSIVE"),
        (metric(0.98, sign_test_p=0.05, mean_loss_low=0.009), "INCONCLUSIVE"),
        (metric(0.98, sign_test_p=0.04, mean_loss_low=-0.01), "FAIL"),
        (metric(0.98, sign_test_p=0.30, mean_loss_low=0.010), "FAIL"),
        (metric(0.98, sign_test_p=math.nan, mean_loss_low=0.0), "FAIL"),
        (metric(0.0, score=0.0), "FAIL"),  # a destroyed model is a finding, not a riddle
        (metric(-0.5, score=-0.4), "FAIL"),
        (metric(math.nan, score=math.nan), "INCONCLUSIVE"),
        (metric(1.0, score=0.0, original=0.0), "INCONCLUSIVE"),
        (metric(2.0, score=-0.4, original=-0.2), "INCONCLUSIVE"),
        (metric(1.0, original=math.nan), "INCONCLUSIVE"),
        # an error of 2.0 may rise to 2.0 / 0.99: allowed loss 0.0202
        (metric(0.97, 2.06, 2.0, False, sign_test_p=0.3, mean_loss_low=0.02), "INCONCLUSIVE"),
        (metric(0.97, 2.06, 2.0, False, sign_test_p=0.3, mean_loss_low=0.03), "FAIL"),
    ],
)
def test_retained(validate, verdict):
    report = decide(GateSettings(min_retained=0.99), validate=validate)
    check = one(report, "min_retained")
    assert check["verdict"] == verdict, check["reason"]
    assert report["verdict"] == verdict


def test_a_missing_metric_is_open_only_where_the_recipe_asks_for_it():
    without = changed(VALIDATE, ("metric", None))
    settings = GateSettings(max_size_ratio=0.5)
    report = decide(settings, validate=without)
    assert one(report, "min_retained")["verdict"] == "NOT JUDGED"
    assert report["verdict"] == "PASS"
    assert "names no metric" in report["notes"][0]["text"]
    report = decide(settings, validate=without, explicit=("min_retained",))
    assert one(report, "min_retained")["verdict"] == "INCONCLUSIVE"
    assert report["verdict"] == "INCONCLUSIVE"


def test_agreement_without_classes_is_open():
    report = decide(limits(min_agreement=0.9), validate=changed(VALIDATE, ("agreement.top1", None)))
    assert one(report, "min_agreement")["verdict"] == "INCONCLUSIVE"


@pytest.mark.parametrize("settings", [{"max_latency_ms": 20}, {"max_peak_memory_bytes": 1 << 30}])
@pytest.mark.parametrize("noise", [{"quiet": False, "reason": "busy"}, {}, None])
def test_absolute_limits_bind_only_on_a_quiet_machine(settings, noise):
    report = decide(limits(**settings), measured=changed(MEASURE, ("noise", noise)))
    check = one(report, next(iter(settings)))
    assert check["verdict"] == "INCONCLUSIVE"
    assert "not quiet" in check["reason"]


@pytest.mark.parametrize(
    ("limit", "verdict"),
    [(10.5, "PASS"), (10.0, "INCONCLUSIVE"), (9.5, "INCONCLUSIVE"), (9, "FAIL")],
)
def test_latency_in_ms_needs_its_bounds_clear_of_the_limit(limit, verdict):
    assert decide(limits(max_latency_ms=limit))["verdict"] == verdict


def test_peak_memory_counts_loading_too():
    loading = changed(MEASURE, ("memory.candidate_load_peak_bytes", 90 << 20))
    report = decide(limits(max_peak_memory_bytes=85 << 20), measured=loading)
    assert one(report, "max_peak_memory_bytes")["verdict"] == "FAIL"
    assert "loading" in one(report, "max_peak_memory_bytes")["reason"]


@pytest.mark.parametrize(("ratio", "verdict"), [(1.0099, "PASS"), (1.0101, "FAIL")])
def test_memory_ratio_has_a_margin(ratio, verdict):
    report = decide(
        limits(max_memory_ratio=1.0), measured=changed(MEASURE, ("memory.ratio", ratio))
    )
    assert report["verdict"] == verdict


def test_the_tighter_of_recipe_and_budget_holds():
    for recipe, budget in itertools.permutations((2999, 4000)):
        report = decide(limits(max_size_bytes=recipe), budget=Budget(max_size_bytes=budget))
        assert one(report, "max_size_bytes")["limit"] == 2999
        assert report["verdict"] == "FAIL"
    assert decide(NO_LIMIT, budget=Budget(max_size_bytes=3000))["verdict"] == "PASS"


def test_a_node_on_another_provider_fails_by_name():
    stray = {"name": "resize_3", "op": "Resize", "provider": "CPUExecutionProvider"}
    placement = {
        "provider": "CUDAExecutionProvider",
        "provider_share": 0.9,
        "required_share": 1.0,
        "ok": False,
        "strays": [stray],
    }
    report = decide(GateSettings(), measured=changed(MEASURE, ("placement", placement)))
    check = one(report, "min_provider_share")
    assert check["verdict"] == "FAIL"
    assert "resize_3 (Resize on CPUExecutionProvider)" in check["reason"]
    assert report["verdict"] == "FAIL"


def test_an_unknown_placement_is_open():
    for placement in ({"provider_share": math.nan, "ok": True}, {"provider_share": 1.0}, None):
        report = decide(GateSettings(), measured=changed(MEASURE, ("placement", placement)))
        assert report["verdict"] == "INCONCLUSIVE"


def test_a_candidate_that_does_not_run_fails_with_the_cause():
    failed = changed(
        MEASURE,
        ("failed", "died of SIGILL"),
        ("latency", None),
        ("memory", None),
        ("placement", None),
    )
    report = decide(GateSettings(max_latency_ratio=1.0), measured=failed)
    assert one(report, "runs")["verdict"] == "FAIL"
    assert "SIGILL" in one(report, "runs")["reason"]
    assert one(report, "max_latency_ratio")["verdict"] == "NOT JUDGED"
    assert report["verdict"] == "FAIL"


def test_the_public_part_holds_no_times():
    settings = GateSettings(
        max_latency_ratio=1.0, max_size_ratio=0.5, max_latency_ms=20.0, max_memory_ratio=1.0
    )
    one_day = decide(settings)
    other_day = decide(settings, measured=with_latency(0.45, 0.47, 0.49))
    assert one_day != other_day
    assert evidence.public(one_day) == evidence.public(other_day)
    values = {c["name"]: c.get("value") for c in evidence.public(one_day)["checks"]}
    assert values == {
        "min_retained": 1.0,
        "max_latency_ratio": None,
        "max_size_ratio": 0.3,
        "max_memory_ratio": None,
        "max_latency_ms": None,
        "runs": None,
        "min_provider_share": 1.0,
    }
