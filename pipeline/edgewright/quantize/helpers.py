"""Helper processes of calibration: this process works on, they take what samples they can.

Who takes which sample depends on time; the statistics do not (see `calibration.statistics`).
"""

import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from types import TracebackType

import numpy as np

from edgewright.calibration.observe import Sample
from edgewright.calibration.statistics import Statistics, from_arrays
from edgewright.errors import EdgewrightError, EnvironmentMissing, from_wire
from edgewright.runtime import worker

Failure = tuple[int, EdgewrightError]  # index of the sample


class Helpers:
    """No helper at first; `hire` starts some, leaving the context ends them all.

    They belong to this process's group and die with it, so an interrupted build leaves none.
    At most two samples for each of them are in memory.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.threads: list[threading.Thread] = []
        self.waiting: queue.SimpleQueue[Sample | None] = queue.SimpleQueue()
        self.failures: list[Failure] = []
        self.shards: list[list[Statistics]] = []

    def hire(self, count: int, model: int, tensors: list[str], groups: list[list[str]]) -> None:
        """Start helpers that watch the tensors of a model, without waiting for them.

        model: a file descriptor, which they inherit.
        """
        path = f"/proc/self/fd/{model}"
        header = {"op": "watch", "model": path, "tensors": tensors, "groups": groups}
        for _ in range(count):
            # From this thread: the kernel ends a child with the thread that started it.
            process = subprocess.Popen(
                [sys.executable, "-s", "-m", "edgewright.calibration.helper"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[model],
            )
            self.processes.append(process)
            thread = threading.Thread(target=self.attend, args=(process, header), daemon=True)
            thread.start()
            self.threads.append(thread)

    def take(self, sample: Sample) -> bool:
        """Hand the sample over, if a helper will soon be free for it."""
        if self.failures or self.waiting.qsize() >= len(self.processes):
            return False
        self.waiting.put(sample)
        return True

    def finish(self) -> tuple[list[list[Statistics]], list[Failure]]:
        """Wait for all samples handed over; the helpers' statistics, and what failed."""
        for _ in self.threads:
            self.waiting.put(None)
        for thread in self.threads:
            thread.join()
        return self.shards, self.failures

    def attend(self, process: subprocess.Popen[bytes], header: dict) -> None:
        """Feed one helper until the samples end or one of its own fails. Runs in a thread."""
        index = -1
        try:
            ask(process, header, {})
            while (sample := self.waiting.get()) is not None:
                index = sample.index
                ask(process, {"op": "sample", "index": index, "name": sample.name}, sample.feed)
            self.shards.append(from_arrays(ask(process, {"op": "finish"}, {})))
        except EdgewrightError as error:
            self.failures.append((index, error))
        except (EOFError, OSError):
            self.failures.append((index, cause_of_death(process)))
        except Exception as error:  # else this thread would end, and its samples be missing
            found = f"{type(error).__name__}: {error}"[:600]
            self.failures.append((index, EnvironmentMissing("calibration failed", found=found)))

    def __enter__(self) -> "Helpers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for thread in self.threads:
            self.waiting.put(None)
            thread.join()
        for process in self.processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()


def ask(
    process: subprocess.Popen[bytes], header: dict, arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """One message and the arrays of its answer; raises what the helper raised."""
    assert process.stdin is not None and process.stdout is not None
    worker.send(process.stdin, header, list(arrays.items()))
    answer, values = worker.receive(process.stdout)
    if "error" in answer:
        raise from_wire(answer["error"])
    found: dict[str, np.ndarray] = values
    return found


def cause_of_death(process: subprocess.Popen[bytes]) -> EdgewrightError:
    """Why a helper no longer answers."""
    code = process.wait()
    found = signal.Signals(-code).name if code < 0 else f"status {code}"
    if code == -signal.SIGKILL:
        found += ", as the system does when memory runs out"
    return EnvironmentMissing(
        "a helper process of the calibration ended", found=found, hint="free memory, try again"
    )
