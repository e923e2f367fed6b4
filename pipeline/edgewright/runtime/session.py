"""A session in a child process: the parent's side of `worker.py`."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from edgewright.errors import BadInput, EdgewrightError, EnvironmentMissing, from_wire
from edgewright.runtime import worker

if TYPE_CHECKING:
    import numpy as np  # an install starts a child before it has anything to compute

WORKER = Path(worker.__file__)
# Inside the single-file device program the worker is no file: the program itself is started.
WORDS = (str(WORKER),) if WORKER.is_file() else (str(WORKER.parents[2]), "worker")
RUN_TIMEOUT_S = 600.0
LOAD_TIMEOUT_S = 600.0
ADDRESS_SPACE = 64 << 30  # bytes; stops a tensor of terabytes, not a normal model
# CUDA maps all memory of host and GPUs at once, so no limit on address space can stand.
NVIDIA = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


def address_space(provider: str) -> int:
    """RLIMIT_AS in bytes of a process that runs the provider, 0 for none."""
    return 0 if provider in NVIDIA else ADDRESS_SPACE


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a Python process for the target is started: command before the script, environment.

    `worker`: the script, as words after `python`. `address_space`: RLIMIT_AS of the child in
    bytes, 0 where an emulator or CUDA reserves more. `remote`: the child is a bridge to the
    process. `engines`: a folder for the engines that a provider builds, None where each session
    builds its own.
    """

    python: tuple[str, ...] = (sys.executable, "-s")
    worker: tuple[str, ...] = WORDS
    env: Mapping[str, str] | None = None
    address_space: int = ADDRESS_SPACE
    time_factor: float = 1.0
    remote: bool = False
    engines: Path | None = None


def plain(text: str) -> str:
    """The runtime's message on one line, without codes and positions in its C++ source."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(text.split()))
    text = re.sub(r"/\S+:\d+ .*\[OpenVINO-EP\] ", "OpenVINO: ", text)
    return re.sub(r"/\S+:\d+ .*?\) (?=[A-Z])", "", text)


class Child:
    """A worker's process, not yet given a model. `early`: it loads its runtime meanwhile."""

    def __init__(self, launch: Launch, early: bool = False) -> None:
        self.launch = launch
        env = {
            **(launch.env if launch.env is not None else os.environ),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self.begin = time.perf_counter()
        self.process = subprocess.Popen(
            [*launch.python, *launch.worker, str(launch.address_space), *["early"][:early]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=env,
            start_new_session=True,
        )

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process; safe to call twice."""
        if self.process.poll() is None:
            self.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self.log.close()


class Session:
    """One ONNX Runtime session in a child process with limits.

    Raises BadInput when the model or a feed is refused, EnvironmentMissing when the provider
    is absent or the process dies of a signal such as SIGILL.
    """

    def __init__(
        self,
        model: Path,
        *,
        launch: Launch | None = None,
        cores: frozenset[int] | None = None,
        name: str = "",
        load_seconds: float = 0,
        child: Child | None = None,
        **options: Any,
    ) -> None:
        self.launch = launch or Launch()
        self.name = name or Path(model).name
        self.timed_out = False
        self.child = child or Child(self.launch)
        self.process, self.log = self.child.process, self.child.log
        if self.launch.remote:
            options |= {"name": self.name, "cores": sorted(cores or ())}
        elif cores is not None:
            os.sched_setaffinity(self.process.pid, cores)
        try:
            self.info = self.ask(
                {"op": "load", "model": str(model), **options},
                seconds=load_seconds or LOAD_TIMEOUT_S * self.launch.time_factor,
            )[0]
        except BaseException:
            self.close()
            raise
        # From process start to a loaded model; a remote process counts from its own start.
        self.ready_s = self.info.get("ready_s") or time.perf_counter() - self.child.begin

    def ask(
        self, header: dict[str, Any], arrays: Mapping[str, "np.ndarray"] = {}, seconds: float = 0
    ) -> tuple[dict[str, Any], dict[str, "np.ndarray"]]:
        """Send one request and wait for its answer, at most `seconds`."""
        seconds = seconds or RUN_TIMEOUT_S * self.launch.time_factor
        assert self.process.stdin is not None and self.process.stdout is not None
        timer = threading.Timer(seconds, self.kill_late)
        timer.daemon = True
        timer.start()
        try:
            worker.send(self.process.stdin, header, list(arrays.items()))
            answer, values = worker.receive(self.process.stdout)
        except (EOFError, BrokenPipeError):
            raise self.cause_of_death(seconds) from None
        finally:
            timer.cancel()
        if "error" in answer:
            raise self.refusal(answer["error"])
        return answer, values

    def run(
        self, feeds: Mapping[str, Any], outputs: list[str] | None = None, seconds: float = 0
    ) -> list["np.ndarray"]:
        """Run the model once; the outputs in the model's order (or the order asked for)."""
        import numpy as np

        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        return list(self.ask({"op": "run", "outputs": outputs}, arrays, seconds)[1].values())

    def keep_feeds(self, feeds: list[dict[str, "np.ndarray"]]) -> None:
        """Give the child the inputs that `slice`, `memory` and `profile` cycle through."""
        for k, feed in enumerate(feeds):
            self.ask({"op": "feeds", "first": k == 0}, feed)

    def kill_late(self) -> None:
        self.timed_out = True
        self.child.kill()

    def cause_of_death(self, seconds: float) -> EdgewrightError:
        """Why the child no longer answers."""
        code = self.process.wait()
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip()[-400:]
        if self.timed_out:
            return BadInput(
                f"running {self.name} took more than {seconds:.0f} s and was stopped",
                hint="check the model for loops that do not end, or for sizes far above typical",
            )
        if code == -signal.SIGKILL:
            return EnvironmentMissing(
                f"the process running {self.name} was killed",
                found="SIGKILL, as the system does when memory runs out",
                hint="free memory or use a smaller input",
            )
        if code < 0:
            return EnvironmentMissing(
                f"the process running {self.name} died of {signal.Signals(-code).name}",
                found=said or "no message",
                hint="the target profile may promise instructions that the CPU lacks; "
                "see `edgewright doctor`",
            )
        return EnvironmentMissing(
            f"the process running {self.name} ended with status {code}",
            found=said or "no message",
            hint="see `edgewright doctor`",
        )

    def refusal(self, error: dict[str, str]) -> EdgewrightError:
        """The child's error as one of ours; a bridge sends its own as they are."""
        if self.launch.remote and error.get("ours"):
            return from_wire(error)
        if error["kind"] in ("LookupError", "ModuleNotFoundError", "ImportError"):
            return EnvironmentMissing(
                error["text"], hint="install an onnxruntime that has it, or choose another target"
            )
        text = plain(error["text"])[:600]
        if error["kind"] in ("MemoryError",) or "bad allocation" in text or "bad_alloc" in text:
            return BadInput(
                f"{self.name} needs more memory than the limit of its process",
                found=text,
                hint="check the sizes in the model",
            )
        return BadInput(f"the runtime refused {self.name}", found=f"{error['kind']}: {text}")

    def close(self) -> None:
        """End the child; safe to call twice."""
        self.child.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
