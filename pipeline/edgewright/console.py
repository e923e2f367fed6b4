"""What a person sees while waiting: one line per stage on standard error.

On a terminal the stage at work has a spinner, a bar where its length is known, and the time. In
a log there are plain lines only.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from edgewright.build import Event, Watch

LOG_EVERY_S = 15.0
LOG_WIDTH = 120  # columns of a table where nobody says how many there are


class Err(Console):
    """Standard error. That nobody reads it any more is no reason to end a build."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


stderr = Err(stderr=True, highlight=False)
if not stderr.is_terminal:
    stderr.width = LOG_WIDTH


@contextmanager
def watching(label: str) -> Iterator[Watch]:
    """A watcher for the stages of one target; `label` stands before every line."""
    if stderr.is_terminal:
        with on_terminal(label) as watch:
            yield watch
    else:
        yield in_log(label)


def finished_line(label: str, event: Event) -> str:
    """The line that stays when a stage is done."""
    how = "from cache" if event.cached else f"{event.seconds:6.1f} s"
    return f"{label:<10} {event.stage:<9} {how:>10}"


def note_line(label: str, event: Event) -> str:
    return f"{label:<10} {event.stage:<9} note: {event.text}"


def in_log(label: str) -> Watch:
    """Plain lines: every finished stage, and a sign of life now and then."""
    spoken = time.monotonic()

    def watch(event: Event) -> None:
        nonlocal spoken
        now = time.monotonic()
        if event.kind == "end":
            line = finished_line(label, event)
        elif event.kind == "note":
            line = note_line(label, event)
        elif event.kind == "step" and (now - spoken > LOG_EVERY_S or "waiting" in event.text):
            count = f" {event.done}/{event.total}" if event.total else ""
            line = f"{label:<10} {event.stage:<9} {event.text}{count} ..."
        else:
            return
        spoken = now
        stderr.out(line)

    return watch


@contextmanager
def on_terminal(label: str) -> Iterator[Watch]:
    """A live line for the stage at work, above it the finished ones."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
    ) as progress:
        task: TaskID | None = None

        def watch(event: Event) -> None:
            nonlocal task
            if event.kind == "start":
                task = progress.add_task(f"{label:<10} {event.stage:<9}", total=None)
            elif event.kind == "step" and task is not None:
                count = f" {event.done}/{event.total}" if event.total else ""
                progress.update(
                    task,
                    description=escape(f"{label:<10} {event.stage:<9} {event.text}{count}"),
                    total=event.total or None,
                    completed=event.done,
                )
            elif event.kind == "end" and task is not None:
                progress.remove_task(task)
                task = None
                mark = "[dim]=[/dim]" if event.cached else "[green]+[/green]"
                progress.print(mark, escape(finished_line(label, event)))
            elif event.kind == "note":
                progress.print("[yellow]![/yellow]", escape(note_line(label, event)))

        yield watch
