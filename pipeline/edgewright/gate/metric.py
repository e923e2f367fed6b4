"""The checks of quality: the share of the metric that is left, agreement with the original."""

from edgewright.gate.check import (
    FAIL,
    INCONCLUSIVE,
    NOT_JUDGED,
    PASS,
    Check,
    Verdict,
    above_zero,
    check,
    finite,
    no_number,
    part,
)
from edgewright.stage import Report

SIGNIFICANCE = 0.05


def retained(limit: float, validate: Report, explicit: bool) -> Check:
    """Share of the original's metric that is left, with the paired test where it falls short.

    Below the limit it is a FAIL, unless the samples do not show it: the sign test finds no
    difference and the lower bound of the mean loss is within what the limit allows.
    """
    name, metric = "min_retained", part(validate, "metric")
    if not metric:
        if not explicit:
            return check(name, limit, NOT_JUDGED, "the recipe names no metric")
        reason = "the recipe sets min_retained but no metric was computed"
        return check(name, limit, INCONCLUSIVE, reason)
    original = part(metric, "original").get("score")
    shipped = part(metric, "shipped")
    value = finite(shipped.get("retained"))
    base = above_zero(original)
    if base is None:
        return no_number(name, limit, "the original's score", original)
    if value is None or finite(shipped.get("score")) is None:
        found = shipped.get("score"), shipped.get("retained")
        return no_number(name, limit, "the shipped model's score and share", found)
    if value >= limit:
        if value <= 0:
            return no_number(name, limit, "the share kept", value)
        reason = f"{value:.2%} of {metric.get('name', 'the metric')} kept"
        return check(name, limit, PASS, reason, value)
    reason = f"only {value:.2%} kept"
    paired = part(metric, "paired")
    p, low = finite(paired.get("sign_test_p")), finite(paired.get("mean_loss_low"))
    if p is None or low is None:
        return check(name, limit, FAIL, reason, value)
    rises = metric.get("higher_is_better", True)
    if not rises and limit <= 0:
        return check(name, limit, FAIL, reason, value)
    allowed = base * (1 - limit) if rises else base * (1 / limit - 1)
    if p >= SIGNIFICANCE and low <= allowed:
        reason += (
            f", but {paired.get('samples', '?')} samples do not prove a loss (sign test "
            f"p = {p:.2f}, loss at least {low:.4g}, allowed {allowed:.4g}); use more samples"
        )
        return check(name, limit, INCONCLUSIVE, reason, value)
    reason += f"; paired samples confirm it (sign test p = {p:.2g}, loss at least {low:.4g})"
    return check(name, limit, FAIL, reason, value)


def agreement(limit: float, validate: Report) -> Check:
    """Share of the samples on which both models choose the same class."""
    name = "min_agreement"
    value = part(validate, "agreement").get("top1")
    if value is None:
        return check(name, limit, INCONCLUSIVE, "no output of the model is a choice of a class")
    number = finite(value)
    if number is None or not 0 <= number <= 1:
        return no_number(name, limit, "agreement", value)
    verdict: Verdict = PASS if number >= limit and number > 0 else FAIL
    return check(name, limit, verdict, f"the same first choice for {number:.2%}", number)
