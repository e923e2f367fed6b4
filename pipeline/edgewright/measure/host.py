"""The measuring machine: one measurement at a time, and the facts that belong to its numbers."""

import fcntl
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgewright.runtime.launch import host_cpu
from edgewright.stage import Tell

POLL_S = 0.5


def lock_path() -> Path:
    """The lock file of this user; a name per user, since no other could open it."""
    return Path(tempfile.gettempdir()) / f"edgewright-measure-{os.getuid()}.lock"


@contextmanager
def exclusive(tell: Tell) -> Iterator[None]:
    """Hold the machine's measuring lock; waits, and says so, while another measurement runs.

    The file stays: removing it would let two processes lock two different files of one name.
    """
    path = lock_path()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    tell(f"waiting for another measurement on this machine ({path})", 0, 0)
                    told = True
                time.sleep(POLL_S)
        yield
    finally:
        os.close(handle)


def allowed_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def core_sets(allowed: list[int], threads: int) -> list[frozenset[int]]:
    """Sets of `threads` cores to alternate between; all cores where there are no two such sets.

    The highest first: interrupts tend to be served by the lowest.
    """
    if threads >= len(allowed):
        return [frozenset(allowed)]
    starts = range(len(allowed) - threads, -1, -threads)
    return [frozenset(allowed[k : k + threads]) for k in starts]


def steal_ticks() -> int:
    """Clock ticks that a hypervisor gave to others, over all cores since boot; 0 if unknown."""
    try:
        return int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8])
    except (OSError, IndexError, ValueError):
        return 0


def facts() -> dict[str, Any]:
    """What a reader of the numbers must know about the machine."""
    return {
        "cpu": host_cpu(),
        "arch": platform.machine(),
        "cores": os.cpu_count(),
        "allowed_cores": allowed_cores(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
