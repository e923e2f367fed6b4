"""Running a target's worker under QEMU user-mode emulation, and installing what that needs.

`launch` says how the worker starts for an emulated target; `setup` installs the emulator and,
for ARM, a guest: a small aarch64 root with Python, numpy and onnxruntime. Everything lives in
one folder per combination of versions under `home()`:

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
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from edgewright.errors import BadInput, EnvironmentMissing, IntegrityError
from edgewright.files import sha256_of
from edgewright.runtime.session import Launch
from edgewright.target import RunSettings, Target, target_names

QEMU_PACKAGE = "qemu-user"
LAYOUT = 1  # of the guest folder; a new number makes old guests be built again
TIME_FACTOR = 50.0  # emulated float code runs 20 to 500 times slower than native code
COMMAND_TIMEOUT_S = 1800.0
SMOKE_TIMEOUT_S = 600.0
GUEST_LIBRARIES = ("libc6", "libstdc++6", "libgcc-s1")
ORT_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")
SOURCES_VARIABLE = "EDGEWRIGHT_APT_SOURCES"

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

Tell = Callable[[str], None]


def launch(target: Target) -> Launch:
    """How the worker starts for an emulated target.

    Cheap when everything is set up: it looks at a few files and starts nothing. Raises
    EnvironmentMissing with the line to type where something is missing, BadInput where the
    profile describes a CPU that cannot be emulated faithfully.
    """
    check_cpu(target)
    qemu = find_qemu(target.device.arch)
    if qemu is None:
        raise missing(target, f"{qemu_name(target.device.arch)} is not installed", qemu=True)
    if target.device.arch == "x86_64":
        return Launch(
            python=(qemu, "-cpu", target.run.cpu_model, "-L", "/", sys.executable, "-s"),
            address_space=0,
            time_factor=TIME_FACTOR,
        )
    guest = guest_folder()
    if not (guest / "guest.json").is_file():
        raise missing(target, f"no aarch64 Python with onnxruntime in {guest}")
    return guest_launch(guest, qemu, target.run)


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
        had_qemu = find_qemu(target.device.arch) is not None
        if not had_qemu:
            install_qemu(target, tell)
        if target.device.arch == "aarch64":
            install_guest(target, tell)
        elif not had_qemu:
            tell("checking onnxruntime under emulation")
            smoke_check(launch(target))
        launch(target)  # writes the files that describe this target's CPU
    tell(f"{target.name}: ready")


def home() -> Path:
    """Where guests live: $EDGEWRIGHT_HOME, else `edgewright` in the user's data folder."""
    named = os.environ.get("EDGEWRIGHT_HOME", "")
    data = os.environ.get("XDG_DATA_HOME", "")
    try:
        if named:
            return Path(named).expanduser().absolute()
        if Path(data).is_absolute():
            return Path(data) / "edgewright"
        return Path.home() / ".local/share/edgewright"
    except RuntimeError:
        raise EnvironmentMissing(
            "this user has no home folder",
            hint="set EDGEWRIGHT_HOME to a folder that may be written",
        ) from None


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


def install_qemu(target: Target, tell: Tell) -> None:
    """Install the emulator from the distribution; needs root."""
    if os.geteuid() != 0:
        raise missing(target, f"{qemu_name(target.device.arch)} is not installed", qemu=True)
    need_tools("apt-get")
    tell(f"installing {QEMU_PACKAGE} from the distribution")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    wait = ("-o", "DPkg::Lock::Timeout=600")
    with contextlib.suppress(EnvironmentMissing):  # stale lists may do; installing decides
        command(["apt-get", *wait, "update"], "reading the package lists", env=env)
    command(
        ["apt-get", *wait, "install", "-y", "--no-install-recommends", QEMU_PACKAGE],
        f"installing {QEMU_PACKAGE}",
        env=env,
    )
    if find_qemu(target.device.arch) is None:
        raise EnvironmentMissing(
            f"{QEMU_PACKAGE} is installed, but {qemu_name(target.device.arch)} is not on PATH",
            hint=f"add the folder that holds {qemu_name(target.device.arch)} to PATH",
        )


