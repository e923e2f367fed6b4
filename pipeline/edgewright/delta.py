"""Making a delta between two bundles; `device.delta` says what it is, and reads it.

Files of one name are compared. Where they lie against each other is found by windows of equal
bytes; between such windows the same distance is taken on, since requantized weights differ in
every few bytes and still belong together. A piece is told as its difference where that has less
entropy than the piece itself.
"""

import hashlib
import lzma
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgewright.bundle import manifest as manifests
from edgewright.bundle import tarball, transport
from edgewright.device import delta as deltas
from edgewright.device.verify import extract, open_bundle, verified
from edgewright.errors import BadInput, UsageError
from edgewright.files import write_atomic

WINDOW = 32  # bytes that must be equal
STRIDE = 16  # of windows in the base
CHUNK = 1 << 20  # places of the new file that are looked up at once
PIECE = 1 << 9  # bytes for which one choice is made
# Any odd factor makes a rolling hash modulo 2^64; a false match costs size, never a wrong byte.
FACTOR = np.uint64(0x9E3779B97F4A7C15)
Piece = tuple[int, int, int]  # begin in the new file, length, place in the base or -1


def make(old: Path, new: Path, out: Path) -> dict[str, int]:
    """Write the delta that makes `new` of an installed `old`; {"bytes", "bundle", "compressed"}.

    Both are verified to be whole, and the delta is applied before it is written.
    """
    with tempfile.TemporaryDirectory(prefix="edgewright-delta-") as name:
        base = Path(name) / "base"
        before, after = extract(old, base), verified(new).manifest
        if (before["name"], before["target"]) != (after["name"], after["target"]):
            raise UsageError(
                "a delta is between two releases of one model for one target",
                expected=f"{before['name']} for {before['target']}",
                found=f"{after['name']} for {after['target']}",
            )
        with open_bundle(new) as stream:
            target = stream.read()
        packer = lzma.LZMACompressor(lzma.FORMAT_XZ, lzma.CHECK_CRC64, transport.PRESET)
        parts = [deltas.MAGIC, hashlib.sha256((base / manifests.PATH).read_bytes()).digest()]
        parts += [packer.compress(record) for record in records(base, before, target)]
        parts.append(packer.flush())
        data = b"".join(parts)
        trial = Path(name) / "delta"
        trial.write_bytes(data)
        with deltas.open_delta(trial, base) as stream:
            if stream.read() != target:
                raise BadInput("the delta does not make the new bundle", hint="please report it")
    write_atomic(out, data)
    whole = lzma.compress(target, lzma.FORMAT_XZ, lzma.CHECK_CRC64, transport.PRESET)
    return {"bytes": len(data), "bundle": len(target), "compressed": len(whole)}


def records(base: Path, before: manifests.Manifest, target: bytes) -> Iterator[bytes]:
    """The records that make the archive `target` of the files in `base`."""
    numbers = {entry["path"]: k for k, entry in enumerate(before["files"], 1)}
    numbers[manifests.PATH] = 0
    place = 0
    for path, begin, size in members(target):
        yield from inserted(target[place:begin])
        content = target[begin : begin + size]
        if path in numbers:
            yield from compared((base / path).read_bytes(), content, numbers[path])
        else:
            yield from inserted(content)
        place = begin + size
    yield from inserted(target[place:])
    yield deltas.RECORD.pack(deltas.END, 0, 0, 0)


def members(target: bytes) -> Iterator[tuple[str, int, int]]:
    """Path, place and size of each member's content in a verified archive."""
    place = 0
    while (block := target[place : place + tarball.BLOCK]) != bytes(tarball.BLOCK):
        size = int(block[124:135], 8)
        yield block[:100].rstrip(b"\0").decode(), place + tarball.BLOCK, size
        place += tarball.BLOCK + size + len(tarball.padding(size))


def inserted(data: bytes) -> Iterator[bytes]:
    """Records of bytes that the base does not have."""
    for k in range(0, len(data), deltas.MOST):
        part = data[k : k + deltas.MOST]
        yield deltas.RECORD.pack(deltas.INSERT, 0, 0, len(part)) + part


