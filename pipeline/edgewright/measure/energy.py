"""Joules of an inference, where a meter can be read; never an estimate.

The meter is the CPU's own (RAPL, through the kernel's powercap files, in microjoules). It counts
the packages, not the board and not what the wall pays, and all that runs on them: what the idle
machine takes is told beside it and subtracted.
"""

import time
from pathlib import Path
from typing import Any

from edgewright.measure.race import CANDIDATE, ask
from edgewright.runtime.session import Session

POWERCAP = Path("/sys/class/powercap")
IDLE_S, RUN_S = 1.0, 3.0


def rails(root: Path = POWERCAP) -> dict[str, Path]:
    """The readable packages of a meter by name; parts of packages are within them."""
    found = {}
    for folder in sorted(root.glob("intel-rapl:*")):
        if folder.name.count(":") != 1:
            continue
        try:
            (folder / "energy_uj").read_text()
            found[(folder / "name").read_text().strip()] = folder
        except OSError:
            continue  # only root may read it on most systems
    return found


def joules(before: dict[str, int], after: dict[str, int], folders: dict[str, Path]) -> float:
    """Energy between two readings of the counters, which start again at their range."""
    total = 0
    for name, folder in folders.items():
        spent = after[name] - before[name]
        if spent < 0:
            spent += int((folder / "max_energy_range_uj").read_text())
        total += spent
    return total / 1e6


def reading(folders: dict[str, Path]) -> dict[str, int]:
    """The counters in microjoules."""
    return {name: int((folder / "energy_uj").read_text()) for name, folder in folders.items()}


def energy(session: Session, root: Path = POWERCAP) -> tuple[dict[str, Any] | None, str | None]:
    """Joules of a call of a warm session that has its feeds; else None and the reason."""
    folders = rails(root)
    if not folders:
        return None, "no energy meter can be read on this machine (RAPL powercap)"
    begin, idle_before = time.monotonic(), reading(folders)
    time.sleep(IDLE_S)
    idle_w = joules(idle_before, reading(folders), folders) / (time.monotonic() - begin)
    begin, before = time.monotonic(), reading(folders)
    answer = ask(CANDIDATE, session, {"op": "slice", "seconds": RUN_S})
    seconds = time.monotonic() - begin
    spent = joules(before, reading(folders), folders)
    calls = len(answer["wall_s"])
    return {
        "meter": "RAPL powercap",
        "rails": sorted(folders),
        "joules_per_call": spent / calls,
        "joules_per_call_above_idle": (spent - idle_w * seconds) / calls,
        "idle_watts": idle_w,
        "seconds": seconds,
        "calls": calls,
        "remark": "of the CPU packages, not at the wall: not comparable with MLPerf Power",
    }, None
