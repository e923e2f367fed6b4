"""The summary of a build for the terminal (standard error, by rich)."""

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from edgewright.report import tables

STYLES = {"PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow"}


def summary(report: tables.Report) -> RenderableType:
    """Verdict, headline figures, gate, stages and warnings of a build report.

    Texts from models and users are never read as markup, and cannot steer the terminal.
    """
    parts: list[RenderableType] = [headline(report), Padding(figures(report), (1, 0, 0, 2))]
    if checks := tables.gate(report):
        parts.append(Padding(gate_table(checks), (1, 0, 0, 0)))
    if stages := tables.stages(report):
        parts.append(Padding(stage_table(stages), (1, 0, 0, 0)))
    if steps := tables.steps(report):
        parts.append(Padding(step_table(steps), (1, 0, 0, 0)))
    if notes := tables.notes(report):
        parts.append(Padding(note_lines(notes), (1, 0, 0, 2)))
    return Group(*parts)


def verdict_text(verdict: str) -> Text:
    return Text(verdict, style=STYLES.get(verdict, "bold"))


def headline(report: tables.Report) -> Text:
    """Verdict, what it is about, and why."""
    verdict = tables.verdict(report)
    style = STYLES.get(verdict, "bold")
    title = " ".join(tables.plain(report.get(key)) for key in ("name", "version"))
    return Text.assemble(
        (f" {verdict} ", f"{style} reverse"),
        (f"  {title}", "bold"),
        (f" for {tables.plain(report.get('target'))}", "bold"),
        "\n  ",
        tables.explanation(report),
    )


def figures(report: tables.Report) -> Table:
    """The headline figures, one a line."""
    table = Table.grid(padding=(0, 2))
    for tile in tables.tiles(report):
        table.add_row(
            Text(tile.label, style="bold"),
            Text(tile.value, style="" if tile.known else "dim"),
            Text(tile.detail, style="dim"),
        )
    return table


def gate_table(checks: list[tables.Check]) -> Table:
    """The checks of the gate."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True, title="Gate", title_justify="left")
    table.add_column("check")
    for name in ("limit", "value", "bounds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("reason", style="dim")
    for check in checks:
        table.add_row(
            Text(check.label),
            Text(check.limit),
            Text(check.value),
            Text(check.bounds),
            verdict_text(check.verdict),
            Text(check.reason),
        )
    return table


def stage_table(stages: list[tables.Stage]) -> Table:
    """The stages, one a line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True, title="Stages", title_justify="left")
    table.add_column("stage", no_wrap=True)
    for name in ("metric", "kept", "size", "nodes", "time", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in stages:
        time = "cached" if stage.cached else stage.seconds
        cells = (stage.score, stage.retained, stage.size, stage.nodes, time, stage.memory)
        table.add_row(Text(stage.name), *(Text(cell) for cell in cells))
    return table


def step_table(steps: list[tables.Step]) -> Table:
    """What each stage left of the original, one a line."""
    title = "Against the original"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True, title=title, title_justify="left")
    table.add_column("after", no_wrap=True)
    for name in ("metric kept", "outputs", "same answer", "size", "work", "CPU time"):
        table.add_column(name, justify="right", no_wrap=True)
    for step in steps:
        cells = (step.kept, step.same, step.top1, step.size, step.macs, step.latency)
        table.add_row(Text(step.stage), *(Text(cell) for cell in cells))
    return table


def note_lines(notes: list[tables.Note]) -> Text:
    """Warnings in full; of other remarks, how many there are."""
    text = Text()
    warnings = [note for note in notes if note.level == "warning"]
    for note in warnings:
        text.append("warning", style="yellow")
        text.append(f"  {note.stage}: {note.text}\n")
    if rest := len(notes) - len(warnings):
        text.append(f"{rest} more remark{'s' if rest > 1 else ''} in the report", style="dim")
    text.rstrip()
    return text
