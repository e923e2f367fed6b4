"""Ways to attack or spoil a bundle, by number: a row each, and more where one is several.

Every row is a bundle as an enemy, an accident or a careless signer would send it: what can be
signed is signed with the very key that the device trusts. Each goes to the single command of the
device program, `install`, on a device where a release runs. It must end with exit code 5 and one
line, write nothing outside ROOT/staging, and leave the device as it was.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import MODEL, RECIPE, Members, make, pack, unpack
from lab import (
    DAY,
    NAME,
    NOW,
    Build,
    Lab,
    at_1970,
    confused,
    cut,
    dated,
    endless,
    enveloped,
    flipped,
    flipped_header,
    holds,
    lists,
    mode,
    other_type,
    put,
    respelt,
    says,
    signs,
    sized,
    spells,
    swapped,
    typed,
    unpacked,
    weaker,
    without_pae,
)

from edgewright import signing
from edgewright.device import program, store
from edgewright.device.install import Wish, install
from edgewright.errors import IntegrityError

pytest.importorskip("cryptography")

SEQUENCE = 5  # what runs on the device


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> tuple[Members, Members]:
    """Two releases of one name, with files of the same names and sizes."""
    found = []
    for name, text in (("one", MODEL), ("two", MODEL.replace("12}", "13}"))):
        (first, manifest, mode), *rest = unpack(make(tmp_path_factory.mktemp(name), text))
        text = respelt(manifest, put(SEQUENCE + 1, "sequence"))
        found.append([(first, text, mode), *rest])
    return found[0], found[1]


@pytest.fixture(scope="module")
def device(materials, tmp_path_factory) -> Iterator[Lab]:
    """The device as every test finds it."""
    memory = Path("/dev/shm")  # hundreds of files that nobody keeps
    if not os.access(memory, os.W_OK):
        memory = tmp_path_factory.mktemp("device")
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name).resolve() / "begin"
        made = {}
        for name in ("ours", "theirs"):
            signing.keygen(folder / name)
            made[name] = signing.signer(str(folder / name), {})
        lab = Lab(folder, made["ours"], made["theirs"], *materials)
        old = folder / "old.bundle.tar"
        old.write_bytes(lab.edited(put(SEQUENCE, "sequence")))
        wish = Wish(trust=[folder / "ours.pub"], self_test=False)
        assert install(old, lab.root, wish)["action"] == "installed"
        (lab.root / "trust").mkdir()
        (folder / "ours.pub").rename(lab.root / "trust/ours.pub")
        yield lab


@pytest.fixture
def lab(device, monkeypatch) -> Iterator[Lab]:
    """The device, a copy for one test."""
    folder = device.folder.with_name("test")
    shutil.copytree(device.folder, folder, symlinks=True)
    lab = replace(device, folder=folder, words=["--no-self-test"], now=[float(NOW)])
    monkeypatch.setattr("edgewright.device.install.time.time", lambda: lab.now[0])
    yield lab
    shutil.rmtree(folder)


def same_sequence(content: dict) -> None:
    content.update(sequence=SEQUENCE, version="9")


def other_envelope(lab: Lab) -> bytes:
    theirs = unpacked(lab.signed(lab.other[0][1]))[1]
    return pack([lab.members[0], theirs, *lab.members[1:]])


def unlisted(lab: Lab) -> bytes:
    return lab.edited(put([], "files"), files=[])


def elsewhere() -> str:
    return "aarch64" if os.uname().machine == "x86_64" else "x86_64"


Row = tuple[int, str, Build, str]
FILES = ["LICENSES/numpy.txt", "model/golden/in.npz", "model/golden/out.npz"]
FILES += ["model/model.onnx", "provenance.intoto.json", "report/bench.json", "report/report.html"]
FILES += ["runtime/lock.txt", "runtime/required_operators.config", "sbom.cdx.json"]
EXTRA = ("zzz", b"x", 0o644)
ROWS: list[Row] = [
    *(
        (90, f"a flipped bit in {name} at {place}", flipped(name, place), "")
        for name in ("manifest.json", NAME, *FILES)
        for place in (0, 17)
    ),
    *(
        (90, f"a flipped bit in the {what}", flipped_header(place), "header")
        for what, place in (("name", 0), ("size", 134), ("checksum", 150), ("owner", 110))
    ),
    (91, "signed by another key", lambda lab: lab.signed(None, lab.stranger), "keys you trust"),
    (92, "no signature", lambda lab: pack(lab.members), "found none"),
    (92, "an empty envelope", lambda lab: enveloped(lab, b"{}"), "signature is refused"),
    (93, "a signature over another type", lambda lab: other_type(lab, False), "payload type"),
    (93, "the same, renamed", lambda lab: other_type(lab, True), "signature"),
    (93, "a signature over the bare bytes", without_pae, "signature"),
    (93, "a stranger's signature under the trusted key's name", confused, "signature"),
    (94, "an older sequence", says(SEQUENCE - 1, "sequence"), "older"),
    (94, "the same sequence, other content", lambda lab: lab.edited(same_sequence), "older"),
    (94, "no sequence", says(0, "sequence"), "older"),
    (95, "the files of another signed release", lambda lab: lab.signed(files=lab.other[1:]), "SHA"),
    (95, "the envelope of another signed release", other_envelope, "own manifest"),
    (96, "an unlisted file at the end", holds(lambda files: [*files, EXTRA]), "zzz"),
    (96, "an unlisted file in front", holds(lambda files: [EXTRA, *files]), "zzz"),
    (97, "the last listed file is missing", holds(lambda files: files[:-1]), "lacks"),
    (97, "the first listed file is missing", holds(lambda files: files[1:]), ""),
    (97, "two members in another order", holds(lambda f: [f[1], f[0], *f[2:]]), "follow"),
    (98, "one file twice", holds(lambda files: [*files, files[-1]]), ""),
    (98, "one path listed twice", lists("runtime/lock.txt"), "twice"),
    (98, "names that differ by case", lists("Runtime/lock2.txt"), "case only"),
    (98, "a composed letter", lists("zé"), "ASCII"),
    (98, "a decomposed letter", lists(unicodedata.normalize("NFD", "zé")), "ASCII"),
    (98, "a trailing dot", lists("zz/x."), "trailing dot"),
    (98, "a trailing space", lists("zz/x "), "trailing"),
    (98, "a name of a device", lists("zz/CON"), "reserved for devices"),
    (98, "a file as a folder", lists("runtime/lock.txt/x"), "both a file"),
    (98, "the manifest's own name", lists("manifest.json"), "twice"),
    (99, "a parent folder", lists("../evil"), "'..'"),
    (99, "a parent folder inside", lists("x/../../evil"), "'..'"),
    (99, "an absolute path", lists("/evil"), "absolute"),
    (99, "a parent folder for Windows", lists("..\\evil"), "backslash"),
    (99, "a name with NUL", lists("zz/\0x"), "control"),
    (100, "a symbolic link", swapped(tarfile.SYMTYPE, linkname="/etc/passwd"), "link"),
    (100, "a hard link", swapped(tarfile.LNKTYPE, linkname="manifest.json"), "link"),
    (100, "a character device", swapped(tarfile.CHRTYPE), "device"),
    (100, "a block device", swapped(tarfile.BLKTYPE), "device"),
    (100, "a FIFO", swapped(tarfile.FIFOTYPE), "FIFO"),
    (100, "a folder", swapped(tarfile.DIRTYPE), "folder"),
    (100, "a sparse file", lambda lab: typed(lab, b"S"), "sparse"),
    (100, "a contiguous file", lambda lab: typed(lab, b"7"), "contiguous"),
    (
        100,
        "a pax header that overrides a path",
        swapped(b"0", tarfile.PAX_FORMAT, pax_headers={"path": "../evil"}),
        "pax header",
    ),
    (100, "a pax header for all", lambda lab: typed(lab, b"g"), "pax header"),
    (
        100,
        "a GNU long name",
        swapped(b"0", tarfile.GNU_FORMAT, name="runtime/" + "x" * 200),
        "ustar format",
    ),
    (101, "a size one too large", lambda lab: sized(lab, len(lab.members[-1][1]) + 1), ""),
    (101, "a size one too small", lambda lab: sized(lab, len(lab.members[-1][1]) - 1), ""),
    (101, "a size in the manifest alone", says(7, "files", -1, "size"), "size"),
    (101, "an endless stream", endless, "after its end"),
    *(
        (102, f"cut off after {share:.0%}", cut(share), "")
        for share in (0, 0.01, 0.3, 0.7, 0.99)
    ),
    (102, "the end mark cut off", lambda lab: lab.signed()[:-512], "ends inside"),
    (102, "a byte behind the end", lambda lab: lab.signed() + b"\n", "after its end"),
    (102, "another archive behind the end", lambda lab: lab.signed() * 2, "after its end"),
    (103, "a space", spells(b'"sequence":6', b'"sequence": 6'), "is refused"),
    (103, "a line break at the end", signs(lambda text: text + b"\n"), "canonical"),
    (103, "a byte order mark", signs(lambda text: b"\xef\xbb\xbf" + text), "canonical"),
    (103, "a key twice", spells(b'"sequence":6', b'"sequence":6,"sequence":6'), "twice"),
    (103, "NaN", spells(b'"sequence":6', b'"sequence":NaN'), "NaN"),
    (103, "infinity", spells(b'"sequence":6', b'"sequence":1e999'), "is refused"),
    (103, "a float", spells(b'"sequence":6', b'"sequence":6.0'), "is refused"),
    (103, "an escape", spells(b'"tiny"', b'"t\\u0069ny"'), "another spelling"),
    (103, "broken UTF-8", spells(b'"tiny"', b'"\xff"'), "is refused"),
    (103, "deep nesting", spells(b'"tiny"', b"[" * 5000 + b"]" * 5000), "nesting"),
    (103, "nothing but nesting", signs(lambda text: b"[" * 100_000), "nesting"),
    (103, "an unknown key", says(1, "extra"), "unknown key"),
    (103, "another major version", says("edgewright-bundle/2", "schema"), "another format"),
    (104, "expired", dated(0, NOW - 1), "expired"),
    (104, "not yet valid", dated(NOW + DAY, None), "from the future"),
    (104, "a clock at 1970", at_1970, "clock"),
    (105, "another architecture", says(elsewhere(), "device", "arch"), "not for this"),
    (105, "a CPU feature that is not here", says(["sve9"], "device", "isa"), "not for"),
    (105, "another board", says(["board:acme-7"], "compatible"), "not for this"),
    (105, "another target", says("elsewhere", "target"), "another model or target"),
    (107, "golden vectors that fail", weaker, "golden vector 1 of"),
    (108, "an empty list of files", unlisted, "at least 1"),
    (108, "no list of files", lambda lab: lab.edited(lambda c: c.pop("files")), "lacks 'files'"),
    (111, "setuid", mode(0o4755), "mode"),
    (111, "an executable that the manifest does not grant", mode(0o755), "mode"),
    (111, "writable for all", mode(0o666), "mode"),
    (111, "setuid that the manifest grants", says("4755", "files", -1, "mode"), ""),
]  # fmt: skip
# The other numbers have tests of their own, in the files named here.
ELSEWHERE = {
    106: ["test_install_killed.py", "test_power_cut.py"],
    109: ["test_bundle_cases.py"],
    110: ["test_bundle_cases.py"],
}


# The rows


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: kinds, modes, link targets, content."""
    found = {}
    for place in sorted(folder.rglob("*")):
        facts = place.lstat()
        what = str(place.readlink()) if place.is_symlink() else ""
        if place.is_file() and not what:
            what = hashlib.sha256(place.read_bytes()).hexdigest()
        found[str(place.relative_to(folder))] = f"{facts.st_mode:o} {what}"
    return found


