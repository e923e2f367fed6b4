"""One line of the gate's report, and what every family of checks shares.

A check is PASS or FAIL only where the evidence decides it. A number that is missing, not finite
or not above zero decides nothing.
"""

import math
from typing import Any, Final, Literal

from edgewright.decision import FAIL, INCONCLUSIVE, PASS
from edgewright.stage import Report

NOT_JUDGED: Final = "NOT JUDGED"
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "NOT JUDGED"]
Check = dict[str, Any]


def check(
    name: str,
    limit: float | None,
    verdict: Verdict,
    reason: str,
    value: float | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Check:
    """One line of the gate report; numbers that are not finite are left out of it."""
    return {
        "name": name,
        "limit": limit,
        "value": finite(value),
        "low": finite(low),
        "high": finite(high),
        "verdict": verdict,
        "reason": reason,
    }


def finite(value: Any) -> float | None:
    """The number, None for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def above_zero(value: Any) -> float | None:
    """The number, None for anything that is not a finite number above zero."""
    number = finite(value)
    return number if number is not None and number > 0 else None


def part(report: Report, key: str) -> dict[str, Any]:
    """A table of a report, empty where it is missing or null."""
    found = report.get(key)
    return found if isinstance(found, dict) else {}


def missing(name: str, limit: float, measure: Report, key: str) -> Check | None:
    """The check where the measurement has no such part: emulated, failed, or simply not there."""
    if part(measure, key):
        return None
    reason = measure.get(f"{key}_reason") or f"the measurement has no {key}"
    if measure.get("failed"):
        return check(name, limit, NOT_JUDGED, "the model does not run on the target")
    if measure.get("emulated"):
        reason = f"it cannot be judged under emulation: {reason}"
        return check(name, limit, NOT_JUDGED, f"{reason}; measure on a device")
    return check(name, limit, INCONCLUSIVE, reason)


def no_number(name: str, limit: float, what: str, value: Any) -> Check:
    """The check where a number is NaN, zero, negative or absent."""
    reason = f"{what} must be a number above zero, the report has {value!r}"
    return check(name, limit, INCONCLUSIVE, reason)


def noisy(measure: Report) -> str | None:
    """Why absolute limits cannot bind on the measuring machine; None where they can."""
    noise = part(measure, "noise")
    if noise.get("quiet") is True:
        return None
    return f"the machine was not quiet: {noise.get('reason') or 'unknown noise'}"


__all__ = [
    "FAIL",
    "INCONCLUSIVE",
    "NOT_JUDGED",
    "PASS",
    "Check",
    "Verdict",
    "above_zero",
    "check",
    "finite",
    "missing",
    "no_number",
    "noisy",
    "part",
]
