"""gate: the reports against the thresholds. PASS, FAIL or INCONCLUSIVE, each with its reason.

A check is PASS or FAIL only where the evidence decides it. A number that is missing, not finite
or not above zero decides nothing. What cannot be judged on a target at all (time and memory under
emulation, a metric the recipe does not name) is NOT JUDGED: it is listed, and neither passes nor
fails anything. The families of checks stand in files of their own; `decide` calls them all.
"""

from collections.abc import Collection, Iterable

from edgewright.gate.check import FAIL, INCONCLUSIVE, NOT_JUDGED, PASS, Check, Verdict
from edgewright.gate.demands import DEMANDS, target_demands
from edgewright.gate.footprint import memory_ratio, peak_memory, size
from edgewright.gate.metric import agreement, retained
from edgewright.gate.speed import LATENCY_MARGIN, latency_ms, latency_ratio
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

    explicit: the keys that the recipe itself sets in [gate]. Any FAIL fails; else anything
    inconclusive, or no threshold judged at all, is INCONCLUSIVE; else PASS.
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
    for limit in tightest(gate.max_size_bytes, budget.max_size_bytes):
        checks.append(size("max_size_bytes", limit, measure, "candidate_bytes"))
    for limit in tightest(gate.max_peak_memory_bytes, budget.max_peak_memory_bytes):
        checks.append(peak_memory(limit, measure))
    for limit in tightest(gate.max_latency_ms, budget.max_latency_ms):
        checks.append(latency_ms(limit, measure))
    checks += target_demands(measure)
    notes = [
        {"level": "warning", "text": f"{c['name']} not judged: {c['reason']}"}
        for c in checks
        if c["verdict"] == NOT_JUDGED
    ]
    verdict = overall(checks)
    if verdict == INCONCLUSIVE and not any(c["verdict"] in (PASS, FAIL) for c in limits(checks)):
        text = "no threshold could be judged: name a metric or set a limit in [gate]"
        notes.append({"level": "warning", "text": text})
    return {"verdict": verdict, "checks": checks, "notes": notes}


def limits(checks: Iterable[Check]) -> list[Check]:
    """The checks of thresholds, without the demands of the target."""
    return [c for c in checks if c["name"] not in DEMANDS]


def overall(checks: list[Check]) -> Verdict:
    """The verdict of all checks together."""
    found = {c["verdict"] for c in checks}
    if FAIL in found:
        return FAIL
    judged = any(c["verdict"] == PASS for c in limits(checks))
    return INCONCLUSIVE if INCONCLUSIVE in found or not judged else PASS


def tightest(*candidates: float | None) -> list[float]:
    """The smallest limit that is set, as a list of one; empty where none is."""
    known = [c for c in candidates if c is not None]
    return [min(known)] if known else []


__all__ = ["LATENCY_MARGIN", "decide", "limits", "overall", "run"]
