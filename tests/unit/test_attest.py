"""What a bundle says of its own making: bill of materials, provenance, lock, licences."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from bundles import RECIPE, make, unpack

from edgewright.bundle import bom, packages
from edgewright.device.verify import verify
from edgewright.errors import BadInput, IntegrityError
from edgewright.runtime.ssh import wheels

VALIDATE = {
    "metric": {
        "name": "score.py:score",
        "higher_is_better": True,
        "original": {"score": 0.9},
        "shipped": {"score": 0.89, "retained": 0.98889},
        "paired": {
            "samples": 96,
            "mean_loss": 0.01,
            "mean_loss_low": 0.002,
            "mean_loss_high": 0.02,
        },
    },
    "agreement": {"samples": 48, "top1": 0.97},
}
GATE = {
    "verdict": "PASS",
    "checks": [
        {"name": "min_retained", "limit": 0.9, "value": 0.98889, "verdict": "PASS"},
        {"name": "max_latency_ratio", "limit": 1.0, "value": 0.5123, "verdict": "PASS"},
    ],
}


def reports(seconds: float = 1.0) -> dict:
    """Reports of a build; `seconds` is all that two builds differ in."""
    gate = json.loads(json.dumps(GATE))
    gate["checks"][1]["value"] = seconds / 7
    made = {"bytes": 1000, "nodes": 3, "sha256": "ab" * 32, "parameters": 12}
    return {
        "export": {"model": made, "seconds": seconds},
        "validate": {**VALIDATE, "seconds": seconds},
        "gate": {**gate, "seconds": seconds, "notes": []},
    }


@pytest.fixture(scope="module")
def attested(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("attested")
    (folder / "source").mkdir(parents=True)
    licence = folder / "source" / "LICENSE"
    recipe = {
        **RECIPE,
        "data": {**RECIPE["data"], "evaluation": "evaluation.npz", "metric": "score.py:score"},
        "release": {"sequence": 5, "license": "Apache-2.0 OR MIT", "license_file": "LICENSE"},
    }
    (folder / "source" / "score.py").write_text("def score(run, data): return 1.0\n")
    np.savez(folder / "source" / "evaluation.npz", x=np.zeros((3, 4), np.float32))
    licence.write_text("Do what you like.\n")
    path = make(folder, recipe=recipe, reports=reports())
    files = {name: data for name, data, _ in unpack(path)}
    files["source of calibration"] = (folder / "source" / "calibration.npz").read_bytes()
    files["source of the model"] = (folder / "source" / "model.onnx").read_bytes()
    return files


def test_everything_is_there(attested):
    assert {
        "sbom.cdx.json",
        "provenance.intoto.json",
        "report/gate.json",
        "report/bench.json",
        "report/report.html",
        "runtime/lock.txt",
        "runtime/required_operators.config",
        "LICENSES/model.txt",
        "LICENSES/onnxruntime.txt",
        "LICENSES/numpy.txt",
    } <= set(attested)
    assert attested["LICENSES/model.txt"] == b"Do what you like.\n"
    assert b"MIT License" in attested["LICENSES/onnxruntime.txt"]


def test_the_bill_of_materials_passes_the_validator_of_cyclonedx(attested):
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    judge = validation.JsonStrictValidator(SchemaVersion.V1_6)
    assert judge.validate_str(attested["sbom.cdx.json"].decode()) is None
    broken = attested["sbom.cdx.json"].replace(b'"SHA-256"', b'"SHA-255"')
    assert judge.validate_str(broken.decode()) is not None


def test_the_bill_of_materials_says_what_ships(attested):
    found = json.loads(attested["sbom.cdx.json"])
    model = found["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["hashes"][0]["content"] == hashlib.sha256(attested["model/model.onnx"]).hexdigest()
    assert model["licenses"] == [{"expression": "Apache-2.0 OR MIT"}]
    card = model["modelCard"]
    metrics = {
        (m["type"], m["slice"]): m for m in card["quantitativeAnalysis"]["performanceMetrics"]
    }
    assert metrics["score.py:score", "shipped"]["value"] == "0.89"
    loss = metrics["mean loss per sample", "96 samples, against the original"]
    assert loss["confidenceInterval"] == {"lowerBound": "0.002", "upperBound": "0.02"}
    parts = {part["bom-ref"]: part for part in found["components"]}
    calibration = parts["data:calibration"]
    digest = hashlib.sha256(attested["source of calibration"]).hexdigest()
    assert calibration["hashes"][0]["content"] == digest
    assert {d["ref"] for d in card["modelParameters"]["datasets"]} == {
        "data:calibration",
        "data:evaluation",
    }
    runtime = parts[f"pkg:pypi/onnxruntime@{onnxruntime.__version__}"]
    assert runtime["licenses"] == [{"license": {"name": "MIT License"}}]
    assert "timestamp" not in found["metadata"]


def test_time_is_source_date_epoch(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1800000000")
    files = {name: data for name, data, _ in unpack(make(tmp_path))}
    assert json.loads(files["sbom.cdx.json"])["metadata"]["timestamp"] == "2027-01-15T08:00:00Z"


def test_provenance_is_a_statement_over_every_file(attested):
    """The subjects are the manifest's files; the rest as SLSA v1 and in-toto v1 demand."""
    found = json.loads(attested["provenance.intoto.json"])
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    manifest = json.loads(attested["manifest.json"])
    listed = {f["path"]: f["sha256"] for f in manifest["files"]}
    listed.pop("provenance.intoto.json")
    assert {s["name"]: s["digest"]["sha256"] for s in found["subject"]} == listed
    build = found["predicate"]["buildDefinition"]
    assert build["externalParameters"]["recipe"]["model"]["name"] == "tiny"
    assert "L1" in build["internalParameters"]["level"]
    inputs = {d["annotations"]["use"]: d["digest"]["sha256"] for d in build["resolvedDependencies"]}
    assert inputs["source"] == hashlib.sha256(attested["source of the model"]).hexdigest()
    assert set(inputs) == {"calibration", "source", "evaluation", "metric"}
    run = found["predicate"]["runDetails"]
    assert run["builder"]["version"]["onnxruntime"] == onnxruntime.__version__
    assert run["byproducts"][0]["annotations"] == {"stage": "export"}
    assert "metadata" not in run  # no invocation, no clock


