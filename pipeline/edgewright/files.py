"""Files that are there whole or not at all, and locks that die with their process."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgewright.errors import UsageError


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_in(folder: Path) -> dict[str, str]:
    """SHA-256 of all files below a folder, by sorted relative names."""
    return {name: sha256_of(folder / name) for name in names_in(folder)}


def names_in(folder: Path) -> list[str]:
    """All files below a folder, as sorted relative names."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def flush(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_kind(path: Path, where: str) -> None:
    """UsageError for what a file must not take the place of: a folder, a device, a pipe."""
    if path.exists() and not path.is_file():
        found = "a folder" if path.is_dir() else "a device, pipe or socket"
        raise UsageError(where, expected="the name of a file to write", found=found)


def check_writable(path: Path, where: str) -> None:
    """UsageError where no file can be written at the path, now or once its folder is made."""
    check_kind(path, where)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        found = f"{folder}: {error.strerror or error}"
        raise UsageError(where, expected="a file that can be written", found=found) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; becomes `path` if the block succeeds."""
    check_kind(path, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
        flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write all of `data` or nothing."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
        flush(temporary)


def copy_atomic(source: Path, target: Path) -> None:
    """Copy a file whole or not at all."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
        flush(temporary)


def copy_folder(source: Path, target: Path) -> None:
    """Copy all files below `source` into the folder `target`."""
    for name in names_in(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def flush_files(folder: Path) -> None:
    """Wait until all files below a folder, and their names, are on the disk."""
    for path in [folder, *folder.rglob("*")]:
        flush(path)


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two files have the same content; a missing `b` has not."""
    if not b.exists() or a.stat().st_size != b.stat().st_size:
        return False
    return sha256_of(a) == sha256_of(b)


@contextmanager
def locked(path: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path`, which says whose it is; removed afterwards.

    If another process holds it, `busy` is called with what the file says; unless that raises,
    the call then waits. The kernel frees the lock of a killed process, so none is ever stale.
    """
    told = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    busy(os.pread(descriptor, 200, 0).decode(errors="replace").strip())
                    told = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if is_at(descriptor, path):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still what the path names (its last holder removes it)."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))