def compared(old: bytes, new: bytes, number: int) -> Iterator[bytes]:
    """Records of a file in terms of an older one."""
    a, b = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    for begin, size, place in merged(pieces(a, b)):
        for k in range(0, size, deltas.MOST):
            part = slice(begin + k, begin + min(k + deltas.MOST, size))
            length = part.stop - part.start
            if place < 0:
                head = deltas.RECORD.pack(deltas.INSERT, 0, 0, length)
                yield head + b[part].tobytes()
            else:
                head = deltas.RECORD.pack(deltas.ADD, number, place + k, length)
                yield head + (b[part] - a[place + k : place + k + length]).tobytes()


def merged(parts: Iterator[Piece]) -> Iterator[Piece]:
    """Neighbours that lie alike as one."""
    last: Piece | None = None
    for begin, size, place in parts:
        if last is not None and place == (last[2] + last[1] if last[2] >= 0 else -1):
            last = (last[0], last[1] + size, last[2])
            continue
        if last is not None:
            yield last
        last = (begin, size, place)
    if last is not None:
        yield last


def pieces(a: np.ndarray, b: np.ndarray) -> Iterator[Piece]:
    """The new file `b` (uint8) in pieces, each with its place in `a`, -1 where none pays."""
    begins = aligned(a, b)
    for (begin, shift), (end, _) in zip(begins, [*begins[1:], (len(b), 0)], strict=True):
        for k in range(begin, end, PIECE):
            size = min(PIECE, end - k)
            place = k + shift
            fits = place >= 0 and place + size <= len(a)
            part = b[k : k + size]
            if fits and entropy(part - a[place : place + size]) < entropy(part):
                yield k, size, place
            else:
                yield k, size, -1


def entropy(data: np.ndarray) -> float:
    """Bits per byte, were the bytes independent; minus one for a run of zeros."""
    counts = np.bincount(data, minlength=256)
    if counts[0] == len(data):
        return -1.0
    shares = counts[counts > 0] / len(data)
    return float(-(shares * np.log2(shares)).sum())


def aligned(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int]]:
    """From which byte of `b` on it lies how far from `a`: (begin, place in a - place in b)."""
    begins = [(0, 0)]
    for place, other in windows(a, b):
        shift = begins[-1][1]
        window = b[place : place + WINDOW]
        here = place + shift
        if 0 <= here <= len(a) - WINDOW and (a[here : here + WINDOW] == window).all():
            continue
        if (a[other : other + WINDOW] != window).any():
            continue
        begin = place
        while (
            begin > begins[-1][0]
            and other > place - begin
            and b[begin - 1] == a[other - (place - begin) - 1]
        ):
            begin -= 1
        begins.append((begin, other - place))
    return begins


def windows(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[int, int]]:
    """Places of `b` and of `a` whose windows have one hash, in the order of `b`."""
    if min(len(a), len(b)) < WINDOW:
        return
    hashes = rolling(a, 0, len(a) - WINDOW + 1)[::STRIDE]
    hashes, where = np.unique(hashes, return_index=True)
    for begin in range(0, len(b) - WINDOW + 1, CHUNK):
        end = min(begin + CHUNK, len(b) - WINDOW + 1)
        found = rolling(b, begin, end)
        at = np.minimum(np.searchsorted(hashes, found), len(hashes) - 1)
        hits = np.flatnonzero(hashes[at] == found)
        last = -STRIDE
        for hit in hits:
            if hit - last >= STRIDE:
                last = int(hit)
                yield begin + last, int(where[at[hit]]) * STRIDE


def rolling(data: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Hashes of the windows that begin at `begin` to `end` - 1: polynomials modulo 2^64."""
    total = np.zeros(end - begin, np.uint64)
    for k in range(WINDOW):
        total = total * FACTOR + data[begin + k : end + k].astype(np.uint64) + np.uint64(1)
    return total ^ total >> np.uint64(29)
