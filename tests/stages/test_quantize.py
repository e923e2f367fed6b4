"""The stage quantize on small models made here, and on the example: kernels, choices, reasons."""

import copy
import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from edgewright import quantize
from edgewright.errors import BadInput, EdgewrightError, EnvironmentMissing
from edgewright.quantize import build, correct, fidelity, pricing, refine, rounding
from edgewright.recipe import load_recipe, parse_recipe
from edgewright.runtime.launch import host_isa, launch_for
from edgewright.stage import Job, Report
from edgewright.target import Target, load_target, parse_target

ROOT = Path(__file__).parents[2]
Data = dict[str, np.ndarray]


def net(text: str, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX text; nodes are called after their first output."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>' + text)
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    for node in model.graph.node:
        node.name = node.output[0]
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    onnx.checker.check_model(model)
    return model


def normal(*shape: int, seed: int = 1, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def here(**int8: object) -> Target:
    """A target that every machine can run: the scheme of `cpu` on the CPU the tests run on."""
    raw = copy.deepcopy(load_target("cpu").raw)
    raw["device"]["arch"] = platform.machine()
    raw["device"]["isa"] = []
    # U8S8 products saturate on x86 without VNNI; head-room makes the numbers alike everywhere.
    raw["int8"]["saturates"] = platform.machine() == "x86_64" and not (
        {"avx512_vnni", "avx_vnni"} & host_isa()
    )
    raw["int8"].update(int8)
    return parse_target(raw)


def on(name: str) -> Target:
    """A shipped target, where this machine can run it."""
    target = load_target(name)
    try:
        launch_for(target)
    except EnvironmentMissing as error:
        pytest.skip(str(error))
    return target


def job(
    folder: Path,
    model: onnx.ModelProto,
    data: Data,
    target: Target | None = None,
    recipe: dict[str, Any] = {},
    **settings: object,
) -> Job:
    """A job of the stage; scope is full unless the settings say otherwise: no timing decides."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "out").mkdir()
    onnx.save(model, folder / "source.onnx")
    np.savez(folder / "calibration.npz", **data)
    tables = {
        "model": {"name": "m", "version": "1", "source": "source.onnx"},
        "quantize": {"scope": "full", **settings},
        **recipe,
    }
    tables["data"] = {"calibration": "calibration.npz", **recipe.get("data", {})}
    return Job(
        recipe=parse_recipe(tables, folder),
        target=target or here(),
        folder=folder / "out",
        model=folder / "source.onnx",
    )


def quantized(
    folder: Path, model: onnx.ModelProto, data: Data, *args: Any, **more: Any
) -> tuple[Report, onnx.ModelProto]:
    """Run the stage; its report and the model it wrote."""
    work = job(folder, model, data, *args, **more)
    report = quantize.run(work)
    assert sorted(p.name for p in work.folder.iterdir()) == ["model.onnx"]
    json.dumps(report)
    result = onnx.load(work.output_model())
    onnx.checker.check_model(result)
    assert [o.name for o in result.graph.output] == [o.name for o in model.graph.output]
    assert [i.name for i in result.graph.input] == [i.name for i in model.graph.input]
    return report, result


def outputs(model: onnx.ModelProto, feed: Data) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)


def sqnr_db(model: onnx.ModelProto, other: onnx.ModelProto, feed: Data) -> float:
    """Signal to noise of the worst output for one feed, where equal outputs have 200 dB."""
    ratios = []
    for a, b in zip(outputs(model, feed), outputs(other, feed), strict=True):
        noise = ((a.astype(float) - b) ** 2).sum()
        ratios.append(10 * np.log10((a.astype(float) ** 2).sum() / noise) if noise else 200.0)
    return min(ratios)


def placed(report: Report, how: str) -> list[str]:
    return [row["node"] for row in report["placement"] if row["runs_as"] == how]


def reason(report: Report, node: str) -> str:
    (row,) = [r for r in report["placement"] if r["node"] == node]
    assert row["runs_as"] == "float"
    return row["reason"]


def types_of_scales(model: onnx.ModelProto) -> tuple[set[str], set[str]]:
    """Types of the quantized activations and of the stored int8 weights (biases left out)."""
    stored = {t.name: t for t in model.graph.initializer}
    names = {v: k for k, v in TensorProto.DataType.items()}
    activations, weights = set(), set()
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            activations.add(names[stored[node.input[2]].data_type])
        elif node.op_type == "DequantizeLinear" and node.input[0] in stored:
            weights.add(names[stored[node.input[0]].data_type])
    return activations, weights - {"INT32"}


RESIDUAL = """g (float[1,3,16,16] x) => (float[1,5] y) {
    a = Conv<pads=[1,1,1,1]>(x, w0, b0)  ar = Relu(a)
    b = Conv<pads=[1,1,1,1], group=8>(ar, w1, b1)  br = Clip(b, zero, six)
    c = Conv(br, w2)  s = Add(ar, c)  sr = Relu(s)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(sr)
    d = Conv(p, w3, b3)  e = Conv(p, w4, b4)  k = Concat<axis=1>(d, e)
    m = GlobalAveragePool(k)  f = Flatten(m)
    h = Gemm<transB=1>(f, w5, b5)  hr = Relu(h)  y = MatMul(hr, w6)
}"""


def residual() -> onnx.ModelProto:
    return net(
        RESIDUAL,
        w0=normal(8, 3, 3, 3, scale=0.3),
        b0=normal(8, seed=2, scale=0.2),
        w1=normal(8, 1, 3, 3, seed=3, scale=0.4),
        b1=normal(8, seed=4, scale=0.2),
        w2=normal(8, 8, 1, 1, seed=5, scale=0.4),
        w3=normal(6, 8, 1, 1, seed=6, scale=0.4),
        b3=normal(6, seed=7, scale=0.2),
        w4=normal(4, 8, 1, 1, seed=8, scale=0.4),
        b4=normal(4, seed=9, scale=0.2),
        w5=normal(12, 10, seed=10),
        b5=normal(12, seed=11),
        w6=normal(12, 5, seed=12),
        zero=np.float32(0),
        six=np.float32(6),
    )


PICTURES = {"x": normal(12, 3, 16, 16, seed=20)}
FRESH = {"x": normal(1, 3, 16, 16, seed=21)}
LAYERS = ["a", "b", "c", "d", "e", "h", "y"]


# --- the scheme and the kernels ------------------------------------------------------------


def test_u8s8_on_cpu_fuses_everything_planned(tmp_path: Path) -> None:
    source = residual()
    report, model = quantized(tmp_path, source, PICTURES, on("cpu"))
    assert report["stayed_float"] is False
    audit = report["audit"]
    assert audit["available"] and audit["unfused"] == 0
    assert audit["float_layers"] == {}
    assert audit["int8_kernels"]["QLinearConv"] == 5
    assert audit["int8_kernels"]["QLinearAdd"] == 1
    assert audit["int8_kernels"]["QLinearConcat"] == 1
    assert audit["int8_kernels"]["QGemm"] == 1
    assert set(LAYERS) <= set(placed(report, "int8"))
    assert types_of_scales(model) == ({"UINT8"}, {"INT8"})
    assert report["scheme"]["activations"] == "uint8"
    assert report["scheme"]["calibration_samples"] == 12
    # The activations between are in the range, not nodes of the file.
    assert not {"Relu", "Clip"} & {n.op_type for n in model.graph.node if n.name != "hr"}
    assert sqnr_db(source, model, FRESH) > 25  # 7 layers of about 35 dB each
    assert report["notes"] == []


def test_s8s8_is_written_for_arm(tmp_path: Path) -> None:
    report, model = quantized(tmp_path, residual(), PICTURES, on("arm"))
    assert types_of_scales(model) == ({"INT8"}, {"INT8"})
    assert report["scheme"]["activations"] == "int8"
    assert report["audit"]["unfused"] == 0  # on ARM; x86 would leave some of them float
    assert report["audit"]["float_layers"] == {}


@pytest.mark.parametrize(
    ("scheme", "types"),
    [
        ({"activations": "int8"}, ({"INT8"}, {"INT8"})),
        ({"weights": "uint8"}, ({"UINT8"}, {"UINT8"})),
        ({"per_channel": False}, ({"UINT8"}, {"INT8"})),
    ],
)
def test_the_profile_decides_the_scheme(
    tmp_path: Path, scheme: dict[str, object], types: tuple[set[str], set[str]]
) -> None:
    source = net(
        "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { a = Conv(x, w) y = Relu(a) }",
        w=normal(4, 3, 3, 3) * np.float32([1, 2, 4, 8]).reshape(4, 1, 1, 1),
    )
    _, model = quantized(tmp_path, source, {"x": normal(8, 3, 8, 8)}, here(**scheme))
    assert types_of_scales(model) == types
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    per_channel = scheme.get("per_channel", True)
    assert stored["w_scale"].size == (4 if per_channel else 1)
    assert sqnr_db(source, model, {"x": normal(1, 3, 8, 8, seed=9)}) > 30


@pytest.mark.parametrize("kind", ["uint16", "int16"])
def test_16_bit_activations_are_closer_and_said_to_run_in_float(tmp_path: Path, kind: str) -> None:
    source = residual()
    eight, _ = quantized(tmp_path / "8", source, PICTURES, here())
    scheme = here(activations=kind, symmetric_activations=kind == "int16", saturates=False)
    report, model = quantized(tmp_path / "16", source, PICTURES, scheme)
    assert types_of_scales(model) == ({kind.upper()}, {"INT8"})
    assert report["model"]["opset"] == 21
    assert {n.domain for n in model.graph.node} == {""}
    assert report["sqnr_db"] > eight["sqnr_db"] + 3  # what is left is the weights' noise
    assert report["audit"]["int8_kernels"].get("QLinearConv", 0) == 0
    (note,) = report["notes"]
    assert f"no kernels for {kind} activations" in note["text"]
    assert "run in float" in note["text"]
    assert set(LAYERS) <= set(placed(report, "float"))
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    # The input's range in 65535 steps, zero exact.
    low, high = PICTURES["x"].min(), PICTURES["x"].max()
    if kind == "uint16":
        assert stored["x_scale"] == pytest.approx((high - low) / 65535, rel=1e-5)
    else:
        assert stored["x_scale"] == pytest.approx(max(-low, high) * 2 / 65535, rel=1e-3)
        assert stored["x_zero_point"] == 0


def test_a_profile_of_ones_own_asks_for_16_bits_by_command(tmp_path: Path) -> None:
    work = job(tmp_path, residual(), PICTURES)
    text = (ROOT / "targets" / "cpu.toml").read_text()
    text = text.replace('"x86_64"', f'"{platform.machine()}"').replace(
        '["avx2", "avx512_vnni"]', "[]"
    )
    (tmp_path / "wide.toml").write_text(
        text.replace('activations = "uint8"', 'activations = "uint16"')
    )
    (tmp_path / "recipe.toml").write_text(
        """[model]
name = "m"
version = "1"
source = "source.onnx"
[data]
calibration = "calibration.npz"
[quantize]
scope = "full"
"""
    )
    command = [sys.executable, "-m", "edgewright", "quantize", str(work.input_model())]
    command += ["--recipe", str(tmp_path / "recipe.toml"), "--target", str(tmp_path / "wide.toml")]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "wide.onnx"), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "no kernels for uint16 activations" in done.stdout
    assert types_of_scales(onnx.load(tmp_path / "wide.onnx"))[0] == {"UINT16"}
    (tmp_path / "wide.toml").write_text(
        text.replace('activations = "uint8"', 'activations = "uint12"')
    )
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "no.onnx")], capture_output=True, text=True
    )
    assert done.returncode == 3 and "uint12" in done.stderr and "'uint16'" in done.stderr


def test_kinds_of_activations_that_are_none() -> None:
    for kind in ("float8", "int4", 16):
        with pytest.raises(BadInput, match="activations"):
            here(activations=kind)


def test_symmetric_activations_have_the_middle_as_zero(tmp_path: Path) -> None:
    _, model = quantized(
        tmp_path,
        residual(),
        PICTURES,
        here(activations="int8", symmetric_activations=True),
    )
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    zeros = {int(stored[n.input[2]]) for n in model.graph.node if n.op_type == "QuantizeLinear"}
    assert zeros == {0}


def test_weights_leave_head_room_where_products_saturate(tmp_path: Path) -> None:
    # Pairs: (2, 1) and (1, -4); (1, 1) and (0, 4). The first output needs 4 / 127 for its peak,
    # the second no more, as its 4 meets a 0; the third 7 / 128 for a pair, and 3.5 is 64.
    weight = np.float32([[2, 1, 1, -4], [1, 1, 0, 4], [3.5, 3.5, 0, 0]])
    source = net(
        "g (float[1,4,8,8] x) => (float[1,3,8,8] y) { y = Conv(x, w, b) }",
        w=weight.reshape(3, 4, 1, 1),
        b=normal(3),
    )
    data = {"x": normal(8, 4, 8, 8)}
    for saturates, last in ((False, 127), (True, 64)):
        _, model = quantized(
            tmp_path / str(saturates), source, data, here(saturates=saturates), corrections=False
        )
        codes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}["w_quantized"]
        assert codes.reshape(3, 4).tolist() == [
            [64, 32, 32, -127],
            [32, 32, 0, 127],
            [last, last, 0, 0],
        ]


def test_codes_and_scales_by_hand(tmp_path: Path) -> None:
    # Peaks 1.27 and 254 over 127 steps; the input is 0..255 in steps of one.
    weight = np.float32([[1.27, 0.3, -0.005], [-254, 3, 100]])
    source = net("g (float[1,3] x) => (float[1,2] y) { y = MatMul(x, w) }", w=weight.T.copy())
    data = {"x": np.float32([[[0, 255, 7]], [[1, 2, 3]], [[200, 30, 0]], [[9, 9, 9]]])}
    _, model = quantized(tmp_path, source, data, corrections=False, ranges="minmax")
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    if not here().int8.saturates:
        np.testing.assert_allclose(stored["w_scale"], [0.01, 2.0], rtol=1e-6)
        # 0.3 / 0.01 = 30; -0.5 and 1.5 go to the even neighbour.
        assert stored["w_quantized"].T.tolist() == [[127, 30, 0], [-127, 2, 50]]
    assert stored["x_scale"] == pytest.approx(1.0)
    assert stored["x_zero_point"] == 0


def test_what_the_runtime_does_not_fuse_is_told(tmp_path: Path) -> None:
    # Signed activations with two readers: x86 runs these in float between Q and DQ (facts, 3).
    if platform.machine() != "x86_64":
        pytest.skip("on ARM they fuse")
    source = net(
        """g (float[1,8] x) => (float[1,5] y) {
            a = MatMul(x, w)  b = Add(a, c)  r = Relu(b)  y = MatMul(r, v)
        }""",
        w=normal(8, 6),
        v=normal(6, 5),
        c=normal(6),
    )
    scheme = here(activations="int8", symmetric_activations=True)
    report, _ = quantized(tmp_path, source, {"x": normal(8, 1, 8)}, scheme)
    kernels = report["audit"]["int8_kernels"]
    fused = kernels.get("MatMulIntegerToFloat", 0) + kernels.get("QGemm", 0)
    lost = [
        n
        for n in ("a", "y")
        if "did not fuse" in next((r["reason"] for r in report["placement"] if r["node"] == n), "")
    ]
    assert lost == ["a"]  # it stands there as "fused a/MatMulAddFusion"
    assert report["audit"]["unfused"] == 1 and fused == 1
    assert [n["level"] for n in report["notes"]] == ["warning"]
    assert "'a'" in report["notes"][0]["text"]


# --- kinds of layers -----------------------------------------------------------------------

KINDS: dict[str, tuple[str, dict[str, np.ndarray], tuple[int, ...], list[str]]] = {
    "3-D Conv": (
        """g (float[1,3,20] x) => (float[1,4,20] y) {
            a = Conv<pads=[1,1]>(x, w, b) r = Relu(a) y = Conv<pads=[2,2], dilations=[2]>(r, v)
        }""",
        {"w": normal(4, 3, 3), "b": normal(4), "v": normal(4, 4, 3, seed=2)},
        (3, 20),
        ["a", "y"],
    ),
    "5-D Conv": (
        """g (float[1,2,6,6,6] x) => (float[1,3,4,4,4] y) {
            a = Conv<pads=[1,1,1,1,1,1]>(x, w, b) r = Relu(a) y = Conv(r, v)
        }""",
        {"w": normal(4, 2, 3, 3, 3), "b": normal(4), "v": normal(3, 4, 3, 3, 3, seed=2)},
        (2, 6, 6, 6),
        ["a", "y"],
    ),
    "weights with one element": (
        "g (float[1,1,6] x) => (float[1,1,6] y) { a = Conv(x, w, b) y = Conv(a, v) }",
        {"w": normal(1, 1, 1), "b": normal(1), "v": normal(1, 1, 1, seed=3)},
        (1, 6),
        ["a", "y"],
    ),
    "MatMul of one number": (
        "g (float[1,1] x) => (float[1,1] y) { y = MatMul(x, w) }",
        {"w": normal(1, 1)},
        (1, 1),
        ["y"],
    ),
    "a channel of zero weights": (
        "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { y = Conv(x, w, b) }",
        {
            "w": normal(4, 3, 3, 3) * np.float32([1, 0, 1, 1]).reshape(4, 1, 1, 1),
            "b": np.float32([0.3, -0.4, 0, 1]),
        },
        (3, 8, 8),
        ["y"],
    ),
    "stacked weights": (
        "g (float[2,1,8] x) => (float[2,1,5] y) { y = MatMul(x, w) }",
        {"w": normal(2, 8, 5)},
        (2, 1, 8),
        ["y"],
    ),
    "a tensor called like a new bias": (
        "g (float[1,3,8,8] x) => (float[1,4,8,8] y) { a = Conv(x, w) r = Relu(a) y = Conv(r, v) }",
        {"w": normal(4, 3, 1, 1), "v": normal(4, 4, 1, 1, seed=2), "a_bias": normal(7)},
        (3, 8, 8),
        ["a", "y"],
    ),
    "weights shared by two layers": (
        """g (float[1,3,8,8] x) => (float[1,3,8,8] y) {
            a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) y = Conv<pads=[1,1,1,1]>(r, w, b)
        }""",
        {"w": normal(3, 3, 3, 3, scale=0.3), "b": normal(3)},
        (3, 8, 8),
        ["a", "y"],
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_layers_run_as_int8(tmp_path: Path, name: str) -> None:
    text, weights, shape, wanted = KINDS[name]
    source = net(text, **weights)
    target = on("cpu") if "avx512_vnni" in host_isa() else here()
    data = normal(16, *shape, seed=5)
    report, model = quantized(tmp_path, source, {"x": data}, target)
    assert report["audit"]["unfused"] == 0
    assert report["audit"]["float_layers"] == {}
    assert set(wanted) <= set(placed(report, "int8"))
    # Eight bits are worth 38 dB or more of a Gaussian; two layers in a row a little less.
    rank = len(source.graph.input[0].type.tensor_type.shape.dim)
    samples = data if len(shape) == rank else data[:, None]
    assert np.mean([sqnr_db(source, model, {"x": x}) for x in samples]) > 30


def test_bias_fits_where_a_channel_has_almost_no_weight(tmp_path: Path) -> None:
    # Steps of 1e-9 / 127 times the input's would cut a bias of 0.5 off at 2**31 of them.
    weight = normal(4, 3, 3, 3)
    weight[1], weight[2] = 1e-9, 1e-44
    source = net(
        "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { y = Conv(x, w, b) }",
        w=weight,
        b=np.float32([0.5, 0.5, -0.5, 0]),
    )
    _, model = quantized(tmp_path, source, {"x": normal(8, 3, 8, 8)}, corrections=False)
    feed = {"x": normal(1, 3, 8, 8, seed=6)}
    wanted, got = outputs(source, feed)[0], outputs(model, feed)[0]
    step = np.abs(wanted).max() / 100  # of the output's range, one in 255
    np.testing.assert_allclose(got[:, 1:3], wanted[:, 1:3], atol=step)


def test_bias_fits_behind_an_input_that_calibration_never_sees(tmp_path: Path) -> None:
    source = net(
        """g (float[1,3,8,8] x) => (float[1,2,8,8] y) {
            a = Conv(x, w, deep) r = Relu(a) y = Conv(r, v, b)
        }""",
        w=normal(3, 3, 1, 1),
        deep=np.full(3, -100, np.float32),
        v=normal(2, 3, 1, 1),
        b=np.float32([0.75, -0.25]),
    )
    _, model = quantized(tmp_path, source, {"x": normal(8, 3, 8, 8)})
    got = outputs(model, {"x": normal(1, 3, 8, 8, seed=6)})[0]
    np.testing.assert_allclose(got[0, :, 0, 0], [0.75, -0.25], atol=1 / 255)


def test_products_of_two_activations(tmp_path: Path) -> None:
    source = net(
        """g (float[1,6,8] x) => (float[1,6,6] y) {
            q = MatMul(x, w) k = MatMul(x, v) t = Transpose<perm=[0,2,1]>(k) y = MatMul(q, t)
        }""",
        w=normal(8, 8),
        v=normal(8, 8, seed=2),
    )
    data = {"x": normal(16, 6, 8, seed=3)}
    report, model = quantized(tmp_path / "full", source, data)
    assert {"q", "k", "y"} <= set(placed(report, "int8"))
    assert sqnr_db(source, model, {"x": normal(1, 6, 8, seed=4)}) > 30
    report, model = quantized(tmp_path / "some", source, data, scope=["MatMul"])
    assert placed(report, "int8") == ["q", "k"]
    assert "product of two activations" in reason(report, "y")


def test_gemm_with_a_transposed_activation_stays_float(tmp_path: Path) -> None:
    source = net(
        "g (float[8,4] x) => (float[4,3] y) { a = Gemm<transA=1>(x, w, b) y = MatMul(a, v) }",
        w=normal(8, 4),
        b=normal(4),
        v=normal(4, 3),
    )
    report, model = quantized(tmp_path, source, {"x": normal(16, 8, 4)})
    assert "transposed activation" in reason(report, "a")
    assert placed(report, "int8") == ["y"]
    assert sqnr_db(source, model, {"x": normal(8, 4, seed=7)}) > 30


@pytest.mark.parametrize("opset", [13, 14, 18, 21])
def test_opsets_from_13_on(tmp_path: Path, opset: int) -> None:
    source = net(
        "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { a = Conv(x, w, b) y = Relu(a) }",
        opset=opset,
        w=normal(4, 3, 3, 3),
        b=normal(4),
    )
    report, model = quantized(tmp_path, source, {"x": normal(8, 3, 8, 8)})
    assert report["audit"]["unfused"] == 0
    assert report["model"]["opset"] == opset
    assert sqnr_db(source, model, {"x": normal(1, 3, 8, 8, seed=9)}) > 30


def test_dynamic_batch_and_size(tmp_path: Path) -> None:
    source = net(
        """g (float[N,3,H,W] x) => (float[N,2,P,Q] y) {
            a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) y = Conv(r, v)
        }""",
        w=normal(4, 3, 3, 3),
        b=normal(4),
        v=normal(2, 4, 3, 3),
    )
    data = {f"x__{k:03}": normal(1 + k % 3, 3, 7 + k, 9, seed=k) for k in range(9)}
    report, model = quantized(tmp_path, source, data)
    assert placed(report, "int8") == ["a", "r", "y"]
    for shape in ((1, 3, 8, 8), (5, 3, 5, 11)):
        feed = {"x": normal(*shape, seed=30)}
        assert outputs(model, feed)[0].shape == outputs(source, feed)[0].shape
        assert sqnr_db(source, model, feed) > 28


@pytest.mark.parametrize("length", ["S", "6"])
def test_sequences_of_free_and_fixed_length(tmp_path: Path, length: str) -> None:
    # With a fixed length ONNX Runtime makes a float Gemm of MatMul and Add, if it is let.
    source = net(
        f"""g (float[1,{length},8] x) => (float[1,{length},4] y) {{
            a = MatMul(x, w) b = Add(a, c) r = Relu(b) y = MatMul(r, v)
        }}""",
        w=normal(8, 12),
        c=normal(12),
        v=normal(12, 4),
    )
    if length == "S":
        data = {f"x__{k:03}": normal(1, 2 + k, 8, seed=k) for k in range(9)}
    else:
        data = {"x": normal(9, 6, 8)}
    report, model = quantized(tmp_path, source, data)
    assert report["audit"]["int8_kernels"] == {"MatMulIntegerToFloat": 2}
    assert report["audit"]["float_layers"] == {}
    assert sqnr_db(source, model, {"x": normal(1, 6, 8, seed=40)}) > 30
    by_name = {t.name: t for t in model.graph.initializer}
    assert np.prod(by_name["c"].dims) == 12


def test_a_float_branch_reads_the_float_tensor(tmp_path: Path) -> None:
    # x and the layer norm have readers in int8 and in float; what float nodes and outputs see
    # of them must not be rounded. What the int8 layer k makes goes through one pair.
    source = net(
        """g (float[1,4,8] x) => (float[1,4,8] y, float[1,4,8] n, float[1,4,8] s) {
            n = LayerNormalization<axis=-1>(x, one)
            k = MatMul(n, w)  m = MatMul(k, v)  e = Erf(k)
            s = Softmax(x)  o = MatMul(x, u)  y = Sum(m, e, n, o)
        }""",
        one=np.ones(8, np.float32),
        w=normal(8, 8, scale=0.3),
        v=normal(8, 8, seed=2, scale=0.3),
        u=normal(8, 8, seed=3, scale=0.3),
    )
    report, model = quantized(tmp_path, source, {"x": normal(16, 4, 8, seed=4)})
    assert placed(report, "int8") == ["k", "m", "o"]
    feed = {"x": normal(1, 4, 8, seed=5)}
    for place in (1, 2):
        np.testing.assert_array_equal(outputs(model, feed)[place], outputs(source, feed)[place])
    readers = {n.name: list(n.input) for n in model.graph.node}
    assert "n" in readers["y"] and readers["s"] == ["x"]
    assert readers["e"] == readers["m"][:1] == ["k_DequantizeLinear_Output"]
    assert report["audit"]["unfused"] == 0
    assert sqnr_db(source, model, feed) > 35


def test_a_last_layer_with_its_bias_runs_as_int8(tmp_path: Path) -> None:
    source = net(
        "g (float[N,8] x) => (float[N,5] y) { a = MatMul(x, w) y = Add(b, a) }",
        w=normal(8, 5),
        b=normal(1, 5, seed=2),
    )
    report, model = quantized(tmp_path, source, {"x": normal(16, 1, 8)})
    assert report["audit"]["unfused"] == 0 and report["audit"]["float_layers"] == {}
    assert sqnr_db(source, model, {"x": normal(3, 8, seed=4)}) > 30


def test_layers_in_subgraphs_are_reported(tmp_path: Path) -> None:
    source = net(
        """g (float[1,3,8,8] x, bool c) => (float[1,4,6,6] y) {
            a = Conv(x, w)  r = Relu(a)  k = Conv(r, u)
            y = If(c) <
                then_branch = one () => (float[1,4,6,6] inner) { inner = Conv(k, v) },
                else_branch = two () => (float[1,4,6,6] other) { other = Relu(k) }
            >
        }""",
        w=normal(4, 3, 3, 3),
        u=normal(4, 4, 1, 1, seed=2),
        v=normal(4, 4, 1, 1, seed=3),
    )
    for branch in source.graph.node[-1].attribute:
        for node in branch.g.node:
            node.name = node.output[0]
    data = {"x": normal(8, 3, 8, 8), "c": np.arange(8) % 2 == 0}
    report, model = quantized(tmp_path, source, data)
    assert "inside a subgraph" in reason(report, "inner")
    assert "a" in placed(report, "int8")
    for choice in (True, False):
        feed = {"x": normal(1, 3, 8, 8, seed=5), "c": np.array(choice)}
        assert sqnr_db(source, model, feed) > 30


def test_two_inputs_and_one_weight(tmp_path: Path) -> None:
    source = net(
        """g (float[1,3,8,8] x, float[1,3,8,8] z) => (float[1,4,6,6] y) {
            a = Conv(x, w, b)  k = Conv(z, w)  y = Add(a, k)
        }""",
        w=normal(4, 3, 3, 3),
        b=normal(4),
    )
    data = {"x": normal(8, 3, 8, 8), "z": normal(8, 3, 8, 8, seed=2, scale=5.0)}
    report, model = quantized(tmp_path, source, data)
    assert set(placed(report, "int8")) == {"a", "k", "y"}
    feed = {"x": normal(1, 3, 8, 8, seed=3), "z": normal(1, 3, 8, 8, seed=4, scale=5.0)}
    assert sqnr_db(source, model, feed) > 30
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    # Each input has the range of its own data.
    assert stored["z_scale"] == pytest.approx(5 * stored["x_scale"], rel=0.2)


# --- scope ---------------------------------------------------------------------------------


def test_excluded_layers_stay_float(tmp_path: Path) -> None:
    source = residual()
    report, model = quantized(tmp_path / "a", source, PICTURES, exclude=["c", "Gemm"])
    assert reason(report, "c") == reason(report, "h") == "excluded by the recipe"
    assert set(LAYERS) - set(placed(report, "int8")) == {"c", "h"}
    # Add reads a float tensor now, so it stays float, too.
    assert "s" not in placed(report, "int8")
    stored = {t.name for t in model.graph.initializer}
    assert {"w2", "w5"} <= stored and not {"w2_quantized", "w5_quantized"} & stored
    everything, _ = quantized(tmp_path / "b", source, PICTURES)
    assert set(LAYERS) <= set(placed(everything, "int8"))


def test_patterns_choose_layers(tmp_path: Path) -> None:
    report, model = quantized(tmp_path, residual(), PICTURES, scope=["[ab]", "MatMul"])
    assert {n for n in placed(report, "int8") if n in LAYERS} == {"a", "b", "y"}
    assert reason(report, "c") == reason(report, "h") == "outside the recipe's scope"
    assert report["scope"] == ("[ab]", "MatMul")
    quantized_weights = {t.name for t in model.graph.initializer if t.data_type == TensorProto.INT8}
    assert {n for n in quantized_weights if n.endswith("_quantized")} == {
        "w0_quantized",
        "w1_quantized",
        "w6_quantized",
    }


def test_full_scope_takes_what_rules_leave_float(tmp_path: Path) -> None:
    source = net(
        """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
            a = Conv(x, w, b)  m = Mul(a, half)  y = Conv(m, v)
        }""",
        w=normal(4, 3, 1, 1),
        b=normal(4),
        v=normal(4, 4, 1, 1, seed=2),
        half=np.float32(0.5),
    )
    data = {"x": normal(8, 3, 8, 8)}
    full, _ = quantized(tmp_path / "full", source, data)
    assert placed(full, "int8") == ["a", "m", "y"]
    some, _ = quantized(tmp_path / "some", source, data, scope=["*"])
    assert placed(some, "int8") == ["a", "y"]
    assert reason(some, "m")


STAYS: dict[str, tuple[str, dict[str, object], str]] = {
    "scope off": ("CONV", {"scope": "off"}, "scope = 'off'"),
    "pattern of nothing": ("CONV", {"scope": ["nothing"]}, "no layer"),
    "everything excluded": ("CONV", {"exclude": ["*"]}, "no layer"),
    "no layers": ("g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }", {}, "no layer"),
    "weights computed": (
        "g (float[1,3] x) => (float[1,1] y) { y = Gemm<transB=1>(x, x) }",
        {},
        "no layer",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_models_that_stay_float_say_why(tmp_path: Path, name: str) -> None:
    text, settings, why = STAYS[name]
    if text == "CONV":
        source = net(
            "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { y = Conv(x, w) }", w=normal(4, 3, 3, 3)
        )
        data = {"x": normal(4, 3, 8, 8)}
    else:
        source, data = net(text), {"x": normal(4, 1, 3)}
    report, _ = quantized(tmp_path, source, data, **settings)
    assert report["stayed_float"] is True
    assert why in report["reason"]
    assert report["audit"] is None
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (tmp_path / "source.onnx").read_bytes()
    assert all(row["runs_as"] == "float" and row["reason"] for row in report["placement"])
    assert report["reason"] in report["notes"][0]["text"]


def test_a_target_without_int8_keeps_the_model(tmp_path: Path) -> None:
    report, model = quantized(tmp_path, residual(), PICTURES, here(style="none"))
    assert report["stayed_float"] and "no int8 kernels" in report["reason"]
    assert model == residual()


def test_int8_that_does_not_pay_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing may be dropped region by region here: this is about the model as a whole.
    monkeypatch.setattr(pricing, "LEAST_SHARE", 9.0)
    for ratio, stays in ((1.2, True), (0.5, False)):
        monkeypatch.setattr(quantize, "cpu_ratio", lambda *_, ratio=ratio: ratio)
        report, model = quantized(tmp_path / str(ratio), residual(), PICTURES, scope="auto")
        assert report["stayed_float"] is stays
        assert {"step": "pay", "cpu_ratio": ratio} in report["choices"]
        if stays:
            assert "1.20 of the float model's time" in report["reason"]
            assert model == residual()


def wasteful() -> tuple[onnx.ModelProto, Data]:
    """Layers that gain by int8 behind one that loses by a factor of two.

    Float convolutions of few channels have kernels of their own, which do HardSwish, too.
    """
    source = net(
        """g (float[1,3,96,96] x) => (float[1,32,24,24] y) {
            a = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (x, stem)
            b = HardSwish(a)
            d = Conv <kernel_shape=[3,3], pads=[1,1,1,1], strides=[4,4]> (b, w1)
            e = Relu(d)
            f = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (e, w2)
            g1 = Relu(f)
            y = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (g1, w3)
        }""",
        stem=normal(16, 3, 3, 3),
        w1=normal(128, 16, 3, 3, seed=2, scale=0.1),
        w2=normal(128, 128, 3, 3, seed=3, scale=0.03),
        w3=normal(32, 128, 3, 3, seed=4, scale=0.03),
    )
    return source, {"x": normal(6, 3, 96, 96, seed=5)}


def test_a_region_that_loses_on_this_machine_goes_back_to_float(tmp_path: Path) -> None:
    source, data = wasteful()
    report, _ = quantized(tmp_path, source, data, on("cpu"), scope="auto", corrections=False)
    prices = report["prices"]
    assert prices["clock"] and prices["sessions"] == 2 and prices["margin"] == 1.15
    (dropped,) = [r for r in prices["regions"] if r["decision"].startswith("float")]
    assert dropped["nodes"] == ["a"]
    assert dropped["int8_us"] > 1.15 * (dropped["float_us"] + dropped["border_us"])
    assert prices["cpu_ratio"] < 0.985
    assert reason(report, "a").startswith("measured: ")
    assert {"d", "f", "y"} <= set(placed(report, "int8"))
    # What is priced is the whole: each int8 layer is in one region.
    regions = [n for r in prices["regions"] for n in r["nodes"]]
    assert sorted(regions) == sorted({*placed(report, "int8"), "a"})
    assert all(r["int8_us"] > 0 and r["float_us"] > 0 for r in prices["regions"])


def test_without_a_clock_rules_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_clock(*_: object) -> None:
        raise AssertionError("a clock was asked")

    for module, name in ((quantize, "cpu_ratio"), (pricing, "cpu_ratio"), (pricing, "profile")):
        monkeypatch.setattr(module, name, no_clock)
    source, data = wasteful()
    more = {"scope": "auto", "measure": False, "corrections": False}
    report, _ = quantized(tmp_path, source, data, **more)
    assert "a" in placed(report, "int8")
    assert report["prices"] == {
        "clock": False,
        "reason": "the recipe says measure = false: rules alone decide",
        "regions": [],
    }


# --- corrections ---------------------------------------------------------------------------


def shifting() -> tuple[onnx.ModelProto, Data]:
    """A layer whose int8 weights lose a constant: 63 weights of 0.4 steps, inputs around 1."""
    rng = np.random.default_rng(50)
    weight = np.full((64, 8), 0.004, np.float32)
    weight[0] = 1.27
    source = net("g (float[1,64] x) => (float[1,8] y) { y = Gemm(x, w, b) }", w=weight, b=normal(8))
    inputs = rng.normal(1, 0.1, (40, 1, 64)).astype(np.float32)
    inputs[:, :, 0] = rng.normal(0, 1, (40, 1))
    return source, {"x": inputs}


def mean_shift(source: onnx.ModelProto, model: onnx.ModelProto, data: Data) -> float:
    shifts = [
        outputs(model, {"x": x})[0].astype(float) - outputs(source, {"x": x})[0] for x in data["x"]
    ]
    return float(np.abs(np.mean(shifts, axis=0)).max())


def test_bias_correction_takes_the_mean_shift_back(tmp_path: Path) -> None:
    source, data = shifting()
    plain_report, plain = quantized(tmp_path / "a", source, data, here(), corrections=False)
    report, model = quantized(tmp_path / "b", source, data, here())
    if here().int8.saturates:
        pytest.skip("with half the steps other weights are lost")
    # 63 * 0.004 * 1 = 0.252 is lost; what stays is the noise of 40 samples' rounding.
    assert mean_shift(source, plain, data) == pytest.approx(0.252, abs=0.02)
    assert mean_shift(source, model, data) < 0.01
    assert report["sqnr_db"] > plain_report["sqnr_db"] + 6
    assert plain_report["choices"] == []
    tried = [c for c in report["choices"] if c["step"] == "correction"]
    assert tried[0]["correction"] == "bias correction" and tried[0]["kept"]
    assert tried[0]["sqnr_db_after"] > tried[0]["sqnr_db_before"] + 6


def test_corrections_are_only_kept_where_they_help(tmp_path: Path) -> None:
    report, _ = quantized(tmp_path, residual(), PICTURES)
    best = None
    for choice in report["choices"]:
        assert choice["kept"] == (
            choice["sqnr_db_after"] > choice["sqnr_db_before"] + 0.09  # rounded to 0.01
        )
        best = choice["sqnr_db_after"] if choice["kept"] else best
    if best is not None:
        assert report["sqnr_db"] == pytest.approx(best, abs=0.02)


def test_biases_are_corrected_one_after_the_other(tmp_path: Path) -> None:
    # Two such layers: the second's shift is measured with the first already corrected, so
    # both come out right; corrected at once, the second would pay for the first again.
    rng = np.random.default_rng(51)
    first = np.full((64, 64), 0.004, np.float32)
    first[0] = 1.27
    second = np.full((64, 4), 0.004, np.float32)
    second[0] = 1.27
    source = net(
        "g (float[1,64] x) => (float[1,4] y) { a = Gemm(x, v, c) y = Gemm(a, w, b) }",
        v=first,
        c=np.ones(64, np.float32),
        w=second,
        b=normal(4),
    )
    inputs = rng.normal(1, 0.1, (40, 1, 64)).astype(np.float32)
    inputs[:, :, 0] = rng.normal(0, 0.3, (40, 1))
    data = {"x": inputs}
    _, plain = quantized(tmp_path / "a", source, data, corrections=False)
    _, model = quantized(tmp_path / "b", source, data)
    assert mean_shift(source, plain, data) > 0.3
    assert mean_shift(source, model, data) < 0.03


def test_equalization_lets_small_channels_use_the_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Channels of 1 to 1/100 before a depthwise layer that makes them equal again.
    sizes = np.geomspace(1, 0.01, 8).astype(np.float32).reshape(8, 1, 1, 1)
    source = net(
        """g (float[1,4,8,8] x) => (float[1,8,6,6] y) {
            a = Conv(x, w, b)  r = Relu(a)  y = Conv<group=8>(r, v)
        }""",
        w=normal(8, 4, 1, 1) * sizes,
        b=normal(8, seed=2) * sizes.reshape(8),
        v=normal(8, 1, 3, 3, seed=3) / sizes,
    )
    data = {"x": normal(16, 4, 8, 8, seed=4)}
    report, _ = quantized(tmp_path / "a", source, data)
    choice = report["choices"][0]
    assert choice["step"] == "equalization" and choice["kept"] and choice["pairs"] == 1
    monkeypatch.setattr(quantize, "equalize", lambda *_: 0)
    other, _ = quantized(tmp_path / "b", source, data)
    assert report["sqnr_db"] > other["sqnr_db"] + 6


def loud() -> tuple[onnx.ModelProto, Data]:
    """A pre-norm block with two channels 60 times louder than the others, which are small in
    the weights: int8 steps made for them swallow the others."""
    gain, weight = np.ones(32, np.float32), normal(32, 16, scale=0.2)
    gain[[3, 17]] = 60
    weight[[3, 17]] /= 60
    source = net(
        """g (float[1,4,32] x) => (float[1,4,32] y) {
            n = LayerNormalization<axis=-1>(x, g, b)  k = MatMul(n, w)  kb = Add(k, c)
            r = Sigmoid(kb)  e = MatMul(r, v)  y = Add(x, e)
        }""",
        g=gain,
        b=normal(32, seed=2, scale=0.1),
        w=weight,
        c=normal(16, seed=3),
        v=normal(16, 32, seed=4),
    )
    return source, {"x": normal(24, 4, 32, seed=5)}


def test_smoothing_gives_quiet_channels_their_codes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = loud()
    feed = {"x": normal(1, 4, 32, seed=6)}
    report, model = quantized(tmp_path / "a", source, data)
    (choice,) = [c for c in report["choices"] if c["step"] == "smoothing"]
    assert choice["kept"] and choice["folded"] == 1
    assert choice["sqnr_db_after"] > choice["sqnr_db_before"] + 6
    assert "Sigmoid 'r' before it" in choice["not_folded"]["r"]
    assert len(model.graph.node) == len(source.graph.node) + 2 * 2 + 2  # pairs, and weights
    assert report["audit"]["unfused"] == 0
    with_it = sqnr_db(source, model, feed)
    monkeypatch.setattr(refine, "find_folds", lambda *_: ([], {}))
    _, model = quantized(tmp_path / "b", source, data)
    assert with_it > sqnr_db(source, model, feed) + 6


def test_clipping_drops_loud_weights_of_silent_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Input 5 is always almost zero; its weights are 20 times the others'. No exact smoothing
    # can take that: the input comes from outside. All scales would be made for it.
    weight = normal(32, 12, scale=0.2)
    weight[5] *= 20
    inputs = normal(32, 1, 32, seed=2)
    inputs[:, :, 5] *= 1e-4
    source = net("g (float[1,32] x) => (float[1,12] y) { y = MatMul(x, w) }", w=weight)
    report, _ = quantized(tmp_path / "a", source, {"x": inputs})
    (choice,) = [c for c in report["choices"] if c.get("correction") == "weight clipping"]
    assert choice["kept"] and choice["sqnr_db_after"] > choice["sqnr_db_before"] + 3
    monkeypatch.setattr(build, "TRIED", tuple(n for n in build.TRIED if n != "weight clipping"))
    other, _ = quantized(tmp_path / "b", source, {"x": inputs})
    assert report["sqnr_db"] > other["sqnr_db"] + 3


def test_rounding_by_output_error_suits_inputs_that_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inputs that move together: an error on one can be undone on the next.
    mixing = normal(6, 48, seed=4)
    inputs = (normal(64, 1, 6, seed=5) @ mixing).astype(np.float32)
    weight = normal(48, 16, seed=6)
    weight[0] *= 30  # coarse steps: rounding is most of the error
    source = net(
        "g (float[1,48] x) => (float[1,16] y) { y = Gemm(x, w, b) }", w=weight, b=normal(16)
    )
    monkeypatch.setattr(build, "TRIED", tuple(n for n in build.TRIED if n != "weight clipping"))
    report, _ = quantized(tmp_path / "a", source, {"x": inputs})
    (choice,) = [c for c in report["choices"] if c.get("correction", "").startswith("rounding")]
    assert choice["kept"] and choice["sqnr_db_after"] > choice["sqnr_db_before"] + 1
    monkeypatch.setattr(build, "TRIED", ("bias correction",))
    other, _ = quantized(tmp_path / "b", source, {"x": inputs})
    assert report["sqnr_db"] > other["sqnr_db"] + 1


# --- how the int8 model is judged ----------------------------------------------------------


def test_an_activation_folded_before_the_end_is_judged_as_one(tmp_path: Path) -> None:
    # Behind Q/DQ the ReLU is gone from the file: its tensor holds the layer's raw output.
    source = net(
        """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
            a = Conv(x, w, b)  r = Relu(a)  y = Sigmoid(r)
        }""",
        w=normal(4, 3, 1, 1),
        b=normal(4),
    )
    report, model = quantized(tmp_path, source, {"x": normal(16, 3, 8, 8)})
    assert fidelity.judged_tensors(source) == ["r"]
    assert "r" in placed(report, "int8")
    assert report["sqnr_db"] > 30
    feed = {"x": normal(1, 3, 8, 8, seed=4)}
    (seen,) = fidelity.values_of(model, ["r"], [feed])[0]
    logits = np.log(outputs(model, feed)[0] / (1 - outputs(model, feed)[0]))
    np.testing.assert_allclose(seen, logits, atol=1e-3)  # of float32 near 1


def test_outputs_that_no_layer_makes_are_compared_as_they_are(tmp_path: Path) -> None:
    source = net(
        """g (float[1,3,8,8] x) => (float[1,4,8,8] y, float[1,3,8,8] z, float[1,3,8,8] i) {
            y = Conv(x, w)  z = Sigmoid(x)  i = Identity(x)
        }""",
        w=normal(4, 3, 1, 1),
    )
    report, model = quantized(tmp_path, source, {"x": normal(8, 3, 8, 8)})
    assert fidelity.judged_tensors(source) == ["y", "z", "i"]
    feed = {"x": normal(1, 3, 8, 8, seed=4)}
    seen = fidelity.values_of(model, ["x", "i", "z"], [feed])[0]
    for value, wanted in zip(seen[:2], (feed["x"], feed["x"]), strict=True):
        np.testing.assert_array_equal(value, wanted)
    np.testing.assert_array_equal(seen[2], outputs(source, feed)[1])
    assert report["sqnr_db"] > 60  # 38 dB, and twice the cap of 100 for what is equal


def test_sqnr_by_hand() -> None:
    reference = [[np.array([3.0, 4.0])], [np.array([1.0, 0.0])]]
    values = [[np.array([3.0, 4.5])], [np.array([0.9, 0.0])]]
    # 25 / 0.25 = 20 dB, 1 / 0.01 = 20 dB
    assert fidelity.sqnr_db(reference, values) == pytest.approx(20.0)
    assert fidelity.sqnr_db(reference, reference) == 100.0
    nothing = [[np.full(2, np.nan)], [np.array([1.0, 0.0])]]
    assert fidelity.sqnr_db(reference, nothing) == 0.0  # -100 and 100
    assert fidelity.sqnr_db([[np.zeros(2)]], [[np.ones(2)]]) == -100.0


# --- the metric ----------------------------------------------------------------------------

SCORE = """
import numpy as np

