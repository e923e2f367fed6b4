"""The model in ORT format: only on request, made by the target's runtime, marked, proven."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from bundles import MODEL, RECIPE, forged, here, make, pack, unpack

from edgewright.bundle import assemble, formats, golden
from edgewright.device.install import Wish, install
from edgewright.device.verify import verify
from edgewright.errors import BadInput, IntegrityError
from edgewright.explain import explain, lines
from edgewright.recipe import parse_recipe
from edgewright.runtime import emulator, ortformat
from edgewright.target import load_target

ORT = "model/model.ort"
CONFIG = "runtime/required_operators_and_types.config"
ASKED = {**RECIPE, "release": {"license": "MIT", "formats": ["ort"]}}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("ort"), recipe=ASKED)


def files(path: Path) -> dict[str, bytes]:
    return {name: data for name, data, _ in unpack(path)}


def test_only_on_request(tmp_path):
    path = make(tmp_path)
    assert not {ORT, CONFIG} & set(files(path)) and "formats" not in verify(path)
    with pytest.raises(BadInput, match="'ort'"):
        parse_recipe({**RECIPE, "release": {"formats": ["tflite"]}}, tmp_path)


def test_what_is_in_it(built, caplog):
    inside = files(built)
    (row,) = verify(built)["formats"]
    assert row == {
        "format": "ort",
        "version": 6,  # since ONNX Runtime 1.16
        "path": ORT,
        "config": CONFIG,
        "reproducible": False,
    }
    assert inside[ORT][4:8] == b"ORTM"  # the identifier in the format's schema (ort.fbs)
    # MatMul since opset 13, Relu since 14; the types that they are used with.
    text = inside[CONFIG].decode()
    assert text.splitlines() == [
        'ai.onnx;13;MatMul{"inputs": {"0": ["float"]}}',
        'ai.onnx;14;Relu{"inputs": {"0": ["float"]}}',
    ]
    assert not any(path.suffix in (".ort", ".config") for path in built.parent.iterdir())
    (built.parent / "again.ort").write_bytes(inside[ORT])
    again = ortformat.required(built.parent / "again.ort", built.parent / "again.config")
    assert again == inside[CONFIG] and not caplog.records, "nothing on the user's screen"
    (built.parent / "again.ort").unlink()


def test_it_computes_what_the_model_does(built, tmp_path):
    session = onnxruntime.InferenceSession(files(built)[ORT])
    x = np.random.default_rng(3).normal(size=(2, 4)).astype(np.float32)
    weights = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], np.maximum(x @ weights, 0), 1e-5)


def test_told(built):
    text = dict(lines(explain(built, None)))["as ort"]
    assert text.startswith(f"{ORT}: {len(files(built)[ORT])} bytes, version 6; not reproducible")
    rows = [{"path": ORT}]
    sizes = {ORT: {"size": 12}, "model/model.onnx": {"size": 34}}
    (note,) = formats.remarks(rows, sizes)
    assert note["text"].startswith("model/model.ort: 12 bytes, as ONNX 34; not reproducible")


def test_proven_on_the_device(built, tmp_path):
    wish = Wish(allow_unsigned=True)
    proof = install(built, tmp_path / "root", wish)["self_test"]
    assert proof["formats"]["ort"]["vectors"] == proof["vectors"] == 5
    # Another model's file under this name: well listed, but not what the model computes.
    other = make(tmp_path / "other", MODEL.replace("12}", "13}"), recipe=ASKED)
    wrong = files(other)[ORT]

    def edit(content):
        content["sequence"] = 1
        for entry in content["files"]:
            if entry["path"] == ORT:
                entry.update(size=len(wrong), sha256=hashlib.sha256(wrong).hexdigest())

    middle = tmp_path / "middle.tar"
    middle.write_bytes(pack([(n, wrong if n == ORT else d, m) for n, d, m in unpack(built)]))
    bad = tmp_path / "bad.tar"
    bad.write_bytes(forged(middle, edit))
    with pytest.raises(IntegrityError, match=r"model\.ort: self-test: golden vector"):
        install(bad, tmp_path / "root", wish)


def test_made_by_the_targets_own_runtime(tmp_path):
    """For ARM in the emulator; what a build of it computes is compared there, too."""
    target = load_target("arm")
    try:
        emulator.launch(target)
    except Exception as error:
        pytest.skip(str(error))
    model = onnx.parser.parse_model(MODEL)
    onnx.save(model, tmp_path / "model.onnx")
    ortformat.convert(tmp_path / "model.onnx", target, tmp_path / "arm.ort")
    assert ortformat.format_version(tmp_path / "arm.ort") == 6
    x = np.ones((1, 4), np.float32)
    y = np.array([[22, 26, 30]], np.float32)  # 1+4+7+10, 2+5+8+11, 3+6+9+12
    limits = golden.tolerances([{"y": y}], False)
    formats.check(tmp_path / "arm.ort", target, [{"x": x}], [{"y": y}], limits)
    with pytest.raises(BadInput, match="outputs of the ONNX file"):
        formats.check(tmp_path / "model.onnx", here(), [{"x": x}], [{"y": y + 1}], limits)
    assert json.dumps(assemble.operators(model)) == '{"ai.onnx:17": ["MatMul", "Relu"]}'
