"""Deltas: small where releases are alike, and no way around any check."""

import hashlib
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import forged, make, pack, unpack
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright import delta as making
from edgewright.device import delta as deltas
from edgewright.device import store
from edgewright.device.delta import RECORD
from edgewright.device.install import Wish, install
from edgewright.errors import BadInput, EdgewrightError, IntegrityError, UsageError

QUICK = Wish(allow_unsigned=True, self_test=False)
DELTA = Wish(allow_unsigned=True, self_test=False, delta=True)


@given(st.binary(max_size=300), st.data())
def test_add_is_addition_modulo_256(base, data):
    change = data.draw(st.binary(min_size=len(base), max_size=len(base)))
    assert deltas.add(base, change) == bytes(
        (a + b) % 256 for a, b in zip(base, change, strict=True)
    )


def told(old: bytes, new: bytes, folder: Path) -> tuple[bytes, int]:
    """`new` as the records of it make it again, and their size when packed."""
    (folder / "member").write_bytes(old)
    data = b"".join(making.compared(old, new, 0)) + RECORD.pack(deltas.END, 0, 0, 0)
    (folder / "records").write_bytes(data)
    with (folder / "records").open("rb") as records:
        found = deltas.Applied(records, [folder / "member"]).readall()
    return found, len(lzma.compress(data))


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 4000), st.integers(0, 6))
def test_any_edit_comes_back(tmp_path_factory, random, size, edits):
    folder = tmp_path_factory.mktemp("edit")
    old = random.randbytes(size)
    new = bytearray(old)
    for _ in range(edits):
        at = random.randint(0, len(new))
        new[at : at + random.choice((0, 1, 50))] = random.randbytes(random.choice((0, 1, 200)))
    assert told(old, bytes(new), folder)[0] == bytes(new)


def test_what_moved_or_shook_costs_little(tmp_path):
    rng = np.random.default_rng(1)
    old = rng.integers(0, 256, 200_000, np.uint8)
    moved = np.concatenate([old[90_000:], rng.integers(0, 256, 77, np.uint8), old[:90_000]])
    shaken = old + rng.choice(np.array([0, 1, 255], np.uint8), len(old), p=[0.9, 0.05, 0.05])
    both = np.concatenate([old[:3], shaken])
    for new, most in ((old, 400), (moved, 1000), (shaken, 25_000), (both, 25_500)):
        found, size = told(old.tobytes(), new.tobytes(), tmp_path)
        assert found == new.tobytes()
        assert size < most, "of 200000"
    # Entropy of the shaking: 0.9, 0.05 and 0.05 are 0.57 bits a byte, 14200 bytes in all.
    assert told(old.tobytes(), shaken.tobytes(), tmp_path)[1] > 14_000


MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
tiny (float[N, 64] x) => (float[N, 256] y) { h = MatMul (x, w)  y = Relu (h) }
"""


def model_bundle(folder: Path, scale: float) -> Path:
    """A bundle of a model with 64 KiB of weights, all of them changed by `scale`."""
    model = onnx.parser.parse_model(MODEL)
    weights = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32)
    model.graph.initializer.append(
        onnx.numpy_helper.from_array((weights * np.float32(scale)).astype(np.float32), "w")
    )
    path = make(folder, onnx.printer.to_text(onnx.parser.parse_model(SMALL)))
    members = {name: (data, mode) for name, data, mode in unpack(path)}
    data = model.SerializeToString()
    members["model/model.onnx"] = (data, 0o644)
    digest = hashlib.sha256(data).hexdigest()

    def edit(content):
        content["sequence"] = round(scale * 100)
        content["model"].update(bytes=len(data), sha256=digest)
        entry = next(e for e in content["files"] if e["path"] == "model/model.onnx")
        entry.update(size=len(data), sha256=digest)

    out = folder / f"{scale}.bundle.tar"
    out.write_bytes(pack([(n, d, m) for n, (d, m) in members.items()]))
    out.write_bytes(forged(out, edit))
    return out


SMALL = """
<ir_version: 9, opset_import: ["" : 17]>
tiny (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two releases and the delta between them."""
    folder = tmp_path_factory.mktemp("delta")
    for name, scale in (("old", 1.0), ("new", 1.01)):
        model_bundle(folder / name, scale).rename(folder / f"{name}.bundle.tar")
    making.make(folder / "old.bundle.tar", folder / "new.bundle.tar", folder / "d")
    return folder


def test_install(place, tmp_path):
    root = tmp_path / "root"
    install(place / "old.bundle.tar", root, QUICK)
    report = install(place / "d", root, DELTA)
    assert report["action"] == "installed" and report["sequence"] == 101
    other = tmp_path / "other"
    whole = install(place / "new.bundle.tar", other, QUICK)
    assert whole["release"] == report["release"]
    for path in (other / "current").rglob("*"):
        if path.is_file():
            twin = root / "current" / path.relative_to(other / "current")
            assert twin.read_bytes() == path.read_bytes()


def test_same_bundles_same_delta_and_a_release_to_itself(place, tmp_path):
    old, new = place / "old.bundle.tar", place / "new.bundle.tar"
    sizes = making.make(old, new, tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == (place / "d").read_bytes()
    assert sizes["bytes"] == (place / "d").stat().st_size < sizes["bundle"]
    assert making.make(old, old, tmp_path / "d")["bytes"] < 1000


def test_by_the_commands(place, tmp_path):
    def run(*words):
        start = [sys.executable, "-m", "edgewright", *words]
        return subprocess.run(start, cwd=place, capture_output=True, text=True)

    made = run("delta", "old.bundle.tar", "new.bundle.tar", "-o", str(tmp_path / "d"))
    assert made.returncode == 0 and "of the bundle" in made.stdout, made.stderr
    flags = ("--root", str(tmp_path / "root"), "--allow-unsigned", "--no-self-test")
    assert run("install", "old.bundle.tar", *flags).returncode == 0
    refused = run("install", str(tmp_path / "d"), *flags)
    assert refused.returncode == 3 and "install it with --delta" in refused.stderr
    done = run("install", str(tmp_path / "d"), "--delta", *flags)
    assert done.returncode == 0 and done.stdout.startswith("installed"), done.stderr


def refuse(data: bytes, place: Path, root: Path, kind: type[EdgewrightError]) -> str:
    """Refused in one line; the old release runs on and nothing is left."""
    if not root.exists():
        install(place / "old.bundle.tar", root, QUICK)
    current = store.linked(root)
    path = root.parent / "bad"
    path.write_bytes(data)
    with pytest.raises(kind) as caught:
        install(path, root, DELTA)
    assert store.linked(root) == current and store.is_whole(root, current)
    assert not list((root / "staging").iterdir())
    assert [p.name for p in (root / "releases").iterdir()] == [current]
    text = str(caught.value)
    assert text.isprintable()
    return text


def delta_of(records: bytes, base: bytes) -> bytes:
    return deltas.MAGIC + base + lzma.compress(records)


def test_deltas_that_are_none(place, tmp_path):
    root, good = tmp_path / "root", (place / "d").read_bytes()
    base = good[8:40]
    assert "no delta" in refuse(b"", place, root, BadInput)
    assert "no delta" in refuse((place / "new.bundle.tar").read_bytes(), place, root, BadInput)
    assert "another release" in refuse(good[:8] + bytes(32) + good[40:], place, root, BadInput)
    for data in (good[:-20], good[:60], good[:40], good + b"x", good[:40] + b"junk"):
        refuse(data, place, root, IntegrityError)
    changed = bytearray(good)
    changed[len(good) // 2] ^= 1
    refuse(bytes(changed), place, root, IntegrityError)
    bad = [
        RECORD.pack(9, 0, 0, 1) + b"x",
        RECORD.pack(deltas.INSERT, 0, 0, 0),
        RECORD.pack(deltas.INSERT, 0, 0, deltas.MOST + 1) + bytes(deltas.MOST + 1),
        RECORD.pack(deltas.INSERT, 0, 0, 9) + b"short",
        RECORD.pack(deltas.ADD, 60_000, 0, 1) + b"x",
        RECORD.pack(deltas.ADD, 0, 2**63, 1) + b"x",
        RECORD.pack(deltas.ADD, 0, 2**40, 1) + b"x",
        RECORD.pack(deltas.END, 0, 0, 0),
        RECORD.pack(deltas.END, 0, 0, 0) + b"x",
        b"",
    ]
    for records in bad:
        refuse(delta_of(records, base), place, root, IntegrityError)


def test_a_delta_that_unpacks_without_end(place, tmp_path):
    """A small file that makes gigabytes of zeros is refused at the first of them."""
    base = (place / "d").read_bytes()[8:40]
    record = RECORD.pack(deltas.INSERT, 0, 0, deltas.MOST) + bytes(deltas.MOST)
    packer = lzma.LZMACompressor()
    parts = [packer.compress(record) for _ in range(2000)]
    data = deltas.MAGIC + base + b"".join([*parts, packer.flush()])
    assert len(data) < 60_000
    refuse(data, place, tmp_path / "root", IntegrityError)


def test_a_well_made_delta_to_a_forged_bundle(place, tmp_path):
    """What it makes is checked as any bundle is: signature, sequence, device."""
    older = tmp_path / "older.tar"
    older.write_bytes(forged(place / "new.bundle.tar", lambda c: c.update(sequence=1)))
    making.make(place / "old.bundle.tar", older, tmp_path / "d")
    text = refuse((tmp_path / "d").read_bytes(), place, tmp_path / "root", IntegrityError)
    assert "sequence above 100" in text


def test_a_base_that_is_damaged(place, tmp_path):
    root = tmp_path / "root"
    install(place / "old.bundle.tar", root, QUICK)
    with (root / "current/model/model.onnx").open("r+b") as file:
        file.seek(5000)
        file.write(os.urandom(64))
    with pytest.raises(IntegrityError, match="not what the manifest lists"):
        install(place / "d", root, DELTA)
    os.truncate(root / "current/model/model.onnx", 100)
    with pytest.raises(IntegrityError, match="outside of its base"):
        install(place / "d", root, DELTA)


def test_no_delta_that_never_ends(place, tmp_path):
    """Nobody waits for the writer of a FIFO."""
    root = tmp_path / "root"
    install(place / "old.bundle.tar", root, QUICK)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(IntegrityError, match="never ends"):
        install(tmp_path / "fifo", root, DELTA)
    with pytest.raises(BadInput, match="delta not found"):
        install(tmp_path / "none", root, DELTA)


def test_without_a_base(place, tmp_path):
    with pytest.raises(UsageError, match="nothing installed"):
        install(place / "d", tmp_path / "root", DELTA)


def test_between_two_models(place, tmp_path):
    other = tmp_path / "other.tar"
    other.write_bytes(forged(place / "new.bundle.tar", lambda c: c.update(name="other")))
    with pytest.raises(UsageError, match="one model"):
        making.make(place / "old.bundle.tar", other, tmp_path / "d")
    assert not (tmp_path / "d").exists()
