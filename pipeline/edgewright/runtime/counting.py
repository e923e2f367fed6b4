"""Instructions of one inference on an emulated CPU, counted exactly, by class of opcode.

QEMU runs the C runner with our plug-in, which counts what is executed between two markers around
the call (see `native/`). Emulated time says nothing of a device; these counts are the same on
every host and in every run, to the digit for int8 models, so a gate can hold a model to them.
They see neither caches nor memory, so they are a cost, not a latency.

One thread, with the runtime's arena: threads that wait by spinning, and malloc's searches, make
counts vary. The first calls are dropped, as they allocate; now and then a later one adds some
hundred instructions, as the runtime looks at the clock, so the value most of them have counts.
"""

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.errors import BadInput, EdgewrightError, EnvironmentMissing
from edgewright.runtime import emulator, toolchain
from edgewright.target import Target

RUNS, DROPPED, LEAST_KEPT = 8, 3, 2
LIMIT_S = 30.0  # slow models are run fewer times
# Every freed block is kept by its size, so that malloc's work does not depend on what went before.
MALLOC = "GLIBC_TUNABLES=glibc.malloc.tcache_max=4194304:glibc.malloc.tcache_count=127"
CLASSES = ("dot", "i8mm", "mlal", "fmla", "simd", "sve", "memory", "branch", "other")


@dataclass(frozen=True)
class Counts:
    """Instructions between the markers.

    runs: totals of the kept runs. classes: of a run with `total`; empty for targets whose
    instructions the plug-in does not tell apart (x86).
    """

    runs: tuple[int, ...]
    classes: dict[str, int]

    @property
    def total(self) -> int:
        """The number that most runs have, the smallest of those."""
        return min(self.runs, key=lambda value: (-self.runs.count(value), value))

    @property
    def equal(self) -> int:
        """How many runs have it."""
        return self.runs.count(self.total)


def count(model: Path, feed: Mapping[str, np.ndarray], target: Target, runs: int = RUNS) -> Counts:
    """Count up to `runs` inferences of a model on an emulated target; the first are dropped.

    EnvironmentMissing says what this machine lacks; BadInput is what the runner says of the model.
    """
    arch = target.device.arch
    with tempfile.TemporaryDirectory(prefix="edgewright-count-") as name:
        folder = Path(name)
        arrays: dict[str, Any] = {f"{k}__000": v for k, v in feed.items()}
        np.savez(folder / "inputs.npz", **arrays)
        # By relative names: a comma in a path ends an argument of a plug-in, and a path is part of
        # what the program works on. The model's whole folder, as it may have data beside it.
        (folder / "count.so").symlink_to(toolchain.plugin())
        (folder / "model").symlink_to(model.resolve().parent)
        (folder / "edge-run").symlink_to(toolchain.runner(arch))
        (folder / "libonnxruntime.so").symlink_to(emulator.library(target))
        words = [
            *emulator.program(
                target, "-plugin", f"./count.so,out=counts.json,arch={arch}", "-E", MALLOC
            ),
            "./edge-run",
            *("--library", "./libonnxruntime.so"),
            *("--model", f"model/{model.resolve().name}", "--inputs", "inputs.npz"),
            *("--warm-up", "0", "--runs", str(runs), "--limit", str(LIMIT_S)),
        ]
        for key, value in target.runtime.session.items():
            words += ["--config", f"{key}={value}"]
        # With nothing of this machine's environment.
        what = f"counting the instructions of {model.name}"
        ran = toolchain.run_to_end(words, folder, {}, what)
        counts = folder / "counts.json"
        if ran.returncode or not counts.is_file():
            raise failure(ran, model.name, target)
        return parse(json.loads(counts.read_text()), arch)


def failure(ran: "subprocess.CompletedProcess[str]", name: str, target: Target) -> EdgewrightError:
    """Why there are no counts: the emulator, the runner, or the model."""
    said = (ran.stderr.strip().splitlines() or ["no message"])[0][:300]
    if "option 'plugin'" in said or ("plugin" in said and not said.startswith("edge-run")):
        version = emulator.qemu_version(target.device.arch)
        return EnvironmentMissing(
            f"this QEMU ({version}) does not take our plug-in for counting instructions",
            expected="a dynamic qemu-user with plug-ins of version 1, as Debian 12 has it (7.2)",
            found=said,
        )
    if ran.returncode == BadInput.exit_code:
        return BadInput(f"the runner refused {name}", found=said.removeprefix("edge-run: "))
    return EnvironmentMissing(
        f"counting the instructions of {name} failed",
        found=f"status {ran.returncode}: {said.removeprefix('edge-run: ')}",
    )


def parse(found: dict[str, Any], arch: str) -> Counts:
    """The plug-in's snapshots, two for each run, as counts."""
    names, marks = found["classes"], np.array(found["marks"], dtype=np.int64)
    if tuple(names) != CLASSES or marks.ndim != 2 or len(marks) % 2 or len(marks) <= 2 * LEAST_KEPT:
        raise EnvironmentMissing(
            "the plug-in did not see every run",
            expected=f"two markers each, with {len(CLASSES)} classes",
            found=f"{len(marks)} markers, with {len(names)} classes",
        )
    each = marks[1::2] - marks[::2]
    each = each[min(DROPPED, len(each) - LEAST_KEPT) :]
    counts = Counts(tuple(each.sum(axis=1).tolist()), {})
    if arch != "aarch64":
        return counts
    typical = each[counts.runs.index(counts.total)]
    return replace(counts, classes=dict(zip(CLASSES, typical.tolist(), strict=True)))
