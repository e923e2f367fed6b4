"""The gate of a release: the candidate against an earlier release, by tolerances.

What a recipe says of ratios to the original was agreed with the original in mind and is judged
there. Against a release everything that was measured is held to the tolerances of recipe and
profile, and what is absolute (bytes, milliseconds) to its limits. `decision` has the rule.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

from edgewright import decision
from edgewright.decision import ALPHA, FAMILY, Settled
from edgewright.gate.check import (
    FAIL,
    INCONCLUSIVE,
    NOT_JUDGED,
    PASS,
    Check,
    above_zero,
    check,
    finite,
    missing,
    no_number,
    part,
)
from edgewright.gate.instructions import ratio
from edgewright.gate.verdict import sealed
from edgewright.stage import Report

METRIC_TAIL = 0.025  # of the bound that shows no loss: what trials of non-inferiority use
METRIC_RUNS = 20  # of the model: where the recipe tells no samples, fewer show nothing at all
AGREEMENT_SAMPLES = 20  # fewer show nothing of a share of 95 %
EQUAL_DB = 200.0  # what `validate` calls equal outputs


def decide_release(
    settled: Settled,
    validate: Report,
    measure: Report,
    *,
    same_file: bool = False,
    more: Sequence[Check] = (),
) -> Report:
    """The gate's report on candidate and release; `more`: checks that need no release."""
    return sealed([*against(settled, validate, measure, same_file=same_file), *more])


def against(
    settled: Settled, validate: Report, measure: Report, *, same_file: bool = False
) -> list[Check]:
    """The checks of what a release owes the one before it.

    same_file: both are one model, byte for byte, so its answers need no evidence.
    """
    return [
        metric(settled.metric, validate, same_file),
        agreement(settled.agreement, validate, same_file),
        latency(settled, measure),
        memory(settled, measure),
        size(settled.size, measure),
        cold_start(settled, measure),
        *instructions(settled, measure),
    ]


def latency(settled: Settled, measure: Report) -> Check:
    """Time of a call, candidate / baseline, with the bounds of the sign test."""
    name, limit = "latency", 1 + settled.latency
    if (nothing := missing(name, limit, measure, name)) is not None:
        return nothing
    report = part(measure, name)
    value, low, high = (finite(report.get(f"ratio{end}")) for end in ("", "_low", "_high"))
    if above_zero(value) is None:
        return no_number(name, limit, "the ratio", report.get("ratio"))
    if unsteady := measure.get("unsteady"):
        return check(name, limit, INCONCLUSIVE, str(unsteady), value, low, high)
    verdict = decision.latency_verdict(report, settled.latency, settled.margin)
    clock = "CPU time" if report.get("primary") == "cpu" else "wall time"
    launches, pairs = report.get("launches", 0), report.get("pairs", 0)
    counts = f"{pairs} pairs in {launches} launch{'es' if launches != 1 else ''}"
    found = f"{clock} {bounded(value, low, high)} of the baseline's ({counts})"
    if verdict == INCONCLUSIVE:
        found += ": too little evidence on this machine in the time given"
    return check(name, limit, verdict, found, value, low, high)


def cold_start(settled: Settled, measure: Report) -> Check:
    """Time to create the session and run it once, candidate / baseline."""
    name = "cold_start"
    report = part(measure, name)
    limit = 1 + decision.cold_start_tolerance(report, settled.cold_start)
    if (nothing := missing(name, limit, measure, name)) is not None:
        return nothing
    value, low, high = (finite(report.get(key)) for key in ("ratio", "low", "high"))
    if above_zero(value) is None:
        return no_number(name, limit, "the ratio", report.get("ratio"))
    if unsteady := measure.get("unsteady"):
        return check(name, limit, INCONCLUSIVE, str(unsteady), value, low, high)
    verdict = decision.cold_start_verdict(report, settled.cold_start, settled.margin)
    found = f"{bounded(value, low, high)} of the baseline's ({report.get('pairs', 0)} pairs)"
    if verdict == INCONCLUSIVE:
        found += ": too little evidence on this machine in the time given"
    return check(name, limit, verdict, found, value, low, high)


def instructions(settled: Settled, measure: Report) -> list[Check]:
    """Instructions of one inference, candidate / baseline: exact; only where they are counted."""
    if not measure.get("countable"):
        return []
    limit = 1 + settled.instructions
    return [ratio("instructions", limit, limit, measure)]


def memory(settled: Settled, measure: Report) -> Check:
    """Peak resident memory, candidate / baseline."""
    name, report = "memory", part(measure, "memory")
    limit = decision.memory_limit(report, settled.memory)
    if (nothing := missing(name, limit, measure, name)) is not None:
        return nothing
    value = above_zero(report.get("ratio"))
    if value is None:
        return no_number(name, limit, "the ratio", report.get("reason", report.get("ratio")))
    verdict = decision.memory_verdict(report, settled.memory)
    return check(name, limit, verdict, f"{value:.3f} of the baseline's peak", value)


def size(tolerance: float, measure: Report) -> Check:
    """Bytes of the file, candidate / baseline; known exactly."""
    name, limit = "size", 1 + tolerance
    value = above_zero(part(measure, name).get("ratio"))
    if value is None:
        return no_number(name, limit, "the size", part(measure, name).get("ratio"))
    verdict: decision.Decision = PASS if value <= limit else FAIL
    return check(name, limit, verdict, f"{value:.3f} of the baseline's", value)


