"""Verifying and unpacking a bundle, in one pass over its bytes and in bounded memory.

The manifest comes first, then the envelope that signs it. Who trusts only some keys learns here
whether they signed, before the manifest is parsed and before any byte behind it is read. Then
every member must be the next one the manifest lists, with that size, mode and digest. No model,
archive of arrays or other content is parsed here.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edgewright.bundle import manifest, tarball, transport
from edgewright.bundle.manifest import Manifest
from edgewright.device import delta, envelope
from edgewright.device.envelope import Trust
from edgewright.errors import (
    BadInput,
    IntegrityError,
    UsageError,
    from_os_error,
)

Admit = Callable[["Verified"], None]
Sink = Callable[[str, int], AbstractContextManager[BinaryIO | None]]  # path, mode -> file


@dataclass(frozen=True)
class Verified:
    """A bundle that is whole. `signers`: keyids; checked only where `trust` was given."""

    manifest: Manifest
    manifest_bytes: bytes
    envelope: bytes | None
    signers: list[str]


def verify(bundle: Path, trust: Trust | None = None) -> Manifest:
    """The manifest of a bundle that is whole and holds exactly what it lists.

    IntegrityError for anything else, BadInput where there is no such file. Without `trust` this
    says nothing about who made the bundle.
    """
    return verified(bundle, trust).manifest


def verified(bundle: Path, trust: Trust | None = None) -> Verified:
    """As `verify`, with what the bundle says of its signers."""
    with open_bundle(bundle) as stream, naming(bundle):
        return walk(stream, lambda path, mode: nullcontext(), trust)


def extract(bundle: Path, folder: Path, trust: Trust | None = None) -> Manifest:
    """Unpack into the new folder `folder`, verifying every byte on its way; the manifest.

    Nothing remains after an error. The folder must not exist, its parent must.
    """
    with open_bundle(bundle) as stream, naming(bundle):
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            raise UsageError(
                f"{folder} exists", expected="a new folder to unpack into", hint="name another one"
            ) from None
        try:
            return walk(stream, lambda path, mode: new_file(folder, path, mode), trust).manifest
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def naming(bundle: Path) -> Iterator[None]:
    """Put the bundle's path before what is wrong inside it; a message for a full disk too."""
    try:
        yield
    except (IntegrityError, BadInput) as error:
        raise type(error)(f"{bundle}: {error}") from None
    except OSError as error:
        raise from_os_error(error, f"reading or unpacking {bundle}") from None


def open_bundle(path: Path) -> BinaryIO:
    """The archive for reading, unpacked where it is compressed.

    BadInput where there is none, IntegrityError where it is a device or pipe: it might never end.
    """
    file = transport.open_file(path, "bundle")
    start = file.read(len(delta.MAGIC))
    file.seek(0)
    if start == delta.MAGIC:
        file.close()
        raise BadInput(
            f"{path} is a delta, no bundle",
            hint="install it with --delta where the release before it is installed",
        )
    return transport.plain(file)


def walk(
    stream: BinaryIO, sink: Sink, trust: Trust | None = None, admit: Admit = lambda found: None
) -> Verified:
    """Check all members in order and hand their content to files that `sink` opens.

    `admit` may refuse what the manifest says before anything behind it is read.
    """
    first, data = read_head(stream, manifest.PATH, manifest.MAX_BYTES)
    second = tarball.read_member(stream)
    signature = None
    if second is not None and second.path == manifest.SIGNATURE:
        signature = head_content(stream, second, envelope.MAX_BYTES)
    signers = envelope.check(signature, data, trust)
    content = manifest.check(data)
    time_stamp = content["source_date_epoch"]
    if trust is not None:
        envelope.check_dates(time_stamp, content["expires"], trust.now)
    found = Verified(content, data, signature, signers)
    admit(found)
    for member, part in ((first, data), (second, signature)):
        if member is not None and part is not None:
            check_time(member, time_stamp)
            with sink(member.path, member.mode) as file:
                if file is not None:
                    file.write(part)
    following = tarball.read_member(stream) if signature is not None else second
    read_files(stream, sink, content, following)
    return found


