"""What `explain` shows of a bundle that somebody made with care, or with malice."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import rfc8785
from bundles import make, pack, unpack

from edgewright.errors import IntegrityError
from edgewright.explain import MAX_BYTES, explain, lines
from edgewright.rebuild import compare, differing


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole"))


def replaced(path, name: str, data: bytes, out):
    """The bundle with another file in it, its manifest made right."""
    members = [(n, data if n == name else d, m) for n, d, m in unpack(path)]
    content = json.loads(members[0][1])
    content.pop("digest")
    for row in content["files"]:
        if row["path"] == name:
            row |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content["digest"] = hashlib.sha256(rfc8785.dumps(content)).hexdigest()
    out.write_bytes(pack([("manifest.json", rfc8785.dumps(content), 0o644), *members[1:]]))
    return out


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b'{"predicate":[]}',
        b'{"predicate":{"buildDefinition":{"resolvedDependencies":[1,{"name":[]}]}}}',
        b'{"predicate":{"buildDefinition":{"externalParameters":{"recipe":{"a":{"b":[1]}}}}}}',
        b'{"predicate":{"runDetails":{"builder":{"version":{"x":{}}},"byproducts":[{"digest":1}]}}}',
    ],
)
def test_documents_of_any_shape(whole, tmp_path, text):
    path = replaced(whole, "provenance.intoto.json", text, tmp_path / "x.bundle.tar")
    assert lines(explain(path, None))


@pytest.mark.parametrize(
    "text",
    [b"[]", b"", b"\xff", b'{"a":' * 5000 + b"1" + b"}" * 5000, b'"' + b"x" * MAX_BYTES + b'"'],
)
def test_documents_that_are_refused(whole, tmp_path, text):
    path = replaced(whole, "provenance.intoto.json", text, tmp_path / "x.bundle.tar")
    with pytest.raises(IntegrityError, match="provenance"):
        explain(path, None)


def test_bounds_of_the_metric(whole, tmp_path):
    paired = {"mean_loss": 0.01, "mean_loss_low": 0.002, "mean_loss_high": 0.03}
    metric = {"name": "f1", "shipped": {"score": 0.9, "retained": 0.98765}, "paired": paired}
    metric["original"] = {"score": 0.91}
    text = json.dumps({"metric": metric}).encode()
    path = replaced(whole, "report/bench.json", text, tmp_path / "x.bundle.tar")
    shown = dict(lines(explain(path, None)))["metric"]
    wanted = "f1: 0.9, 98.77% of the original's 0.91; mean loss per sample 0.01 (0.002 to 0.03)"
    assert shown == wanted


def test_the_first_stage_that_differs_is_named():
    """In the order in which the bundle's stages ran, whatever their names."""

    def made(**stages):
        rows = [{"annotations": {"stage": s}, "digest": {"sha256": d}} for s, d in stages.items()]
        return {"provenance.intoto.json": {"predicate": {"runDetails": {"byproducts": rows}}}}

    bundle = SimpleNamespace(manifest={"files": []}, manifest_bytes=b"")
    there = made(simplify="1", quantize="2", bundle="3")
    here = made(simplify="1", quantize="9", bundle="8")
    assert compare(bundle, there, bundle, here)["stage"] == "quantize"
    assert compare(bundle, there, bundle, there)["stage"] == ""
    assert differing({"a": 1}, {"b": 2}) == [
        {"name": "a", "there": 1, "here": None},
        {"name": "b", "there": None, "here": 2},
    ]
