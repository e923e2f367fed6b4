"""The checks of memory and of the size of the file."""

from edgewright.decision import MEMORY_SLACK
from edgewright.gate.check import (
    FAIL,
    INCONCLUSIVE,
    PASS,
    Check,
    Verdict,
    above_zero,
    check,
    missing,
    no_number,
    noisy,
    part,
)
from edgewright.stage import Report

MEMORY_MARGIN = 0.01  # with MEMORY_SLACK: repeats of one model differ by less


def size(name: str, limit: float, measure: Report, key: str) -> Check:
    """Size of the file, as a ratio to the original or in bytes; it is known exactly."""
    value = above_zero(part(measure, "size").get(key))
    if value is None:
        return no_number(name, limit, "the size", part(measure, "size").get(key))
    shown = f"{value:.3f} of the original" if key == "ratio" else f"{value:,.0f} bytes"
    verdict: Verdict = PASS if value <= limit else FAIL
    return check(name, limit, verdict, shown, value)


def memory_ratio(limit: float, measure: Report) -> Check:
    """Peak resident memory, candidate / original; 1 % or 256 KiB more is no difference."""
    name = "max_memory_ratio"
    if (nothing := missing(name, limit, measure, "memory")) is not None:
        return nothing
    memory = part(measure, "memory")
    value = above_zero(memory.get("ratio"))
    original = above_zero(memory.get("original_peak_bytes"))
    if value is None or original is None:
        return no_number(name, limit, "the memory ratio", memory.get("reason", memory.get("ratio")))
    border = limit + max(limit * MEMORY_MARGIN, MEMORY_SLACK / original)
    verdict: Verdict = PASS if value <= border else FAIL
    return check(name, limit, verdict, f"{value:.3f} of the original's peak", value)


def peak_memory(limit: float, measure: Report) -> Check:
    """Peak resident bytes of the whole process, of running or of loading, whatever is larger."""
    name = "max_peak_memory_bytes"
    if (nothing := missing(name, limit, measure, "memory")) is not None:
        return nothing
    memory = part(measure, "memory")
    running = above_zero(memory.get("candidate_peak_bytes"))
    loading = above_zero(memory.get("candidate_load_peak_bytes")) or 0
    if running is None:
        found = memory.get("reason", memory.get("candidate_peak_bytes"))
        return no_number(name, limit, "the peak of memory", found)
    value = max(running, loading)
    found = f"{value:,.0f} bytes at the peak of {'running' if running >= loading else 'loading'}"
    if (reason := noisy(measure)) is not None:
        return check(name, limit, INCONCLUSIVE, f"{found}; {reason}", value)
    verdict: Verdict = PASS if value <= limit else FAIL
    return check(name, limit, verdict, found, value)
