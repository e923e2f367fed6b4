"""The checks of time: the ratio to the original, and the limit in milliseconds."""

from edgewright.gate.check import (
    FAIL,
    INCONCLUSIVE,
    PASS,
    Check,
    above_zero,
    check,
    missing,
    no_number,
    noisy,
    part,
)
from edgewright.stage import Report

LATENCY_MARGIN = 0.02  # equal models differ by up to 1 % between launches, so 2 % is no slowdown


def latency_ratio(limit: float, measure: Report) -> Check:
    """Candidate / original; the bounds must be clear of limit + 2 %.

    The margin: equal models differ by up to 1 % between launches of their processes.
    """
    name = "max_latency_ratio"
    if (nothing := missing(name, limit, measure, "latency")) is not None:
        return nothing
    latency = part(measure, "latency")
    numbers = [above_zero(latency.get(key)) for key in ("ratio_low", "ratio", "ratio_high")]
    low, value, high = numbers
    if value is None:
        return no_number(name, limit, "the ratio", latency.get("ratio"))
    if low is None or high is None:
        reason = f"too few pairs ({latency.get('pairs', '?')}) for bounds"
        return check(name, limit, INCONCLUSIVE, reason, value, low, high)
    if unsteady := measure.get("unsteady"):
        return check(name, limit, INCONCLUSIVE, str(unsteady), value, low, high)
    border = limit * (1 + LATENCY_MARGIN)
    clock = "CPU time" if latency.get("primary") == "cpu" else "wall time"
    found = f"{clock} {value:.3f} of the original, {low:.3f} to {high:.3f}"
    if not low <= value <= high:
        reason = f"the bounds do not enclose the ratio: {found}"
        return check(name, limit, INCONCLUSIVE, reason, value, low, high)
    if high <= border:
        return check(name, limit, PASS, found, value, low, high)
    if low > border:
        return check(name, limit, FAIL, f"slower than allowed: {found}", value, low, high)
    reason = f"{found}: the limit of {limit:g} + 2 % is in between; the machine is too noisy"
    return check(name, limit, INCONCLUSIVE, reason, value, low, high)


def latency_ms(limit: float, measure: Report) -> Check:
    """p90 of single calls in ms, with its bounds; only where the machine is quiet."""
    name = "max_latency_ms"
    if (nothing := missing(name, limit, measure, "latency")) is not None:
        return nothing
    times = part(part(measure, "latency"), "candidate")
    value = above_zero(times.get("p90_ms"))
    low, high = above_zero(times.get("p90_low_ms")), above_zero(times.get("p90_high_ms"))
    if value is None:
        return no_number(name, limit, "p90", times.get("p90_reason") or times.get("p90_ms"))
    found = f"p90 {value:.3g} ms"
    if (reason := measure.get("unsteady") or noisy(measure)) is not None:
        return check(name, limit, INCONCLUSIVE, f"{found}; {reason}", value, low, high)
    if low is None or high is None:
        return check(name, limit, INCONCLUSIVE, f"{found} has no bounds", value, low, high)
    found += f", {low:.3g} to {high:.3g}"
    if high <= limit:
        return check(name, limit, PASS, found, value, low, high)
    if low > limit:
        return check(name, limit, FAIL, found, value, low, high)
    return check(name, limit, INCONCLUSIVE, f"{found}: the limit is in between", value, low, high)
