"""A delta: the next bundle, told in terms of the release that is installed.

Eight bytes of magic, the SHA-256 of the base's manifest, then an xz stream of records. A record
is a kind, a member of the base (0: its manifest, k: the k-th file that lists), an offset there and
a length, and then that many bytes: the bundle's own (INSERT), or what to add, byte by byte and
modulo 256, to that piece of the base (ADD, as bsdiff does it: Percival, "Naive differences of
executable code", 2003). Where nothing changed these are zeros, which cost nothing.

The reader gives the bundle's bytes as they are asked for, in bounded memory, and proves nothing:
they are verified like those of any other bundle, signature first. So a forged delta makes no more
than a forged bundle would.
"""

import hashlib
import io
import os
import struct
from pathlib import Path
from typing import BinaryIO

from edgewright.bundle import manifest as manifests
from edgewright.bundle import transport
from edgewright.errors import BadInput, IntegrityError

MAGIC = b"EWDELTA1"
HEAD = len(MAGIC) + 32
RECORD = struct.Struct(">BHQI")
END, INSERT, ADD = 0, 1, 2
MOST = 1 << 16  # bytes of a record


def add(base: bytes, change: bytes) -> bytes:
    """The sums modulo 256 of two equally long byte strings, all at once in two long integers.

    The lower seven bits of each byte cannot carry into the next one; the highest is added apart.
    """
    size = len(change)
    x, y = int.from_bytes(base, "little"), int.from_bytes(change, "little")
    if not y:
        return base
    low = int.from_bytes(b"\x7f" * size, "little")
    high = low + int.from_bytes(b"\x01" * size, "little")
    return ((x & low) + (y & low) ^ (x ^ y) & high).to_bytes(size, "little")


def open_delta(path: Path, base: Path) -> BinaryIO:
    """The bytes of the bundle that a delta makes of the installed release in the folder `base`.

    BadInput where the file is no delta, or one for another release.
    """
    file = transport.open_file(path, "delta")
    head = file.read(HEAD)
    data = (base / manifests.PATH).read_bytes()
    if len(head) < HEAD or not head.startswith(MAGIC):
        file.close()
        raise BadInput(f"{path} is no delta", hint="leave --delta out for a whole bundle")
    if head[len(MAGIC) :] != hashlib.sha256(data).digest():
        file.close()
        raise BadInput(
            f"{path} is a delta for another release",
            expected=f"one for {base.name}",
            found=f"one for the manifest {head[len(MAGIC) :].hex()[:16]}...",
            hint="install the whole bundle",
        )
    paths = [manifests.PATH, *(entry["path"] for entry in manifests.check(data)["files"])]
    records = io.BufferedReader(transport.Unpacked(file), transport.READ)
    return io.BufferedReader(Applied(records, [base / one for one in paths]), MOST)


class Applied(io.RawIOBase):
    """The bytes that records make of the members of a base."""

    def __init__(self, records: BinaryIO, members: list[Path]) -> None:
        self.records = records
        self.members = members
        self.number = -1
        self.member: BinaryIO | None = None
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Fill part of the buffer; 0 at the end."""
        if not self.ready:
            self.ready = self.following()
        part = self.ready[: len(buffer)]
        self.ready = self.ready[len(part) :]
        buffer[: len(part)] = part
        return len(part)

    def following(self) -> bytes:
        """What the next record makes; nothing at the end."""
        kind, number, offset, size = RECORD.unpack(self.exactly(RECORD.size))
        if kind == END:
            if self.records.read(1):
                raise IntegrityError("the delta has bytes after its end")
            return b""
        if kind not in (INSERT, ADD) or not 0 < size <= MOST:
            raise IntegrityError("the delta is damaged", found=f"record {kind} of {size} bytes")
        change = self.exactly(size)
        return change if kind == INSERT else add(self.piece(number, offset, size), change)

    def exactly(self, size: int) -> bytes:
        data = self.records.read(size)
        if len(data) != size:
            raise IntegrityError("the delta ends too early", hint="fetch it again")
        return data

    def piece(self, number: int, offset: int, size: int) -> bytes:
        """A piece of a member of the base."""
        if number >= len(self.members):
            raise IntegrityError("the delta is damaged", found=f"no member {number} in its base")
        if number != self.number:
            self.close_member()
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self.member = os.fdopen(os.open(self.members[number], flags), "rb")
            self.number = number
        assert self.member is not None
        if offset + size > os.fstat(self.member.fileno()).st_size:
            raise IntegrityError("the delta is damaged", found="a piece outside of its base")
        self.member.seek(offset)
        return self.member.read(size)

    def close_member(self) -> None:
        if self.member is not None:
            self.member.close()
            self.member, self.number = None, -1

    def close(self) -> None:
        self.close_member()
        self.records.close()
        super().close()
