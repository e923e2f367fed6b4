"""Running a target's worker under QEMU user-mode emulation.

`launch` says how the worker starts for an emulated target; `setup` installs the emulator and,
for ARM, a guest (see `guest`).
"""

import functools
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from edgewright.errors import BadInput, EnvironmentMissing
from edgewright.runtime import toolchain
from edgewright.runtime.guest import (
    TIME_FACTOR,
    cpu_prefix,
    guest_folder,
    guest_launch,
    install_guest,
    smoke_check,
)
from edgewright.runtime.installing import Tell, command, install_packages, os_errors
from edgewright.runtime.session import Launch
from edgewright.target import Target, target_names

QEMU_PACKAGE = "qemu-user"

# The MIDR part numbers that go with a QEMU model: CPUs with exactly its instructions. Any other
# pair ends in SIGILL (identity promises more than the model has) or in slower kernels (less).
CPU_PARTS = {
    "cortex-a35": ("0xd04",),
    "cortex-a53": ("0xd03",),
    "cortex-a55": ("0xd05",),
    "cortex-a57": ("0xd07",),
    "cortex-a72": ("0xd08",),
    "cortex-a76": ("0xd0b", "0xd05"),  # A55 has the same instructions; QEMU 7.2 has no A55
    "cortex-a710": ("0xd47",),
    "neoverse-n1": ("0xd0c",),
    "neoverse-n2": ("0xd49",),
    "neoverse-v1": ("0xd40",),
}


def launch(target: Target) -> Launch:
    """How the worker starts for an emulated target.

    Cheap when everything is set up: it looks at a few files and starts nothing. Raises
    EnvironmentMissing with the line to type where something is missing, BadInput where the
    profile describes a CPU that cannot be emulated faithfully.
    """
    qemu = ready(target)
    if target.device.arch == "x86_64":
        return Launch(
            python=(qemu, "-cpu", target.run.cpu_model, "-L", "/", sys.executable, "-s"),
            address_space=0,
            time_factor=TIME_FACTOR,
        )
    return guest_launch(guest_folder(), qemu, target.run)


def program(target: Target, *options: str) -> tuple[str, ...]:
    """What stands before a program of the target's architecture to run it here; see `launch`.

    options: more of QEMU's own.
    """
    qemu = ready(target)
    x86 = target.device.arch == "x86_64"
    prefix = "/" if x86 else str(cpu_prefix(guest_folder(), target.run))
    return (qemu, "-cpu", target.run.cpu_model, *options, "-L", prefix)


def library(target: Target) -> Path:
    """The onnxruntime library that programs of an emulated target load."""
    if target.device.arch == "x86_64":
        return toolchain.host_library()
    return toolchain.library_in(guest_folder() / "site/onnxruntime")


def ready(target: Target) -> str:
    """The path of the emulator; EnvironmentMissing unless all is there to run the target."""
    check_cpu(target)
    qemu = find_qemu(target.device.arch)
    if qemu is None:
        raise missing(target, f"{qemu_name(target.device.arch)} is not installed", qemu=True)
    if target.device.arch == "aarch64" and not (guest_folder() / "guest.json").is_file():
        raise missing(target, f"no aarch64 Python with onnxruntime in {guest_folder()}")
    return qemu


def setup(target: Target, tell: Tell) -> None:
    """Install what an emulated target needs; at once when it is there already.

    Safe to interrupt and to run twice at the same time: a guest is built in a folder beside its
    place, checked, and renamed, under a file lock. Installs the emulator from the distribution
    (as root only) and never touches the host's package state otherwise.
    """
    if target.run.how != "emulate":
        tell(f"{target.name}: runs without an emulator, nothing to set up")
        return
    check_cpu(target)
    with os_errors(f"setting up target {target.name}"):
        found = find_qemu(target.device.arch)
        qemu = found or install_qemu(target, tell)
        if target.device.arch == "aarch64":
            install_guest(target.run, qemu, tell)
        elif not found:
            tell("checking onnxruntime under emulation")
            smoke_check(launch(target))
        launch(target)  # writes the files that describe this target's CPU
        toolchain.setup(target.device.arch, tell)
    tell(f"{target.name}: ready")