def test_no_time_gets_in(attested, tmp_path):
    """Reports that differ in times and latencies only make the same bundle, byte for byte."""
    paths = [make(tmp_path / str(k), reports=reports(seconds)) for k, seconds in enumerate((2, 3))]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    for name, data, _ in unpack(paths[0]):
        assert b"0.2857" not in data and b"0.4285" not in data, name


def test_the_page_escapes_what_it_shows(tmp_path):
    evil = {**VALIDATE, "metric": {**VALIDATE["metric"], "name": "<script>alert(1)</script>"}}
    path = make(tmp_path, reports={**reports(), "validate": evil})
    page = {name: data for name, data, _ in unpack(path)}["report/report.html"]
    assert b"<script" not in page and b"&lt;script&gt;" in page and b"0.89" in page


def test_bench_holds_ratios_that_do_not_change(attested):
    found = json.loads(attested["report/bench.json"])
    size = len(attested["model/model.onnx"])
    assert found["size"] == {"shipped_bytes": size, "original_bytes": 1000, "ratio": size / 1000}
    assert found["metric"]["shipped"]["retained"] == 0.98889
    assert "latency" in found["left_out"]


def test_the_lock_names_the_wheels_of_this_installation(attested):
    text = attested["runtime/lock.txt"].decode()
    assert f"\nonnxruntime=={onnxruntime.__version__}\n" in text
    assert f"\nnumpy=={np.__version__}\n" in text
    tag = f"onnxruntime-{onnxruntime.__version__}-cp"
    assert f"# wheel: {tag}" in text and "not known" in text


def test_a_record_digest_leaves_out_what_the_installer_wrote():
    wheel = "a/b.py,sha256=x,3\na-1.dist-info/METADATA,sha256=y,9\na-1.dist-info/RECORD,,\n"
    more = "../../bin/a,sha256=q,1\na-1.dist-info/INSTALLER,sha256=z,4\na/b.pyc,,\n"
    digest = wheels.record_digest(wheel)
    assert digest == wheels.record_digest(more + wheel)
    assert digest == wheels.record_digest("\n".join(wheel.splitlines()[::-1]))
    assert digest != wheels.record_digest(wheel.replace("=x", "=X"))
    lines = b"a-1.dist-info/METADATA,sha256=y,9\na/b.py,sha256=x,3\n"
    assert digest == hashlib.sha256(lines).hexdigest()


def test_a_lock_with_the_digest_of_a_wheel_is_what_pip_demands():
    one = packages.Package(
        name="numpy", version="2.0.1", wheel="numpy-2.0.1-x.whl", wheel_sha256="ab" * 32
    )
    assert f"\nnumpy==2.0.1 --hash=sha256:{'ab' * 32}\n" in packages.lock([one]).decode()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("MIT", "expression"),
        ("MIT OR Apache-2.0", "expression"),
        ("(MIT AND Zlib) OR GPL-2.0-only WITH Classpath-exception-2.0", "expression"),
        ("MIT License", "license"),
        ("Ask us first", "license"),
    ],
)
def test_licences(text, kind):
    assert [kind] == [key for row in bom.licenses(text)["licenses"] for key in row]


def test_a_private_key_never_ships(tmp_path):
    source = tmp_path / "source"
    recipe = {**RECIPE, "release": {"license_file": "LICENSE"}}
    with pytest.raises(BadInput, match="license_file"):
        make(tmp_path / "1", recipe=recipe)
    (tmp_path / "2" / "source").mkdir(parents=True)
    Path(tmp_path / "2" / "source" / "LICENSE").write_text("-----BEGIN EC PRIVATE KEY-----\nMHc\n")
    with pytest.raises(IntegrityError, match="private key"):
        make(tmp_path / "2", recipe=recipe)
    assert not source.exists() and not list((tmp_path / "2" / "out").iterdir())


def test_without_reports_nothing_is_made_up(tmp_path):
    path = make(tmp_path)
    files = {name: data for name, data, _ in unpack(path)}
    assert verify(path)["gate"] is None
    card = json.loads(files["sbom.cdx.json"])["metadata"]["component"]["modelCard"]
    assert "quantitativeAnalysis" not in card
    assert json.loads(files["report/bench.json"])["metric"] is None
    assert b"Gate: <b>none</b>" in files["report/report.html"]