def score(run, data):
    hits = [run({"x": x})[0].argmax() == y for x, y in zip(data["x"], data["y"])]
    return float(np.mean(hits))
"""


def at_fault() -> onnx.ModelProto:
    """Three layers; the second reads 1000 + a small signal, which int8 steps of 4 swallow."""
    offset = np.full(16, 1000, np.float32)
    middle = normal(16, 16, seed=61, scale=0.3)
    return net(
        """g (float[1,8] x) => (float[1,6] y) {
            a = MatMul(x, w0)  ab = Add(a, b0)
            k = MatMul(ab, w1)  kb = Add(k, b1)  r = Relu(kb)
            y = MatMul(r, w2)
        }""",
        w0=normal(8, 16, seed=60, scale=0.3),
        b0=offset,
        w1=middle,
        b1=-(offset.astype(np.float64) @ middle).astype(np.float32),
        w2=normal(16, 6, seed=62),
    )


def graded(folder: Path, source: onnx.ModelProto, score: str = SCORE) -> dict[str, Any]:
    """Recipe tables with a metric: agreement with the float model's own answers."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = normal(200, 1, 8, seed=70)
    scores = np.array([outputs(source, {"x": x})[0][0] for x in inputs])
    ranked = np.sort(scores, axis=1)
    sure = np.argsort(ranked[:, -2] - ranked[:, -1])[:60]
    np.savez(folder / "evaluation.npz", x=inputs[sure], y=scores[sure].argmax(1))
    (folder / "score.py").write_text(score)
    return {
        "data": {"evaluation": "evaluation.npz", "metric": "score.py:score"},
        "gate": {"min_retained": 0.96},
    }


