"""What the commands print: results on standard output, all else on standard error."""

import json
import os
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click

from edgewright.errors import EdgewrightError, from_os_error


def explain(error: Exception) -> int:
    """Print one message for an error; its exit code."""
    if isinstance(error, OSError):
        error = from_os_error(error, "running this command")
    if isinstance(error, EdgewrightError):
        return say(f"error: {error}", error.exit_code)
    with tempfile.NamedTemporaryFile(
        "w", prefix="edgewright-error-", suffix=".log", delete=False
    ) as log:
        traceback.print_exception(error, file=log)
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return say(f"internal error: {text}. Please report it; details in {log.name}", 3)


def say(text: str, code: int = 0) -> int:
    """Print a message on standard error; the code, for the caller to return."""
    with suppress(BrokenPipeError):
        click.echo(f"edgewright: {printable(text)}", err=True)
    return code


def emit(text: str) -> None:
    """Print a result on standard output; a reader that has left changes no exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def emit_json(value: Any) -> None:
    """Print a result for machines."""
    emit(json.dumps(value, indent=1, sort_keys=True, default=str))


def emit_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print aligned columns; the last one is not padded."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        emit(printable("  ".join([*cells, row[-1]]).rstrip()))


def printable(text: str) -> str:
    """Text that cannot steer a terminal, whatever a model's names hold."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
