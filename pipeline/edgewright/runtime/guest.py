"""The guest of emulated ARM targets: a small aarch64 root with Python, numpy and onnxruntime.

One folder per combination of versions under `home()`:

    aarch64-onnxruntime-V-numpy-V-layoutN/
        guest.json   what is inside
        root/        the distribution's packages (libc, libstdc++, Python)
        site/        the wheels, for PYTHONPATH
        cpus/ID/     links into root/ plus the /proc and /sys files that describe one CPU

ONNX Runtime chooses kernels from the hardware capabilities QEMU announces *and* from the CPU
identity in /proc/cpuinfo. QEMU's `-L PREFIX` answers file opens from PREFIX first, so each
emulated CPU gets a prefix that holds a /proc/cpuinfo of its own; without one onnxruntime reads
the host's and crashes.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from edgewright.errors import EnvironmentMissing, IntegrityError
from edgewright.files import sha256_of
from edgewright.runtime.installing import (
    SOURCES_VARIABLE,
    Tell,
    apt,
    command,
    home,
    need_tools,
    os_errors,
    place_once,
    unpack_packages,
    update,
    write_apt_config,
)
from edgewright.runtime.session import Launch
from edgewright.target import RunSettings

LAYOUT = 1  # of the guest folder; a new number makes old guests be built again
TIME_FACTOR = 50.0  # emulated float code runs 20 to 500 times slower than native code
SMOKE_TIMEOUT_S = 600.0
GUEST_LIBRARIES = ("libc6", "libstdc++6", "libgcc-s1")
ORT_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")


def guest_folder() -> Path:
    """The folder of the aarch64 guest that fits the host's onnxruntime and numpy."""
    runtime, numpy = host_versions()
    return home() / f"aarch64-onnxruntime-{runtime}-numpy-{numpy}-layout{LAYOUT}"


def host_versions() -> tuple[str, str]:
    """The installed versions of onnxruntime and numpy; found without importing them."""
    for name in ORT_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            runtime = importlib.metadata.version(name).partition("+")[0]
            return runtime, importlib.metadata.version("numpy")
    raise EnvironmentMissing(
        "onnxruntime is not installed", hint="pip install onnxruntime, then run this again"
    )


def guest_launch(guest: Path, qemu: str, run: RunSettings) -> Launch:
    """The launch of the Python inside a guest folder, on the CPU that `run` describes."""
    python = json.loads((guest / "guest.json").read_text())["python"]
    prefix = cpu_prefix(guest, run)
    # Nothing of the host's Python and loader settings may reach the guest.
    env = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    env |= {
        "PYTHONPATH": str(guest / "site"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONUTF8": "1",
    }
    interpreter = str(prefix / "usr/bin" / python)
    return Launch(
        python=(qemu, "-cpu", run.cpu_model, "-L", str(prefix), interpreter, "-S"),
        env=env,
        address_space=0,
        time_factor=TIME_FACTOR,
    )


def cpu_prefix(guest: Path, run: RunSettings) -> Path:
    """The prefix for QEMU's `-L`: the guest's root plus the files that describe one CPU.

    Named by its content and made on first use; two processes may make it at once.
    """
    files = cpu_files(run)
    name = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    prefix = guest / "cpus" / name
    if prefix.is_dir():
        return prefix
    with os_errors("describing the emulated CPU"):
        prefix.parent.mkdir(exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=prefix.parent))
        try:
            made.chmod(0o755)
            for path, text in files.items():
                (made / path).parent.mkdir(parents=True, exist_ok=True)
                (made / path).write_text(text)
            for entry in (guest / "root").iterdir():
                if not (made / entry.name).exists():
                    (made / entry.name).symlink_to(Path("../../root", entry.name))
            try:
                made.rename(prefix)
            except OSError:
                if not prefix.is_dir():  # not made by another process in the meantime
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return prefix


def cpu_files(run: RunSettings) -> dict[str, str]:
    """Path below the prefix -> text of the files from which libraries learn the ARM CPU."""
    blocks = [
        f"processor\t: {core}\n"
        "BogoMIPS\t: 108.00\n"
        f"Features\t: {run.cpu_features}\n"
        "CPU implementer\t: 0x41\n"
        "CPU architecture: 8\n"
        f"CPU variant\t: {run.cpu_variant}\n"
        f"CPU part\t: {run.cpu_part}\n"
        "CPU revision\t: 1\n"
        for core in range(run.cores)
    ]
    cores = "0\n" if run.cores == 1 else f"0-{run.cores - 1}\n"
    lists = {f"sys/devices/system/cpu/{k}": cores for k in ("possible", "present", "online")}
    return {"proc/cpuinfo": "\n".join(blocks) + "\n", **lists}


