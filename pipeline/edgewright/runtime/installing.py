"""Installing from the distribution: commands, apt with a state of its own, the folder it goes to.

Whatever fails here is an EnvironmentMissing with what was said and what to do next.
"""

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from edgewright.errors import EnvironmentMissing

COMMAND_TIMEOUT_S = 1800.0
WAIT = ("-o", "DPkg::Lock::Timeout=600")
SILENT = {"DEBIAN_FRONTEND": "noninteractive"}
SOURCES_VARIABLE = "EDGEWRIGHT_APT_SOURCES"

Tell = Callable[[str], None]


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


def install_packages(names: Sequence[str], tell: Tell) -> None:
    """Install packages of the distribution; for root."""
    need_tools("apt-get")
    tell(f"installing {', '.join(names)} from the distribution")
    read_lists()
    command(
        ["apt-get", *WAIT, "install", "-y", "--no-install-recommends", *names],
        f"installing {', '.join(names)}",
        env={**os.environ, **SILENT},
    )


@functools.cache
def read_lists() -> None:
    """Bring the package lists up to date, once; stale ones may do, installing decides."""
    with contextlib.suppress(EnvironmentMissing):
        command(
            ["apt-get", *WAIT, "update"], "reading the package lists", env={**os.environ, **SILENT}
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


def place_once(folder: Path, marker: str, fill: Callable[[Path], None], tell: Tell) -> None:
    """Let `fill` write an empty folder beside `folder`, then move it there, unless it is there.

    A folder without the file `marker` is not whole. Safe to interrupt and to run twice.
    """
    if (folder / marker).is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".{folder.name}.lock", tell):
        if (folder / marker).is_file():
            return
        for leftover in folder.parent.glob(f".new-{folder.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".new-{folder.name}-", dir=folder.parent))
        try:
            work.chmod(0o755)
            fill(work)
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


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


def unpack_packages(packages: Sequence[Path], root: Path) -> None:
    """Unpack Debian packages (verified by apt) into `root`, and drop what never runs there."""
    root.mkdir()
    for package in packages:
        command(["dpkg-deb", "-x", str(package), str(root)], f"unpacking {package.name}")
    if not (root / "lib").exists():  # newer packages rely on the link that base-files makes
        (root / "lib").symlink_to("usr/lib")
    for unused in ("doc", "man", "locale", "info", "lintian"):
        shutil.rmtree(root / "usr/share" / unused, ignore_errors=True)
