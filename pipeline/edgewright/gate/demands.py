"""What the target demands of every model: that it runs, on the provider it names."""

from typing import Any

from edgewright.gate.check import FAIL, INCONCLUSIVE, PASS, Check, check, finite, part
from edgewright.stage import Report

# Conditions of the target: they can fail a model, but passing them proves no quality.
DEMANDS = ("runs", "min_provider_share")


def target_demands(measure: Report) -> list[Check]:
    """What the target demands of every model: that it runs, on the provider it names."""
    checks = []
    if measure.get("failed"):
        return [check("runs", None, FAIL, str(measure["failed"]))]
    placement = part(measure, "placement")
    if not placement:
        return [check("runs", None, INCONCLUSIVE, "the measurement says nothing of the target")]
    checks.append(check("runs", None, PASS, "loads and runs on the target"))
    name, share = "min_provider_share", finite(placement.get("provider_share"))
    limit = finite(placement.get("required_share"))
    if share is None or not 0 <= share <= 1 or "ok" not in placement:
        checks.append(check(name, limit, INCONCLUSIVE, "the measurement does not tell it"))
    elif placement["ok"] is True:
        found = f"{share:.1%} of the nodes on {placement.get('provider', 'the provider')}"
        checks.append(check(name, limit, PASS, found, share))
    else:
        strays = [stray_name(s) for s in placement.get("strays", [])]
        more = f" and {len(strays) - 10} more" if len(strays) > 10 else ""
        found = f"only {share:.1%} of the nodes on {placement.get('provider', 'the provider')}"
        reason = f"{found}; elsewhere: {', '.join(strays[:10])}{more}"
        checks.append(check(name, limit, FAIL, reason, share))
    return checks


def stray_name(stray: Any) -> str:
    """A node that runs elsewhere, for people."""
    if not isinstance(stray, dict):
        return str(stray)
    return f"{stray.get('name')} ({stray.get('op')} on {stray.get('provider')})"
