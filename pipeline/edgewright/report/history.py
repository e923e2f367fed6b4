"""The history of verdicts: a file of JSON lines that only ever grows, one line per verdict.

Nothing in it is believed: a line that is damaged, cut off or not ours is left where it is and
told, with its number and the reason. A time is kept only where SOURCE_DATE_EPOCH gives one.
"""

import errno
import fcntl
import json
import os
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.errors import BadInput
from edgewright.files import flush
from edgewright.report import tables
from edgewright.report.tables import find, number

SCHEMA = "edgewright-history/1"
LINE_BYTES = 64 << 10  # ours have about a thousand
FILE_BYTES = 64 << 20
FAULTS_SHOWN = 5
TEXTS = ("name", "version", "target", "verdict")
FIGURES: dict[str, tuple[str, ...]] = {
    "retained": ("validate", "metric", "shipped", "retained"),
    "score": ("validate", "metric", "shipped", "score"),
    "agreement": ("validate", "agreement", "top1"),
    "latency_ratio": ("measure", "latency", "ratio"),
    "latency_ratio_low": ("measure", "latency", "ratio_low"),
    "latency_ratio_high": ("measure", "latency", "ratio_high"),
    "memory_ratio": ("measure", "memory", "ratio"),
    "peak_bytes": ("measure", "memory", "candidate_peak_bytes"),
    "size_ratio": ("measure", "size", "ratio"),
    "size_bytes": ("measure", "size", "candidate_bytes"),
}

Entry = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """A line that cannot be read, counted from 1, and why."""

    line: int
    reason: str


def entry(
    report: tables.Report, *, commit: str | None, label: str | None, epoch: int | None
) -> Entry:
    """The line of a report with a verdict: what was judged, how, and the figures behind it.

    metrics: the figures of FIGURES and the value of every check, finite numbers only. failed,
    unsure: the names of the checks that are FAIL and INCONCLUSIVE.
    """
    checks = tables.rows(tables.stage_report(report, "gate").get("checks"))
    figures = {
        key: number(find(tables.stage_report(report, stage), *path))
        for key, (stage, *path) in FIGURES.items()
    }
    figures |= {f"check.{c.get('name')}": number(c.get("value")) for c in checks}
    found: Entry = {
        "schema": SCHEMA,
        **{key: tables.plain(report.get(key)) for key in ("name", "version", "target")},
        "verdict": tables.verdict(report),
        "failed": [str(c.get("name")) for c in checks if c.get("verdict") == "FAIL"],
        "unsure": [str(c.get("name")) for c in checks if c.get("verdict") == "INCONCLUSIVE"],
        "metrics": {key: value for key, value in figures.items() if value is not None},
        "commit": commit,
    }
    return {
        **found,
        **({} if label is None else {"label": label}),
        **({} if epoch is None else {"epoch": epoch}),
    }


def append(path: Path, entries: Sequence[Entry]) -> None:
    """Add lines at the end of the file, whole and on the disk; what is there is never touched.

    Where the last line was cut off, it stays a line of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one, sort_keys=True, allow_nan=False).encode() + b"\n" for one in entries]
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise BadInput(f"history {path}", expected="a file", found="something else")
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        data = (b"\n" if cut else b"") + b"".join(lines)
        try:
            if os.write(handle, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)
    flush(path.parent)


def read(path: Path) -> tuple[list[Entry], list[Fault]]:
    """The lines of a history in their order, and those that cannot be read."""
    found: list[Entry] = []
    faults: list[Fault] = []
    if not path.exists():
        return found, faults
    if not path.is_file() or path.stat().st_size > FILE_BYTES:
        raise BadInput(
            f"history {path}",
            expected=f"a file of at most {FILE_BYTES >> 20} MiB",
            hint="name another file; the old one stays as it is",
        )
    for count, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(parsed(line))
        except (ValueError, RecursionError) as error:
            faults.append(Fault(count, tables.plain(str(error))[:200]))
    return found, faults


def parsed(line: bytes) -> Entry:
    """One line; ValueError says what is wrong with it."""
    if len(line) > LINE_BYTES:
        raise ValueError(f"longer than {LINE_BYTES} bytes")
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=no_number, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise ValueError(f"not a line of {SCHEMA}")
    for key in TEXTS:
        if not isinstance(value.get(key), str):
            raise ValueError(f"{key} is not a text")
    for key in ("failed", "unsure"):
        names = value.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key} is not a list of texts")
    metrics = value.get("metrics")
    if not isinstance(metrics, dict) or any(number(v) is None for v in metrics.values()):
        raise ValueError("metrics are not a table of numbers")
    return value


def no_number(word: str) -> None:
    """JSON has no NaN and no Infinity, whatever Python reads."""
    raise ValueError(f"{word} is not a number")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys all differ: which of two would count?"""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice")
    return value


def told(faults: Sequence[Fault]) -> list[str]:
    """A sentence for each damaged line, the first few of them."""
    texts = [f"history line {f.line} cannot be read: {f.reason}" for f in faults[:FAULTS_SHOWN]]
    if len(faults) > FAULTS_SHOWN:
        texts.append(f"and {len(faults) - FAULTS_SHOWN} more lines of the history")
    return texts


def same_model(entries: Sequence[Entry], report: tables.Report) -> list[Entry]:
    """The lines about the report's model on its target, in their order."""
    wanted = [tables.plain(report.get(key)) for key in ("name", "target")]
    return [one for one in entries if [one["name"], one["target"]] == wanted]


def commit_of(folder: Path, without: Path) -> str | None:
    """The commit of the repository around a folder, None where there is none.

    Ends in "+changes" where tracked files below the folder, the file `without` aside, differ
    from it.
    """
    git = ["git", "-C", str(folder)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode:
            return None
        top, commit = found.stdout.splitlines()
        aside = without.resolve()
        words = [f":(exclude){aside}"] if aside.is_relative_to(top) else []
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", ".", *words], capture_output=True, check=False
        )
    except (OSError, ValueError):
        return None
    return commit + ("+changes" if changed.returncode else "")