def metric(tolerance: float, validate: Report, same_file: bool) -> Check:
    """The share of the baseline's metric that is lost, at most the tolerance: non-inferiority."""
    name, limit = "metric", 1 - tolerance
    report = part(validate, name)
    if same_file:
        return check(name, limit, PASS, "the same file, byte for byte", 1.0)
    if not report:
        return check(name, limit, NOT_JUDGED, not_run(validate) or "the recipe names no metric")
    score, base = (
        finite(part(report, "shipped").get("score")),
        finite(part(report, "original").get("score")),
    )
    kept = finite(part(report, "shipped").get("retained"))
    if score is None or base is None or kept is None:
        return no_number(
            name,
            limit,
            "both scores",
            [part(report, k).get("score") for k in ("original", "shipped")],
        )
    raw = part(report, "raw")
    before, after = raw.get("original"), raw.get("shipped")
    if not before or not after:
        runs = report.get("runs", 0)
        reason = f"{kept:.2%} kept in {runs} runs; without data.per_sample nothing tells how sure "
        reason += "that is"
        if kept >= limit and runs >= METRIC_RUNS:
            return check(name, limit, PASS, reason, kept)
        return check(name, limit, INCONCLUSIVE, reason, kept)
    rises = report.get("higher_is_better", True)
    loss = [(a - b) * (1 if rises else -1) for a, b in zip(before, after, strict=True)]
    mean, low, high = mean_loss(loss, scale(before, after))
    level = abs(sum(before) / len(before)) or abs(base)
    allowed = level * tolerance
    if level == 0:
        return no_number(name, limit, "the baseline's metric", base)
    shares = [1 - x / level for x in (mean, high, low)]
    found = f"{bounded(*shares)} of the baseline's, {len(loss)} samples in pairs"
    if low > 0 and mean > allowed / 2:
        verdict: decision.Decision = FAIL
    elif high <= allowed:
        verdict = PASS
    else:
        verdict = INCONCLUSIVE
        found += f": too few to tell a loss of {tolerance:.1%}"
    return check(name, limit, verdict, found, *shares)


def scale(before: Sequence[float], after: Sequence[float]) -> float:
    """By how much one sample may change at all, as far as the values show: 1 for right or wrong."""
    values = [*before, *after]
    return max(max(values) - min(values), *(abs(v) for v in values))


def mean_loss(loss: Sequence[float], largest: float) -> tuple[float, float, float]:
    """Mean loss per sample with its lower and upper bound.

    Normal bounds with two samples added, half of one worse and half of one better by `largest`:
    the adjusted Wald interval for matched pairs (Agresti and Min 2005, Statistics in Medicine
    24:729). Without them samples that all agree would prove that there is no loss at all.
    """
    n = len(loss) + 2
    mean = sum(loss) / n
    spread = max(0.0, (sum(x * x for x in loss) + largest**2) / n - mean**2)
    error = math.sqrt(spread / n)
    low = mean - NormalDist().inv_cdf(1 - ALPHA / len(FAMILY)) * error
    high = mean + NormalDist().inv_cdf(1 - METRIC_TAIL) * error
    return sum(loss) / len(loss), low, high


def agreement(tolerance: float, validate: Report, same_file: bool) -> Check:
    """The share of the samples for which both choose the same class, or equal outputs."""
    name, limit = "agreement", 1 - tolerance
    report = part(validate, name)
    if same_file:
        return check(name, limit, PASS, "the same file, byte for byte", 1.0)
    if not report:
        reason = not_run(validate) or "no outputs were compared"
        return check(name, limit, NOT_JUDGED if not_run(validate) else INCONCLUSIVE, reason)
    decibels, equal = part(report, "sqnr_db"), part(report, "equal")
    samples, share = report.get("samples", 0), finite(report.get("top1"))
    alike = all(v == EQUAL_DB for v in decibels.values()) and all(v == 1 for v in equal.values())
    if samples and (decibels or equal) and alike:
        return check(name, limit, PASS, f"equal outputs on {samples} samples", 1.0)
    if share is None:
        worst = min(decibels.values(), default=None)
        shown = "" if worst is None else f"; SQNR {worst:.1f} dB"
        return check(name, limit, NOT_JUDGED, f"no output is a choice of a class{shown}")
    found = f"the same first choice for {share:.2%} of {samples} samples"
    same = round(share * samples)
    if share < limit and at_most(same, samples, limit) <= ALPHA / len(FAMILY):
        return check(name, limit, FAIL, found, share)
    if share < limit or samples < AGREEMENT_SAMPLES:
        return check(name, limit, INCONCLUSIVE, f"{found}: too few to tell", share)
    return check(name, limit, PASS, found, share)


def at_most(successes: int, trials: int, chance: float) -> float:
    """P(B <= successes), B ~ Binomial(trials, chance)."""
    return sum(
        math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k)
        for k in range(successes + 1)
    )


def not_run(validate: Report) -> str:
    """Why the models were not compared at all, empty where they were."""
    return str(validate.get("skipped") or "")


def bounded(value: float | None, low: float | None, high: float | None) -> str:
    """A ratio with its bounds, `?` for one that there is not."""
    return f"{value:.3f} ({', '.join('?' if x is None else f'{x:.3f}' for x in (low, high))})"
