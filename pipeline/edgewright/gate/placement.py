"""The placement contract: enough of the work on the target's provider, and enough of it in int8."""

from typing import Any

from edgewright.gate.check import FAIL, INCONCLUSIVE, PASS, Check, check, finite

NAMED = 10  # nodes that a reason names


def provider_share(placement: dict[str, Any]) -> Check:
    """Share of the work that the provider took; below the contract the reason names the others."""
    name, share = "min_provider_share", finite(placement.get("provider_share"))
    limit = finite(placement.get("required_share"))
    if share is None or not 0 <= share <= 1 or "ok" not in placement:
        return check(name, limit, INCONCLUSIVE, "the measurement does not tell it")
    of = placement.get("share_of", "work")
    counted = "work" if of == "work" else f"work ({of})"
    found = f"{share:.1%} of the {counted} on {placement.get('provider', 'the provider')}"
    if placement["ok"] is True:
        return check(name, limit, PASS, found, share)
    strays = [node_text(s) for s in placement.get("strays", [])]
    more = f" and {len(strays) - NAMED} more" if len(strays) > NAMED else ""
    reason = f"only {found}; elsewhere: {', '.join(strays[:NAMED])}{more}"
    return check(name, limit, FAIL, reason, share)


def int8_share(placement: dict[str, Any]) -> list[Check]:
    """Share of the multiply-accumulates in int8, where the profile demands one."""
    name, limit = "min_int8_share", finite(placement.get("required_int8_share"))
    if not limit:
        return []
    share = finite(placement.get("int8_work_share"))
    if share is None:
        why = placement.get("int8_work_reason") or "the measurement does not tell it"
        return [check(name, limit, INCONCLUSIVE, str(why))]
    found = f"{share:.1%} of the multiply-accumulates in int8"
    if share >= limit:
        return [check(name, limit, PASS, found, share)]
    floats = [str(n.get("name")) for n in placement.get("float_nodes", [])]
    more = f" and {len(floats) - NAMED} more" if len(floats) > NAMED else ""
    named = f"; in float: {', '.join(floats[:NAMED])}{more}" if floats else ""
    return [check(name, limit, FAIL, f"only {found}{named}", share)]


def node_text(stray: Any) -> str:
    """A node that runs elsewhere, for people."""
    if not isinstance(stray, dict):
        return str(stray)
    return f"{stray.get('name')} ({stray.get('op')} on {stray.get('provider')})"
