"""Several built models in one bundle: shared tensors once, signed, installed, proven, explained."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import tiny_model
from onnx import numpy_helper

from edgewright import bundle as bundles
from edgewright.baseline import open_baseline
from edgewright.build import no_recipe
from edgewright.bundle.golden import write_npz
from edgewright.device import install
from edgewright.device.verify import extract
from edgewright.errors import BadInput, IntegrityError, UsageError
from edgewright.pooling import pool_bundles
from edgewright.recipe import parse_recipe
from edgewright.runtime.local import open_local
from edgewright.runtime.pooled import open_pooled
from edgewright.stage import Job
from edgewright.target import load_target

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def built(tmp_path_factory, edgewright) -> Path:
    """Two bundles whose models share all but the head, as a build leaves them."""
    folder = tmp_path_factory.mktemp("pool")
    assert edgewright("keygen", "-o", folder / "key").code == 0
    rng = np.random.default_rng(1)
    np.savez(folder / "calibration.npz", x=rng.normal(size=(3, 1, 12, 12)).astype(np.float32))
    for k, name in enumerate(("one", "two")):
        model = tiny_model()
        (head,) = (t for t in model.graph.initializer if t.name == "head")
        scaled = numpy_helper.to_array(head) * np.float32(k + 1)
        head.CopyFrom(numpy_helper.from_array(scaled, "head"))
        onnx.save(model, folder / f"{name}.onnx")
        recipe = {
            "model": {"name": name, "version": "1.0.0", "source": f"{name}.onnx"},
            "data": {"calibration": "calibration.npz"},
            "release": {"sequence": k + 3, "license": "MIT"},
        }
        check = {"name": "max_size_bytes", "limit": 10**6, "value": 10**5, "verdict": "PASS"}
        job = Job(
            recipe=parse_recipe(recipe, folder),
            target=load_target("cpu"),
            folder=folder,
            model=folder / f"{name}.onnx",
            reports={"gate": {"verdict": "PASS", "checks": [check]}},
        )
        bundles.run(job)
    return folder


def bundle(built: Path, name: str) -> Path:
    return built / f"{name}-1.0.0-cpu.bundle.tar"


@pytest.fixture(scope="module")
def pooled(built, edgewright) -> tuple[Path, dict]:
    out = built / "both.bundle.tar"
    words = ("pool", bundle(built, "one"), bundle(built, "two"), "-o", out, "--version", "1.5")
    ran = edgewright(*words, "--sign", built / "key", "--json")
    assert ran.code == 0, ran.err
    return out, ran.json


def test_what_is_shared_lies_there_once(built, pooled, tmp_path):
    out, report = pooled
    facts = extract(out, tmp_path / "x")
    assert (facts["name"], facts["version"], facts["sequence"]) == ("both", "1.5", 3 + 4)
    assert [row["name"] for row in facts["pool"]["models"]] == ["one", "two"]
    assert facts["gate"]["verdict"] == "PASS" and report["self_test"]["vectors"] >= 6
    shared = [row["shared_tensors"] for row in report["models"]]
    assert shared[0] == shared[1] > 0
    weights = (tmp_path / "x/model/weights.bin").stat().st_size
    apart = sum(row["stored_bytes"] for row in report["models"])
    assert weights < apart - report["models"][0]["shared_bytes"] + 64 * 8
    names = ["one", "two"]
    x = {"x": np.random.default_rng(9).normal(size=(1, 1, 12, 12)).astype(np.float32)}
    sessions = open_pooled(tmp_path / "x/model", names)
    for name in names:
        alone = open_local(built / f"{name}.onnx").run(x)[0]
        assert np.allclose(sessions[name].run(x)[0], alone, rtol=1e-4, atol=1e-4)


def pool(built: Path, out: Path, *bundles: Path) -> dict:
    facts = {"name": "both", "version": "1.5", "sequence": None}
    return pool_bundles(bundles, None, out, watch=lambda event: None, **facts)


def test_same_inputs_same_bytes(built, pooled):
    out, report = pooled
    again = built / "again.bundle.tar"
    found = pool(built, again, bundle(built, "one"), bundle(built, "two"))
    assert found["sha256"] == report["sha256"]
    with tarfile.open(out) as signed, tarfile.open(again) as plain:
        kept = [n for n in signed.getnames() if n != "manifest.dsse.json"]
        assert kept == plain.getnames()


def test_installed_and_proven_like_any_other(built, pooled, edgewright, tmp_path):
    out, _ = pooled
    root = tmp_path / "root"
    trust = ("--trust", built / "key.pub")
    ran = edgewright("install", out, "--root", root, *trust, "--json")
    assert ran.code == 0, ran.err
    proof = ran.json["self_test"]
    assert sorted(proof["models"]) == ["one", "two"]
    assert proof["vectors"] == sum(one["vectors"] for one in proof["models"].values())
    explained = edgewright("explain", out, *trust)
    assert explained.code == 0 and "good, by " in explained.out
    assert "two 1.0.0: " in explained.out and "gate two max_size_bytes" in explained.out
    # What its parts said of themselves, verbatim.
    source = bundle(built, "two")
    with tarfile.open(source) as archive:
        manifest = archive.extractfile("manifest.json").read()
    assert (root / "current/models/two/manifest.json").read_bytes() == manifest


def test_the_second_model_is_proven_too(built, pooled, edgewright, tmp_path):
    """Golden outputs of the second that are not its own: refused, though the first is right."""
    out, _ = pooled
    other = tmp_path / "x"
    extract(out, other)
    facts = json.loads((other / "manifest.json").read_bytes())
    golden = facts["pool"]["models"][1]["golden"]
    assert golden["outputs"] == "model/golden/two/out.npz"
    arrays = dict(np.load(other / golden["outputs"]))
    wrong = {name: array + 1 for name, array in arrays.items()}
    (other / golden["outputs"]).write_bytes(write_npz(wrong))
    with pytest.raises(IntegrityError, match="golden vector 1 of"):
        install.self_test(facts, other)


def test_the_bill_of_materials_is_valid(pooled, tmp_path):
    cyclonedx = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    extract(pooled[0], tmp_path / "x")
    text = (tmp_path / "x/sbom.cdx.json").read_text()
    assert cyclonedx.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    refs = [part["bom-ref"] for part in json.loads(text)["components"]]
    assert len(set(refs)) == len(refs) and {"one:model", "two:model"} <= set(refs)


def test_refusals(built, pooled, edgewright, tmp_path):
    one, out = bundle(built, "one"), tmp_path / "x.bundle.tar"
    assert edgewright("pool", one, bundle(built, "two"), "-o", tmp_path / "folder").code == 2
    broken = tmp_path / "broken.bundle.tar"
    broken.write_bytes(one.read_bytes()[:-1])
    for other, kind, word in (
        (one, UsageError, "different models"),
        (pooled[0], UsageError, "holds several models"),
        (broken, IntegrityError, "ends inside"),
    ):
        with pytest.raises(kind, match=word):
            pool(built, out, one, other)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.bundle.tar"]
    recipe = no_recipe("")
    recipe = replace(recipe, model=replace(recipe.model, name="both"))
    with pytest.raises(BadInput, match="several models"):
        open_baseline(pooled[0], recipe, load_target("cpu"), tmp_path / "x")
