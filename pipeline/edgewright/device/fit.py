"""Whether a bundle is for this device: what can be said before any of its files is read.

The standard library only. A bundle that names another device is refused like a forged one
(IntegrityError); what the owner can change here, the runtime or the free space, is the
environment's fault (EnvironmentMissing).
"""

import os
import re
from pathlib import Path

from edgewright.bundle.manifest import Manifest
from edgewright.errors import EnvironmentMissing, IntegrityError
from edgewright.runtime.cpu import host_isa

SPARE_BYTES = 1 << 20  # for state, links and folders
SPARE_FILES = 32
TAGS = "tags"  # a file in the root: what else this device is, a line each


def own_tags(root: Path) -> frozenset[str]:
    """What the owner of the device says it is."""
    try:
        lines = (root / TAGS).read_text("utf-8").splitlines()
    except FileNotFoundError:
        return frozenset()
    return frozenset(line.strip() for line in lines if line.strip())


def check_device(manifest: Manifest, tags: frozenset[str] = frozenset()) -> None:
    """IntegrityError where architecture, CPU features or a `compatible` tag are not ours."""
    machine = os.uname().machine
    if manifest["device"]["arch"] != machine:
        refuse(manifest["device"]["arch"], machine)
    isa = host_isa()
    if missing := sorted(set(manifest["device"]["isa"]) - isa):
        refuse(" ".join(manifest["device"]["isa"]), "no " + " ".join(missing))
    for tag in manifest["compatible"]:
        if tag not in tags and not has_tag(tag, isa):
            refuse(tag, "a device that is not")


def refuse(expected: str, found: str) -> None:
    raise IntegrityError(
        "the bundle is not for this device",
        expected=expected,
        found=found,
        hint="install the bundle that was built for this device's target",
    )


def has_tag(tag: str, isa: frozenset[str]) -> bool:
    """Whether this machine is what a tag says: `linux-aarch64`, `linux-aarch64-glibc2.28`,
    `cpu:FLAG`. A `provider:NAME` is for the self-test to find.
    """
    kind, _, name = tag.partition(":")
    if name:
        return name in isa if kind == "cpu" else kind == "provider"
    system, machine = os.uname().sysname.lower(), os.uname().machine
    stated = re.fullmatch(r"(.+)-glibc([0-9]+\.[0-9]+)", tag)
    if stated:
        return stated[1] == f"{system}-{machine}" and numbers(stated[2]) <= glibc()
    return tag in (system, f"{system}-{machine}")


def glibc() -> tuple[int, ...]:
    """The version of the C library, () where it is another one."""
    try:
        return numbers(os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (ValueError, OSError):
        return ()


def installed_runtime() -> str:
    """The version of onnxruntime here, without importing it."""
    import importlib.metadata  # slow to import, and not every command asks

    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise EnvironmentMissing(
        "no onnxruntime is installed for this Python",
        hint="install the version in the bundle's runtime/lock.txt; `install --no-self-test` where "
        "something else runs the model",
    )


def check_runtime(manifest: Manifest, version: str) -> None:
    """EnvironmentMissing where the runtime is outside the range the bundle allows."""
    runtime = manifest["runtime"]
    if not (numbers(runtime["min"]) <= numbers(version) < numbers(runtime["max"])):
        raise EnvironmentMissing(
            "this onnxruntime is not one the bundle may run with",
            expected=f"{runtime['min']} or later, {runtime['max']}",
            found=version,
            hint=f"install onnxruntime {runtime['exact']}, which the bundle was proven with",
        )


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to compare by."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def check_space(manifest: Manifest, root: Path) -> None:
    """EnvironmentMissing where the files do not fit beside what is installed."""
    free = os.statvfs(root)
    block = free.f_frsize
    files = manifest["files"]
    needed = sum(-(-entry["size"] // block) * block for entry in files) + SPARE_BYTES
    if needed > free.f_bavail * block:
        raise EnvironmentMissing(
            f"not enough free space below {root}",
            expected=f"{needed} bytes",
            found=f"{free.f_bavail * block}",
            hint="free some space; an install keeps the running release beside the new one",
        )
    if free.f_files and free.f_favail < len(files) + SPARE_FILES:
        raise EnvironmentMissing(
            f"not enough free inodes below {root}",
            expected=f"{len(files) + SPARE_FILES}",
            found=f"{free.f_favail}",
            hint="remove some files",
        )
