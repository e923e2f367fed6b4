"""The checks of a release: every one can fail, and what proves nothing stays open."""

import json
import math

import numpy as np
import pytest

from edgewright.decision import FAIL, INCONCLUSIVE, PASS, Settled
from edgewright.gate import release
from edgewright.gate.check import NOT_JUDGED

GOOD = {
    "latency": {
        "primary": "cpu",
        "ratio": 1.0,
        "ratio_low": 0.99,
        "ratio_high": 1.01,
        "launches": 2,
        "pairs": 60,
    },
    "cold_start": {"ratio": 1.0, "low": 0.98, "high": 1.02, "pairs": 24, "original_s": 0.2},
    "memory": {"ratio": 1.0, "original_peak_bytes": 100 << 20},
    "size": {"ratio": 1.0},
}


def answers(before, after, top1=1.0, samples=100, decibels=40.0, rises=True):
    """A report of validate on per-sample values."""
    score, base = float(np.mean(after)), float(np.mean(before))
    return {
        "metric": {
            "higher_is_better": rises,
            "original": {"score": base},
            "shipped": {"score": score, "retained": score / base if rises else base / score},
            "raw": {"original": list(before), "shipped": list(after)},
        },
        "agreement": {
            "sqnr_db": {"y": decibels},
            "equal": {},
            "samples": samples,
            "top1": top1,
        },
    }


def wrong(count, samples):
    """Per-sample accuracy with the first `count` samples wrong."""
    return [0.0] * count + [1.0] * (samples - count)


RIGHT = answers(wrong(0, 400), wrong(0, 400))


def judged(validate=RIGHT, measure=GOOD, **more):
    report = release.decide_release(Settled(), validate, measure, **more)
    json.dumps(report, allow_nan=False)
    return report


def verdict_of(report, name):
    (found,) = [c for c in report["checks"] if c["name"] == name]
    return found["verdict"]


def test_an_equal_release_passes():
    report = judged()
    assert {c["verdict"] for c in report["checks"]} == {PASS}
    assert report["verdict"] == PASS


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("latency", {"ratio": 1.06, "ratio_low": 1.03, "ratio_high": 1.09}),
        ("cold_start", {"ratio": 1.2, "low": 1.1, "high": 1.3}),
        ("memory", {"ratio": 1.02}),
        ("size", {"ratio": 1.06}),
    ],
)
def test_every_measured_comparator_can_fail(name, part):
    report = judged(measure={**GOOD, name: {**GOOD[name], **part}})
    assert verdict_of(report, name) == report["verdict"] == FAIL
    assert [c["name"] for c in report["checks"] if c["verdict"] == FAIL] == [name]


@pytest.mark.parametrize("name", ["latency", "cold_start", "memory", "size"])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, 0.0, -1.0, "1.0", True])
def test_numbers_that_cannot_be_decide_nothing(name, bad):
    report = judged(measure={**GOOD, name: {**GOOD[name], "ratio": bad}})
    assert verdict_of(report, name) == report["verdict"] == INCONCLUSIVE


@pytest.mark.parametrize("name", ["latency", "cold_start", "memory"])
def test_a_part_that_is_missing_decides_nothing(name):
    report = judged(measure={k: v for k, v in GOOD.items() if k != name})
    assert verdict_of(report, name) == report["verdict"] == INCONCLUSIVE


def test_mean_loss_by_hand():
    # 98 samples of which 2 are lost, two pseudo-samples of +-1: n = 100, mean 0.02,
    # variance (2 + 1) / 100 - 0.02^2 = 0.0296, standard error 0.0172.
    mean, low, high = release.mean_loss([1.0] * 2 + [0.0] * 96, 1.0)
    error = math.sqrt(0.0296 / 100)
    assert mean == pytest.approx(2 / 98)
    assert high == pytest.approx(0.02 + 1.959964 * error, rel=1e-6)
    assert low == pytest.approx(0.02 - 2.807034 * error, rel=1e-6)  # 0.01 / 4 on that side


