"""This process and what it started: signals as exceptions, and no child left behind."""

import ctypes
import os
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType

PR_SET_CHILD_SUBREAPER = 36


class Stopped(BaseException):
    """Somebody wants this process to end: `code` is the exit code for it, `word` how it was said.

    Not a KeyboardInterrupt: libraries answer that one in ways of their own.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        interrupted = number == signal.SIGINT
        self.code = 130 if interrupted else 143
        self.word = "interrupted" if interrupted else "terminated"


def catch_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP end the work by an exception, once; then let it tidy up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def arrived(number: int, frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    for number in numbers:
        # A shell starts background jobs with SIGINT ignored, nohup with SIGHUP: leave that.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, arrived)


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent dies (Linux), so that they can be ended."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_children() -> None:
    """Kill every process this one started or adopted, and theirs as they are adopted."""
    while pids := children():
        for pid in pids:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def children() -> list[int]:
    """Process ids of the living and dead children of all threads of this process."""
    found: list[int] = []
    for listing in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found += [int(pid) for pid in listing.read_text().split()]
    return found
