"""The compressed form in which a bundle travels: xz around the archive, outside all digests.

What is signed and verified is the archive; this form may be made, undone and made again by
anyone. The reader hands out no more than it is asked for, in bounded memory, so a small file
that unpacks without end costs no more than the archive it claims to be.
"""

import io
import lzma
import os
import stat
from pathlib import Path
from typing import BinaryIO

from edgewright.errors import BadInput, IntegrityError, from_os_error

SUFFIX = ".xz"
MAGIC = b"\xfd7zXZ\x00"
PRESET = 6  # its dictionary is 8 MiB: a reader needs 9 MiB
MEMORY = 80 << 20  # that of preset 9, the most anyone writes
READ = 1 << 16


def open_file(path: Path, what: str) -> BinaryIO:
    """A bundle or delta (`what`) for reading, as it is.

    BadInput where there is none, IntegrityError where it is a device or pipe: it might never end.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadInput(f"{what} not found: {path}", hint="check the path") from None
    except OSError as error:
        raise from_os_error(error, f"opening the {what}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise BadInput(f"{path} is no {what}", expected="a file", found="a folder")
        raise IntegrityError(
            f"{what} {path}", expected="a regular file", found="a device or pipe, which never ends"
        )
    return os.fdopen(descriptor, "rb")


def compress(bundle: Path) -> Path:
    """Write the compressed form beside a bundle, all or nothing; its path."""
    out = bundle.with_name(bundle.name + SUFFIX)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    packer = lzma.LZMACompressor(lzma.FORMAT_XZ, lzma.CHECK_CRC64, PRESET)
    try:
        with bundle.open("rb") as source, temporary.open("xb") as file:
            while block := source.read(1 << 20):
                file.write(packer.compress(block))
            file.write(packer.flush())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return out


def plain(file: BinaryIO) -> BinaryIO:
    """The archive's bytes, whether the file is an archive or a compressed one."""
    start = file.read(len(MAGIC))
    file.seek(0)
    return io.BufferedReader(Unpacked(file), READ) if start == MAGIC else file


class Unpacked(io.RawIOBase):
    """What an xz file of one stream holds, unpacked as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.packed = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Fill part of the buffer; 0 at the end. IntegrityError for what is no whole xz file."""
        while not self.packed.eof:
            block = self.file.read(READ) if self.packed.needs_input else b""
            if self.packed.needs_input and not block:
                raise IntegrityError(
                    "the compressed bundle ends too early", hint="fetch it again, it is truncated"
                )
            try:
                data = self.packed.decompress(block, len(buffer))
            except lzma.LZMAError as error:
                raise IntegrityError(
                    "the compressed bundle is damaged",
                    found=str(error),
                    hint="fetch the bundle again, unchanged",
                ) from None
            if data:
                buffer[: len(data)] = data
                return len(data)
        if self.packed.unused_data or self.file.read(1):
            raise IntegrityError("the compressed bundle has bytes after its end")
        return 0

    def close(self) -> None:
        self.file.close()
        super().close()
