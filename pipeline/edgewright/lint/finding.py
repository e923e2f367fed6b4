"""What the lint says: one finding for all nodes that share a reason."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

FIRST = 5  # nodes named in a finding
BIG_SHARE = 0.05  # of the work or bytes: below it is not worth a warning


@dataclass(frozen=True)
class Hit:
    """One node with one trouble.

    kind: what the trouble is. subject: operator or form, for the text. key: first output of the
    node, which survives rewrites. level: warning where speed or metric is lost and nobody mends
    it. remedy: what to do. fixed_by: the pass or rule of ours that does it; "" for the user.
    """

    kind: str
    subject: str
    key: str
    level: str
    why: str
    remedy: str
    fixed_by: str = ""


@dataclass(frozen=True)
class Finding:
    """Hits of one reason; `share` is that of the model's multiply-accumulates, None: unknown."""

    kind: str
    level: str
    text: str
    why: str = ""
    remedy: str = ""
    fixed_by: str = ""
    nodes: tuple[str, ...] = ()
    count: int = 0
    share: float | None = None

    def facts(self) -> dict[str, Any]:
        """JSON data."""
        return {**vars(self), "nodes": list(self.nodes)}


def group(
    hits: Iterable[Hit], labels: dict[str, str], work: dict[str, int], total: int
) -> list[Finding]:
    """Findings from hits that differ in their node only, in the order of the first of each.

    labels: key -> how to call the node. work: key -> multiply-accumulates, of `total`.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for hit in hits:
        same = (hit.kind, hit.subject, hit.level, hit.why, hit.remedy, hit.fixed_by)
        keys = groups.setdefault(same, [])
        if hit.key not in keys:
            keys.append(hit.key)
    found = []
    for (kind, subject, level, why, remedy, fixed_by), keys in groups.items():
        known = [work[k] for k in keys if k in work]
        share = round(sum(known) / total, 4) if known and total else None
        if kind == "no-int8-kernel" and share is not None and share < BIG_SHARE:
            level = "info"
        names = tuple(labels.get(k, k) for k in keys[:FIRST])
        more = f" and {len(keys) - FIRST} more" if len(keys) > FIRST else ""
        part = f", {share:.0%} of the work" if share is not None else ""
        text = f"{len(keys)} {subject}{part}: {', '.join(names)}{more}"
        found.append(Finding(kind, level, text, why, remedy, fixed_by, names, len(keys), share))
    return found
