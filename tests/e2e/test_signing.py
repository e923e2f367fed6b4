"""Signing, trusting, explaining and rebuilding, by the commands a release manager types."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import RECIPE, Ran, command, write_tiny

pytest.importorskip("cryptography")
pytestmark = pytest.mark.filterwarnings("error")

# No clock decides what becomes int8: builds of this recipe are alike wherever they run.
FIXED = RECIPE + '\n[quantize]\nmeasure = false\n\n[release]\nsequence = 3\nlicense = "MIT"\n'


@pytest.fixture(scope="module")
def keys(tmp_path_factory, edgewright) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in "abc":
        assert edgewright("keygen", "-o", folder / name).code == 0
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory, edgewright, keys) -> tuple[Path, Path]:
    """The recipe and the bundle, built and signed by a."""
    recipe = write_tiny(tmp_path_factory.mktemp("signing") / "tiny", FIXED)
    out = recipe.parent / "out"
    ran = edgewright(
        "build", recipe, "--target", "cpu", "--out", out, "--sign", keys / "a", "--json"
    )
    assert ran.code == 0, ran.err
    assert len(ran.json["targets"][0]["signers"]) == 1
    return recipe, next((out / "cpu").glob("*.bundle.tar"))


def test_verify_says_whose_signature_it_is(built, keys, edgewright):
    _, bundle = built
    name = edgewright("keygen", "-o", keys / "d").out.split()[-1]
    ran = edgewright("verify", bundle)
    assert ran.code == 0 and "not checked against any key you trust" in ran.out
    ran = edgewright("verify", bundle, "--trust", keys / "a.pub")
    assert ran.code == 0 and "good, by " in ran.out
    ran = edgewright("verify", bundle, "--trust", keys / "d.pub")
    assert ran.code == 5 and ran.err.count("\n") == 1 and name not in ran.out
    both = ("--trust", keys / "a.pub", "--trust", keys / "b.pub", "--threshold", 2)
    assert edgewright("verify", bundle, *both).code == 5
    assert edgewright("verify", bundle, "--trust", keys / "a").code == 2  # the private one


def test_a_second_signer_and_a_trust_file_that_rotates(built, keys, edgewright, tmp_path):
    bundle = tmp_path / "x.bundle.tar"
    shutil.copy(built[1], bundle)
    ran = edgewright("sign", bundle, env={"EDGEWRIGHT_SIGNING_KEY": (keys / "b").read_text()})
    assert ran.code == 0, ran.err
    both = ("--trust", keys / "a.pub", "--trust", keys / "b.pub", "--threshold", 2)
    assert edgewright("verify", bundle, *both).code == 0
    a, b, c = (keys / f"{name}.pub" for name in "abc")
    old, new, bad = (tmp_path / f"{name}.json" for name in ("old", "new", "bad"))
    words = ("trust", "write", "--threshold", 2, "-o")
    sign = {name: ("--sign", keys / name) for name in "abc"}
    ran = edgewright(*words, old, "--key", a, "--key", b, *sign["a"], *sign["b"])
    assert ran.code == 0, ran.err
    assert edgewright("verify", bundle, "--trust", old).code == 0
    next_keys = ("--key", b, "--key", f"{c}=2026-01-01..2999-01-01", "--version", 2)
    assert edgewright(*words, bad, *next_keys, *sign["b"], *sign["c"]).code == 0
    ran = edgewright("trust", "update", old, bad)
    assert ran.code == 5 and ran.err.count("\n") == 1
    ran = edgewright(*words, new, *next_keys, *sign["a"], *sign["b"], *sign["c"])
    assert ran.code == 0, ran.err
    assert edgewright("trust", "update", old, new).code == 0
    assert old.read_bytes() == new.read_bytes()
    assert edgewright("verify", bundle, "--trust", old).code == 5
    assert edgewright("sign", bundle, "--key", keys / "c").code == 0
    assert edgewright("verify", bundle, "--trust", old).code == 0
    assert edgewright(*words, bad, *next_keys, *sign["a"]).code == 2  # of no use to anyone


def test_a_build_without_a_key_takes_no_signature_away_unsaid(keys, edgewright, tmp_path):
    """The same again keeps its signature; what changed loses it, and that is said."""
    recipe = write_tiny(tmp_path / "tiny", FIXED + "\n[share]\ncompress = true\n")
    words = ("build", recipe, "--target", "cpu", "--out", tmp_path / "out")
    assert edgewright(*words, "--sign", keys / "a").code == 0
    bundles = sorted((tmp_path / "out" / "cpu").glob("*.bundle.tar*"))
    assert len(bundles) == 2
    before = [bundle.read_bytes() for bundle in bundles]
    again = edgewright(*words)
    assert again.code == 0 and "keeps its signatures" in again.err, again.err
    assert [bundle.read_bytes() for bundle in bundles] == before
    recipe.write_text(recipe.read_text().replace("sequence = 3", "sequence = 4"))
    changed = edgewright(*words)
    assert changed.code == 0 and "was signed by" in changed.err, changed.err
    for bundle in bundles:
        assert edgewright("verify", bundle, "--json").json["signers"] == []
    assert "was signed by" not in edgewright(*words).err


def test_a_key_that_others_can_read_stops_a_build_before_it_begins(built, keys, edgewright):
    recipe, _ = built
    open_key = keys / "open"
    shutil.copy(keys / "a", open_key)
    open_key.chmod(0o644)
    ran = edgewright("build", recipe, "--target", "cpu", "--sign", open_key)
    assert ran.code == 5 and "0644" in ran.err and ran.err.count("\n") == 1
    assert edgewright("build", recipe, "--target", "cpu", "--sign", keys / "none").code == 3


def test_what_fails_the_gate_is_not_signed(built, keys, edgewright, tmp_path):
    recipe = built[0].with_name("failing.toml")
    recipe.write_text(FIXED.replace("min_retained = 0.9", "min_retained = 0.9\nmax_size_bytes = 1"))
    ran = edgewright(
        "build", recipe, "--target", "cpu", "--out", tmp_path / "out", "--sign", keys / "a"
    )
    assert ran.code == 1 and "NOT for release, so not signed" in ran.out
    bundle = next((tmp_path / "out" / "cpu").glob("*.bundle.tar"))
    assert "none: nothing says who made it" in edgewright("verify", bundle).out
    assert edgewright("sign", bundle, "--key", keys / "a").code == 2
    assert edgewright("sign", bundle, "--key", keys / "a", "--any-verdict").code == 0


def test_bundle_and_sign_on_files(built, keys, edgewright, tmp_path):
    recipe, _ = built
    model, packed = recipe.parent / "out" / "cpu" / "model.onnx", tmp_path / "x.bundle.tar"
    words = ("bundle", model, "--recipe", recipe, "-o", packed, "--sign", keys / "a")
    assert edgewright(*words).code == 2 and not packed.exists()
    gate = tmp_path / "gate.json"
    gate.write_text(json.dumps({"verdict": "PASS", "checks": []}))
    assert edgewright(*words, "--gate", gate).code == 0
    assert edgewright("verify", packed, "--trust", keys / "a.pub").code == 0


def test_explain(built, keys, edgewright):
    recipe, bundle = built
    ran = edgewright("explain", bundle, "--trust", keys / "a.pub")
    assert ran.code == 0, ran.err
    for text in (
        "good, by ",
        "from calibration",
        "calibration.npz",
        "from metric",
        "after simplify",
    ):
        assert text in ran.out, text
    for text in ("SLSA Build L1", "gate min_retained", "needs runtime", "set gate.min_retained"):
        assert text in ran.out, text
    found = edgewright("explain", bundle, "--json").json
    assert found["signature"]["trusted"] is False
    stages = {row["stage"]: row["sha256"] for row in found["built_from"]["stages"]}
    assert stages["quantize"] == found["model"]["sha256"]
    assert found["built_from"]["settings"]["release"]["sequence"] == 3
    assert recipe.name not in ran.out  # what was built from, not where it lay


def test_a_tampered_document_is_never_explained(built, edgewright, tmp_path):
    data = bytearray(built[1].read_bytes())
    place = data.index(b"SLSA Build L1")
    data[place] ^= 1
    broken = tmp_path / "broken.bundle.tar"
    broken.write_bytes(data)
    ran = edgewright("explain", broken)
    assert ran.code == 5 and ran.out == "" and ran.err.count("\n") == 1


def test_rebuild_says_identical_or_what_differs(built, keys, edgewright, tmp_path):
    """Elsewhere, of the same inputs; then of calibration data with one changed sample."""
    recipe, bundle = built
    here = tmp_path / "copied"
    here.mkdir()
    for name in ("model.onnx", "calibration.npz", "evaluation.npz", "score.py", "recipe.toml"):
        shutil.copy(recipe.parent / name, here / name)
    ran = edgewright("verify", bundle, "--rebuild", here / "recipe.toml", "--trust", keys / "a.pub")
    assert (ran.code, ran.out[:10]) == (0, "identical:"), ran.out + ran.err
    data = dict(np.load(here / "calibration.npz"))
    data["x"] = data["x"].copy()
    data["x"][0] *= 3
    np.savez(here / "calibration.npz", **data)
    ran = edgewright("verify", bundle, "--rebuild", here / "recipe.toml", "--json")
    assert ran.code == 5, ran.err
    found = ran.json
    # The metric's code may read what lies beside it, so all of that is its input.
    assert [row["name"] for row in found["inputs"]] == ["calibration", "metric"]
    assert found["stage"] in ("", "quantize") and not found["settings"] and not found["versions"]
    assert "model/golden/in.npz" in [row["name"] for row in found["files"]]
    other = here / "other.toml"
    other.write_text((here / "recipe.toml").read_text().replace('"tiny"', '"else"'))
    assert edgewright("verify", bundle, "--rebuild", other).code == 3


@pytest.fixture
def stranger() -> Iterator[tuple[Path, dict]]:
    """A folder and how to run there: as another user where that is possible here."""
    folder = Path(tempfile.mkdtemp(prefix="stranger "))
    folder.chmod(0o777)
    who: dict = {}
    if os.geteuid() == 0:
        probe = [sys.executable, "-c", "import edgewright, onnxruntime, onnx"]
        other = {"user": 65534, "group": 65534, "extra_groups": []}
        with suppress(PermissionError):
            if subprocess.run(probe, cwd=folder, capture_output=True, **other).returncode == 0:
                who = other
    yield folder, who
    shutil.rmtree(folder)


def test_another_user_elsewhere_makes_the_same_bytes(built, keys, stranger):
    """Folder, user, umask, time zone, locale, hash seed and core count change; nothing else."""
    recipe, bundle = built
    folder, who = stranger
    for name in (
        "model.onnx",
        "calibration.npz",
        "evaluation.npz",
        "score.py",
        "recipe.toml",
    ):
        shutil.copy(recipe.parent / name, folder / name)
        (folder / name).chmod(0o644)
    key = folder / "key"
    shutil.copy(keys / "a", key)
    key.chmod(0o600)
    if who:
        os.chown(key, who["user"], who["group"])
    env = {
        **os.environ,
        "HOME": str(folder),
        "EDGEWRIGHT_CACHE": str(folder / "cache"),
        "TZ": "Asia/Kathmandu",
        "LC_ALL": "tr_TR.UTF-8",
        "LANG": "tr_TR.UTF-8",
        "PYTHONHASHSEED": "4711",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(folder),
        "MPLCONFIGDIR": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    core = str(min(os.sched_getaffinity(0)))
    words = command("build", "recipe.toml", "--target", "cpu", "--sign", key)
    words = ["taskset", "-c", core, *words] if shutil.which("taskset") else words
    ran = subprocess.run(
        words, cwd=folder, env=env, umask=0o027, capture_output=True, text=True, **who
    )
    assert ran.returncode == 0, Ran(ran.returncode, ran.stdout, ran.stderr)
    again = next((folder / "build" / "tiny" / "cpu").glob("*.bundle.tar"))
    assert again.read_bytes() == bundle.read_bytes()
