"""The bundle's container: an uncompressed ustar archive in one canonical form.

A list of (path, mode, content) and one time stamp has exactly one spelling here. The reader
takes a header apart, spells it again with the writer's own function and refuses what differs
by a byte. So links, devices, sparse files, pax and GNU extensions, owners, names over 100
bytes and odd padding cannot even be expressed, and nothing hides between the members.

Every refusal is an IntegrityError of one line; names from the archive are quoted in it.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edgewright.errors import BadInput, IntegrityError

BLOCK = 512
READ = 1 << 20
END = bytes(2 * BLOCK)
MAX_NUMBER = 8**11 - 1  # eleven octal digits: the size and time fields of ustar
MAX_PATH = 100  # the name field; the prefix field is never used
KINDS = {
    b"\0": "a file of the old tar format",
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a FIFO",
    b"7": "a contiguous file",
    b"g": "a pax header for all members",
    b"x": "a pax header",
    b"K": "a GNU long link name",
    b"L": "a GNU long name",
    b"S": "a sparse file",
}
# Names that Windows gives to devices, with any ending.
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
PART = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Member:
    """One regular file of the archive: what its header says."""

    path: str
    size: int
    mode: int
    mtime: int


def path_fault(path: str) -> str:
    """What makes a member path unsafe or ambiguous on some device; empty where nothing does.

    Only ASCII passes: Unicode has several spellings of one name, and file systems differ in
    which of them they hold equal.
    """
    if not path:
        return "an empty name"
    if len(path.encode("utf-8", "surrogatepass")) > MAX_PATH:
        return f"a name of more than {MAX_PATH} bytes"
    if any(ord(c) < 32 or ord(c) == 127 for c in path):
        return "a control character"
    if not path.isascii():
        return "a character outside ASCII"
    if path.startswith("/"):
        return "an absolute path"
    if "\\" in path:
        return "a backslash"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return f"the path part {part!r}"
        if part.endswith((".", " ")):
            return "a trailing dot or space"
        if RESERVED.fullmatch(part):
            return "a name reserved for devices"
        if not PART.fullmatch(part):
            return "a name that starts with '.' or '-', or holds other than letters, digits, ._+-"
    return ""


def paths_fault(paths: Iterable[str]) -> str:
    """What is wrong with these paths together: twins on some file system, a file as a folder."""
    spelt: dict[str, str] = {}
    files: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        if fault := path_fault(path):
            return f"{path!r}: {fault}"
        parts = path.split("/")
        above = ["/".join(parts[:k]) for k in range(1, len(parts))]
        for name in (*above, path):
            if spelt.setdefault(name.lower(), name) != name:
                return f"{path!r} differs from {spelt[name.lower()]!r} by case only"
        if path in files:
            return f"{path!r} appears twice"
        files.add(path)
        folders.update(above)
    both = sorted(files & folders)
    return f"{both[0]!r} is both a file and a folder" if both else ""


def header(member: Member) -> bytes:
    """The 512 bytes before a member's content (POSIX.1-1988 ustar; root-less, name-less)."""
    fields = (
        member.path.encode().ljust(100, b"\0"),
        b"%07o\0" % member.mode,
        b"0000000\0",
        b"0000000\0",
        b"%011o\0" % member.size,
        b"%011o\0" % member.mtime,
        b" " * 8,  # the checksum counts itself as spaces
        b"0".ljust(101, b"\0"),
        b"ustar\x0000".ljust(72, b"\0"),
        b"0000000\x000000000\0".ljust(183, b"\0"),
    )
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padding(size: int) -> bytes:
    """The zeros that fill a member's last block."""
    return bytes(-size % BLOCK)


def source_size(source: bytes | Path) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def source_blocks(source: bytes | Path) -> Iterator[bytes]:
    """The content of a member to be written, in pieces."""
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while block := file.read(READ):
            yield block


def source_digest(source: bytes | Path) -> str:
    """SHA-256 of a member to be written."""
    whole = hashlib.sha256()
    for block in source_blocks(source):
        whole.update(block)
    return whole.hexdigest()