def install_guest(target: Target, tell: Tell) -> None:
    """Build the aarch64 guest for the host's versions, unless it is there."""
    guest = guest_folder()
    if (guest / "guest.json").is_file():
        return
    guest.parent.mkdir(parents=True, exist_ok=True)
    with locked(guest.parent / f".{guest.name}.lock", tell):
        if (guest / "guest.json").is_file():
            return
        for leftover in guest.parent.glob(f".new-{guest.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.rmtree(guest, ignore_errors=True)  # has no guest.json: not whole
        work = Path(tempfile.mkdtemp(prefix=f".new-{guest.name}-", dir=guest.parent))
        try:
            work.chmod(0o755)
            build_guest(target, work, tell)
            work.rename(guest)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def build_guest(target: Target, guest: Path, tell: Tell) -> None:
    """Fill the empty folder `guest` and prove that it works for the target."""
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
    qemu = find_qemu("aarch64")
    assert qemu is not None
    smoke_check(guest_launch(guest, qemu, target.run))


def write_apt_config(folder: Path) -> Path:
    """An apt configuration for aarch64 with a state of its own, on top of the host's.

    Sources, keys, proxies and credentials stay the host's; `#clear` drops its architectures
    and the hooks it runs after an update.
    """
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    (folder / "state/status").touch()
    lines = [
        "#clear APT::Architectures;",
        "#clear APT::Update::Pre-Invoke;",
        "#clear APT::Update::Post-Invoke;",
        "#clear APT::Update::Post-Invoke-Success;",
        'APT::Architecture "arm64";',
        'APT::Architectures { "arm64"; };',
        'APT::Install-Recommends "false";',
        'APT::Sandbox::User "";',
        'Acquire::Languages "none";',
        'Acquire::IndexTargets::deb-src::Sources::DefaultEnabled "false";',
        f'Dir::State "{folder}/state";',
        'Dir::State::lists "lists/";',
        f'Dir::State::status "{folder}/state/status";',
        f'Dir::Cache "{folder}/cache";',
        'Dir::Cache::archives "archives/";',
    ]
    sources = os.environ.get(SOURCES_VARIABLE)
    if sources:
        lines += [
            f'Dir::Etc::sourcelist "{Path(sources).absolute()}";',
            'Dir::Etc::sourceparts "/dev/null";',
        ]
    config = folder / "apt.conf"
    config.write_text("\n".join(lines) + "\n")
    return config


def apt(config: Path, tool: str, *arguments: str) -> str:
    """Run an apt tool with a private configuration; what it printed."""
    return command(
        [tool, "-q", "-c", str(config), *arguments],
        f"running {tool} {arguments[0]} for aarch64",
        hint="check the network and apt's sources; where they have no arm64 packages, set "
        f"{SOURCES_VARIABLE} to a file of apt sources that have them",
    )


def update(config: Path) -> EnvironmentMissing | None:
    """Read the package lists. Some source may fail and the needed ones not, so the failure is
    returned, to be raised only if something is missing later."""
    try:
        apt(config, "apt-get", "update")
    except EnvironmentMissing as error:
        return error
    return None


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


def unpack_packages(packages: Sequence[Path], root: Path) -> None:
    """Unpack Debian packages (verified by apt) into `root`, and drop what never runs there."""
    root.mkdir()
    for package in packages:
        command(["dpkg-deb", "-x", str(package), str(root)], f"unpacking {package.name}")
    if not (root / "lib").exists():  # newer packages rely on the link that base-files makes
        (root / "lib").symlink_to("usr/lib")
    for unused in ("doc", "man", "locale", "info", "lintian"):
        shutil.rmtree(root / "usr/share" / unused, ignore_errors=True)


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


def need_tools(*names: str) -> None:
    """EnvironmentMissing unless the distribution's package tools are there."""
    absent = [name for name in names if shutil.which(name) is None]
    if absent:
        raise EnvironmentMissing(
            "setting up emulation uses the package tools of Debian or Ubuntu",
            expected=" ".join(names),
            found="no " + " ".join(absent),
            hint="run it on Debian or Ubuntu (a container will do), or use a target that runs "
            "without an emulator",
        )


def command(
    arguments: Sequence[str],
    doing: str,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = COMMAND_TIMEOUT_S,
    hint: str = "",
) -> str:
    """Run a command to its end and return what it printed; EnvironmentMissing if it fails."""
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=env,
            cwd=cwd,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentMissing(
            f"{doing} took more than {timeout_s:.0f} s and was stopped", hint=hint
        ) from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message")[-600:].rstrip(".")
        status = f"status {done.returncode}"
        raise EnvironmentMissing(f"{doing} failed", found=f"{status}: {said}", hint=hint)
    return done.stdout


@contextlib.contextmanager
def locked(path: Path, tell: Tell) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for whoever holds it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("another set-up is under way; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def os_errors(doing: str) -> Iterator[None]:
    """File operations in the block fail with EnvironmentMissing."""
    try:
        yield
    except OSError as error:
        raise EnvironmentMissing(
            f"file operation failed while {doing}",
            found=f"{error.strerror or error} ({error.filename or home()})",
            hint=f"check space and permissions of {home()}, or set EDGEWRIGHT_HOME to another "
            "folder, then run the same command again",
        ) from None


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
