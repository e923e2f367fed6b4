"""What the target demands of every model: that it runs, where and as what its profile says."""

from edgewright.gate.check import FAIL, INCONCLUSIVE, PASS, Check, check, part
from edgewright.gate.instructions import int8_instructions
from edgewright.gate.placement import int8_share, provider_share
from edgewright.stage import Report

# Conditions of the target: they can fail a model, but passing them proves no quality.
DEMANDS = ("runs", "min_provider_share", "min_int8_share", "int8_instructions")


def target_demands(measure: Report) -> list[Check]:
    """What the target demands of every model: that it runs, where and as what its profile says."""
    if measure.get("failed"):
        return [check("runs", None, FAIL, str(measure["failed"]))]
    placement = part(measure, "placement")
    if not placement:
        return [check("runs", None, INCONCLUSIVE, "the measurement says nothing of the target")]
    runs = check("runs", None, PASS, "loads and runs on the target")
    return [runs, provider_share(placement), *int8_share(placement), *int8_instructions(measure)]
