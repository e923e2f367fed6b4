"""Compiling our own C: the runner for devices without Python, and the plug-in for QEMU.

The sources lie in `native/`. What is compiled is kept under `home()`, in a folder named by the
sources and flags, so it is compiled once and never stale. No header of ONNX Runtime or QEMU is
needed, only a C compiler of the distribution.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgewright.errors import EnvironmentMissing
from edgewright.runtime.installing import Tell, command, home, install_packages, os_errors

SOURCES = Path(__file__).parent / "native"
RUNNER_SOURCES = ("edge_run.c", "options.c", "tell.c", "npz.c", "check.c")
PLUGIN_SOURCES = ("edge_count.c",)
# No build path and no identity of the build in the file: same compiler and source, same bytes.
FLAGS = ("-std=gnu11", "-O2", "-s", "-Wall", "-Wextra", "-Wl,--build-id=none")
PLUGIN_FLAGS = ("-shared", "-fPIC", "-fvisibility=hidden")
LIBRARIES = ("-ldl", "-lm")
COMPILE_TIMEOUT_S = 120.0
TIME_LIMIT_S = 1800.0  # for the runner, emulated or not
# What a compiler gets of this user's environment: others (CPATH, LD_RUN_PATH) would change bytes.
ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")


def runner(arch: str) -> Path:
    """The runner for an architecture ('x86_64', 'aarch64'); see `native/edge_run.c`.

    EnvironmentMissing where it is not compiled yet and there is no compiler for it.
    """
    return compiled(f"edge-run-{arch}", RUNNER_SOURCES, FLAGS, LIBRARIES, arch)


def compile_runner(arch: str, made: Path) -> None:
    """Compile the runner into the new file `made`, whatever is kept from before.

    Same sources, flags and `tools`: same bytes. EnvironmentMissing without a compiler.
    """
    compile_to(made, RUNNER_SOURCES, FLAGS, LIBRARIES, arch)


def plugin() -> Path:
    """The plug-in that counts instructions, for this machine's QEMU; see `native/edge_count.c`."""
    return compiled("edge-count.so", PLUGIN_SOURCES, FLAGS + PLUGIN_FLAGS, (), platform.machine())


def host_library() -> Path:
    """The onnxruntime library inside this Python's wheel, for the runner's --library."""
    spec = importlib.util.find_spec("onnxruntime")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return library_in(Path(folders[0]) if folders else Path("onnxruntime"))


def library_in(package: Path) -> Path:
    """The library in an unpacked onnxruntime package, which ships beside its Python module."""
    found = sorted((package / "capi").glob("libonnxruntime.so.*"))
    if not found:
        raise EnvironmentMissing(
            "the onnxruntime package has no C library",
            expected="onnxruntime/capi/libonnxruntime.so.VERSION",
            hint="pip install --force-reinstall onnxruntime",
        )
    return found[-1]


def packages(arch: str) -> tuple[str, ...]:
    """The distribution's packages that compile for an architecture on this machine."""
    if arch == platform.machine():
        return ("gcc", "libc6-dev")
    cross = {"aarch64": "arm64", "x86_64": "amd64"}.get(arch, arch)
    return (f"gcc-{arch.replace('_', '-')}-linux-gnu", f"libc6-dev-{cross}-cross")


def compiler(arch: str) -> str | None:
    """The path of a C compiler for an architecture, None where there is none."""
    names = ["gcc", "cc"] if arch == platform.machine() else []
    found = (shutil.which(name) for name in (*names, f"{arch}-linux-gnu-gcc"))
    return next((path for path in found if path), None)


def needed_compiler(arch: str, name: str) -> str:
    """`compiler`; EnvironmentMissing with the packages where there is none to compile `name`."""
    path = compiler(arch)
    if path is None:
        needed = " ".join(packages(arch))
        raise EnvironmentMissing(
            f"no C compiler for {arch}, to compile {name}",
            expected=needed,
            hint=f"{'' if os.geteuid() == 0 else 'sudo '}apt-get install {needed}",
        )
    return path