PATHS: list[str] = []  # of all that is opened to be written or made, by the hook and by `written`


def hook(event: str, args: tuple) -> None:
    if event == "open" and isinstance(args[0], str) and set("wax+") & set(str(args[1])):
        PATHS.append(args[0])
    elif event in ("os.rename", "os.symlink", "os.link"):
        PATHS.append(os.fsdecode(args[1]))


@pytest.fixture(scope="module", autouse=True)
def hooked() -> None:
    sys.addaudithook(hook)  # once: it stays as long as the process


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """PATHS, with the real ones of what is opened below a folder's descriptor."""
    real_open = os.open

    def opened(path, flags, mode=0o777, *, dir_fd=None):
        descriptor = real_open(path, flags, mode, dir_fd=dir_fd)
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            PATHS.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    return PATHS


def refused(lab: Lab, bundle: Path, written: list[str], capsys) -> str:
    """Exit 5, one line, nothing written outside staging, nothing changed; the line."""
    before = tree(lab.folder)
    del written[:]
    words = ["install", str(bundle), "--root", str(lab.root), *lab.words]
    with pytest.raises(SystemExit) as end:
        program.main(words)
    outside = [path for path in written if not path.startswith(f"{lab.root}/staging/")]
    assert all(map(lab.may_write, outside)), outside
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (5, ""), err
    assert err.count("\n") == 1 and err[:-1].isprintable() and "internal" not in err, err
    assert tree(lab.folder) == before
    assert not list((lab.root / "staging").iterdir())
    return err