def test_a_layer_at_fault_goes_back_to_float(tmp_path: Path) -> None:
    source = at_fault()
    recipe = graded(tmp_path, source)
    data = {"x": normal(24, 1, 8, seed=71)}
    report, model = quantized(tmp_path, source, data, recipe=recipe, scope="auto", measure=False)
    asked = [c for c in report["choices"] if c["step"] in ("metric", "rollback")]
    assert asked[0]["regions_in_float"] == 0 and asked[0]["retained"] < 0.9
    assert asked[0]["wanted"] == pytest.approx(0.98)
    assert asked[1]["regions_in_float"] == 1 and asked[1]["retained"] >= 0.98
    assert reason(report, "k").startswith("rolled back")
    assert "y" in placed(report, "int8")
    stored = {t.name for t in model.graph.initializer}
    assert "w1" in stored and "w1_quantized" not in stored
    # Nobody asked the metric: everything stays int8.
    full, _ = quantized(tmp_path / "full", source, data, scope="full")
    assert placed(full, "int8") == ["a", "k", "y"]


def test_no_placement_keeps_a_metric_that_wants_the_same_bits(tmp_path: Path) -> None:
    source = at_fault()
    feed = normal(1, 8, seed=72)
    exact = outputs(source, {"x": feed})[0]
    score = f"""
import numpy as np

def score(run, data):
    got = run({{"x": np.array({feed.tolist()}, np.float32)}})[0]
    return float(np.abs(got - np.array({exact.tolist()})).max() < 1e-6)
"""
    recipe = graded(tmp_path, source, score)
    report, model = quantized(
        tmp_path,
        source,
        {"x": normal(24, 1, 8, seed=71)},
        recipe=recipe,
        scope="auto",
        measure=False,
    )
    assert report["stayed_float"] and "no int8 placement keeps the metric" in report["reason"]
    assert model == source
    counts = [c["regions_in_float"] for c in report["choices"] if c["step"] == "rollback"]
    assert counts and max(counts) == 2  # of three regions, one is left int8 at the most


