"""The verdict of all checks together, and what is worth a note."""

from collections.abc import Iterable

from edgewright.gate.check import FAIL, INCONCLUSIVE, NOT_JUDGED, PASS, Check, Verdict
from edgewright.gate.demands import DEMANDS
from edgewright.stage import Report


def sealed(checks: list[Check]) -> Report:
    """The report of the gate: any FAIL fails; else anything inconclusive, or no threshold judged
    at all, is INCONCLUSIVE; else PASS.
    """
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