@pytest.mark.parametrize(
    ("number", "what", "build", "word"), ROWS, ids=[f"{row[0]} {row[1]}" for row in ROWS]
)
def test_case(lab, written, capsys, number, what, build, word):
    bundle = lab.folder / "case.bundle.tar"
    bundle.write_bytes(build(lab))
    text = refused(lab, bundle, written, capsys)
    assert word in text, text


def test_the_good_one_goes_in(lab, written, capsys):
    """What all rows are made of is installed: it is their fault alone that is refused."""
    bundle = lab.folder / "case.bundle.tar"
    bundle.write_bytes(lab.signed())
    del written[:]
    with pytest.raises(SystemExit) as end:
        program.main(["install", str(bundle), "--root", str(lab.root)])
    assert end.value.code == 0, capsys.readouterr().err
    assert lab.members[0][1] == (lab.root / "current/manifest.json").read_bytes()
    assert any("/staging/" in path for path in written), "what is written is seen"
    assert all(path.startswith(str(lab.root)) or lab.may_write(path) for path in written)


def test_every_number_has_a_row():
    assert {row[0] for row in ROWS} | set(ELSEWHERE) == set(range(90, 112))
    for number, files in ELSEWHERE.items():
        for file in files:
            assert f"({number})" in Path(__file__).with_name(file).read_text(), (number, file)


