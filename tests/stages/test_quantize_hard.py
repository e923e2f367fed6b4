"""The stage quantize on input that breaks quantizers: right, or refused with the name of it.

Where a result is compared with the float model, the floor is 30 dB: eight bits of a Gaussian
that fills its range are worth 38 dB or more, and a layer or two cost a few dB of it.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_quantize import here, job, net, normal, outputs, placed, quantized, reason, sqnr_db

from edgewright import quantize
from edgewright.errors import BadInput
from edgewright.quantize import calibrate

FLOOR_DB = 30.0


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


# --- numerics by hand ----------------------------------------------------------------------
#
# The int8 model against integers computed here from its own codes: sum of (x - zx) * w in
# int64, plus the bias code, times x_scale * w_scale. float32 holds such sums exactly (below
# 2**24), so one rounding is left for each scaling: a few units in the last place.


def codes_of(model: onnx.ModelProto, feed: np.ndarray, name: str) -> tuple[np.ndarray, float, int]:
    """Codes of an activation by the ONNX rule: round half to even, shift, saturate."""
    tensors = stored(model)
    (node,) = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == name]
    scale, zero = np.float32(tensors[node.input[1]]), int(tensors[node.input[2]])
    info = np.iinfo(tensors[node.input[2]].dtype)
    codes = np.clip(np.rint(feed / scale).astype(np.int64) + zero, info.min, info.max)
    return codes - zero, float(scale), zero


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_products_by_hand(tmp_path: Path, op: str) -> None:
    body = "y = MatMul(x, w)" if op == "MatMul" else "y = Gemm<transB=1>(x, w, b)"
    weight = normal(6, 10, seed=2)
    more = {"b": normal(6, seed=3)} if op == "Gemm" else {}
    source = net(
        f"g (float[N,10] x) => (float[N,6] y) {{ {body} }}",
        w=weight if op == "Gemm" else weight.T.copy(),
        **more,
    )
    data = normal(16, 1, 10, seed=4)
    _, model = quantized(tmp_path, source, {"x": data}, corrections=False)
    feed = normal(5, 10, seed=5)
    tensors = stored(model)
    x, x_scale, _ = codes_of(model, feed, "x")
    w = tensors["w_quantized"].astype(np.int64)
    w = w.T if op == "Gemm" else w
    scales = x_scale * tensors["w_scale"].astype(np.float64)
    total = x @ w
    if op == "Gemm":
        total = total + tensors["b_quantized"].astype(np.int64)
        np.testing.assert_allclose(tensors["b_quantized"], np.rint(more["b"] / scales), atol=1)
    if not here().int8.saturates:  # The weights' codes are those of round half to even.
        peaks = (np.abs(weight).max(axis=1) / 127).astype(np.float32)
        np.testing.assert_array_equal(w.T, np.rint(weight / peaks[:, None]))
    np.testing.assert_allclose(
        outputs(model, {"x": feed})[0], total * scales, rtol=1e-6, atol=1e-6 * np.abs(total).max()
    )


def test_a_convolution_by_hand(tmp_path: Path) -> None:
    weight, bias = normal(4, 3, 3, 3, seed=2), normal(4, seed=3)
    source = net(
        """g (float[1,3,7,7] x) => (float[1,4,4,4] y) {
            y = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w, b)
        }""",
        w=weight,
        b=bias,
    )
    _, model = quantized(
        tmp_path, source, {"x": normal(16, 3, 7, 7, seed=4)}, corrections=False, ranges="minmax"
    )
    feed = normal(1, 3, 7, 7, seed=5)
    tensors = stored(model)
    x, x_scale, _ = codes_of(model, feed, "x")
    w = tensors["w_quantized"].astype(np.int64)
    scales = x_scale * tensors["w_scale"].astype(np.float64)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))  # zero is code 0 behind the zero point
    total = np.zeros((1, 4, 4, 4), np.int64)
    for row in range(4):
        for column in range(4):
            patch = padded[0, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            total[0, :, row, column] = (w * patch).sum(axis=(1, 2, 3))
    total += tensors["b_quantized"].astype(np.int64).reshape(1, 4, 1, 1)
    (head,) = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] != "x"]
    y_scale, y_zero = np.float32(tensors[head.input[1]]), int(tensors[head.input[2]])
    exact = total * (scales / float(y_scale)).reshape(1, 4, 1, 1)
    codes = np.clip(np.rint(exact) + y_zero, 0, 255)
    got = np.rint(outputs(model, {"x": feed})[0] / y_scale) + y_zero
    # The kernel scales in float32: where a product lies within 1e-4 of a half, either is right.
    clear = np.abs(exact - np.floor(exact) - 0.5) > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(got[clear], codes[clear])


# --- activations ---------------------------------------------------------------------------

TWO = "g (float[1,3,8,8] x) => (float[1,2,8,8] y) { a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }"


def two(**more: np.ndarray) -> onnx.ModelProto:
    weights = {"w": normal(4, 3, 1, 1), "b": normal(4, seed=2), "v": normal(2, 4, 1, 1, seed=3)}
    return net(TWO, **{**weights, **more})


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0, 1e-20])
def test_inputs_that_never_change(tmp_path: Path, value: float) -> None:
    source = two()
    feed = np.full((8, 3, 8, 8), value, np.float32)
    report, model = quantized(tmp_path, source, {"x": feed})
    assert not report["stayed_float"]
    wanted = outputs(source, {"x": feed[:1]})[0]
    got = outputs(model, {"x": feed[:1]})[0]
    assert np.isfinite(got).all()
    # Codes of the layers' ranges: a step is 1/255 of them.
    np.testing.assert_allclose(got, wanted, atol=3 * np.abs(wanted).max() / 255)


def test_layers_that_give_nothing_but_zero(tmp_path: Path) -> None:
    source = two(w=np.zeros((4, 3, 1, 1), np.float32), b=np.zeros(4, np.float32))
    report, model = quantized(tmp_path, source, {"x": normal(8, 3, 8, 8)})
    assert {"a", "y"} <= set(placed(report, "int8"))
    np.testing.assert_array_equal(outputs(model, {"x": normal(1, 3, 8, 8)})[0], 0.0)


@pytest.mark.parametrize("ranges", ["mse", "percentile", "minmax"])
def test_one_outlier_of_1e30_is_refused_by_name(tmp_path: Path, ranges: str) -> None:
    data = normal(16, 3, 8, 8, seed=4)
    data[5, 1, 2, 3] = 1e30
    work = job(tmp_path, two(), {"x": data}, ranges=ranges)
    with pytest.raises(BadInput, match=r"sample 5 is out of line in tensor 'x'.*found 1e\+30"):
        quantize.run(work)
    assert list(work.folder.iterdir()) == []


@pytest.mark.parametrize("ranges", ["mse", "percentile", "minmax", "moving-average", "entropy"])
def test_batches_and_processes_make_the_same_int8_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: str
) -> None:
    monkeypatch.setattr(calibrate, "HIRE_AFTER", 0)
    source = net(TWO.replace("[1,", "[batch,"), **stored(two()))
    data = normal(16, 3, 8, 8, seed=6)
    made = []
    for k, (feeds, processes) in enumerate(
        [(data, 1), (data.reshape(2, 8, 3, 8, 8), 1), (data, 3)]
    ):
        folder = tmp_path / str(k)
        folder.mkdir()
        settings = {"ranges": ranges, "corrections": False, "processes": processes}
        report, model = quantized(folder, source, {"x": feeds}, **settings)
        assert report["scheme"]["calibration_samples"] == 16
        made.append(model.SerializeToString(deterministic=True))
    assert made[0] == made[1] == made[2]
    # An average of extrema cuts those of every other sample.
    floor_db = 20.0 if ranges == "moving-average" else FLOOR_DB
    assert sqnr_db(source, model, {"x": data[:4]}) > floor_db


def test_quiet_and_loud_samples_are_no_outliers(tmp_path: Path) -> None:
    # Silence, and 16 bits of loudness: what a microphone gives.
    loud = np.geomspace(2.0**-15, 1, 16).astype(np.float32)
    loud[::4] = 0
    data = normal(16, 3, 8, 8, seed=4) * loud.reshape(16, 1, 1, 1)
    report, model = quantized(tmp_path, two(), {"x": data})
    assert not report["stayed_float"]
    assert sqnr_db(two(), model, {"x": data[-1:]}) > FLOOR_DB


def test_an_empty_sample_is_refused_by_name(tmp_path: Path) -> None:
    source = net("g (float[N,8] x) => (float[N,5] y) { y = MatMul(x, w) }", w=normal(8, 5))
    data = {f"x__{k:03}": normal(0 if k == 2 else 3, 8, seed=k) for k in range(8)}
    with pytest.raises(BadInput, match=r"sample 2, input 'x'.*empty"):
        quantize.run(job(tmp_path, source, data))


SLICED = """g (float[4,8] x, int64[1] n) => (float[4,5] y, float[K,5] z) {
    y = MatMul(x, w)  e = Slice(x, start, n, start)  z = MatMul(e, v)
}"""


def test_a_tensor_that_is_empty_now_and_then(tmp_path: Path) -> None:
    source = net(SLICED, w=normal(8, 5), v=normal(8, 5, seed=2), start=np.int64([0]))
    data = {"x": normal(32, 4, 8), "n": np.arange(32).reshape(32, 1) % 4}
    report, model = quantized(tmp_path, source, data)
    assert placed(report, "int8") == ["y", "z"]
    feed = {"x": data["x"][3], "n": np.int64([3])}
    assert sqnr_db(source, model, feed) > FLOOR_DB
    assert outputs(model, {**feed, "n": np.int64([0])})[1].shape == (0, 5)


def test_a_tensor_that_is_always_empty_stays_float(tmp_path: Path) -> None:
    source = net(SLICED, w=normal(8, 5), v=normal(8, 5, seed=2), start=np.int64([0]))
    data = {"x": normal(8, 4, 8), "n": np.zeros((8, 1), np.int64)}
    report, model = quantized(tmp_path, source, data)
    assert placed(report, "int8") == ["y"]
    assert reason(report, "z") == "its tensor 'e' is empty in every calibration sample"
    # With values, it is the float layer that it was.
    feed = {"x": normal(4, 8, seed=9), "n": np.int64([3])}
    np.testing.assert_array_equal(outputs(model, feed)[1], outputs(source, feed)[1])


def test_a_model_whose_only_layer_is_empty_stays_float(tmp_path: Path) -> None:
    source = net(
        """g (float[4,8] x, int64[1] n) => (float[K,5] z) {
            e = Slice(x, start, n, start)  z = MatMul(e, v)
        }""",
        v=normal(8, 5),
        start=np.int64([0]),
    )
    data = {"x": normal(8, 4, 8), "n": np.zeros((8, 1), np.int64)}
    report, _ = quantized(tmp_path, source, data)
    assert report["stayed_float"] and "empty in calibration" in report["reason"]


# --- weights and layers --------------------------------------------------------------------

LAYERS = {
    "grouped Conv": (
        "g (float[1,6,8,8] x) => (float[1,4,6,6] y) { y = Conv<group=2>(x, w, b) }",
        {"w": normal(4, 3, 3, 3), "b": normal(4)},
        (6, 8, 8),
    ),
    "depthwise Conv": (
        "g (float[1,6,8,8] x) => (float[1,6,6,6] y) { y = Conv<group=6>(x, w, b) }",
        {"w": normal(6, 1, 3, 3), "b": normal(6)},
        (6, 8, 8),
    ),
    "depthwise Conv with two filters each": (
        "g (float[1,3,8,8] x) => (float[1,6,6,6] y) { y = Conv<group=3>(x, w, b) }",
        {"w": normal(6, 1, 3, 3), "b": normal(6)},
        (3, 8, 8),
    ),
    "grouped 1-D Conv": (
        "g (float[1,6,20] x) => (float[1,4,18] y) { y = Conv<group=2>(x, w, b) }",
        {"w": normal(4, 3, 3), "b": normal(4)},
        (6, 20),
    ),
    "Conv with auto_pad": (
        """g (float[1,3,9,9] x) => (float[1,4,5,5] y) {
            y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w, b)
        }""",
        {"w": normal(4, 3, 3, 3), "b": normal(4)},
        (3, 9, 9),
    ),
    "Gemm with transB": (
        "g (float[4,8] x) => (float[4,5] y) { y = Gemm<transB=1>(x, w, b) }",
        {"w": normal(5, 8), "b": normal(5)},
        (4, 8),
    ),
    "Gemm without a bias": (
        "g (float[4,8] x) => (float[4,5] y) { y = Gemm(x, w) }",
        {"w": normal(8, 5)},
        (4, 8),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_forms_of_layers(tmp_path: Path, name: str) -> None:
    text, weights, shape = LAYERS[name]
    source = net(text, **weights)
    data = normal(16, *shape, seed=5)
    report, model = quantized(tmp_path, source, {"x": data})
    assert placed(report, "int8") == ["y"]
    assert report["audit"]["unfused"] == 0
    rank = len(source.graph.input[0].type.tensor_type.shape.dim)
    samples = data if len(shape) == rank else data[:, None]
    assert np.mean([sqnr_db(source, model, {"x": x}) for x in samples]) > FLOOR_DB


@pytest.mark.parametrize("flags", ["transA=1, transB=1", "alpha=0.5", "beta=2.0"])
def test_gemm_that_has_no_kernel_is_named(tmp_path: Path, flags: str) -> None:
    wide = "float[8,4] x" if "transA" in flags else "float[4,8] x"
    source = net(
        f"g ({wide}) => (float[4,5] z) {{ y = Gemm<{flags}>(x, w, b) z = MatMul(y, v) }}",
        w=normal(5, 8) if "transB" in flags else normal(8, 5),
        b=normal(5),
        v=normal(5, 5),
    )
    shape = (8, 4) if "transA" in flags else (4, 8)
    report, model = quantized(tmp_path, source, {"x": normal(16, *shape)})
    assert "no int8 kernel" in reason(report, "y")
    assert sqnr_db(source, model, {"x": normal(*shape, seed=9)}) > FLOOR_DB


def test_zero_weights_in_one_channel_keep_its_bias(tmp_path: Path) -> None:
    weight = normal(4, 3, 3, 3)
    weight[1] = 0
    source = net(
        "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { y = Conv(x, w, b) }",
        w=weight,
        b=np.float32([0.3, -0.4, 0, 1]),
    )
    _, model = quantized(tmp_path, source, {"x": normal(8, 3, 8, 8)})
    (head,) = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] != "x"]
    step = float(stored(model)[head.input[1]])
    got = outputs(model, {"x": normal(1, 3, 8, 8, seed=9)})[0]
    np.testing.assert_allclose(got[0, 1], -0.4, atol=step / 2 + 1e-6)


def test_opset_11_is_refused_by_name_of_the_remedy(tmp_path: Path) -> None:
    work = job(tmp_path, two_of(11), {"x": normal(4, 3, 8, 8)})
    with pytest.raises(BadInput, match=r"opset.*13.*11.*edgewright simplify"):
        quantize.run(work)
    assert list(work.folder.iterdir()) == []


def two_of(opset: int) -> onnx.ModelProto:
    weights = {"w": normal(4, 3, 1, 1), "b": normal(4, seed=2), "v": normal(2, 4, 1, 1, seed=3)}
    return net(TWO, opset=opset, **weights)
