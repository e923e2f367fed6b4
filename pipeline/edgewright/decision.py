"""When evidence decides: the rule of a release against the one before it. Pure numbers.

A ratio new / old has three verdicts. FAIL: the lower bound is above 1 + margin and the estimate
above 1 + tolerance / 2. PASS: else, where the upper bound is below 1 + tolerance. INCONCLUSIVE
otherwise. So nothing within the margin ever fails, and what is worse by the tolerance or more
passes with the chance of the bound's error only.

The errors are bounded for the whole verdict. It fails where any check fails, so what a false
alarm may cost, ALPHA, is shared by the checks and by the looks (Bonferroni; Holm's steps change
only which further checks are named, never whether one fails). It passes only where every check
passes, which needs no sharing between checks (intersection-union test; Berger 1982, Technometrics
24:295), only between looks.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from edgewright.errors import BadInput

PASS: Final = "PASS"
FAIL: Final = "FAIL"
INCONCLUSIVE: Final = "INCONCLUSIVE"
Decision = Literal["PASS", "FAIL", "INCONCLUSIVE"]

ALPHA = 0.01  # chance that a release as good as the last fails, and that a worse one passes
LOOKS = 3  # times the growing evidence is judged at most
FAMILY = ("latency", "cold_start", "metric", "agreement")  # judged by statistics, not exactly
FAIL_TAIL = ALPHA / (LOOKS * len(FAMILY))
PASS_TAIL = ALPHA / LOOKS
MIN_LAUNCHES = 2  # see `launched_verdict`


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """How much worse than the baseline a release may be, as shares; None: the default.

    golden: of every ratio against the pinned golden release. margin: what is no difference.
    budget_s: seconds of measuring. inconclusive: whether a verdict that stays open ends a
    release (`fail`) or only warns.
    """

    latency: float | None = None
    memory: float | None = None
    size: float | None = None
    cold_start: float | None = None
    instructions: float | None = None
    metric: float | None = None
    agreement: float | None = None
    golden: float | None = None
    margin: float | None = None
    budget_s: float | None = None
    inconclusive: Literal["fail", "warn"] | None = None


@dataclass(frozen=True, kw_only=True)
class Settled:
    """`Tolerances` with a value for each. See docs/gate.md for where the defaults come from."""

    latency: float = 0.05
    memory: float = 0.01
    size: float = 0.05
    cold_start: float = 0.10
    instructions: float = 0.005
    metric: float = 0.01
    agreement: float = 0.05
    golden: float = 0.10
    margin: float = 0.01
    budget_s: float = 24.0
    inconclusive: Literal["fail", "warn"] = "fail"


def settle(recipe: Tolerances, profile: Tolerances) -> Settled:
    """What the recipe says, else the profile of the target, else the default."""
    values = {}
    for field in fields(Settled):
        for said in (getattr(recipe, field.name), getattr(profile, field.name)):
            if said is not None:
                values[field.name] = said
                break
    return Settled(**values)


def only_warns(recipe: Tolerances, profile: Tolerances) -> bool:
    """Whether a verdict that stays open ends no release."""
    return settle(recipe, profile).inconclusive == "warn"


def check_tolerances(given: Tolerances, where: str) -> None:
    """BadInput for a share outside 0 to 1, where nothing could fail or nothing could pass."""
    for field in fields(Tolerances):
        value = getattr(given, field.name)
        if value is None or field.name == "inconclusive":
            continue
        if field.name == "budget_s":
            if value <= 0:
                raise BadInput(f"{where}.budget_s", expected="above 0", found=str(value))
        elif not 0 < value <= 1:
            raise BadInput(f"{where}.{field.name}", expected="above 0, at most 1", found=str(value))
    settled = settle(given, Tolerances())
    if settled.margin >= settled.latency:
        raise BadInput(
            f"{where}.margin",
            expected=f"below latency ({settled.latency})",
            found=str(settled.margin),
        )


def ratio_verdict(
    low: float | None, value: float | None, high: float | None, tolerance: float, margin: float
) -> Decision:
    """The verdict on a ratio new / old with its bounds; None: no such bound.

    Bounds that do not enclose a finite value above zero decide nothing.
    """
    if value is None or not math.isfinite(value) or value <= 0:
        return INCONCLUSIVE
    if (low is not None and not 0 < low <= value) or (high is not None and not value <= high):
        return INCONCLUSIVE
    if low is not None and low > 1 + margin and value > 1 + tolerance / 2:
        return FAIL
    if high is not None and high < 1 + tolerance:
        return PASS
    return INCONCLUSIVE


def launched_verdict(
    low: float | None,
    value: float | None,
    high: float | None,
    launches: int,
    tolerance: float,
    margin: float,
) -> Decision:
    """`ratio_verdict` of times: processes differ for life, so one launch decides the gross only.

    Equal models differ by 0.5 to 1.4 % (one sd) between launches, which bounds over the pairs of
    a single launch cannot see. Gross is an estimate above the whole tolerance, or an upper bound
    below half of it.
    """
    found = ratio_verdict(low, value, high, tolerance, margin)
    if launches >= MIN_LAUNCHES or found == INCONCLUSIVE:
        return found
    assert value is not None
    if found == FAIL:
        return FAIL if value > 1 + tolerance else INCONCLUSIVE
    return PASS if high is not None and high < 1 + tolerance / 2 else INCONCLUSIVE


MEMORY_SLACK = 256 << 10  # bytes by which repeats of one model differ
COLD_SLACK_S = 0.005  # nobody waits for that


def latency_verdict(report: dict[str, Any], wanted: float, margin: float) -> Decision:
    """The verdict on the latency part of a measurement, against a tolerance."""
    low, value, high = (report.get(f"ratio{end}") for end in ("_low", "", "_high"))
    return launched_verdict(low, value, high, report.get("launches", 0), wanted, margin)


def cold_start_tolerance(report: dict[str, Any], wanted: float) -> float:
    """The tolerance, or what COLD_SLACK_S is of the baseline's time where that is more."""
    seconds = report.get("original_s")
    return max(wanted, COLD_SLACK_S / seconds) if seconds else wanted


def cold_start_verdict(report: dict[str, Any], wanted: float, margin: float) -> Decision:
    """The verdict on the cold-start part of a measurement, against a tolerance."""
    tolerance = cold_start_tolerance(report, wanted)
    margin = max(margin, tolerance / 5)  # small models start in so few steps that 1 % is chance
    return ratio_verdict(
        report.get("low"), report.get("ratio"), report.get("high"), tolerance, margin
    )


def memory_limit(report: dict[str, Any], wanted: float) -> float:
    """The largest ratio of peaks that is no difference: 1 + tolerance, or what the slack makes."""
    peak = report.get("original_peak_bytes")
    return 1 + max(wanted, MEMORY_SLACK / peak) if peak else 1 + wanted


def memory_verdict(report: dict[str, Any], wanted: float) -> Decision:
    """The verdict on the memory part of a measurement; peaks are exact but for a slack."""
    ratio = report.get("ratio")
    if ratio is None or not math.isfinite(ratio) or ratio <= 0:
        return INCONCLUSIVE
    return PASS if ratio <= memory_limit(report, wanted) else FAIL