def qemu_name(arch: str) -> str:
    """The emulator's command for an architecture."""
    return f"qemu-{arch}"


def find_qemu(arch: str) -> str | None:
    """The path of the user-mode emulator, dynamic or static build, or None."""
    return shutil.which(qemu_name(arch)) or shutil.which(f"{qemu_name(arch)}-static")


def missing(target: Target, found: str, qemu: bool = False) -> EnvironmentMissing:
    """The error for an incomplete set-up, with the exact line that completes it."""
    name = target.name if target.name in target_names() else "PATH-OF-THIS-PROFILE"
    line = f"edgewright setup --target {name}"
    if qemu and os.geteuid() != 0:
        line = f"`sudo apt-get install {QEMU_PACKAGE}`, then `{line}`"
    return EnvironmentMissing(
        f"target {target.name} runs under emulation, which is not set up here",
        found=found,
        hint=line,
    )


def check_cpu(target: Target) -> None:
    """Refuse a profile whose parts describe different CPUs, or one that cannot run here."""
    run, arch = target.run, target.device.arch
    where = f"target {target.name}"
    if run.cores < 1:
        raise BadInput(f"{where}: run.cores", expected="at least 1", found=str(run.cores))
    if arch == "x86_64":
        if platform.machine() != "x86_64":
            raise EnvironmentMissing(
                f"{where} is emulated with the host's own Python",
                expected="an x86_64 host",
                found=platform.machine(),
                hint="build this target on an x86-64 machine",
            )
        return
    for key, value in (("cpu_part", run.cpu_part), ("cpu_variant", run.cpu_variant)):
        if not re.fullmatch(r"0x[0-9a-f]{1,3}", value):
            raise BadInput(
                f"{where}: run.{key}", expected="the CPU's number, as '0xd0b'", found=repr(value)
            )
    if run.cpu_model == "max":
        raise BadInput(
            f"{where}: run.cpu_model",
            expected="a CPU that exists",
            found="'max', which has SVE and SME and so takes kernels no other CPU takes",
            hint="use 'max,sve=off,sme=off,pauth=off' for a CPU with i8mm",
        )
    parts = CPU_PARTS.get(run.cpu_model)
    if parts and run.cpu_part not in parts:
        raise BadInput(
            f"{where}: run.cpu_part does not belong to run.cpu_model '{run.cpu_model}'",
            expected=" or ".join(parts),
            found=run.cpu_part,
            hint="onnxruntime trusts cpu_part and would run instructions the model lacks, or "
            "leave out some it has",
        )


def install_qemu(target: Target, tell: Tell) -> str:
    """Install the emulator from the distribution, which needs root; its path."""
    if os.geteuid() != 0:
        raise missing(target, f"{qemu_name(target.device.arch)} is not installed", qemu=True)
    install_packages((QEMU_PACKAGE,), tell)
    qemu = find_qemu(target.device.arch)
    if qemu is None:
        raise EnvironmentMissing(
            f"{QEMU_PACKAGE} is installed, but {qemu_name(target.device.arch)} is not on PATH",
            hint=f"add the folder that holds {qemu_name(target.device.arch)} to PATH",
        )
    return qemu


@functools.cache
def qemu_version(arch: str) -> str | None:
    """The emulator's version as it prints it, e.g. '7.2.22', or None where it is absent."""
    qemu = find_qemu(arch)
    if qemu is None:
        return None
    try:
        text = command([qemu, "--version"], "asking QEMU for its version", timeout_s=10)
    except (EnvironmentMissing, OSError):
        return None
    found = re.search(r"version (\S+)", text)
    return found[1] if found else None