# --- the same bytes, and nothing on failure ------------------------------------------------

AGAIN = """
import sys
from pathlib import Path
from edgewright import quantize
from edgewright.recipe import parse_recipe
from edgewright.stage import Job
from edgewright.target import parse_target
import json
given = json.loads(sys.argv[1])
folder = Path(given["folder"])
out = folder / sys.argv[2]
out.mkdir()
report = quantize.run(Job(recipe=parse_recipe(given["recipe"], folder),
    target=parse_target(given["target"]), folder=out, model=folder / "source.onnx"))
print(json.dumps(report))
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    work = job(tmp_path, residual(), PICTURES)
    given = json.dumps(
        {"folder": str(tmp_path), "recipe": work.recipe.raw, "target": work.target.raw}
    )
    answers = []
    for seed in ("1", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", AGAIN, given, seed],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        data = (tmp_path / seed / "model.onnx").read_bytes()
        answers.append((hashlib.sha256(data).hexdigest(), done.stdout))
    assert answers[0] == answers[1]


def overflow() -> onnx.ModelProto:
    return net("g (float[1,4] x) => (float[1,3] y) { e = Exp(x) y = MatMul(e, w) }", w=normal(4, 3))


def test_nothing_is_written_where_calibration_overflows(tmp_path: Path) -> None:
    inputs = normal(6, 1, 4)
    inputs[4] = 100.0
    work = job(tmp_path, overflow(), {"x": inputs})
    with pytest.raises(BadInput, match="sample 4 makes tensor 'e' of the model Inf"):
        quantize.run(work)
    assert list(work.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("score", "said"),
    [
        ("def score(run, data):\n    return float('nan')\n", "finite"),
        ("def score(run, data):\n    raise KeyError('labels')\n", "KeyError"),
    ],
)
def test_nothing_is_written_where_the_metric_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: str, said: str
) -> None:
    monkeypatch.setattr(quantize, "cpu_ratio", lambda *_: 0.5)
    source = at_fault()
    recipe = graded(tmp_path, source, score)
    work = job(
        tmp_path,
        source,
        {"x": normal(8, 1, 8)},
        recipe=recipe,
        scope="auto",
        measure=False,
        corrections=False,
    )
    with pytest.raises(EdgewrightError, match=said):
        quantize.run(work)
    assert list(work.folder.iterdir()) == []


def test_the_source_stays_as_it_is(tmp_path: Path) -> None:
    work = job(tmp_path, residual(), PICTURES)
    assert work.model is not None
    before = work.model.read_bytes()
    quantize.run(work)
    assert work.model.read_bytes() == before


# --- the example ---------------------------------------------------------------------------


def test_the_digits_through_the_real_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from edgewright import export, simplify

    target = on("cpu")
    monkeypatch.setattr(quantize, "cpu_ratio", lambda *_: 0.5)
    recipe = load_recipe(ROOT / "examples" / "digits" / "recipe.toml")
    model: Path | None = None
    models: dict[str, Path] = {}
    for name, stage in (("export", export), ("simplify", simplify), ("quantize", quantize)):
        folder = tmp_path / name
        folder.mkdir()
        work = Job(recipe=recipe, target=target, folder=folder, model=model, models=models)
        report = stage.run(work)
        model = work.output_model()
        models = {**models, name: model}
    assert report["audit"]["unfused"] == 0 and report["audit"]["float_layers"] == {}
    assert report["audit"]["int8_kernels"]["QLinearConv"] == 15
    (asked,) = [c for c in report["choices"] if c["step"] == "metric"]
    assert asked["retained"] >= 0.995
    assert report["sqnr_db"] > 30
    assert models["quantize"].stat().st_size < 0.35 * models["simplify"].stat().st_size


# --- what must not become int8, and files that lack what simplify gives them ---------------


def test_a_clip_away_from_zero_is_not_folded(tmp_path: Path) -> None:
    # A range holds zero always, so it cuts at 3 but lets what is below 1 through.
    source = net(
        """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
            a = Conv(x, w)  c = Clip(a, one, three)  y = Conv(c, v)
        }""",
        w=normal(4, 3, 1, 1),
        v=normal(4, 4, 1, 1, seed=2),
        one=np.float32(1),
        three=np.float32(3),
    )
    report, model = quantized(tmp_path, source, {"x": normal(16, 3, 8, 8)}, corrections=False)
    assert reason(report, "c")
    assert sqnr_db(source, model, {"x": normal(1, 3, 8, 8, seed=4)}) > 30


def test_an_output_keeps_its_negative_values_beside_its_relu(tmp_path: Path) -> None:
    source = net(
        """g (float[1,3,8,8] x) => (float[1,4,8,8] a, float[1,4,8,8] y) {
            a = Conv(x, w)  y = Relu(a)
        }""",
        w=normal(4, 3, 1, 1),
    )
    _, model = quantized(tmp_path, source, {"x": normal(16, 3, 8, 8)})
    assert sqnr_db(source, model, {"x": normal(1, 3, 8, 8, seed=4)}) > 30


@pytest.mark.parametrize("wide", [8, 6])
def test_a_matrix_and_its_transpose_share_one_scale(tmp_path: Path, wide: int) -> None:
    source = net(
        """g (float[1,8] x) => (float[1,8] y) {
            a = Gemm(x, w, c)  r = Relu(a)  y = Gemm<transB=1>(r, w, b)
        }""",
        w=normal(8, wide),
        b=normal(8, seed=2),
        c=normal(wide, seed=3),
    )
    data = normal(16, 1, 8, seed=4)
    report, model = quantized(tmp_path, source, {"x": data})
    assert {"a", "y"} <= set(placed(report, "int8"))
    assert np.mean([sqnr_db(source, model, {"x": x}) for x in data]) > 25


def test_one_scale_for_all_groups(tmp_path: Path) -> None:
    source = net(
        "g (float[1,4,8,8] x) => (float[1,4,6,6] y) { y = Conv<group=4>(x, w, b) }",
        w=normal(4, 1, 3, 3),
        b=normal(4),
    )
    data = {"x": normal(16, 4, 8, 8)}
    report, model = quantized(tmp_path, source, data, here(per_channel=False))
    assert placed(report, "int8") == ["y"]
    assert sqnr_db(source, model, {"x": normal(1, 4, 8, 8, seed=4)}) > 30


@pytest.mark.parametrize("saturates", [True, False])
def test_rounding_by_output_is_told_which_weights_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saturates: bool
) -> None:
    # What happens without is in test_saturation.
    asked = []

    def watched(*args: Any, **named: Any) -> np.ndarray:
        asked.append(named["pairs"].tolist())
        return rounding.round_by_output(*args, **named)

    monkeypatch.setattr("edgewright.quantize.build.rounding", SimpleNamespace(**vars(rounding)))
    monkeypatch.setattr("edgewright.quantize.build.rounding.round_by_output", watched)
    source = net(
        "g (float[1,3,8,8] x) => (float[1,4,7,7] y) { y = Conv(x, w, b) }",
        w=normal(4, 3, 2, 2),
        b=normal(4),
    )
    quantized(tmp_path, source, {"x": normal(16, 3, 8, 8)}, here(saturates=saturates))
    expected = [[0, 4], [8, 1], [5, 9], [2, 6], [10, 3], [7, 11]] if saturates else []
    assert asked == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "g (float[1,8] x) => (float[1,8] y) { a = MatMul(x, w) y = Gemm(x, w, a) }",
        "g (float[1,8] x) => (float[1,8] y) { a = MatMul(x, w) y = Gemm(a, w, one) }",
    ],
)
def test_gemm_with_another_addend_stays_float(tmp_path: Path, text: str) -> None:
    source = net(text, w=normal(8, 8), one=np.ones(1, np.float32))
    report, _ = quantized(tmp_path, source, {"x": normal(16, 1, 8)})
    assert "bias" in reason(report, "y")
    assert placed(report, "int8") == ["a"]
    assert report["audit"]["unfused"] == 0


def test_conv_with_a_computed_bias_stays_float(tmp_path: Path) -> None:
    source = net(
        """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
            m = ReduceMean<axes=[0,2,3], keepdims=0>(x)  b = MatMul(m, v)  y = Conv(x, w, b)
        }""",
        w=normal(4, 3, 1, 1),
        v=normal(3, 4),
    )
    report, _ = quantized(tmp_path, source, {"x": normal(16, 3, 8, 8)})
    assert "bias" in reason(report, "y")
    assert report["audit"]["unfused"] == 0


def test_older_opsets_are_refused_with_a_remedy(tmp_path: Path) -> None:
    source = net(
        "g (float[1,3,8,8] x) => (float[1,4,8,8] y) { y = Conv(x, w) }",
        opset=12,
        w=normal(4, 3, 1, 1),
    )
    work = job(tmp_path, source, {"x": normal(4, 3, 8, 8)})
    with pytest.raises(BadInput, match=r"opset.*13.*12.*edgewright simplify"):
        quantize.run(work)
    assert list(work.folder.iterdir()) == []


@pytest.mark.parametrize("name", ["", "n"])
def test_nodes_without_names_of_their_own(tmp_path: Path, name: str) -> None:
    source = net(
        """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
            a = Conv(x, w)  r = Relu(a)  s = Softmax<axis=1>(r)  y = Conv(s, v)
        }""",
        w=normal(4, 3, 1, 1),
        v=normal(4, 4, 1, 1),
    )
    given = copy.deepcopy(source)
    for node in given.graph.node:
        node.name = name
    report, model = quantized(tmp_path, given, {"x": normal(8, 3, 8, 8)})
    assert [r["op"] for r in report["placement"] if r["runs_as"] == "int8"] == [
        "Conv",
        "Relu",
        "Conv",
    ]
    assert sqnr_db(source, model, {"x": normal(1, 3, 8, 8, seed=4)}) > 28


def test_a_file_without_inner_types(tmp_path: Path) -> None:
    source = residual()
    del source.graph.value_info[:]
    report, _ = quantized(tmp_path, source, PICTURES)
    assert set(LAYERS) <= set(placed(report, "int8"))


def test_a_target_that_cannot_run_here_leaves_nothing(tmp_path: Path) -> None:
    raw = copy.deepcopy(here().raw)
    raw["device"]["isa"] = ["no_such_instructions"]
    work = job(tmp_path, residual(), PICTURES, parse_target(raw))
    with pytest.raises(EnvironmentMissing, match="no_such_instructions"):
        quantize.run(work)
    assert list(work.folder.iterdir()) == []


def test_a_correction_that_fails_leaves_the_model_uncorrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise BadInput("this piece does not run alone")

    monkeypatch.setattr(correct, "run_piece", fail)
    report, _ = quantized(tmp_path, residual(), PICTURES)
    assert not report["stayed_float"]
    (choice,) = [c for c in report["choices"] if c.get("correction") == "bias correction"]
    assert not choice["kept"] and "does not run alone" in choice["reason"]


def lstm_net() -> onnx.ModelProto:
    hidden, width = 16, 8
    return net(
        """g (float[6,1,8] x) => (float[6,1,1,16] y) { y = LSTM<hidden_size=16>(x, w, r, b) }""",
        w=normal(1, 4 * hidden, width) * np.float32(0.3),
        r=normal(1, 4 * hidden, hidden, seed=2) * np.float32(0.3),
        b=normal(1, 8 * hidden, seed=3) * np.float32(0.1),
    )


def test_an_lstm_becomes_dynamic_int8_where_outputs_stay_near(tmp_path: Path) -> None:
    # 8-bit weights and activations leave about 1 % noise: 30 dB or more; 25 dB is asked for.
    data = normal(16, 6, 1, 8, seed=5)
    here_target = here()
    source = lstm_net()
    work = job(tmp_path, source, {"x": data}, here_target)
    report = quantize.run(work)
    tried = [c for c in report["choices"] if c["step"] == "dynamic int8 LSTM"]
    assert len(tried) == 1
    assert tried[0]["sqnr_db"] > 25
    assert tried[0]["kept"]
    if not report["stayed_float"]:  # so small a net may not pay on this machine
        ops = [n.op_type for n in onnx.load(work.output_model()).graph.node]
        assert "DynamicQuantizeLSTM" in ops
        assert "LSTM" not in ops


def test_an_lstm_stays_float_where_its_int8_form_is_far_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "NEAR_DB", 99.0)
    report = quantize.run(job(tmp_path, lstm_net(), {"x": normal(16, 6, 1, 8, seed=5)}))
    assert report["stayed_float"]
    assert not next(c for c in report["choices"] if c["step"] == "dynamic int8 LSTM")["kept"]


def test_what_stays_float_gets_its_activations_in_one_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here()
    monkeypatch.setattr(quantize, "MUST_PAY", 99.0)  # whatever a clock says
    source = net(
        """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
            a = Conv(x, w)  b = Add(a, three)  c = Clip(b, zero, six)  d = Mul(a, c)
            e = Div(d, six)  y = Conv(e, v)
        }""",
        w=normal(4, 3, 1, 1),
        v=normal(4, 4, 1, 1, seed=2),
        three=np.float32(3),
        zero=np.float32(0),
        six=np.float32(6),
    )
    work = job(tmp_path, source, {"x": normal(8, 3, 8, 8)}, scope="auto")
    report = quantize.stay_float(work, "a trial")
    result = onnx.load(work.output_model())
    assert [n.op_type for n in result.graph.node] == ["Conv", "HardSwish", "Conv"]
    assert report["choices"][-1]["step"].startswith("HardSwish")
    # The same function: only the order of float32 operations differs.
    assert sqnr_db(source, result, {"x": normal(1, 3, 8, 8, seed=4)}) > 100
