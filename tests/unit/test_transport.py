"""The compressed form of a bundle: what goes in comes out, and damage is told, cheaply."""

import lzma
from pathlib import Path

import pytest

from edgewright.bundle import transport
from edgewright.errors import IntegrityError

DATA = bytes(range(256)) * 4096


def read(path: Path) -> bytes:
    with path.open("rb") as file, transport.plain(file) as stream:
        return stream.read()


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    plain = tmp_path / "a.bundle.tar"
    plain.write_bytes(DATA)
    return transport.compress(plain)


def test_what_goes_in_comes_out(packed: Path, tmp_path: Path) -> None:
    assert packed.name == "a.bundle.tar.xz" and packed.stat().st_size < len(DATA) / 100
    assert read(packed) == read(tmp_path / "a.bundle.tar") == DATA
    assert lzma.decompress(packed.read_bytes()) == DATA  # any xz tool reads it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bundle.tar", "a.bundle.tar.xz"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-20], "ends too early"),
        (lambda data: data + b"more", "bytes after its end"),
        (lambda data: data + data, "bytes after its end"),
        (lambda data: data[:40] + b"\xff\x00\xff" + data[43:], "damaged"),
    ],
)
def test_damage_is_told(packed: Path, change, said: str) -> None:
    packed.write_bytes(change(packed.read_bytes()))
    with pytest.raises(IntegrityError, match=said):
        read(packed)


def test_a_bomb_gives_no_more_than_it_is_asked_for(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.xz"
    with lzma.open(bomb, "wb", preset=0) as file:
        for _ in range(512):
            file.write(bytes(1 << 20))
    assert bomb.stat().st_size > transport.READ
    with bomb.open("rb") as file, transport.plain(file) as stream:
        assert stream.read(1000) == bytes(1000)
        assert file.tell() <= transport.READ


def test_a_stream_that_wants_much_memory_is_refused(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 << 20}]
    greedy = tmp_path / "greedy.xz"
    greedy.write_bytes(lzma.compress(DATA, filters=filters))
    with pytest.raises(IntegrityError, match="damaged"):
        read(greedy)
