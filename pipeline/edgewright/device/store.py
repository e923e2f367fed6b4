"""The root folder of a device: its releases, the one that runs, and what is known of them.

    ROOT/releases/NAME-VERSION-DIGEST/   what bundles held, whole or not there at all
    ROOT/current -> releases/...         the release that runs; swapped by one rename
    ROOT/previous -> releases/...        the one to go back to; for people, state.json decides
    ROOT/state.json                      order and fate of the releases, the highest sequence
    ROOT/trust, ROOT/tags                written by the owner: whose signatures count; what else
                                         this device is
    ROOT/staging/                        work of a running install; leftovers go at the next one

The link `current` is the one truth of what runs. The state is written before the link moves, and
lists releases from the newest on, so whatever is cut short, what comes after `current` in the
list is what to go back to, and what comes before it never ran or has failed.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgewright.bundle import manifest as manifests
from edgewright.bundle.manifest import Manifest
from edgewright.errors import EnvironmentMissing, IntegrityError, UsageError
from edgewright.files import flush, locked, write_atomic

SCHEMA = "edgewright-device/1"
RELEASES, STAGING, CURRENT, PREVIOUS = "releases", "staging", "current", "previous"
STATE, LOCK, STATE_LOCK = "state.json", "lock", "state.lock"
KEPT_EVENTS = 32
LINK = re.compile(rf"{RELEASES}/([A-Za-z0-9][A-Za-z0-9._+~-]{{0,250}})")
READ = 1 << 20


@dataclass
class Release:
    """`good`: it proved itself by running. `starts`: since installed, while not yet good."""

    id: str
    good: bool = False
    starts: int = 0
    failed: str = ""


@dataclass
class State:
    """What the device remembers.

    `sequence`: the highest ever run here, of the manifest with digest `newest`; nothing older is
    let in. `time_floor`: seconds since 1970 that have passed for certain, from signed manifests;
    never from the clock, which may be wrong either way.
    """

    name: str = ""
    target: str = ""
    sequence: int = 0
    newest: str = ""
    time_floor: int = 0
    releases: list[Release] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def tell(self, event: str, release: str, detail: str = "") -> None:
        """Remember what happened."""
        row = {"event": event, "release": release, "detail": detail, "clock": int(time.time())}
        self.events = [*self.events, row][-KEPT_EVENTS:]


def prepare(root: Path) -> None:
    """Make the folders; refuse a root that others could change behind our back."""
    if root.exists() and not root.is_dir():
        raise UsageError(f"--root {root}", expected="a folder", found="a file")
    new = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(mode=0o755, parents=True, exist_ok=True)
    for folder in new:
        flush(folder.parent)  # or the root could go with all that is in it
    for name in (RELEASES, STAGING):
        with suppress(FileExistsError):
            # Staging: nobody else lists it, yet the self-test's child may be another user.
            (root / name).mkdir(mode=0o755 if name == RELEASES else 0o711)
    for folder in (root.resolve(), root / RELEASES, root / STAGING):
        facts = folder.lstat()
        if not stat.S_ISDIR(facts.st_mode):
            raise IntegrityError(
                f"{folder}", expected="a folder of its own", found="a link or file"
            )
        if facts.st_mode & 0o022 or facts.st_uid not in (0, os.geteuid()):
            raise IntegrityError(
                f"{folder} can be changed by others",
                expected="a folder of root or this user, not writable for group and others",
                found=f"mode {stat.S_IMODE(facts.st_mode):04o} of user {facts.st_uid}",
                hint=f"chmod go-w {folder}",
            )


@contextmanager
def installing(root: Path) -> Iterator[None]:
    """Only one install at a time; the second is refused."""

    def busy(owner: str) -> None:
        raise EnvironmentMissing(
            f"another install is running below {root}", found=f"process {owner}", hint="wait for it"
        )

    with locked(root / LOCK, busy):
        yield


@contextmanager
def changing(root: Path) -> Iterator[State]:
    """The state, for one short change of it and of the links; others wait meanwhile."""
    with locked(root / STATE_LOCK, lambda owner: None):
        yield read_state(root)


def existing(root: Path) -> None:
    """UsageError where nothing was ever installed."""
    if not (root / RELEASES).is_dir():
        raise UsageError(
            f"{root} is no device root",
            expected=f"a folder with {RELEASES}/ in it",
            hint="install a bundle there first, or name another one with --root",
        )


def linked(root: Path, name: str = CURRENT) -> str:
    """The release a link names, empty where there is none."""
    try:
        found = LINK.fullmatch(str((root / name).readlink()))
    except OSError:
        return ""
    return found[1] if found else ""


def set_link(root: Path, name: str, release: str) -> None:
    """Let a link name a release, in one step that a power cut cannot halve."""
    temporary = root / f".{name}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(f"{RELEASES}/{release}")
    temporary.replace(root / name)
    flush(root)


def read_state(root: Path) -> State:
    """The state; made anew from what is installed where its file is lost or damaged."""
    try:
        value = json.loads((root / STATE).read_bytes())
        if value.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        releases = [Release(**row) for row in value.pop("releases")]
        state = State(releases=releases, **value)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        state = rebuilt(root)
        if not isinstance(error, FileNotFoundError):
            state.tell("state lost", linked(root), "state.json could not be read")
    current = linked(root)
    if current and current not in [release.id for release in state.releases]:
        state.releases.insert(0, Release(current))
    return state


def rebuilt(root: Path) -> State:
    """A state that says what the installed releases say of themselves."""
    state = State()
    for release in dict.fromkeys((linked(root), linked(root, PREVIOUS))):
        if not release:
            continue
        try:
            data = (root / RELEASES / release / manifests.PATH).read_bytes()
            content = manifests.check(data)
        except (OSError, IntegrityError):
            continue
        state.releases.append(Release(release))
        state.name, state.target = content["name"], content["target"]
        state.time_floor = max(state.time_floor, content["source_date_epoch"])
        if content["sequence"] >= state.sequence:
            state.sequence = content["sequence"]
            state.newest = state.newest or hashlib.sha256(data).hexdigest()
    return state


def write_state(root: Path, state: State) -> None:
    """Keep the state, all of it or the old one."""
    text = json.dumps({"schema": SCHEMA, **asdict(state)}, indent=1, sort_keys=True)
    write_atomic(root / STATE, text.encode() + b"\n")


def behind(root: Path, state: State) -> list[Release]:
    """The current release and those to go back to, in that order; all where none is current."""
    names = [release.id for release in state.releases]
    current = linked(root)
    return state.releases[names.index(current) :] if current in names else state.releases


def check_release(root: Path, release: str) -> Manifest:
    """The manifest of an installed release that is whole; IntegrityError where it is not."""
    folder = root / RELEASES / release
    try:
        content = manifests.check((folder / manifests.PATH).read_bytes())
        for entry in content["files"]:
            if sha256_of(folder / entry["path"]) != entry["sha256"]:
                raise IntegrityError(f"{release}: {entry['path']} is damaged")
    except OSError as error:
        raise IntegrityError(
            f"the installed release {release} is damaged",
            found=f"{error.filename}: {error.strerror}",
        ) from None
    return content


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file, in bounded memory."""
    whole = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        while block := file.read(READ):
            whole.update(block)
    return whole.hexdigest()


