"""[quantize] weights_only = true: a quarter of the file, float arithmetic, nothing calibrated."""

import copy
import platform
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper

from edgewright import quantize
from edgewright.recipe import parse_recipe
from edgewright.runtime.launch import host_isa
from edgewright.stage import Job, Report
from edgewright.target import load_target, parse_target


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


WEIGHTS = {
    "w": normal(32, 3, 4, 4) * np.geomspace(0.01, 1, 32).reshape(32, 1, 1, 1),
    "t": normal(32, 16, 2, 2, seed=2),
    "a": normal(64, 48, seed=3),
    "b": normal(48, seed=4),
    "d": normal(40, 48, seed=5),
    "lw": normal(1, 64, 40, seed=6),
    "lr": normal(1, 64, 16, seed=7),
    "tiny": normal(16, 4, seed=8),
}


def source() -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,3,8,8] x) => (float[1,1,1,4] y) {
            c = Conv<strides=[4,4]>(x, w)  e = ConvTranspose<strides=[2,2]>(c, t)
            f = Reshape(e, flat)  m = MatMul(f, a)  n = Add(m, b)
            k = Gemm<transB=1>(n, d)  s = Reshape(k, seq)
            h = LSTM<hidden_size=16>(s, lw, lr)  y = MatMul(h, tiny)
        }"""
    )
    shapes = {"flat": np.array([4, 64]), "seq": np.array([4, 1, 40])}
    for name, value in (WEIGHTS | shapes).items():
        array = value.astype(np.float32) if value.dtype != np.int64 else value
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for node in model.graph.node:
        node.name = node.output[0]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def build(
    folder: Path, isa: list[str], **settings: object
) -> tuple[Report, onnx.ModelProto, onnx.ModelProto]:
    (folder / "out").mkdir(parents=True)
    model = source()
    onnx.save(model, folder / "source.onnx")
    np.savez(folder / "calibration.npz", x=normal(6, 3, 8, 8, seed=9))
    raw = copy.deepcopy(load_target("cpu").raw)
    raw["device"] |= {"arch": platform.machine(), "isa": isa}
    recipe = {
        "model": {"name": "m", "version": "1", "source": "source.onnx"},
        "data": {"calibration": "calibration.npz"},
        "quantize": {"weights_only": True, **settings},
    }
    job = Job(
        recipe=parse_recipe(recipe, folder),
        target=parse_target(raw),
        folder=folder / "out",
        model=folder / "source.onnx",
    )
    report = quantize.run(job)
    return report, onnx.load(folder / "out" / "model.onnx"), model


def run(model: onnx.ModelProto, optimize: bool) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": normal(1, 3, 8, 8, seed=10)})[0]


def test_weights_are_codes_and_a_scale_per_channel(tmp_path: Path) -> None:
    report, model, _ = build(tmp_path, [])
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, axes in {"w": (1, 2, 3), "t": (0, 2, 3), "a": 0, "d": 1, "lw": 2, "lr": 2}.items():
        codes, scale = stored[f"{name}_int8"], stored[f"{name}_scale"]
        peak = np.abs(WEIGHTS[name]).max(axis=axes, keepdims=True)
        np.testing.assert_allclose(scale, peak / 127, rtol=1e-6)
        assert codes.dtype == np.int8 and np.abs(codes.astype(int)).max() == 127
        # Half a step of its own channel, no more.
        assert (np.abs(codes * scale - WEIGHTS[name]) <= scale * 0.5001).all()
    assert "tiny" in stored and "tiny_int8" not in stored
    reasons = {r["node"]: r["reason"] for r in report["placement"]}
    assert "nothing to gain" in reasons["y"] and "float arithmetic" in reasons["h"]
    # Float arithmetic on those weights, nothing else: the same as with them put in by hand.
    by_hand = source()
    for tensor in by_hand.graph.initializer:
        if f"{tensor.name}_int8" in stored:
            value = stored[f"{tensor.name}_int8"] * stored[f"{tensor.name}_scale"]
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    for optimize in (False, True):
        got = run(model, optimize)
        np.testing.assert_allclose(got, run(by_hand, optimize), rtol=1e-5, atol=1e-5)
    assert report["sqnr_db"] > 30
    # The runtime folds what turns them back: the kernels are the float model's.
    assert report["audit"]["int8_kernels"] == {}
    assert report["audit"]["dequantize_linear"] == 0
    (choice,) = report["choices"]
    assert choice["step"] == "weights only" and choice["bytes_ratio"] < 0.35
    assert report["stayed_float"] is False and choice["cpu_ratio"] > 0


def test_a_slower_model_is_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "cpu_ratio", lambda *_: 1.5)
    report, _, _ = build(tmp_path, [])
    assert report["stayed_float"] is False and report["choices"][0]["cpu_ratio"] == 1.5


def test_matrices_go_in_blocks_where_that_is_fast(tmp_path: Path) -> None:
    if "avx512_vnni" not in host_isa():
        pytest.skip("this machine has no VNNI")
    report, model, original = build(tmp_path, ["avx512_vnni"])
    ops = [n.op_type for n in model.graph.node]
    assert ops.count("DequantizeLinear") == 1 and ops.count("Cast") == 5
    assert report["audit"]["int8_kernels"] == {"MatMulNBits": 1}
    assert report["audit"]["dequantize_linear"] == 0
    wanted, got = run(original, True).astype(float), run(model, True)
    assert 10 * np.log10((wanted**2).sum() / ((got - wanted) ** 2).sum()) > 25


def test_scope_and_exclude_choose_the_layers(tmp_path: Path) -> None:
    _, model, _ = build(tmp_path / "a", [], scope=["Conv*"])
    names = {t.name for t in model.graph.initializer}
    assert {n for n in names if n.endswith("_int8")} == {"w_int8", "t_int8"}
    _, model, _ = build(tmp_path / "b", [], exclude=["LSTM", "k"])
    names = {t.name for t in model.graph.initializer}
    assert {n for n in names if n.endswith("_int8")} == {"w_int8", "t_int8", "a_int8"}
    report, _, _ = build(tmp_path / "c", [], scope=["nothing"])
    assert report["stayed_float"] and "no layer in scope" in report["reason"]