def install_guest(run: RunSettings, qemu: str, tell: Tell) -> None:
    """Build the aarch64 guest for the host's versions, unless it is there.

    Proves it on the CPU that `run` describes. `qemu`: path of the emulator.
    """
    place_once(guest_folder(), "guest.json", lambda work: build_guest(work, run, qemu, tell), tell)


def build_guest(guest: Path, run: RunSettings, qemu: str, tell: Tell) -> None:
    """Fill the empty folder `guest` and prove that it works."""
    need_tools("apt-get", "apt-cache", "dpkg-deb")
    if importlib.util.find_spec("pip") is None:
        raise EnvironmentMissing(
            "this Python has no pip, which downloads the aarch64 wheels",
            hint=f"{sys.executable} -m ensurepip",
        )
    tell("reading the distribution's aarch64 package lists")
    config = write_apt_config(guest / "apt")
    python, libc_minor = guest_versions(config, update(config))
    tell(f"downloading {python} and its libraries for aarch64")
    packages = [*GUEST_LIBRARIES, f"{python}-minimal", f"lib{python}-stdlib"]
    apt(config, "apt-get", "install", "-y", "--download-only", *packages)
    unpack_packages(sorted((guest / "apt/cache/archives").glob("*.deb")), guest / "root")
    tell("downloading onnxruntime and numpy for aarch64")
    wheels = download_wheels(guest / "wheels", python.removeprefix("python"), libc_minor)
    for wheel in wheels:
        unpack_wheel(wheel, guest / "site")
    shutil.rmtree(guest / "apt")
    digests = {wheel.name: sha256_of(wheel) for wheel in wheels}
    shutil.rmtree(guest / "wheels")
    contents = {"python": python, "wheels": sorted(digests), "sha256": digests}
    (guest / "guest.json").write_text(json.dumps(contents, indent=1) + "\n")
    tell("checking onnxruntime under emulation")
    smoke_check(guest_launch(guest, qemu, run))


def guest_versions(config: Path, failure: EnvironmentMissing | None) -> tuple[str, int]:
    """The distribution's Python for aarch64, as 'python3.11', and the minor version of glibc."""
    try:
        text = apt(config, "apt-cache", "show", "--no-all-versions", "python3-minimal", "libc6")
    except EnvironmentMissing as error:
        raise failure or error from None
    python = re.search(r"\b(python3\.\d+)-minimal\b", text)
    libc = re.search(r"^Package: libc6$.*?^Version: (?:\d+:)?2\.(\d+)", text, re.M | re.S)
    if python is None or libc is None:
        raise failure or EnvironmentMissing(
            "cannot tell the distribution's aarch64 Python and C library from its package lists",
            hint=f"set {SOURCES_VARIABLE} to a file of apt sources that have arm64 packages",
        )
    return python[1], int(libc[1])


def download_wheels(folder: Path, python: str, libc_minor: int) -> list[Path]:
    """Download the host's versions of onnxruntime and numpy for aarch64; all the worker needs.

    `python` is '3.11'; every manylinux tag that glibc 2.`libc_minor` satisfies is accepted,
    newest first.
    """
    runtime, numpy = host_versions()
    tags = [f"manylinux_2_{minor}_aarch64" for minor in range(libc_minor, 16, -1)]
    platforms = [f"--platform={tag}" for tag in [*tags, "manylinux2014_aarch64"]]
    command(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        + ["-d", str(folder), f"--python-version={python}", *platforms]
        + [f"onnxruntime=={runtime}", f"numpy=={numpy}"],
        "downloading the aarch64 wheels",
        hint="check the network and pip's index; the wheels must exist for the distribution's "
        f"Python {python}",
    )
    return sorted(folder.glob("*.whl"))


def unpack_wheel(wheel: Path, folder: Path) -> None:
    """Unpack a wheel, refusing links and names that lead out of `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for item in archive.infolist():
                name = PurePosixPath(item.filename)
                odd = name.is_absolute() or ".." in name.parts or "\\" in item.filename
                if odd or stat.S_ISLNK(item.external_attr >> 16):
                    raise IntegrityError(
                        f"wheel {wheel.name} is not safe to unpack",
                        expected="plain files with relative names",
                        found=repr(item.filename),
                    )
            archive.extractall(folder)
    except zipfile.BadZipFile as error:
        raise IntegrityError(
            f"wheel {wheel.name} is damaged", found=str(error), hint="run the same command again"
        ) from None


def smoke_check(start: Launch) -> None:
    """Import what the worker needs, the way the worker does.

    Writes the guest's bytecode on the way, so later starts need not compile.
    """
    env = dict(start.env if start.env is not None else os.environ)
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:  # where QEMU would leave a core file
        command(
            [*start.python, "-c", "import json, resource, numpy, onnxruntime"],
            "importing onnxruntime under emulation",
            env=env,
            cwd=Path(folder),
            timeout_s=SMOKE_TIMEOUT_S,
            hint="QEMU may be too old for the CPU model of the profile; 7.2 is known to work",
        )
