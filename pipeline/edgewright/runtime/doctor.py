"""What this machine can run: its hardware and versions, and whether each target works here.

Nothing heavy is started: a target counts as ready when everything it needs is in its place.
"""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from edgewright.errors import EdgewrightError, IntegrityError
from edgewright.runtime import emulator, toolchain
from edgewright.runtime.guest import ORT_PACKAGES
from edgewright.runtime.launch import host_cpu, host_isa, launch_for
from edgewright.runtime.providers import need_provider, runtime_packages
from edgewright.runtime.ssh import link
from edgewright.target import Target, load_target, target_names

# What decides which int8 kernels run, by the kernel's names for it.
ISA_OF_INTEREST = (
    "avx2",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
PACKAGES = ("onnx", "onnxruntime", "numpy", "torch")


def checks() -> list[dict[str, Any]]:
    """One entry per shipped profile: {target, ready, reason, next}.

    `reason` says how the target runs here, or why it cannot; `next` is what to do about it,
    empty where the target is ready.
    """
    return [check(load_target(name)) for name in target_names()]


def check(target: Target) -> dict[str, Any]:
    """Whether one target runs here, and if not, why and what to do."""
    try:
        launch_for(target)
        need_provider(target)
        reason = over_ssh(target) if target.run.how == "ssh" else how_it_runs(target)
    except IntegrityError:
        raise  # another device in its place is no matter of readiness
    except EdgewrightError as error:
        reason, _, hint = str(error).partition(" Next: ")
        return {
            "target": target.name,
            "ready": False,
            "reason": reason.removesuffix("."),
            "next": hint.removesuffix("."),
        }
    return {"target": target.name, "ready": True, "reason": reason, "next": ""}


def over_ssh(target: Target) -> str:
    """In words, for a device behind SSH that was asked and is ready."""
    found = link.probe(target)
    provider = target.runtime.provider.removesuffix("ExecutionProvider")
    emulated = ", emulated" if target.run.emulated else ""
    return (
        f"{provider}, over SSH: {found['machine']}{emulated}, {found['cpu'] or 'unknown CPU'}, "
        f"{found['cores']} cores, python {found['python']}, onnxruntime {found['onnxruntime']}, "
        f"{found['free_bytes'] / 2**30:.1f} GiB free"
    )


def how_it_runs(target: Target) -> str:
    """In words, for a target that is ready."""
    provider = target.runtime.provider.removesuffix("ExecutionProvider")
    if target.run.how == "emulate":
        version = emulator.qemu_version(target.device.arch) or "of unknown version"
        model = target.run.cpu_model.partition(",")[0]
        counts = "" if toolchain.present(target.device.arch) else "; no compiler to count with"
        return f"{provider}, emulated: QEMU {version}, CPU model {model}{counts}"
    packages = " and ".join(runtime_packages(target))
    return f"{provider}, natively" + (f" with {packages}" if packages else "")


def host() -> dict[str, Any]:
    """Facts about this machine: sizes in bytes, versions as text or None where absent."""
    flags = host_isa()
    return {
        "cpu": host_cpu(),
        "arch": platform.machine(),
        "isa": [flag for flag in ISA_OF_INTEREST if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "qemu": emulator.qemu_version("aarch64") or emulator.qemu_version("x86_64"),
    }


def package_version(name: str) -> str | None:
    """The installed version of a package, without importing it."""
    names = ORT_PACKAGES if name == "onnxruntime" else (name,)
    for candidate in names:
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
