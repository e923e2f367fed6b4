#!/usr/bin/env python3
"""This working tree against an older commit, piece by piece, in turns: which is slower?

    python bench/compare.py OLDREF [PIECE ...] [--launches 5] [--rounds 4] [--json FILE]

Stored times of another day or machine say nothing, so both versions run now: for each piece (see
bench/pieces.py) and launch a process of each, one at work while the other waits, in random order.
From the paired log-ratios of CPU time come the ratio and its bounds as the gate has them
(measure/statistics.py). Slower, or faster, is said only where the bounds are beyond the margin.
Exit code: 0, 1 where a piece is slower, 2 where OLDREF is none.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pieces import PIECES

from edgewright.measure.statistics import launch_ratio

MARGIN = 0.02
PIECES_FILE = Path(__file__).with_name("pieces.py")
Row = dict[str, Any]


class Side:
    """A process with one version's code that does a piece when told to."""

    def __init__(self, code: Path, piece: str) -> None:
        # Its errors go to a file: a full pipe would stop it.
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, str(PIECES_FILE), piece],
            env={**os.environ, "PYTHONPATH": str(code / "pipeline"), "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def ready(self) -> str:
        """Wait until the piece is; why it never will be, "" where all is well."""
        assert self.process.stdout is not None
        if self.process.stdout.readline() == "ready\n":
            return ""
        self.process.wait()
        self.log.seek(0)
        return (self.log.read().strip().splitlines() or ["it ended without a word"])[-1][:300]

    def once(self) -> dict[str, float] | None:
        """Seconds of one time; None where the process ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        """End the process; it removes its folder."""
        self.process.communicate()
        self.log.close()


def compared(piece: str, old: Path, new: Path, launches: int, rounds: int) -> Row:
    """One piece on both versions: ratio new / old with bounds, or why there is none."""
    order = random.Random(piece)
    logs: list[list[float]] = []
    raw: list[list[dict[str, Any]]] = []
    for _ in range(launches):
        sides = {"old": Side(old, piece), "new": Side(new, piece)}
        try:
            for name, side in sides.items():
                if why := side.ready():
                    return {"piece": piece, "verdict": "not compared", "reason": f"{name}: {why}"}
            pairs = []
            for turn in range(rounds + 1):
                names = order.sample(list(sides), 2)
                times = {name: sides[name].once() for name in names}
                if None in times.values():
                    ended = " and ".join(name for name in names if times[name] is None)
                    reason = f"{ended}: {sides[ended.split()[0]].ready()}"
                    return {"piece": piece, "verdict": "not compared", "reason": reason}
                if turn:  # the first one fills caches
                    pairs.append(times)
        finally:
            for side in sides.values():
                side.close()
        logs.append([math.log(p["new"]["cpu_s"] / p["old"]["cpu_s"]) for p in pairs])
        raw.append(pairs)
    found = launch_ratio(logs)
    return {"piece": piece, "verdict": verdict(found), **found, "raw": raw}


def verdict(found: dict[str, float | None]) -> str:
    """What the bounds prove: slower, faster, or neither."""
    low, high = found["low"], found["high"]
    if low is not None and low > 1 + MARGIN:
        return "slower"
    if high is not None and high < 1 / (1 + MARGIN):
        return "faster"
    return "no difference proven"


def checkout(root: Path, ref: str, folder: Path) -> str:
    """Put the package of a commit into `folder`; the commit, "" where there is no such one."""
    git = ["git", "-C", str(root)]
    words = [*git, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"]
    commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    if commit:
        # Not a worktree: a killed run would leave it behind in the repository.
        archive = [*git, "archive", commit, "pipeline", "targets"]
        packed = subprocess.run(archive, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", str(folder)], input=packed, check=True)
    return commit


def show(row: Row) -> None:
    """One line for people."""
    if "ratio" not in row:
        print(f"{row['piece']:<12} {row['verdict']}: {row['reason']}", flush=True)
        return
    bounds = [f"{row[k]:.3f}" if row[k] is not None else "?" for k in ("low", "high")]
    new = sorted(pair["new"]["cpu_s"] for launch in row["raw"] for pair in launch)
    print(
        f"{row['piece']:<12} new / old {row['ratio']:.3f} ({' to '.join(bounds)}), "
        f"{1e3 * new[len(new) // 2]:.0f} ms of CPU: {row['verdict']}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", metavar="OLDREF")
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=", ".join(PIECES))
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    if unknown := set(asked.pieces) - set(PIECES):
        parser.error(f"unknown piece {', '.join(sorted(unknown))}; known: {', '.join(PIECES)}")
    with tempfile.TemporaryDirectory(prefix="edgewright-old-") as folder:
        commit = checkout(asked.root, asked.old, Path(folder))
        if not commit:
            parser.error(f"no commit {asked.old} in {asked.root}")
        print(f"working tree against {commit[:12]}, CPU time, 95 % bounds", flush=True)
        rows = []
        for piece in asked.pieces or PIECES:
            sides = (Path(folder), asked.root)
            rows.append(compared(piece, *sides, asked.launches, asked.rounds))
            show(rows[-1])
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps({"old": commit, "pieces": rows}, indent=1) + "\n")
    return int(any(row["verdict"] == "slower" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
