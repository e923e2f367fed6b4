"""The lint's findings as a table for the terminal."""

import io
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgewright.report.tables import plain

NARROWEST = 80


def findings_text(findings: list[dict[str, Any]], width: int) -> str:
    """Level, finding, why it hurts, what to do and who does it, in columns."""
    if not findings:
        return "nothing found that would hurt"
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False)
    table.add_column("level", no_wrap=True)
    table.add_column("finding", ratio=4, overflow="fold")
    table.add_column("why it hurts", ratio=4)
    table.add_column("remedy", ratio=3)
    table.add_column("done by", ratio=2)
    for row in findings:
        by = row["fixed_by"] or ("you" if row["remedy"] else "")
        cells = [row["level"], row["text"], row["why"], row["remedy"], by]
        style = "bold" if row["level"] == "warning" else ""
        table.add_row(*(Text(plain(c)) for c in cells), style=style)
    page = io.StringIO()
    Console(file=page, width=max(width, NARROWEST), color_system=None).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().rstrip().splitlines())
