"""The single-file device program: the same sources, the same answers, Python alone."""

import ast
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import onnx
import pytest
from bundles import MODEL, forged, make, pack, unpack

import edgewright
from edgewright import signing
from edgewright.device import pack as packing
from edgewright.device import starts, store
from edgewright.device.install import Wish, install
from edgewright.errors import IntegrityError

ROOT = Path(edgewright.__file__).parent
RUNTIME = {"numpy", "onnxruntime"}  # for the self-test, imported when it runs


def with_sequence(path: Path, sequence: int) -> bytes:
    return forged(path, lambda content: content.update(sequence=sequence))


def weaker(path: Path, sequence: int) -> bytes:
    """The next release, whose model computes something else than its golden outputs."""
    files = {name: (data, mode) for name, data, mode in unpack(path)}
    model = onnx.load_from_string(files["model/model.onnx"][0])
    model.graph.node[1].op_type = "Neg"
    data = model.SerializeToString()
    files["model/model.onnx"] = (data, 0o644)
    digest = hashlib.sha256(data).hexdigest()

    def edit(content):
        content["sequence"] = sequence
        content["model"].update(bytes=len(data), sha256=digest)
        for entry in content["files"]:
            if entry["path"] == "model/model.onnx":
                entry.update(size=len(data), sha256=digest)

    middle = path.with_name("middle.tar")
    middle.write_bytes(pack([(n, d, m) for n, (d, m) in files.items()]))
    return forged(middle, edit)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the program, keys and signed bundles."""
    pytest.importorskip("cryptography")
    folder = tmp_path_factory.mktemp("device")
    (folder / "device.pyz").write_bytes(packing.program())
    plain = make(folder / "source")
    signing.keygen(folder / "key")
    key = signing.signer(str(folder / "key"), {})
    bundles = {f"s{k}": with_sequence(plain, k) for k in (1, 2)}
    bundles["bad"] = weaker(plain, 3)
    for name, data in bundles.items():
        path = folder / f"{name}.bundle.tar"
        path.write_bytes(data)
        signing.sign_bundle(path, [key], any_verdict=True)
    (folder / "unsigned.bundle.tar").write_bytes(plain.read_bytes())
    (folder / "broken.bundle.tar").write_bytes((folder / "s1.bundle.tar").read_bytes()[:-600])
    return folder


def device(place: Path, *words: str, bare: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the program as a device does: far from this package; `bare`: no packages at all."""
    start = [sys.executable, "-I", *(["-S"] if bare else []), str(place / "device.pyz"), *words]
    return subprocess.run(start, cwd=place, capture_output=True, text=True)


def package(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "edgewright", *words]
    return subprocess.run(start, cwd=place, capture_output=True, text=True)


def test_same_sources_same_bytes(place):
    assert (place / "device.pyz").read_bytes() == packing.program()
    done = package(place, "device-program", "-o", "again.pyz")
    assert done.returncode == 0, done.stderr
    assert (place / "again.pyz").read_bytes() == packing.program()
    assert (place / "again.pyz").stat().st_mode & 0o111
    with zipfile.ZipFile(place / "device.pyz") as archive:
        names = [name.removeprefix("edgewright/") for name in archive.namelist()[1:]]
        assert names == list(packing.FILES)
        assert all(archive.read(f"edgewright/{n}") == (ROOT / n).read_bytes() for n in names)


def test_it_imports_what_it_holds_and_the_standard_library():
    held = {"edgewright." + name[:-3].replace("/", ".") for name in packing.FILES}
    held |= {name.removesuffix(".__init__") for name in held}
    for name in packing.FILES:
        if not name.endswith(".py"):
            continue
        tree = ast.parse((ROOT / name).read_text())
        typing = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in typing:
                continue
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for one in found:
                top = one.split(".")[0]
                if top != "edgewright":
                    assert top in sys.stdlib_module_names | RUNTIME, (name, one)
                elif one != "edgewright.bundle.assemble":  # when a bundle is made
                    assert one in held or (is_name(one) and one.rpartition(".")[0] in held), one


def is_name(dotted: str) -> bool:
    """Whether this is a name in a module, no module itself."""
    path = ROOT.parent / dotted.replace(".", "/")
    return not path.with_suffix(".py").exists() and not path.is_dir()