def read_head(stream: BinaryIO, path: str, limit: int) -> tuple[tarball.Member, bytes]:
    """The first member, which must be `path`, and its content."""
    member = tarball.read_member(stream)
    if member is None or member.path != path:
        raise IntegrityError(
            "not a bundle",
            expected=f"{path} as its first member",
            found=repr(member.path) if member else "an empty archive",
            hint="a bundle is what `edgewright build` writes, NAME.bundle.tar",
        )
    return member, head_content(stream, member, limit)


def head_content(stream: BinaryIO, member: tarball.Member, limit: int) -> bytes:
    """Manifest or envelope: the whole member, of no more than `limit` bytes."""
    if member.size > limit or member.mode != 0o644:
        raise IntegrityError(
            f"the bundle's {member.path} is refused",
            expected=f"mode 0644 and at most {limit} bytes",
            found=f"mode {member.mode:04o}, {member.size} bytes",
        )
    return b"".join(tarball.read_content(stream, member))


def read_files(
    stream: BinaryIO, sink: Sink, content: Manifest, member: tarball.Member | None
) -> None:
    """Check the members from `member` on against the manifest's list of files."""
    time_stamp = content["source_date_epoch"]
    listed = {entry["path"] for entry in content["files"]}
    for entry in content["files"]:
        if member is None:
            raise IntegrityError("the bundle lacks a listed file", expected=repr(entry["path"]))
        check_member(member, entry, listed)
        check_time(member, time_stamp)
        whole = hashlib.sha256()
        with sink(member.path, member.mode) as file:
            for block in tarball.read_content(stream, member):
                whole.update(block)
                if file is not None:
                    file.write(block)
        if whole.hexdigest() != entry["sha256"]:
            raise IntegrityError(
                f"{member.path} in the bundle is not what the manifest lists",
                expected=f"SHA-256 {entry['sha256']}",
                found=whole.hexdigest(),
                hint="fetch the bundle again, from the source you trust",
            )
        member = tarball.read_member(stream)
    if member is not None:
        raise IntegrityError("a file that the manifest does not list", found=repr(member.path))


def check_member(member: tarball.Member, entry: dict[str, object], listed: set[str]) -> None:
    """The header against its line in the manifest."""
    if member.path != entry["path"]:
        if member.path not in listed:
            raise IntegrityError("a file that the manifest does not list", found=repr(member.path))
        raise IntegrityError(
            "a bundle's members follow its manifest",
            expected=repr(entry["path"]),
            found=repr(member.path),
        )
    if member.size != entry["size"]:
        raise IntegrityError(
            f"size of {member.path} in the bundle",
            expected=f"{entry['size']} bytes",
            found=str(member.size),
        )
    if f"{member.mode:04o}" != entry["mode"]:
        raise IntegrityError(
            f"mode of {member.path} in the bundle",
            expected=str(entry["mode"]),
            found=f"{member.mode:04o}",
        )


def check_time(member: tarball.Member, time_stamp: int) -> None:
    """One time stamp for all, so that the manifest fixes every byte of the archive."""
    if member.mtime != time_stamp:
        raise IntegrityError(
            f"time stamp of {member.path} in the bundle",
            expected=str(time_stamp),
            found=str(member.mtime),
        )


def new_file(folder: Path, path: str, mode: int) -> AbstractContextManager[BinaryIO]:
    """A file that did not exist before, opened below `folder` without following any link."""
    *parts, name = path.split("/")
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    here = os.open(folder, flags)
    try:
        for part in parts:
            with suppress(FileExistsError):  # made for a file before, or refused by the next line
                os.mkdir(part, 0o700, dir_fd=here)
            inner = os.open(part, flags, dir_fd=here)
            os.close(here)
            here = inner
        create = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, create, 0o600, dir_fd=here)
        os.fchmod(descriptor, mode)
    finally:
        os.close(here)
    return os.fdopen(descriptor, "wb")
