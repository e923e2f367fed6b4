"""Cache keys: the digest of everything that can change what a stage makes.

A key covers our own code, the versions of the libraries, the settings the stage depends on, the
user's files, and the models and reports of earlier stages. It never covers times of files.
"""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from edgewright.data import file_digest, source_digest
from edgewright.errors import BadInput
from edgewright.recipe import Recipe
from edgewright.runtime import emulator, toolchain
from edgewright.runtime.launch import host_cpu, host_isa
from edgewright.runtime.providers import CPU, runtime_packages
from edgewright.runtime.ssh import link
from edgewright.sidecars import external_data
from edgewright.target import Target

PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "sympy")
VOLATILE = ("seconds", "peak_rss_bytes")  # of a report; the rest decides what follows from it


@cache
def code_digest() -> str:
    """Digest of the files of this package, profiles aside (they are settings)."""
    root = Path(__file__).parent
    whole = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and "__pycache__" not in name and not name.startswith("targets/"):
            whole.update(f"{name}\0{file_digest(path)}\n".encode())
    return whole.hexdigest()


def versions(recipe: Recipe) -> dict[str, str]:
    """Versions of what computes; torch only where the model is made or trained by it."""
    trains = recipe.recover is not None and recipe.recover.method == "distill"
    if (prune := recipe.prune) is not None:
        trains = trains or bool(prune.soft) or prune.criterion in ("taylor", "fisher")
    names = [*PACKAGES, *(["torch"] if trains or ".py:" in recipe.model.source else [])]
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


FACTS: dict[str, Callable[[Recipe, Target], Any]] = {
    "recipe": lambda recipe, _: recipe.raw,
    "release": lambda recipe, _: [
        recipe.model.name,
        recipe.model.version,
        asdict(recipe.release),
        content(recipe, recipe.release.license_file) if recipe.release.license_file else "",
    ],
    "inputs": lambda recipe, _: asdict(recipe.model)["inputs"],
    "source": lambda recipe, _: [recipe.model.source, content(recipe, recipe.model.source)],
    "calibration": lambda recipe, _: [
        recipe.data.calibration,
        content(recipe, recipe.data.calibration),
        [recipe.data.scale, recipe.data.mean, recipe.data.std],
    ],
    "evaluation": lambda recipe, _: [
        recipe.data.higher_is_better,
        *(
            [source, content(recipe, source) if source else ""]
            for source in (recipe.data.evaluation, recipe.data.metric, recipe.data.per_sample)
        ),
    ],
    "prune": lambda recipe, _: asdict(recipe.prune) if recipe.prune else None,
    "recover": lambda recipe, _: (
        [asdict(recipe.recover), content(recipe, recipe.recover.labels)]
        if recipe.recover and recipe.recover.labels
        else asdict(recipe.recover)
        if recipe.recover
        else None
    ),
    "share": lambda recipe, _: asdict(recipe.share) if recipe.share else None,
    # How many processes work on it does not show in the result.
    "quantize": lambda recipe, _: asdict(replace(recipe.quantize, processes=0)),
    "min_retained": lambda recipe, _: recipe.gate.min_retained,
    "max_latency_ratio": lambda recipe, _: recipe.gate.max_latency_ratio,
    "gate": lambda recipe, _: [asdict(recipe.gate), sorted(recipe.raw.get("gate", {}))],
    "tolerance": lambda recipe, target: [asdict(recipe.gate.tolerance), asdict(target.tolerance)],
    "budget": lambda _, target: asdict(target.budget),
    "device": lambda _, target: [
        target.name,
        asdict(target.device),
        asdict(target.runtime),
        asdict(target.run),
        asdict(target.int8),
        asdict(target.prune),
    ],
    "profile": lambda _, target: target.raw,
    "host": lambda _, target: [
        host_cpu(),
        sorted(host_isa()),
        emulator_version(target),
        link.identity(target) if target.run.how == "ssh" else None,
        runtime_packages(target),
    ],
    "runner": lambda recipe, target: runner_tools(recipe, target),
    "epoch": lambda *_: os.environ.get("SOURCE_DATE_EPOCH", ""),
}


MEMORY: dict[Any, str] = {}  # contents that this process has hashed


def emulator_version(target: Target) -> list[str | bool | None]:
    """The emulator that the target runs in: its version and whether we can count there.

    Empty where the target needs none.
    """
    if target.run.how != "emulate":
        return []
    arch = target.device.arch
    return [emulator.qemu_version(arch), toolchain.present(arch)]


def runner_tools(recipe: Recipe, target: Target) -> tuple[tuple[str, str, str], ...]:
    """What compiles the runner that the recipe wants in the bundle; see `toolchain.tools`.

    Empty where it wants none, or the target's provider is none of the runner's.
    EnvironmentMissing where there is no compiler.
    """
    if not recipe.release.runner or target.runtime.provider != CPU:
        return ()
    return toolchain.tools(target.device.arch)


def content(recipe: Recipe, source: str) -> str:
    """Digest of what a source of the recipe holds; hashed again only if its files changed."""
    if (path := recipe.path(source)).exists() and not (path.is_file() or path.is_dir()):
        raise BadInput(f"{path}", expected="a file or a folder", found="a FIFO, socket or device")
    facts = [(p, p.stat()) for p in source_files(recipe, source)]
    stamp = tuple((str(p), s.st_size, s.st_mtime_ns, s.st_ino) for p, s in facts)
    place = (str(recipe.folder), source, stamp)
    if place not in MEMORY:
        beside = external_data(recipe.path(source))
        parts = [source_digest(recipe, source), *(f"{p.name}:{file_digest(p)}" for p in beside)]
        MEMORY[place] = "\n".join(parts)
    return MEMORY[place]


def source_files(recipe: Recipe, source: str) -> list[Path]:
    """The files whose change means a changed source."""
    path = recipe.path(source.rpartition(":")[0] if ".py:" in source else source)
    if ".py:" in source:
        return sorted(p for p in path.parent.iterdir() if p.is_file()) if path.is_file() else []
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    return [path, *external_data(path)] if path.is_file() else []
