"""What a stage gets and gives back, and the limited child process that each stage runs in.

A stage is a function `run(job) -> report`: frozen settings and files in, files in `job.folder`
and a report (JSON data) out. Stages run in a child of their own: a model that crashes, hangs or
swallows memory takes the stage down, never the build, and the peak memory of a stage is known.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edgewright import errors
from edgewright.errors import BadInput, EdgewrightError, EnvironmentMissing
from edgewright.recipe import Recipe, parse_recipe
from edgewright.target import Target, parse_target

Report = dict[str, Any]


class Tell(Protocol):
    """Progress: what is being done, how far it is, of how much (0: not known)."""

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None: ...


def say_nothing(text: str, done: int = 0, total: int = 0) -> None:
    """Progress that nobody watches."""


ADDRESS_SPACE = int(os.environ.get("EDGEWRIGHT_ADDRESS_SPACE", 64 << 30))
# Threads of numpy's BLAS wait for each other by spinning: on two busy cores two of them took 2.3 s
# for moments of 768 channels, one 0.5 s. One also sums in the same order on every machine.
CHILD = {"OPENBLAS_NUM_THREADS": "1"}  # the user's own value stands before it
TIMEOUT_S = float(os.environ.get("EDGEWRIGHT_STAGE_TIMEOUT_S", 3 * 3600))


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a stage may look at.

    recipe, target: the settings. folder: where the stage writes; empty at the start.
    model: the model of the stage before, None for the first. models: model files of the
    finished stages by stage name. reports: their reports by stage name. unfinished: a folder
    that outlives a killed stage and is handed to the same work again; None where nothing is kept.
    """

    recipe: Recipe
    target: Target
    folder: Path
    model: Path | None = None
    models: dict[str, Path] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)
    unfinished: Path | None = None
    tell: Tell = say_nothing

    def input_model(self) -> Path:
        """The model to work on."""
        if self.model is None:
            raise BadInput("this stage needs a model", found="none")
        return self.model

    def output_model(self) -> Path:
        """Where the stage writes its model."""
        return self.folder / "model.onnx"


def run_in_child(stage: str, job: Job, tell: Callable[[str, int, int], None]) -> Report:
    """Run the stage module `edgewright.<stage>` on the job in a limited child process.

    Returns the report with `seconds` and `peak_rss_bytes` added. Raises what the stage raised.
    """
    request = {
        "stage": stage,
        "recipe": job.recipe.raw,
        "recipe_folder": str(job.recipe.folder),
        "target": job.target.raw,
        "folder": str(job.folder),
        "model": str(job.model) if job.model else None,
        "models": {k: str(v) for k, v in job.models.items()},
        "reports": job.reports,
        "unfinished": str(job.unfinished) if job.unfinished else None,
        "parent": os.getpid(),
    }
    begin = time.monotonic()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-s", "-m", "edgewright.stage"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**CHILD, **os.environ, "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        late = threading.Event()

        def stop_late() -> None:
            late.set()
            kill_group(child.pid)

        timer = threading.Timer(TIMEOUT_S, stop_late)
        timer.daemon = True
        timer.start()
        answer: dict[str, Any] | None = None
        try:
            assert child.stdin is not None and child.stdout is not None
            try:
                child.stdin.write(json.dumps(request).encode())
                child.stdin.close()
            except BrokenPipeError:
                pass  # the child died at once; its status is told below
            for line in child.stdout:
                event = json.loads(line)
                if "progress" in event:
                    tell(event["progress"], event["done"], event["total"])
                else:
                    answer = event
            child.wait()
        finally:
            timer.cancel()
            kill_group(child.pid)
            child.wait()
        if answer is None:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()[-3:]
            raise death(stage, child.returncode, late.is_set(), " | ".join(said))
    if "error" in answer:
        raise errors.from_wire(answer["error"])
    report: Report = answer["report"]
    return {
        **report,
        "seconds": round(time.monotonic() - begin, 3),
        "peak_rss_bytes": answer["peak_rss_bytes"],
    }


def death(stage: str, code: int, late: bool, said: str) -> EdgewrightError:
    """Why a stage's process ended without an answer."""
    if late:
        return BadInput(
            f"stage {stage} took more than {TIMEOUT_S:.0f} s and was stopped",
            hint="check the model for loops that do not end; EDGEWRIGHT_STAGE_TIMEOUT_S raises it",
        )
    if code == -signal.SIGKILL:
        return EnvironmentMissing(
            f"stage {stage} was killed",
            found="SIGKILL, as the system does when memory runs out",
            hint="free memory or use fewer or smaller inputs",
        )
    name = signal.Signals(-code).name if code < 0 else f"status {code}"
    return BadInput(
        f"stage {stage} crashed on this input ({name})",
        found=said or "no message",
        hint="inspect the model with `edgewright inspect`",
    )


def kill_group(pid: int) -> None:
    """End a child and everything it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to end this process when its parent dies (Linux; PR_SET_PDEATHSIG = 1)."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def answers_on_stdout() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Keep the real standard output for JSON lines; prints of libraries go to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(event: dict[str, Any]) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    try:
        yield say
    finally:
        out.close()


def child_main() -> int:
    """Entry of the child: job on standard input, JSON lines on standard output."""
    request = json.load(sys.stdin)
    die_with_parent(request["parent"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if ADDRESS_SPACE:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    with answers_on_stdout() as say:
        try:
            job = Job(
                recipe=parse_recipe(request["recipe"], Path(request["recipe_folder"])),
                target=parse_target(request["target"]),
                folder=Path(request["folder"]),
                model=Path(request["model"]) if request["model"] else None,
                models={k: Path(v) for k, v in request["models"].items()},
                reports=request["reports"],
                unfinished=Path(request["unfinished"]) if request["unfinished"] else None,
                tell=lambda text, done=0, total=0: say(
                    {"progress": text, "done": done, "total": total}
                ),
            )
            report = importlib.import_module(f"edgewright.{request['stage']}").run(job)
            say({"report": report, "peak_rss_bytes": peak_rss_bytes()})
        except Exception as error:
            say({"error": errors.to_wire(as_ours(error, request["stage"]))})
    return 0


def peak_rss_bytes() -> int:
    """Peak resident memory of this process and, if larger, of its largest child."""
    own, children = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return 1024 * max(own, children)


def as_ours(error: Exception, stage: str) -> EdgewrightError:
    """Any exception of a stage as a message; the traceback goes to the stage's log only."""
    if isinstance(error, EdgewrightError):
        return error
    traceback.print_exc()
    if isinstance(error, OSError) and error.errno is not None:
        return errors.from_os_error(error, f"running stage {stage}")
    if isinstance(error, MemoryError):
        return BadInput(
            f"stage {stage} needs more memory than its limit",
            found=f"over {ADDRESS_SPACE >> 30} GiB of address space",
            hint="check the sizes in the model; EDGEWRIGHT_ADDRESS_SPACE raises the limit",
        )
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:400]
    return BadInput(
        f"stage {stage} cannot process this input",
        found=f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})",
        hint="inspect the model with `edgewright inspect`; if it looks right, report this line",
    )


if __name__ == "__main__":
    sys.exit(child_main())
