"""A verdict as Markdown, for a pull request or the summary of a job.

Nothing from a model or user becomes markup: it makes no table, link, mention or reference.
"""

import re
from collections.abc import Sequence

from edgewright.report import history, tables
from edgewright.report.tables import number

REASON_CHARS = 400  # the whole text has to fit into a comment of 65 536 characters
NOTES_SHOWN = 20
LAST_SHOWN = 8
TREND = (
    ("retained", "metric kept", tables.share_text),
    ("latency_ratio", "latency", tables.ratio_text),
    ("memory_ratio", "memory", tables.ratio_text),
    ("size_bytes", "size", tables.bytes_text),
)


def summary(
    reports: Sequence[tables.Report],
    entries: Sequence[history.Entry] = (),
    faults: Sequence[history.Fault] = (),
) -> str:
    """All reports one below the other, each with the last verdicts on the same model and target.

    reports: build reports, or what is left of one: name, version, target and `error`.
    """
    parts = [section(report, history.same_model(entries, report)) for report in reports]
    if faults:
        parts.append("\n".join(f"- warning: {safe(text)}" for text in history.told(faults)) + "\n")
    return "\n".join(parts)


def section(report: tables.Report, entries: Sequence[history.Entry]) -> str:
    """One report: verdict, figures, checks, warnings, and how it was before."""
    title = " ".join(safe(report.get(key)) for key in ("name", "version"))
    where = safe(report.get("target"))
    if report.get("error"):
        return f"### ERROR: {title} for {where}\n\nWhy: {shortened(report['error'])}\n"
    lines = [
        f"### {tables.verdict(report)}: {title} for {where}",
        "",
        f"Why: {shortened(tables.explanation(report))}",
        "",
        *grid(
            ("figure", "value", "how"),
            [(t.label, t.value, t.detail) for t in tables.tiles(report)],
        ),
    ]
    if checks := tables.gate(report):
        cells = [(c.label, c.limit, c.value, c.bounds, c.verdict, c.reason) for c in checks]
        lines += ["", *grid(("check", "limit", "value", "bounds", "verdict", "reason"), cells)]
    warnings = [note for note in tables.notes(report) if note.level == "warning"]
    if warnings:
        texts = [shortened(f"{note.stage}: {note.text}") for note in warnings[:NOTES_SHOWN]]
        lines += ["", *(f"- warning: {text}" for text in texts)]
    if len(warnings) > NOTES_SHOWN:
        lines.append(f"- and {len(warnings) - NOTES_SHOWN} more warnings in the report")
    if len(entries) > 1:
        lines += ["", "Last verdicts, the newest first:", "", *last(entries)]
    return "\n".join(lines) + "\n"


def last(entries: Sequence[history.Entry]) -> list[str]:
    """The newest lines of the history as a table."""
    shown = list(reversed(entries))[:LAST_SHOWN]
    cells = []
    for one in shown:
        commit = one.get("commit")
        figures = [form(number(one["metrics"].get(key))) for key, _, form in TREND]
        mark = str(one.get("label") or (commit if isinstance(commit, str) else "") or "")
        cells.append((one["version"], mark[:20], one["verdict"], *figures))
    return grid(("version", "label or commit", "verdict", *(h for _, h, _ in TREND)), cells)


def grid(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A table; every cell is text and nothing else."""
    rows = [heads, ["---"] * len(heads), *([shortened(cell) for cell in row] for row in cells)]
    return [f"| {' | '.join(row)} |" for row in rows]


def shortened(text: object) -> str:
    """`safe`, with the end of a long text left out."""
    whole = tables.plain(text)
    return safe(whole if len(whole) <= REASON_CHARS else whole[:REASON_CHARS] + " ...")


def safe(value: object) -> str:
    """Text that Markdown, HTML and GitHub's own links leave as it is, on one line.

    Not for the start of a line: a number or a dash there would begin a list.
    """
    text = tables.plain(value)
    # As character references, these start no markup and end no table cell.
    text = re.sub(r"[&<>|\\`*_\[\]~$]", lambda found: f"&#{ord(found[0])};", text)
    # Mentions, issues, emoji and bare links are looked for after that; a comment parts them.
    text = re.sub(r"(?<=[@:])(?=\S)|(?<=(?<!&)#)(?=\S)", "<!-- -->", text)
    return re.sub(r"(?i)(?<=www)(?=\.)", "<!-- -->", text)
