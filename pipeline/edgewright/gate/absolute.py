"""The limits that need no other model: bytes, milliseconds, instructions.

Of the recipe or of the target.
"""

from edgewright.gate.check import Check
from edgewright.gate.footprint import peak_memory, size
from edgewright.gate.instructions import instruction_limit
from edgewright.gate.speed import latency_ms
from edgewright.recipe import GateSettings
from edgewright.stage import Report
from edgewright.target import Budget


def absolute_limits(gate: GateSettings, budget: Budget, measure: Report) -> list[Check]:
    """The checks of what is set; the tighter of recipe and budget holds."""
    checks = []
    for limit in tightest(gate.max_size_bytes, budget.max_size_bytes):
        checks.append(size("max_size_bytes", limit, measure, "candidate_bytes"))
    for limit in tightest(gate.max_peak_memory_bytes, budget.max_peak_memory_bytes):
        checks.append(peak_memory(limit, measure))
    for limit in tightest(gate.max_latency_ms, budget.max_latency_ms):
        checks.append(latency_ms(limit, measure))
    for limit in tightest(gate.max_instructions, budget.max_instructions):
        checks.append(instruction_limit(limit, measure))
    return checks


def tightest(*candidates: float | None) -> list[float]:
    """The smallest limit that is set, as a list of one; empty where none is."""
    known = [c for c in candidates if c is not None]
    return [min(known)] if known else []
