"""The C runner inside the bundle, on request (`release.runner` of the recipe).

It runs the model and checks its golden vectors on a device that has ONNX Runtime's library but no
Python: `cd /opt/keyword/current && bin/edge-run @bin/edge-run.options`. It is compiled here, never
taken from what was compiled before, so that the compiler that the provenance names is the one that
made it. It proves the golden vectors before it ships, unless the device is behind SSH.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgewright import keys
from edgewright.bundle import manifest
from edgewright.errors import BadInput, EnvironmentMissing
from edgewright.runtime import emulator, toolchain
from edgewright.runtime.providers import CPU
from edgewright.stage import Job
from edgewright.target import Target

Json = dict[str, Any]
Files = dict[str, bytes | Path]
GLIBC = re.compile(rb"GLIBC_([0-9]{1,3})\.([0-9]{1,3})(?:\.[0-9]+)?\0")
CHECK_ONLY = ("--warm-up", "0", "--runs", "0")
DIFFERENT = 1  # the runner's exit code; its others are ours


@dataclass(frozen=True, kw_only=True)
class Runner:
    """What the bundle holds of it; nothing where it was not asked for or is left out.

    row: the manifest's `runner`. tools: what compiled it: use, version, SHA-256.
    """

    row: Json | None = None
    files: Files = field(default_factory=dict)
    tools: Sequence[tuple[str, str, str]] = ()
    notes: Sequence[Json] = ()


def make(job: Job, facts: manifest.Manifest, files: Files) -> Runner:
    """Compile the runner for the target, write its options, let it prove the golden vectors.

    facts, files: the bundle's so far. EnvironmentMissing without a compiler; BadInput where the
    runner cannot run the model, or gets other outputs.
    """
    if not job.recipe.release.runner:
        return Runner()
    tools = keys.runner_tools(job.recipe, job.target)
    if not tools:
        why = f"it has {CPU} alone, the target runs {job.target.runtime.provider}"
        return Runner(notes=(note("warning", f"{manifest.RUNNER} is left out: {why}"),))
    job.tell("compiling the runner")
    program = compiled(job)
    made: Files = {manifest.RUNNER: program, manifest.RUNNER_OPTIONS: options(facts)}
    row = {
        "path": manifest.RUNNER,
        "options": [manifest.RUNNER_OPTIONS],
        "glibc": oldest_glibc(program),
    }
    notes: list[Json] = []
    if job.target.run.how == "ssh":
        text = f"{manifest.RUNNER} was not run: no program is started on the device but Python"
        notes.append(note("warning", text))
    else:
        job.tell("golden vectors without Python")
        prove(job, {**files, **made})
    return Runner(row=row, files=made, tools=tools, notes=notes)


def compiled(job: Job) -> bytes:
    """The program for the target's architecture."""
    place = job.folder / "edge-run"
    toolchain.compile_runner(job.target.device.arch, place)
    program = place.read_bytes()
    place.unlink()
    return program


def note(level: str, text: str) -> Json:
    return {"level": level, "text": text}


def options(facts: manifest.Manifest) -> bytes:
    """The runner's words for a model, a line each; files by their place in the bundle.

    facts: `model`, `golden` and `runtime` of a manifest.
    """
    runtime, golden = facts["runtime"], facts["golden"]
    words = ["--model", facts["model"]["path"]]
    words += ["--inputs", golden["inputs"], "--expect", golden["outputs"]]
    for row in golden["tolerances"]:
        near = f"{row['atol']!r}:{row['rtol']!r}:{row['min_equal']!r}"
        words += ["--tolerance", f"{row['output']}={near}"]
    words += ["--threads", str(runtime["threads"])]
    for key, value in sorted(runtime["session"].items()):
        words += ["--config", f"{key}={value}"]
    return "".join(f"{word}\n" for word in words).encode()


def oldest_glibc(program: bytes) -> str | None:
    """The version of the C library that a program's symbols ask for, None where none is."""
    found = [(int(major), int(minor)) for major, minor in GLIBC.findall(program)]
    return "{}.{}".format(*max(found)) if found else None


def prove(job: Job, files: Files) -> None:
    """Run the runner on the golden vectors as a device would, from an unpacked bundle."""
    named = (manifest.MODEL, manifest.GOLDEN_INPUTS, manifest.GOLDEN_OUTPUTS)
    with tempfile.TemporaryDirectory(prefix="release-", dir=job.folder) as name:
        folder = Path(name)
        for path in (*named, manifest.RUNNER, manifest.RUNNER_OPTIONS):
            place, source = folder / path, files[path]
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, Path):
                place.symlink_to(source.resolve())
            else:
                place.write_bytes(source)
        (folder / manifest.RUNNER).chmod(0o755)
        ran = run(job.target, folder)
    if ran.returncode == 0:
        return
    said = (ran.stderr.strip().splitlines() or ["no message"])[0][:300]
    if ran.returncode in (DIFFERENT, BadInput.exit_code):
        raise BadInput(
            f"{manifest.RUNNER} does not get the golden outputs of this model",
            expected="what the target's runtime gives in Python, within the tolerances",
            found=said.removeprefix("edge-run: "),
            hint="leave release.runner out of the recipe; the rest of the bundle is not at fault",
        )
    raise EnvironmentMissing(
        f"{manifest.RUNNER} cannot be run here to prove it",
        found=f"status {ran.returncode}: {said.removeprefix('edge-run: ')}",
    )


def run(target: Target, folder: Path) -> "subprocess.CompletedProcess[str]":
    """The runner's one check of all golden vectors in an unpacked bundle, here or emulated."""
    before: tuple[str, ...] = ()
    environment = dict(os.environ)
    if target.run.how == "emulate":
        before, library = emulator.program(target), emulator.library(target)
        environment = {}  # this machine's may name libraries of another architecture
    else:
        library = toolchain.host_library()
    words = [*before, manifest.RUNNER, f"@{manifest.RUNNER_OPTIONS}", "--library", str(library)]
    what = f"proving the golden vectors with {manifest.RUNNER}"
    return toolchain.run_to_end([*words, *CHECK_ONLY], folder, environment, what)
