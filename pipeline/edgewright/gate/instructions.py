"""The checks of instruction counts, where a target is emulated: exact, so they always decide."""

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

MARGIN = 0.005  # float models vary by 0.002 %, and memory laid out otherwise changes as little
NAMES = {"dot": "dot-product", "i8mm": "8-bit matrix", "mlal": "widening multiply"}


def uncounted(name: str, limit: float | None, measure: Report) -> Check | None:
    """The check where there are no counts: none can be had on this target, or they are missing."""
    if part(measure, "instructions"):
        return None
    reason = str(measure.get("instructions_reason") or "the measurement has no instruction counts")
    if measure.get("failed"):
        return check(name, limit, NOT_JUDGED, "the model does not run on the target")
    verdict: Verdict = INCONCLUSIVE if measure.get("countable") else NOT_JUDGED
    return check(name, limit, verdict, reason)


def instruction_ratio(limit: float, measure: Report) -> Check:
    """Instructions of one inference, candidate / original; half a percent more is no difference."""
    return ratio("max_instruction_ratio", limit, limit * (1 + MARGIN), measure)


def ratio(name: str, limit: float, border: float, measure: Report) -> Check:
    """Instructions of one inference, candidate / the other model, at most `border`."""
    if (nothing := uncounted(name, limit, measure)) is not None:
        return nothing
    counts = part(measure, "instructions")
    value = above_zero(counts.get("ratio"))
    if value is None:
        return no_number(name, limit, "the ratio", counts.get("ratio"))
    totals = [part(counts, side).get("total") for side in ("candidate", "original")]
    found = f"{shown(totals[0])} instructions, {value:.3f} of the {shown(totals[1])} beside it"
    verdict: Verdict = PASS if value <= border else FAIL
    return check(name, limit, verdict, found, value)


def instruction_limit(limit: float, measure: Report) -> Check:
    """Instructions of one inference."""
    name = "max_instructions"
    if (nothing := uncounted(name, limit, measure)) is not None:
        return nothing
    value = above_zero(part(part(measure, "instructions"), "candidate").get("total"))
    if value is None:
        return no_number(name, limit, "the number of instructions", value)
    verdict: Verdict = PASS if value <= limit else FAIL
    return check(name, limit, verdict, f"{shown(value)} instructions", value)


def int8_instructions(measure: Report) -> list[Check]:
    """Whether int8 layers got the instructions that the CPU of the profile has for them.

    Empty where nothing is promised: no int8 layers, no counts, or not ARM.
    """
    facts = part(part(measure, "instructions"), "kernels")
    layers, promised = finite(facts.get("layers")), facts.get("promised")
    if not layers:
        return []
    name, executed = "int8_instructions", part(facts, "executed")
    found = ", ".join(
        f"{shown(executed.get(key, 0))} {NAMES.get(key, key)}"
        for key in (*NAMES,)
        if key in executed
    )
    reason = f"{found} instructions for {layers:.0f} int8 layers"
    if promised is None:
        # What the CPU lacks it cannot execute, unless the profile is of another CPU than it says.
        foreign = [key for key in ("dot", "i8mm") if executed.get(key)]
        if foreign:
            reason += (
                f"; the profile's isa has no {' and no '.join(NAMES[k] for k in foreign)} ones"
            )
        return [check(name, None, FAIL if foreign else PASS, reason)]
    if executed.get(promised):
        return [check(name, None, PASS, reason)]
    reason += f"; the profile promises {NAMES.get(str(promised), promised)} ones"
    return [check(name, None, FAIL, reason)]


def shown(value: object) -> str:
    """A count with its thousands apart."""
    number = finite(value)
    return "?" if number is None else f"{number:,.0f}"
