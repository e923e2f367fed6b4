"""gate: the reports against the thresholds. PASS, FAIL or INCONCLUSIVE, each with its reason.

A check is PASS or FAIL only where the evidence decides it. A number that is missing, not finite
or not above zero decides nothing. What cannot be judged on a target at all (time and memory under
emulation, a metric the recipe does not name) is NOT JUDGED: it is listed, and neither passes nor
fails anything. The families of checks stand in files of their own; `decide` calls them all.
"""

from collections.abc import Collection

from edgewright.gate.absolute import absolute_limits
from edgewright.gate.check import Check
from edgewright.gate.demands import target_demands
from edgewright.gate.footprint import memory_ratio, size
from edgewright.gate.instructions import instruction_ratio
from edgewright.gate.metric import agreement, retained
from edgewright.gate.speed import LATENCY_MARGIN, latency_ratio
from edgewright.gate.verdict import limits, overall, sealed
from edgewright.recipe import GateSettings
from edgewright.stage import Job, Report
from edgewright.target import Budget


def run(job: Job) -> Report:
    """The stage: judge the reports of validate and measure; see `decide`."""
    raw = job.recipe.raw.get("gate", {})
    report = decide(
        job.recipe.gate,
        job.target.budget,
        job.reports.get("validate", {}),
        job.reports.get("measure", {}),
        explicit=tuple(raw),
    )
    quantize = job.reports.get("quantize", {})
    warnings = [n for n in quantize.get("notes", []) if n.get("level") == "warning"]
    report["notes"] += [{**n, "text": f"quantize: {n.get('text', '')}"} for n in warnings]
    return report


def decide(
    gate: GateSettings,
    budget: Budget,
    validate: Report,
    measure: Report,
    *,
    explicit: Collection[str] = (),
) -> Report:
    """Judge the reports against the thresholds of the recipe and the budget of the target.

    explicit: the keys that the recipe itself sets in [gate].
    """
    checks: list[Check] = []
    if gate.min_retained is not None:
        checks.append(retained(gate.min_retained, validate, "min_retained" in explicit))
    if gate.min_agreement is not None:
        checks.append(agreement(gate.min_agreement, validate))
    if gate.max_latency_ratio is not None:
        checks.append(latency_ratio(gate.max_latency_ratio, measure))
    if gate.max_size_ratio is not None:
        checks.append(size("max_size_ratio", gate.max_size_ratio, measure, "ratio"))
    if gate.max_memory_ratio is not None:
        checks.append(memory_ratio(gate.max_memory_ratio, measure))
    if gate.max_instruction_ratio is not None:
        checks.append(instruction_ratio(gate.max_instruction_ratio, measure))
    checks += absolute_limits(gate, budget, measure)
    checks += target_demands(measure)
    return sealed(checks)


__all__ = ["LATENCY_MARGIN", "decide", "limits", "overall", "run", "sealed"]