def is_whole(root: Path, release: str) -> bool:
    try:
        check_release(root, release)
    except IntegrityError:
        return False
    return True


def clean(root: Path) -> list[str]:
    """Remove what killed installs left, and releases nobody goes back to; their names.

    To be called while `installing`.
    """
    removed = []
    for path in (root / STAGING).iterdir():
        remove(path)
        removed.append(f"{STAGING}/{path.name}")
    with changing(root) as state:
        kept = behind(root, state)[:2]
        for path in (root / RELEASES).iterdir():
            if path.name not in [release.id for release in kept]:
                remove(path)
                removed.append(f"{RELEASES}/{path.name}")
        for path in root.glob(".*.tmp"):
            path.unlink(missing_ok=True)
            removed.append(path.name)
        if len(kept) != len(state.releases):
            state.releases = kept
            write_state(root, state)
        if len(kept) > 1 and linked(root) and linked(root, PREVIOUS) != kept[1].id:
            set_link(root, PREVIOUS, kept[1].id)
    return removed


def remove(path: Path) -> None:
    """Remove a folder with all below it, or whatever else is there; never through a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def activate(root: Path, release: str, content: Manifest, digest: str) -> str:
    """Let the installed `release` be what runs; the one that ran before, empty where none did."""
    with changing(root) as state:
        before = linked(root)
        older = [r for r in behind(root, state) if r.id != release]
        state.releases = [Release(release), *older][:3]
        state.name, state.target = content["name"], content["target"]
        if content["sequence"] >= state.sequence:
            state.sequence, state.newest = content["sequence"], digest
        state.time_floor = max(state.time_floor, content["source_date_epoch"])
        state.tell("installed", release, f"before: {before}" if before else "")
        write_state(root, state)
        set_link(root, CURRENT, release)
        if before:
            set_link(root, PREVIOUS, before)
    return before


def roll_back(root: Path, state: State, reason: str) -> str:
    """Go back to the newest whole release behind the current one; its name, empty where none is.

    The one left counts as failed, so nothing comes back to it by itself. To be called while
    `changing`.
    """
    current = linked(root)
    options = behind(root, state)
    for release in options:
        if release.id == current:
            release.failed = reason
    for release in options:
        if release.id != current and not release.failed and is_whole(root, release.id):
            state.tell("rolled back", release.id, f"from {current}: {reason}")
            write_state(root, state)
            set_link(root, CURRENT, release.id)
            (root / PREVIOUS).unlink(missing_ok=True)
            return release.id
    return ""