def test_a_flipped_bit_in_every_file(lab, written, capsys):
    """Case 90 once more, whatever a bundle holds."""
    bundle = lab.folder / "case.bundle.tar"
    assert {name for name, _, _ in lab.members} >= set(FILES)
    for name, content, _ in lab.members:
        bundle.write_bytes(flipped(name, len(content) // 2)(lab))
        refused(lab, bundle, written, capsys)


def test_streams_without_end(lab, written, capsys):
    """Case 101 once more: 10 GB of zeros, and what has no end at all."""
    sparse = lab.folder / "case.bundle.tar"
    sparse.write_bytes(lab.signed())
    os.truncate(sparse, 10 << 30)
    line, root = "", lab.root
    for path in (sparse, Path("/dev/zero")):
        with pytest.raises(SystemExit) as end:
            program.main(["install", str(path), "--root", str(root), *lab.words])
        line = capsys.readouterr().err
        assert end.value.code == 5 and line.count("\n") == 1, line
    assert "never ends" in line
    assert not list((root / "staging").iterdir())


def test_a_runtime_that_is_too_old(lab, capsys):
    """Case 105's other half: what the machine lacks is exit 6, as everywhere."""
    lab.words = []
    bundle = lab.folder / "case.bundle.tar"
    bundle.write_bytes(lab.edited(put("90.1", "runtime", "min")))
    before = tree(lab.folder)
    with pytest.raises(SystemExit) as end:
        program.main(["install", str(bundle), "--root", str(lab.root)])
    err = capsys.readouterr().err
    assert end.value.code == 6 and "expected 90.1 or later" in err and err.count("\n") == 1
    assert tree(lab.folder) == before


def test_no_option_lets_a_file_pass(lab, capsys):
    """(109): nothing ignores what is unsigned, and trusting nobody is no way around keys."""
    text = subprocess.run(
        [sys.executable, "-m", "edgewright", "install", "--help"], capture_output=True, text=True
    ).stdout
    assert "--trust" in text and "ignore" not in text
    bundle = lab.folder / "case.bundle.tar"
    bundle.write_bytes(lab.signed(files=[*lab.members[1:], EXTRA]))
    for words in (["--ignore-unsigned-files"], ["--ignore-paths", "zzz"], ["--allow-unsigned"]):
        with pytest.raises(SystemExit) as end:
            program.main(["install", str(bundle), "--root", str(lab.root), *words])
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1, err


def test_private_keys(lab):
    """(110): one that others may read is refused; none goes into a bundle or lies in here."""
    (lab.folder / "theirs").chmod(0o644)
    with pytest.raises(IntegrityError, match="0644"):
        signing.signer(str(lab.folder / "theirs"), {})
    source = lab.folder / "keyed"
    source.mkdir()
    (source / "source").mkdir()
    (source / "source/licence.txt").write_text((lab.folder / "ours").read_text())
    recipe = {**RECIPE, "release": {"license": "MIT", "license_file": "licence.txt"}}
    with pytest.raises(IntegrityError, match="private key"):
        make(source, recipe=recipe)
    assert not list((source / "out").iterdir())
    repository = Path(__file__).parents[2]
    mark = b"-----BEGIN " + b"PRIVATE KEY-----\n"
    for path in repository.rglob("*"):
        parts = path.relative_to(repository).parts
        if path.is_file() and not parts[0].startswith(".") and path.stat().st_size < 1 << 20:
            assert mark not in path.read_bytes(), path


def test_the_release_that_ran_still_runs(lab):
    """The fixture's own device: what the rows find unchanged is whole."""
    assert store.is_whole(lab.root, store.linked(lab.root))
