"""Finished stages, stored under the digest of everything they were made from.

`FOLDER/ab/abcd.../` has the files of one stage in `files/`, and `entry.json` with the SHA-256 of
each. An entry is written into a folder of its own beside, flushed and renamed, so it is
there whole or not at all; reading checks every hash, and an entry that does not fit is removed.
Two builds that want the same entry take turns: one makes it, the other waits and takes it.
"""

import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgewright.errors import EnvironmentMissing, UsageError
from edgewright.files import (
    copy_folder,
    digests_in,
    flush,
    flush_files,
    is_at,
    locked,
    names_in,
)

SCHEMA = "edgewright-cache/1"
MAX_BYTES = 20 << 30
ENTRY = "entry.json"

Note = Callable[[str], None]


@dataclass(frozen=True)
class Kept:
    """The files of an entry, and the SHA-256 of each by name."""

    folder: Path
    digests: dict[str, str]


@dataclass(frozen=True)
class Cache:
    """A cache folder that `open_cache` has checked, and the bytes it may hold."""

    folder: Path
    max_bytes: int = MAX_BYTES

    def entry(self, key: str) -> Path:
        """Where the entry of a key is, whether it exists or not."""
        return self.folder / key[:2] / key

    def unfinished(self, key: str) -> Path:
        """Where a stage may leave work to go on with after it was killed."""
        return self.folder / "unfinished" / key

    def locked(self, key: str, busy: Note) -> AbstractContextManager[None]:
        """Hold the lock of a key; `busy` is told the process that has it, then it is waited for."""
        return locked(self.folder / "locks" / key, busy)

    def lookup(self, key: str, note: Note) -> Kept | None:
        """A whole, verified entry, else None. A damaged entry is removed."""
        folder = self.entry(key)
        if not folder.exists():
            return None
        try:
            digests = verified(folder, key)
            os.utime(folder / ENTRY)  # the order in which entries are given up
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            note(f"a damaged cache entry was removed ({error}); this stage is built again")
            self.remove(folder)
            return None
        return Kept(folder / "files", digests)

    def store(self, key: str, stage: str, source: Path) -> Kept:
        """Keep the files of `source` under the key. Call it with the key's lock held."""
        with self.temporary() as temporary:
            copy_folder(source, temporary / "files")
            digests = digests_in(temporary / "files")
            entry = {"schema": SCHEMA, "key": key, "stage": stage, "files": digests}
            (temporary / ENTRY).write_text(json.dumps(entry, sort_keys=True), "utf-8")
            flush_files(temporary)
            target = self.entry(key)
            target.parent.mkdir(mode=0o700, exist_ok=True)
            self.remove(target)
            temporary.rename(target)
            flush(target.parent)
        self.shrink(keep=key)
        return Kept(target / "files", digests)

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """A new folder for an entry in the making, held so that `tidy` leaves it alone."""
        while True:
            folder = Path(tempfile.mkdtemp(dir=self.folder / "tmp"))
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another build tidies it away at this very moment
                os.close(descriptor)
                continue
            if folder.exists():
                break
            os.close(descriptor)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)

    def tidy(self) -> None:
        """Remove what killed builds left: temporary folders and lock files that nobody holds."""
        for left in [*(self.folder / "tmp").iterdir(), *(self.folder / "locks").iterdir()]:
            with suppressed_open(left) as descriptor:
                if descriptor is None or not try_lock(descriptor) or not is_at(descriptor, left):
                    continue
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)

    def remove(self, folder: Path) -> None:
        """Take an entry away at once: renamed first, so that no reader meets half of it."""
        with self.temporary() as grave, suppress(FileNotFoundError):
            folder.rename(grave / "entry")

    def entries(self) -> list[tuple[float, int, Path]]:
        """All entries as (last use, bytes, folder), least recently used first."""
        rows = []
        for listing in self.folder.glob(f"??/*/{ENTRY}"):
            try:
                size = sum((listing.parent / n).stat().st_size for n in names_in(listing.parent))
                rows.append((listing.stat().st_mtime, size, listing.parent))
            except FileNotFoundError:
                continue  # removed by another process meanwhile
        return sorted(rows)

    def shrink(self, keep: str = "") -> None:
        """Give up the least recently used entries until the rest fits into `max_bytes`.

        The entry `keep` and entries whose lock another build holds stay.
        """
        rows = self.entries()
        total = sum(size for _, size, _ in rows)
        for _, size, folder in rows:
            if total <= self.max_bytes:
                return
            if folder.name != keep and not self.in_use(folder.name):
                self.remove(folder)
                total -= size

    def in_use(self, key: str) -> bool:
        """Whether a process holds the lock of the key."""
        with suppressed_open(self.folder / "locks" / key) as descriptor:
            return descriptor is not None and not try_lock(descriptor)

    def clear(self) -> tuple[int, int]:
        """Remove all entries that no build is using; how many there were, and their bytes."""
        rows = [row for row in self.entries() if not self.in_use(row[2].name)]
        for _, _, folder in rows:
            self.remove(folder)
        for left in (self.folder / "unfinished").glob("*"):
            if not self.in_use(left.name):
                shutil.rmtree(left, ignore_errors=True)
        self.tidy()
        return len(rows), sum(size for _, size, _ in rows)


@contextmanager
def suppressed_open(path: Path) -> Iterator[int | None]:
    """A descriptor of the path, None where it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Take the lock of an open file if nobody has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def verified(folder: Path, key: str) -> dict[str, str]:
    """The digests of an entry; ValueError or OSError unless it is whole and every one fits."""
    entry = json.loads((folder / ENTRY).read_bytes())
    if entry["schema"] != SCHEMA or entry["key"] != key:
        raise ValueError("it is the entry of something else")
    found = digests_in(folder / "files")
    for name in sorted(entry["files"].keys() | found.keys()):
        if entry["files"].get(name) != found.get(name):
            raise ValueError(f"{name} has changed")
    return found


def cache_folder(env: Mapping[str, str]) -> Path:
    """Where the cache lies: EDGEWRIGHT_CACHE, else below XDG_CACHE_HOME, else ~/.cache."""
    if env.get("EDGEWRIGHT_CACHE"):
        return Path(env["EDGEWRIGHT_CACHE"]).absolute()
    if env.get("XDG_CACHE_HOME"):
        return Path(env["XDG_CACHE_HOME"]).absolute() / "edgewright"
    return Path(env.get("HOME") or Path.home()) / ".cache" / "edgewright"


def open_cache(env: Mapping[str, str]) -> Cache:
    """The cache, its folder made if need be (0700) and checked, leftovers tidied away.

    What lies in the cache ends up in bundles, so a folder that another user owns or may write
    to is refused.
    """
    folder = cache_folder(env)
    text = env.get("EDGEWRIGHT_CACHE_MAX_BYTES", str(MAX_BYTES))
    if not text.isascii() or not text.isdigit():
        raise UsageError("EDGEWRIGHT_CACHE_MAX_BYTES", expected="a number of bytes", found=text)
    hint = "name another folder in EDGEWRIGHT_CACHE, or build with --no-cache"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise EnvironmentMissing(
                f"the cache folder {folder} is not safe",
                expected="a folder of your own that nobody else may write to",
                found=f"owner {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):04o}",
                hint=hint,
            )
        cache = Cache(folder, int(text))
        for part in ("tmp", "locks"):
            (folder / part).mkdir(mode=0o700, exist_ok=True)
        cache.tidy()
    except OSError as error:
        raise EnvironmentMissing(
            f"the cache folder {folder} cannot be used", found=error.strerror or "", hint=hint
        ) from None
    return cache
