"""The measuring machine, here or behind SSH: one measurement at a time, and what it was like."""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgewright.runtime.launch import host_cpu
from edgewright.runtime.ssh import facts as device
from edgewright.runtime.ssh import link
from edgewright.stage import Tell
from edgewright.target import Target

POLL_S = 0.5
THROTTLED_NOW = 0xF  # of the firmware's word on a Raspberry Pi; the bits above tell the past


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


def core_sets(allowed: list[int], threads: int) -> list[frozenset[int]]:
    """Sets of `threads` cores to alternate between; all cores where there are no two such sets.

    The highest first: interrupts tend to be served by the lowest.
    """
    if threads >= len(allowed):
        return [frozenset(allowed)]
    starts = range(len(allowed) - threads, -1, -threads)
    return [frozenset(allowed[k : k + threads]) for k in starts]


def look(target: Target) -> dict[str, Any]:
    """How the machine that runs the target is doing now; the keys of `runtime.ssh.facts`."""
    return link.look(target) if target.run.how == "ssh" else device.facts()


def usable_cores(target: Target, found: dict[str, Any]) -> list[int]:
    """The cores that a measurement may use."""
    cores: list[int] = sorted(target.run.pin) or found["allowed_cores"]
    return cores


def facts(found: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the numbers must know about the machine, of what `look` saw."""
    return {
        "cpu": found["cpu"] or host_cpu(),
        "arch": found["machine"],
        "cores": found["cores"],
        "allowed_cores": found["allowed_cores"],
        "kernel": found["kernel"],
        "python": found["python"],
        **state(found),
    }


def state(found: dict[str, Any]) -> dict[str, Any]:
    """What may change while something is measured; governor and the like where they are told."""
    told: dict[str, Any] = {"load_average": found["load_average"]}
    for name, key in (("governor", "governors"), ("frequency_limit_khz", "frequency_limits")):
        if found[key]:
            told[name] = ", ".join(sorted(set(found[key].values())))
    if found["temperatures_c"]:
        told["hottest_c"] = max(found["temperatures_c"].values())
    if found["throttled"]:
        told["throttled"] = found["throttled"]
    return told


def unsteady(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Why times taken between two looks cannot be trusted; None where nothing speaks against it."""
    for key, what in (
        ("governors", "the CPU's governor"),
        ("frequency_limits", "the CPU's frequency limit"),
        ("throttled", "the CPU's count of throttling"),
    ):
        for part in sorted({*before[key], *after[key]}):
            was, now = (table[key].get(part, "none") for table in (before, after))
            if was != now:
                return f"{what} changed from {was} to {now} ({part}) during the measurement"
    word = after["throttled"].get("firmware", "0").removeprefix("throttled=")
    try:
        throttled = int(word, 16) & THROTTLED_NOW
    except ValueError:
        return None
    return f"the firmware holds the CPU back ({word})" if throttled else None
