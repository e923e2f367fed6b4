"""The container: one spelling, and nothing else is read."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.bundle import tarball
from edgewright.bundle.tarball import Member, path_fault, paths_fault
from edgewright.errors import BadInput, IntegrityError

FILES = [("a.json", b"first"), ("b/empty", b""), ("b/run.sh", b"x" * 512), ("c", b"y" * 1025)]


def source(path, content, mode=0o644, mtime=7):
    return (
        Member(path, len(content), mode, mtime),
        content,
        hashlib.sha256(content).hexdigest(),
    )


def packed(files=FILES) -> bytes:
    return b"".join(tarball.archive([source(path, content) for path, content in files]))


def read_all(data) -> list[tuple[str, bytes]]:
    """Everything the reader lets through."""
    stream = data if hasattr(data, "read") else io.BytesIO(data)
    found = []
    while (member := tarball.read_member(stream)) is not None:
        found.append((member.path, b"".join(tarball.read_content(stream, member))))
    return found


def refused(data) -> str:
    """The message of the refusal: one printable line, exit code 5."""
    with pytest.raises(IntegrityError) as caught:
        read_all(data)
    text = str(caught.value)
    assert caught.value.exit_code == 5
    assert text.isprintable(), text
    return text


def by_tarfile(info: tarfile.TarInfo, content=b"", form=tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def regular(name="a.json", size=0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info


def test_round_trip():
    assert read_all(packed()) == FILES


def test_python_reads_what_we_write():
    with tarfile.open(fileobj=io.BytesIO(packed())) as archive:
        members = archive.getmembers()
        assert [(m.name, archive.extractfile(m).read()) for m in members] == FILES
        assert {(m.uid, m.gid, m.uname, m.gname, m.mtime, m.mode) for m in members} == {
            (0, 0, "", "", 7, 0o644)
        }


def test_header_is_that_of_python():
    info = regular("model/model.onnx", 123456789)
    info.mtime, info.mode = 1_700_000_000, 0o755
    theirs = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    theirs[329:345] = b"0000000\x000000000\0"  # no device: zeros as GNU tar has them, not NULs
    ours = tarball.header(Member(info.name, info.size, info.mode, info.mtime))
    assert ours == resummed(theirs)


def test_write_is_atomic_and_notices_a_file_that_changes(tmp_path):
    good = tmp_path / "good.tar"
    digest = tarball.write(good, [source(path, content) for path, content in FILES])
    assert hashlib.sha256(good.read_bytes()).hexdigest() == digest
    changed = tmp_path / "data"
    changed.write_bytes(b"now")
    member, _, wrong = source("data", b"was")
    with pytest.raises(BadInput, match="changed while"):
        tarball.write(tmp_path / "bad.tar", [(member, changed, wrong)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "good.tar"]


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "../up", "a/../../b", "./a", "a//b", "a/", "a\\b", "..\\b", "a\0b", "a\nb"]
    + ["a\x1b[31m", "a\x7f", "dir./x", "x.", "x ", " x", "CON", "con.txt", "a/NUL", "lpt1.onnx"]
    + [".hidden", "-rf", "a b", "a:b", "naïve", "e\u0301", "\u202e", "\udc80", "a" * 101],
)
def test_unsafe_paths(path):
    assert path_fault(path)


@pytest.mark.parametrize(
    "path", ["a", "model/model.onnx", "LICENSES/a-1.2+b_c.txt", "_x", "console", "a" * 100]
)
def test_safe_paths(path):
    assert path_fault(path) == ""


@pytest.mark.parametrize(
    "paths",
    [["a", "a"], ["a", "A"], ["a/x", "A/y"], ["Model/x", "model/x"], ["a", "a/b"], ["a/b", "a"]],
)
def test_paths_that_clash(paths):
    assert paths_fault(paths)


def test_paths_that_do_not_clash():
    assert paths_fault(["a/x", "a/y", "b"]) == ""


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.BLKTYPE, "block device"),
        (tarfile.DIRTYPE, "folder"),
        (tarfile.FIFOTYPE, "FIFO"),
        (tarfile.CONTTYPE, "contiguous"),
        (tarfile.AREGTYPE, "old tar"),
        (b"Z", "unknown"),
    ],
)
def test_only_regular_files(kind, word):
    info = regular()
    info.type, info.linkname = kind, "/etc/passwd"
    assert word in refused(by_tarfile(info))


def test_pax_and_gnu_extensions():
    long = regular("a" * 150)
    assert "pax" in refused(by_tarfile(long, form=tarfile.PAX_FORMAT))
    override = regular()
    override.pax_headers = {"path": "../../etc/passwd"}
    assert "pax" in refused(by_tarfile(override, form=tarfile.PAX_FORMAT))
    refused(by_tarfile(long, form=tarfile.GNU_FORMAT))
    refused(by_tarfile(regular(), form=tarfile.GNU_FORMAT))
    ours = bytearray(packed())
    ours[156:157] = b"S"
    assert "sparse" in refused(resummed(ours))


def resummed(data: bytearray) -> bytes:
    """The archive with the checksum of its first header made right again."""
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, b"../../../x\0"),
        (0, b"/etc/x\0"),
        (0, b"a\0hidden"),
        (0, b"CON\0\0\0\0"),
        (0, b"\0" * 100),
        (100, b"-000644\0"),
        (108, b"0001750\0"),
        (116, b"0001750\0"),
        (124, b"\x80" + b"\0" * 10 + b"\x05"),  # base-256 size
        (124, b"-0000000005\0"),
        (124, b"        5\0  "),
        (136, b"\xff" * 12),
        (157, b"/etc/passwd"),
        (257, b"ustar  \0"),
        (265, b"root"),
        (297, b"root"),
        (329, b"0000001\0"),
        (345, b"../.."),
        (500, b"hidden"),
    ],
)
def test_headers_in_another_form(place, value):
    data = bytearray(packed())
    data[place : place + len(value)] = value
    refused(resummed(data))


def test_a_wrong_checksum():
    data = bytearray(packed())
    data[0] ^= 1
    assert "checksum" in refused(data)


def test_truncated_anywhere():
    data = packed()
    for size in [*range(0, len(data), 97), len(data) - 512, len(data) - 1]:
        refused(data[:size])


def test_bytes_after_the_end():
    assert "after its end" in refused(packed() + b"\0")
    refused(packed() + packed())
    refused(packed() + bytes(10240))


def test_end_and_padding():
    data = packed()
    refused(data[:-1] + b"x")
    assert "padding" in refused(data[:520] + b"x" + data[521:])


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"<html>404</html>", bytes(512), bytes(1536)])
def test_no_archive_at_all(data):
    refused(data)


class Endless(io.RawIOBase):
    """Zeros without an end; counts what is taken."""

    def __init__(self, begin=b""):
        self.begin, self.taken = begin, 0

    def read(self, size=-1):
        assert size >= 0, "the reader must never ask for everything"
        self.taken += size
        data, self.begin = self.begin[:size], self.begin[size:]
        return data + bytes(size - len(data))


def test_an_endless_stream_ends_at_once():
    stream = Endless()
    refused(stream)
    assert stream.taken < 4096
    stream = Endless(packed())
    refused(stream)
    assert stream.taken < 3 * len(packed())


def test_a_size_that_lies_costs_no_memory():
    lie = tarball.header(Member("a", tarball.MAX_NUMBER, 0o644, 0))
    refused(lie + b"short")


@given(st.binary(max_size=2048))
def test_random_bytes(data):
    refused(data)


@settings(max_examples=200)
@given(st.integers(0, 511), st.integers(1, 255))
def test_every_byte_of_a_header_counts(place, change):
    data = bytearray(packed())
    data[place] ^= change
    refused(bytes(data))


def test_blocks_are_bounded(tmp_path: Path):
    big = tmp_path / "big"
    big.write_bytes(bytes(3 * tarball.READ + 5))
    member = Member("big", big.stat().st_size, 0o644, 0)
    tarball.write(tmp_path / "t.tar", [(member, big, tarball.source_digest(big))])
    with (tmp_path / "t.tar").open("rb") as stream:
        assert tarball.read_member(stream) == member
        sizes = [len(block) for block in tarball.read_content(stream, member)]
    assert sizes == [tarball.READ] * 3 + [5]
