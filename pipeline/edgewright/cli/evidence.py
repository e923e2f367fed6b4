"""What a verdict leaves behind for a pull request, a job server and later releases."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from edgewright.cli.terminal import say
from edgewright.errors import UsageError
from edgewright.files import check_writable

LABEL_CHARS = 200
FILE = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True)
class Evidence:
    """The files that the options name; None: not wanted."""

    markdown: Path | None
    junit: Path | None
    junit_inconclusive: str | None
    history: Path | None
    label: str | None

    def prepare(self) -> None:
        """Refuse now what would fail after the work, and remove what an earlier run left.

        A job server that finds an old file takes it for the verdict of a run that has none.
        """
        if self.label is not None and self.history is None:
            raise UsageError("--label", expected="--history FILE with it")
        if self.label is not None and len(self.label) > LABEL_CHARS:
            raise UsageError("--label", expected=f"at most {LABEL_CHARS} characters")
        for name in ("markdown", "junit", "history"):
            if (path := getattr(self, name)) is not None:
                check_writable(path, f"--{name} {path}")
        for path in (self.markdown, self.junit):
            if path is not None:
                path.unlink(missing_ok=True)
        if self.history is not None or self.junit is not None:
            epoch()

    def write(
        self, reports: Sequence[dict[str, Any]], folder: Path, only_warns: Sequence[bool]
    ) -> dict[str, Any]:
        """Write the files for reports of builds; the page's part on the past, by target.

        reports: build reports, or name, version, target and `error`. folder: the recipe's, whose
        commit the history names. only_warns: for each, the policy for a verdict that stays open.
        """
        from edgewright.files import write_atomic
        from edgewright.report import history, junit, markdown, tables

        entries: list[history.Entry] = []
        faults: list[history.Fault] = []
        past = {}
        if self.history is not None:
            from edgewright.report import trend

            commit = history.commit_of(folder, self.history)
            judged = [r for r in reports if tables.verdict(r) != tables.NO_VERDICT]
            lines = [
                history.entry(r, commit=commit, label=self.label, epoch=epoch()) for r in judged
            ]
            history.append(self.history, lines)
            entries, faults = history.read(self.history)
            for text in history.told(faults):
                say(f"warning: {text}; {self.history} keeps it")
            past = {r["target"]: trend.view(r, entries, faults) for r in judged}
        if self.markdown is not None:
            text = markdown.summary(reports, entries, faults)
            write_atomic(self.markdown, text.encode())
        if self.junit is not None:
            open_ones = [
                self.junit_inconclusive or ("skipped" if warns else "error") for warns in only_warns
            ]
            data = junit.xml(reports, open_ones, epoch() or 0)
            write_atomic(self.junit, data)
        return past


def epoch() -> int | None:
    """SOURCE_DATE_EPOCH, None where it is unset."""
    from edgewright.bundle import assemble

    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    return assemble.epoch(text) if text else None


def evidence_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `Evidence`."""
    for option in (
        click.option("--label", metavar="TEXT", help="A word of yours in the line of --history."),
        click.option(
            "--history", type=FILE, help="Add a line of JSON about the verdict to this file."
        ),
        click.option(
            "--junit-inconclusive",
            type=click.Choice(["error", "skipped", "failure"]),
            help="What INCONCLUSIVE is in --junit. Default: error; skipped where the policy warns.",
        ),
        click.option("--junit", type=FILE, help="Write the checks as JUnit XML."),
        click.option("--markdown", type=FILE, help="Write a summary for a pull request."),
    ):
        command = option(command)
    return command