def tools(arch: str) -> tuple[tuple[str, str, str], ...]:
    """What the bytes of a compiled program depend on beside its sources.

    Compiler, linker and C library: use, version as it says itself, SHA-256 of the file.
    """
    return tools_of(needed_compiler(arch, "edge-run"), " ".join(packages(arch)))


@functools.cache
def tools_of(path: str, needed: str) -> tuple[tuple[str, str, str], ...]:
    """`tools` of the compiler at this path; `needed`: the packages that it should come from."""

    def say(*words: str) -> str:
        said = command(
            words,
            f"asking {words[0]} for its version",
            env={**environment(), "LC_ALL": "C"},
            timeout_s=COMPILE_TIMEOUT_S,
            hint=f"the compiler needs {needed}",
        )
        return said.strip().partition("\n")[0]

    with os_errors(f"looking at what {path} works with"):
        linker = shutil.which(say(path, "-print-prog-name=ld")) or "ld"
        library = Path(say(path, "-print-file-name=libc.so.6")).resolve().read_bytes()
        stated = re.search(rb"GNU C Library [ -~]*", library)
        version = stated[0].decode().rstrip(".") if stated else "libc.so.6"
        return (
            ("compiler", say(path, "--version"), digest(Path(path).read_bytes())),
            ("linker", say(linker, "--version"), digest(Path(linker).read_bytes())),
            ("C library", version, digest(library)),
        )


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def environment() -> dict[str, str]:
    """What a compiler may know of this process."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def present(arch: str) -> bool:
    """Whether the runner and the plug-in are there, or can be compiled."""
    folder = home() / f"native-{source_digest()}"
    kept = (folder / f"edge-run-{arch}").is_file() and (folder / "edge-count.so").is_file()
    return kept or all(compiler(each) for each in (arch, platform.machine()))


def setup(arch: str, tell: Tell) -> None:
    """Compile the runner for a target's architecture and the plug-in for this machine.

    Installs compilers from the distribution where they are missing, as root only.
    """
    try:
        runner(arch)
        plugin()
        return
    except EnvironmentMissing:
        if os.geteuid() != 0:
            raise
    install_packages(tuple(dict.fromkeys(packages(arch) + packages(platform.machine()))), tell)
    runner(arch)
    plugin()


def compiled(
    name: str,
    sources: tuple[str, ...],
    flags: tuple[str, ...],
    libraries: tuple[str, ...],
    arch: str,
) -> Path:
    """The file made from sources, compiled unless it is there. Two processes may do it at once."""
    done = home() / f"native-{source_digest()}" / name
    if done.is_file():
        return done
    needed_compiler(arch, name)  # before a folder is made for what it would compile
    with os_errors(f"compiling {name}"):
        done.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=done.parent) as folder:
            made = Path(folder, name)
            compile_to(made, sources, flags, libraries, arch)
            made.rename(done)
    return done


def compile_to(
    made: Path, sources: Sequence[str], flags: Sequence[str], libraries: Sequence[str], arch: str
) -> None:
    """Compile sources into the file `made`. They are named without a path: none gets into it."""
    command(
        [needed_compiler(arch, made.name), *flags, "-o", str(made), *sources, *libraries],
        f"compiling {made.name}",
        env=environment(),
        cwd=SOURCES,
        timeout_s=COMPILE_TIMEOUT_S,
        hint=f"the compiler needs {' '.join(packages(arch))}",
    )


def run_to_end(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], what: str
) -> "subprocess.CompletedProcess[str]":
    """Run the runner in a folder, under an emulator or not, and wait for its end.

    EnvironmentMissing where `what` it does takes more than TIME_LIMIT_S.
    """
    try:
        return subprocess.run(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentMissing(f"{what} took more than {TIME_LIMIT_S:.0f} s") from None


@functools.cache
def source_digest() -> str:
    """What names the folder of compiled files: all sources and the flags."""
    whole = hashlib.sha256(" ".join((*FLAGS, *PLUGIN_FLAGS, *LIBRARIES)).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]