@pytest.mark.parametrize(
    ("lost", "samples", "verdict"),
    [
        (0, 5, INCONCLUSIVE),  # five samples show nothing, even if all agree
        (0, 400, PASS),
        (4, 400, INCONCLUSIVE),
        (40, 400, FAIL),
    ],
)
def test_the_metric_is_held_by_pairs_of_samples(lost, samples, verdict):
    report = judged(answers(wrong(0, samples), wrong(lost, samples)))
    assert verdict_of(report, "metric") == report["verdict"] == verdict


@pytest.mark.parametrize(
    ("kept", "runs", "verdict"),
    [(1.0, 5, INCONCLUSIVE), (1.0, 20, PASS), (0.991, 400, PASS), (0.98, 400, INCONCLUSIVE)],
)
def test_a_metric_without_samples_shows_little(kept, runs, verdict):
    validate = answers(wrong(0, 400), wrong(0, 400))
    shipped = {"score": kept, "retained": kept}
    validate["metric"] = {"original": {"score": 1.0}, "shipped": shipped, "runs": runs}
    report = judged(validate)
    assert verdict_of(report, "metric") == report["verdict"] == verdict
    assert f"in {runs} runs; without data.per_sample" in report["checks"][0]["reason"]


def test_an_error_that_rises_is_a_loss():
    rng = np.random.default_rng(0)
    before = rng.uniform(0.9, 1.1, 400)
    worse, better = before * 1.1, before * 0.9
    assert verdict_of(judged(answers(before, worse, rises=False)), "metric") == FAIL
    assert verdict_of(judged(answers(before, better, rises=False)), "metric") == PASS


def test_the_bounds_of_a_loss_cover_it():
    rng = np.random.default_rng(1)
    outside = 0
    for _ in range(400):
        loss = rng.choice([1.0, 0.0, -1.0], size=200, p=[0.03, 0.96, 0.01])
        _, low, high = release.mean_loss(list(loss), 1.0)
        outside += not low <= 0.02 <= high
    assert outside <= 20  # 2.75 % are allowed: 11 expected, 20 is 2.7 standard deviations above


@pytest.mark.parametrize(
    ("top1", "samples", "decibels", "verdict"),
    [
        (0.97, 64, 40.0, PASS),
        (0.97, 8, 40.0, INCONCLUSIVE),
        (1.0, 3, 200.0, PASS),  # equal outputs
        (0.92, 64, 40.0, INCONCLUSIVE),
        (0.5, 64, 40.0, FAIL),
        (None, 64, 40.0, NOT_JUDGED),
    ],
)
def test_agreement(top1, samples, decibels, verdict):
    validate = {**RIGHT, "agreement": {**RIGHT["agreement"], "sqnr_db": {"y": decibels}}}
    validate["agreement"] |= {"top1": top1, "samples": samples}
    assert verdict_of(judged(validate), "agreement") == verdict


def test_one_file_needs_no_evidence_of_its_answers():
    report = judged({"skipped": "the same file"}, same_file=True)
    assert verdict_of(report, "metric") == verdict_of(report, "agreement") == PASS


def test_a_race_that_failed_leaves_the_answers_unjudged():
    slow = {**GOOD["latency"], "ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1}
    report = judged({"skipped": "the race had decided before"}, {**GOOD, "latency": slow})
    assert report["verdict"] == FAIL
    assert verdict_of(report, "metric") == verdict_of(report, "agreement") == NOT_JUDGED


def test_emulated_time_is_not_judged():
    measure = {"emulated": True, "latency": None, "memory": None, "size": GOOD["size"]}
    report = judged(measure=measure)
    verdicts = [verdict_of(report, name) for name in ("latency", "cold_start", "memory")]
    assert verdicts == [NOT_JUDGED] * 3
    (memory,) = [c for c in report["checks"] if c["name"] == "memory"]
    assert memory["limit"] == pytest.approx(1.01), "no peak, so no slack in bytes"
    assert report["verdict"] == PASS