def write(path: Path, files: Iterable[tuple[Member, bytes | Path, str]]) -> str:
    """Write the archive, all or nothing, in the given order; its SHA-256.

    `files`: header, content and the SHA-256 that the content must have. BadInput where a file
    changed since its header was made.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    whole = hashlib.sha256()
    try:
        with temporary.open("xb") as file:
            for block in archive(files):
                whole.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return whole.hexdigest()


def archive(files: Iterable[tuple[Member, bytes | Path, str]]) -> Iterator[bytes]:
    """The bytes of the archive, in pieces."""
    for member, source, digest in files:
        yield header(member)
        size, content = 0, hashlib.sha256()
        for block in source_blocks(source):
            size += len(block)
            content.update(block)
            yield block
        if size != member.size or content.hexdigest() != digest:
            raise BadInput(
                f"{member.path} changed while the bundle was written",
                hint="run the same command again, and let nothing else write there",
            )
        yield padding(size)
    yield END


def read_exact(stream: BinaryIO, size: int, what: str) -> bytes:
    """Exactly `size` bytes, or IntegrityError."""
    data = stream.read(size)
    if len(data) != size:
        raise IntegrityError(
            f"the bundle ends inside {what}",
            expected=f"{size} bytes",
            found=f"{len(data)}",
            hint="fetch the bundle again; the copy is truncated",
        )
    return data


def octal(field: bytes, what: str) -> int:
    """A number of a header: octal digits that fill the field, then NUL."""
    if not re.fullmatch(rb"[0-7]+\0", field):
        raise IntegrityError(f"a tar header has a malformed {what}", found=repr(field))
    return int(field[:-1], 8)


def read_member(stream: BinaryIO) -> Member | None:
    """The next header; None at a proper end of the archive, after which there is nothing."""
    block = read_exact(stream, BLOCK, "a tar header")
    if block == bytes(BLOCK):
        if read_exact(stream, BLOCK, "the end mark") != bytes(BLOCK):
            raise IntegrityError("the bundle's end mark is damaged")
        if stream.read(1):
            raise IntegrityError(
                "the bundle has bytes after its end", hint="fetch the bundle again, unchanged"
            )
        return None
    if block[257:265] != b"ustar\x0000":
        raise IntegrityError(
            "not a bundle, or a damaged one",
            expected="a tar header in ustar format",
            found=repr(block[257:265]),
            hint="a bundle is what `edgewright build` writes, NAME.bundle.tar",
        )
    name = block[:100].rstrip(b"\0").decode("ascii", "backslashreplace")
    stated = re.fullmatch(rb"([0-7]{6})\0 ", block[148:156])
    if stated is None or int(stated[1], 8) != sum(block) - sum(block[148:156]) + 8 * 32:
        raise IntegrityError(f"the tar header of {name!r} is damaged", found="a wrong checksum")
    if (kind := block[156:157]) != b"0":
        raise IntegrityError(
            f"member {name!r}",
            expected="a regular file",
            found=KINDS.get(kind, f"an unknown kind of member ({kind!r})"),
        )
    if fault := path_fault(name):
        raise IntegrityError(f"member {name!r}", expected="a safe path", found=fault)
    member = Member(
        path=name,
        size=octal(block[124:136], f"size ({name!r})"),
        mode=octal(block[100:108], f"mode ({name!r})"),
        mtime=octal(block[136:148], f"time ({name!r})"),
    )
    if header(member) != block:
        raise IntegrityError(
            f"the tar header of {name!r} is not in the one form a bundle has",
            expected="owner 0, no owner names, no prefix, no extensions",
        )
    return member


def read_content(stream: BinaryIO, member: Member) -> Iterator[bytes]:
    """The member's content in pieces of at most 1 MiB; its padding is checked at the end."""
    left = member.size
    while left:
        block = read_exact(stream, min(left, READ), repr(member.path))
        left -= len(block)
        yield block
    fill = padding(member.size)
    if read_exact(stream, len(fill), f"the padding of {member.path!r}") != fill:
        raise IntegrityError(f"the padding after {member.path!r} is not zero")
