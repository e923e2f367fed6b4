"""What prune, recover and share did, as text for the page."""

from typing import Any

from edgewright.report import tables
from edgewright.report.tables import find, number, plain, rows

Lines = list[tuple[str, ...]]
NAMES_SHOWN = 8


def view(report: tables.Report) -> dict[str, Any]:
    """Tables of the three stages; empty for those that did not run."""
    return {
        "prune": prune(tables.stage_report(report, "prune")),
        "recover": recover(tables.stage_report(report, "recover")),
        "share": share(tables.stage_report(report, "share")),
    }


def prune(report: tables.Report) -> dict[str, Any]:
    """The budget, what went from each group, what was tried, what no rule covers."""
    if not report:
        return {}
    of = plain(find(report, "budget", "of"))
    asked, left = (find(report, "budget", key) for key in ("asked", "left"))
    wanted = "" if asked is None else f"{tables.share_text(asked)} of the {of}; "
    facts = [("budget", f"{wanted}{tables.share_text(left)} is left")]
    if isinstance(ratios := find(report, "ratios"), dict):
        facts += [
            (f"units of {plain(k)} to remain", tables.share_text(v)) for k, v in ratios.items()
        ]
    if isinstance(soft := find(report, "soft"), dict):
        steps = plain(soft.get("steps"))
        facts.append(("trained before the cut", f"{plain(soft.get('way'))}, {steps} steps"))
    if packed := find(report, "compressed_bytes"):
        before, after = (tables.bytes_text(size) for size in packed)
        facts.append(("compressed (zlib)", f"{before} before, {after} with the zeros"))
    if (ratio := number(find(report, "cpu_ratio"))) is not None:
        facts.append(("processor time with the zeros", tables.ratio_text(ratio)))
    return {
        "facts": [
            *facts,
            ("criterion", f"{plain(report.get('criterion'))} ({plain(report.get('needs'))})"),
            ("allocation", plain(report.get("allocation"))),
            ("widths are multiples of", plain(report.get("multiple"))),
        ],
        "groups": [
            (
                plain(row.get("group")),
                plain(row.get("kind")),
                tables.count_text(row.get("units")),
                tables.count_text(row.get("kept")),
                plain(row.get("reason") or ""),
            )
            for row in rows(report.get("groups"))
        ],
        "tries": [
            (
                tables.share_text(row.get("budget")),
                tables.share_text(row.get("drop")),
                "kept" if row.get("kept") else "costs too much",
            )
            for row in rows(report.get("tries"))
        ],
        "frozen": grouped(rows(report.get("frozen"))),
    }


def grouped(found: list[dict[str, Any]]) -> Lines:
    """Reasons with how many nodes they hold, and the first of these."""
    return [
        (op, reason, tables.count_text(len(names)), ", ".join(names[:NAMES_SHOWN]))
        for (op, reason), names in tables.grouped(found, "op", "reason")
    ]


def recover(report: tables.Report) -> dict[str, Any]:
    """How many layers were repaired, which were not and why, how training ended."""
    if not report:
        return {}
    layers = rows(report.get("layers"))
    left = [row for row in layers if row.get("reason")]
    facts = [
        ("method", plain(report.get("method"))),
        ("layers repaired", f"{len(layers) - len(left)} of {len(layers)}"),
    ]
    learnt = report.get("distillation")
    if isinstance(learnt, dict):
        start, best = (number(find(learnt, key, "distance")) for key in ("start", "best"))
        if start is not None and best is not None:
            facts.append(
                ("distance from the original", f"{start:.4g} before, {best:.4g} after training")
            )
        facts.append(("training steps", plain(learnt.get("steps"))))
        if learnt.get("stopped"):
            facts.append(("training ended", plain(learnt.get("stopped"))))
    return {"facts": facts, "left": grouped(left)}


def share(report: tables.Report) -> dict[str, Any]:
    """What sharing saved, and the codebooks."""
    if not report:
        return {}
    before, after = (find(report, "sent_bytes", key) for key in ("before", "after"))
    start, best = (number(find(report, "training", k, "distance")) for k in ("start", "best"))
    learnt = []
    if start is not None and best is not None:
        text = f"{start:.4g} by k-means, {best:.4g} after training"
        learnt.append(("distance from the model before", text))
    return {
        "facts": [
            *learnt,
            ("stored twice before", tables.bytes_text(report.get("duplicate_bytes"))),
            (
                "sent, entropy coded",
                f"{tables.bytes_text(before)} before, {tables.bytes_text(after)} after",
            ),
        ],
        "codebooks": [
            (
                plain(row.get("tensor")),
                tables.count_text(row.get("values")),
                tables.count_text(row.get("entries")),
                plain(row.get("entropy_bits")),
                tables.share_text(row.get("relative_error")),
            )
            for row in rows(report.get("codebooks"))
        ],
    }