def test_nothing_but_the_standard_library_is_there(place):
    """`-I -S`: the interpreter that the tests below run in knows no packages."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", "import numpy"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert sysconfig.get_path("purelib") not in done.stdout


COMMANDS = [
    ("verify", "s1.bundle.tar", "--trust", "key.pub", "--json"),
    ("verify", "unsigned.bundle.tar", "--trust", "key.pub"),
    ("verify", "broken.bundle.tar"),
    ("verify", "nowhere.bundle.tar"),
    ("install", "unsigned.bundle.tar", "--root", "ROOT", "--trust", "key.pub", "--no-self-test"),
    ("install", "s2.bundle.tar", "--root", "ROOT", "--no-self-test"),
    ("install", "s2.bundle.tar", "--root", "ROOT", "--trust", "key.pub", "--no-self-test"),
    ("install", "s1.bundle.tar", "--root", "ROOT", "--trust", "key.pub", "--no-self-test"),
    ("start-check", "--root", "ROOT"),
    ("mark-good", "--root", "ROOT", "--json"),
    ("rollback", "--root", "ROOT"),
    ("status", "--root", "ROOT", "--check"),
    ("self-test", "--root", "ROOT", "s1.bundle.tar"),
    ("self-test", "s1.bundle.tar", "--rollback"),
    ("self-test", "--root", "nowhere"),
    ("status",),
    ("install", "--no-such-option"),
]


def test_the_same_answers_as_the_package(place):
    """Every command, in order, on a root of each: same exit code, same result, same message."""
    codes = []
    for words in COMMANDS:
        file, full = (
            run(place, *[w.replace("ROOT", root) for w in words])
            for run, root in ((device, "root-file"), (package, "root-full"))
        )
        assert file.returncode == full.returncode, (words, file.stderr, full.stderr)
        if file.returncode == 0:
            assert file.stdout.replace("root-file", "root-full") == full.stdout, words
        else:
            one, other = (
                text.replace("root-file", "root-full").replace("edgewright-device", "edgewright")
                for text in (file.stderr, full.stderr)
            )
            assert one == other or (words[0] == "verify" and "nowhere" in words[1]), words
            assert file.stderr.count("\n") == 1 and "Traceback" not in file.stderr
        codes.append(file.returncode)
    assert codes == [0, 5, 5, 3, 5, 2, 0, 5, 0, 0, 6, 0, 2, 2, 2, 2, 2]


def test_keys_are_replaced_on_the_device(place, tmp_path):
    """By a file that enough of the old keys signed; another changes nothing."""
    for name in ("a", "b"):
        signing.keygen(tmp_path / name)
    files = {
        "old": (1, ["a"], ["a"]),
        "forged": (2, ["b"], ["b"]),
        "next": (2, ["b"], ["a", "b"]),
    }
    for name, (version, keys, signers) in files.items():
        names = [str(tmp_path / f"{key}.pub") for key in keys]
        made = [signing.signer(str(tmp_path / key), {}) for key in signers]
        (tmp_path / name).write_bytes(signing.trust_file(names, 1, version, made))
    old = str(tmp_path / "old")
    before = (tmp_path / "old").read_bytes()
    refused = device(place, "trust-update", old, str(tmp_path / "forged"))
    assert refused.returncode == 5 and refused.stderr.count("\n") == 1
    assert "by the old file's keys" in refused.stderr
    assert (tmp_path / "old").read_bytes() == before
    done = device(place, "trust-update", old, str(tmp_path / "next"))
    assert (done.returncode, done.stdout) == (0, f"{old}: version 2\n"), done.stderr
    assert (tmp_path / "old").read_bytes() == (tmp_path / "next").read_bytes()
    assert device(place, "trust-update", old, str(tmp_path / "next")).returncode == 5


def test_the_unit_in_the_docs_marks_good_what_still_runs(place, tmp_path):
    """systemd runs ExecStartPost to its end, whatever became of the service meanwhile."""
    root = tmp_path / "root"
    install(place / "s1.bundle.tar", root, Wish(allow_unsigned=True, self_test=False))
    text = (Path(__file__).parents[2] / "docs/device.md").read_text()
    (line,) = (row for row in text.splitlines() if row.startswith("ExecStartPost="))
    script = shlex.split(line)[-1]
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid, good in ((dead.pid, False), (os.getpid(), True)):
        here = {
            "sleep 30": "true",
            "${MAINPID}": str(pid),
            "/usr/bin/python3": sys.executable,
            "/opt/edgewright-device.pyz": str(place / "device.pyz"),
            "/opt/keyword": str(root),
        }
        words = script
        for old, new in here.items():
            assert old in words, old
            words = words.replace(old, new)
        done = subprocess.run(["/bin/sh", "-c", words], capture_output=True, check=False)
        assert (done.returncode == 0) == good, done.stderr
        assert starts.status(root)["current"]["good"] == good


def test_golden_vectors_in_the_single_file(place):
    """With numpy and onnxruntime there: proven in a child of its own, then switched to."""
    done = device(
        place,
        *("install", "s1.bundle.tar", "--root", "proven", "--trust", "key.pub", "--json"),
        bare=False,
    )
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)["self_test"]
    assert proof["ok"] and proof["vectors"] == 5 and proof["exact"]
    again = device(place, "self-test", "--root", "proven", bare=False)
    assert again.returncode == 0 and "5 golden vectors" in again.stdout
    whole = device(place, "self-test", "s2.bundle.tar", bare=False)
    assert whole.returncode == 0 and "5 golden vectors" in whole.stdout


def test_the_child_may_be_started_otherwise(place):
    """By a command that sets up another user or an emulator, say; here, one that leaves a trace."""
    (place / "starter").write_text(f'#!/bin/sh\necho "$@" > {place}/trace\nexec "$@"\n')
    (place / "starter").chmod(0o755)
    words = ("self-test", "s2.bundle.tar", "--python")
    done = device(place, *words, f"{place}/starter {sys.executable} -s", bare=False)
    assert done.returncode == 0 and "5 golden vectors" in done.stdout, done.stderr
    assert f"{place}/device.pyz worker" in (place / "trace").read_text()
    wrong = device(place, *words, "/nowhere/python", bare=False)
    assert wrong.returncode == 3 and wrong.stderr.count("\n") == 1
    assert device(place, *words, "'", bare=False).returncode == 2


def test_the_child_as_nobody(place):
    """The model can run as a user who owns nothing, and whom nothing is open to but the files."""
    nobody = f"setpriv --reuid 65534 --regid 65534 --clear-groups {sys.executable}"
    if not shutil.which("setpriv") or not works(*nobody.split(), "-c", "import onnxruntime"):
        pytest.skip("needs root, setpriv, and packages that everybody may read")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for file in ("device.pyz", "s1.bundle.tar", "key.pub"):
            shutil.copy(place / file, folder)
        words = ("install", "s1.bundle.tar", "--root", "root", "--trust", "key.pub")
        done = device(folder, *words, "--python", nobody, bare=False)
        assert done.returncode == 0 and "5 golden vectors" in done.stdout, done.stderr
        done = device(folder, "self-test", "s1.bundle.tar", "--python", nobody, bare=False)
        assert done.returncode == 0, done.stderr


def works(*words: str) -> bool:
    return subprocess.run(words, capture_output=True).returncode == 0


def test_without_a_runtime(place):
    words = ("install", "s1.bundle.tar", "--root", "bare", "--trust", "key.pub")
    done = device(place, *words)
    assert done.returncode == 6 and "onnxruntime" in done.stderr
    assert not (place / "bare/current").exists() and not list((place / "bare/staging").iterdir())


def test_a_release_that_fails_its_golden_vectors_never_runs(place):
    root = place / "guarded"
    wish = Wish(trust=[place / "key.pub"])
    good = install(place / "s2.bundle.tar", root, wish)["release"]
    with pytest.raises(IntegrityError, match="golden vector 1 of 5"):
        install(place / "bad.bundle.tar", root, wish)
    assert store.linked(root) == good
    assert not list((root / "staging").iterdir())
    assert [p.name for p in (root / "releases").iterdir()] == [good]
    # Installed all the same, without the test: what runs at the next boot finds out.
    install(place / "bad.bundle.tar", root, Wish(trust=[place / "key.pub"], self_test=False))
    with pytest.raises(IntegrityError, match=f"golden vector 1 of 5.* went back to {good}"):
        starts.self_test(root, go_back=True)
    assert store.linked(root) == good
    assert "Relu" in MODEL
