"""Layers as matrices: W times the columns is what the runtime computes, and their moments."""

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewright.quantize import layers
from edgewright.quantize.layers import (
    POSITIONS,
    SHRINK,
    Layer,
    columns_of,
    find_layers,
    input_moments,
    layer_of,
)


def silent(text: str, done: int, total: int) -> None:
    """Progress that nobody reads."""


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_layer(op: str, weight: np.ndarray, rank: int, **attributes: object) -> onnx.ModelProto:
    """A model of one layer: x -> y with the weight w."""
    node = helper.make_node(op, ["x", "w"], ["y"], "layer", **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def computed(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def only_layer(model: onnx.ModelProto) -> Layer:
    (layer,) = find_layers(model, ["layer"])
    return layer


@dataclass(frozen=True)
class Case:
    """A convolution: shapes of weight and input, its attributes."""

    weight: tuple[int, ...]
    x: tuple[int, ...]
    attributes: dict[str, object] = field(default_factory=dict)


CONVOLUTIONS = {
    "1-D": Case((4, 3, 3), (1, 3, 20)),
    "1-D, all at once": Case(
        (6, 2, 3), (2, 4, 17), {"group": 2, "strides": [2], "pads": [2, 1], "dilations": [3]}
    ),
    "2-D": Case((4, 3, 3, 3), (1, 3, 9, 8)),
    "2-D, padded unevenly": Case((4, 3, 3, 2), (1, 3, 6, 7), {"pads": [0, 1, 2, 3]}),
    "2-D, strides and dilations": Case(
        (5, 2, 3, 3), (2, 2, 13, 12), {"strides": [2, 3], "dilations": [2, 1], "pads": [1] * 4}
    ),
    "2-D, valid": Case((4, 3, 3, 3), (1, 3, 7, 7), {"auto_pad": "VALID"}),
    "grouped": Case((6, 2, 3, 3), (1, 6, 8, 8), {"group": 3, "pads": [1] * 4}),
    "depthwise": Case((5, 1, 3, 3), (2, 5, 8, 8), {"group": 5, "pads": [1] * 4}),
    "depthwise, widening": Case((10, 1, 3, 3), (1, 5, 8, 8), {"group": 5, "strides": [2, 2]}),
    "pointwise": Case((7, 4, 1, 1), (2, 4, 5, 6)),
    "pointwise, strided": Case((7, 4, 1, 1), (2, 4, 9, 8), {"strides": [2, 3]}),
    "pointwise, grouped": Case((6, 2, 1, 1), (1, 4, 5, 5), {"group": 2}),
    "pointwise, padded": Case((3, 2, 1, 1), (1, 2, 4, 4), {"pads": [1, 0, 2, 1]}),
    "3-D": Case((4, 2, 3, 2, 3), (1, 2, 6, 5, 6), {"pads": [1, 0, 1, 1, 1, 0]}),
    "one weight": Case((1, 1, 1, 1), (1, 1, 3, 3)),
    "more positions than are taken": Case((3, 2, 3, 3), (2, 2, 40, 30)),
    "pointwise, more than are taken": Case((3, 2, 1), (2, 2, 1000)),
}


@pytest.mark.parametrize("sample", [0, 3])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_weights_times_columns_is_the_convolution(name: str, sample: int) -> None:
    case = CONVOLUTIONS[name]
    weight, x = normal(*case.weight), normal(*case.x, seed=2)
    model = one_layer("Conv", weight, len(case.x), **case.attributes)
    layer = only_layer(model)
    matrix, columns = layer.matrix(weight), columns_of(layer, x, sample)
    groups = int(case.attributes.get("group", 1))
    assert matrix.shape == (groups, case.weight[0] // groups, int(np.prod(case.weight[1:])))
    y = np.moveaxis(computed(model, x), 1, 0).reshape(groups, case.weight[0] // groups, -1)
    stride = max(1, -(-y.shape[2] // POSITIONS))
    taken = np.arange(sample % stride, y.shape[2], stride)
    assert columns.shape == (groups, layer.columns, len(taken))
    assert len(taken) <= POSITIONS
    # Sums of 54 products of float32 at most, in another order.
    np.testing.assert_allclose(matrix @ columns, y[:, :, taken], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "attributes", "weight", "x"),
    [
        ("Gemm", {}, (5, 3), (4, 5)),
        ("Gemm", {"transB": 1}, (3, 5), (4, 5)),
        ("Gemm", {"transB": 1}, (5, 5), (1, 5)),
        ("MatMul", {}, (5, 3), (4, 5)),
        ("MatMul", {}, (5, 3), (2, 3, 4, 5)),
        ("MatMul", {}, (1, 1), (6, 1)),
        ("MatMul", {}, (2, 3), (3, 500, 2)),
    ],
)
def test_weights_times_columns_is_the_product(
    op: str, attributes: dict[str, int], weight: tuple[int, ...], x: tuple[int, ...]
) -> None:
    w, value = normal(*weight), normal(*x, seed=2)
    model = one_layer(op, w, len(x), **attributes)
    layer = only_layer(model)
    columns = columns_of(layer, value, 1)
    y = computed(model, value)
    y = y.reshape(-1, y.shape[-1]).T
    stride = max(1, -(-y.shape[1] // POSITIONS))
    product = layer.matrix(w)[0] @ columns[0]
    np.testing.assert_allclose(product, y[:, 1 % stride :: stride], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "shape", "attributes"),
    [
        ("Conv", (4, 3, 5), {}),
        ("Conv", (4, 3, 5, 2), {}),
        ("Conv", (4, 3, 2, 3, 2), {}),
        ("Conv", (6, 2, 3, 3), {"group": 3}),
        ("Conv", (6, 1, 3, 3), {"group": 6}),
        ("Gemm", (4, 7), {}),
        ("Gemm", (4, 7), {"transB": 1}),
        ("MatMul", (4, 7), {}),
        ("MatMul", (1, 1), {}),
    ],
)
def test_stored_undoes_matrix(op: str, shape: tuple[int, ...], attributes: dict[str, int]) -> None:
    weight = normal(*shape)
    layer = only_layer(one_layer(op, weight, max(2, len(shape)), **attributes))
    matrix = layer.matrix(weight)
    np.testing.assert_array_equal(layer.stored(matrix, weight), weight)
    # Each output channel is one row, and lies along the channel axis of the stored weight.
    rows = matrix.reshape(-1, layer.columns)
    for channel in range(weight.shape[layer.channel_axis]):
        np.testing.assert_array_equal(
            rows[channel], np.take(weight, channel, layer.channel_axis).reshape(-1)
        )
    changed = layer.stored(matrix * 2, weight)
    np.testing.assert_array_equal(changed, weight * 2)


@pytest.mark.parametrize(
    ("op", "shape", "attributes"),
    [
        ("Conv", (4, 3, 3, 3), {"auto_pad": "SAME_UPPER"}),
        ("Gemm", (4, 7), {"transA": 1}),
        ("Gemm", (4, 7), {"alpha": 0.5}),
        ("MatMul", (2, 4, 7), {}),
        ("MatMul", (4,), {}),
        ("ConvTranspose", (4, 3, 3, 3), {}),
    ],
)
def test_what_is_no_layer(op: str, shape: tuple[int, ...], attributes: dict[str, object]) -> None:
    model = one_layer(op, normal(*shape), 4, **attributes)
    stored = {t.name: t for t in model.graph.initializer}
    assert layer_of(model.graph.node[0], stored) is None
    assert layer_of(model.graph.node[0], {}) is None


def test_layers_come_in_graph_order() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "v"], ["a"], "first"),
            helper.make_node("Relu", ["a"], ["b"], "relu"),
            helper.make_node("Conv", ["b", "w"], ["y"], "second"),
        ],
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(normal(2, 3, 1, 1), "v"),
            numpy_helper.from_array(normal(2, 2, 1, 1), "w"),
        ],
    )
    found = find_layers(helper.make_model(graph), ["second", "relu", "first"])
    assert [(la.node, la.input, la.output) for la in found] == [
        ("first", "x", "a"),
        ("second", "b", "y"),
    ]


# --- moments -------------------------------------------------------------------------------


def expected_moments(columns: np.ndarray) -> np.ndarray:
    """numpy's covariance of (n, count) columns, the correlations shrunk as documented."""
    n, count = columns.shape
    covariance = np.cov(columns.astype(np.float64), bias=True).reshape(n, n)
    shrunk = covariance * (count / (count + SHRINK * n))
    np.fill_diagonal(shrunk, np.diag(covariance))
    return shrunk


@pytest.mark.parametrize("offset", [0.0, 1000.0, -3e4])
def test_moments_are_numpys_covariance(offset: float) -> None:
    # Far from zero, as behind a large bias: the square of the mean must not swallow them.
    rng = np.random.default_rng(3)
    mix = rng.normal(size=(6, 6))
    values = [(rng.normal(size=(20 + k, 6)) @ mix + offset).astype(np.float32) for k in range(5)]
    model = one_layer("MatMul", normal(6, 4), 2)
    layer = only_layer(model)
    found = input_moments(model, [layer], lambda: ({"x": v} for v in values), silent)
    wanted = expected_moments(np.concatenate(values).T)
    assert found["layer"].shape == (1, 6, 6)
    # The variances are 1 to 10, float32 has 24 bits; the mean of the first sample is close.
    np.testing.assert_allclose(found["layer"][0], wanted, rtol=1e-4, atol=1e-4)


def test_moments_of_grouped_convolutions() -> None:
    feeds = [normal(1, 4, 6, 6, seed=k) + k for k in range(4)]
    model = one_layer("Conv", normal(4, 2, 3, 3), 4, group=2, pads=[1] * 4)
    layer = only_layer(model)
    found = input_moments(model, [layer], lambda: ({"x": x} for x in feeds), silent)["layer"]
    for group in range(2):
        columns = []
        for x in feeds:  # im2col written out: every window of the padded picture
            padded = np.pad(x[0, 2 * group : 2 * group + 2], [(0, 0), (1, 1), (1, 1)])
            columns += [
                padded[:, i : i + 3, j : j + 3].reshape(-1) for i in range(6) for j in range(6)
            ]
        wanted = expected_moments(np.array(columns).T)
        np.testing.assert_allclose(found[group], wanted, rtol=1e-4, atol=1e-4)


def test_moments_of_layers_inside_and_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("MatMul", ["x", "v"], ["a"], "first"),
                helper.make_node("Relu", ["a"], ["b"], "relu"),
                helper.make_node("MatMul", ["b", "w"], ["c"], "second"),
                helper.make_node("Gemm", ["b", "u"], ["d"], "beside"),
                helper.make_node("Add", ["c", "d"], ["y"], "sum"),
            ],
            "inside",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 5])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 2])],
            [
                numpy_helper.from_array(normal(5, 3, seed=4), "v"),
                numpy_helper.from_array(normal(3, 2, seed=5), "w"),
                numpy_helper.from_array(normal(3, 2, seed=6), "u"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    x = normal(40, 5, seed=7)
    found_layers = find_layers(model, ["first", "second", "beside"])
    found = input_moments(model, found_layers, lambda: iter([{"x": x}]), silent)
    assert set(found) == {"first", "second", "beside"}
    np.testing.assert_allclose(found["first"][0], expected_moments(x.T), rtol=1e-4, atol=1e-5)
    hidden = np.maximum(x @ normal(5, 3, seed=4), 0)
    for name in ("second", "beside"):
        np.testing.assert_allclose(found[name][0], expected_moments(hidden.T), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(layers, "MAX_COLUMNS", 3)
    assert set(input_moments(model, found_layers, lambda: iter([{"x": x}]), silent)) == {
        "second",
        "beside",
    }
    monkeypatch.setattr(layers, "MAX_COLUMNS", 2)
    assert input_moments(model, found_layers, lambda: iter([{"x": x}]), silent) == {}


def test_few_columns_leave_moments_that_can_be_inverted() -> None:
    # 3 columns of 8 numbers have a covariance of rank 2; shrunk, it has full rank.
    x = normal(3, 8, seed=8)
    model = one_layer("MatMul", normal(8, 2), 2)
    found = input_moments(model, [only_layer(model)], lambda: iter([{"x": x}]), silent)["layer"][0]
    assert np.linalg.matrix_rank(np.cov(x.T, bias=True)) == 2
    assert np.linalg.eigvalsh(found).min() > 0
