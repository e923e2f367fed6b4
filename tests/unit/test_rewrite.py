"""Operators rewritten for int8: the same function, and only where int8 nodes feed them."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from edgewright.quantize.rewrite import rewritten
from edgewright.recipe import QuantizeSettings
from edgewright.runtime.local import open_local


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


WEIGHTS = {
    "w": normal(4, 3, 3, 3),
    "up": normal(4, 5, 2, 2, seed=2),
    "wide": normal(4, 5, 2, 3, seed=3),
    "three": normal(4, 5, 3, 3, seed=4),
    "bias": normal(5, seed=5),
    "scale": normal(4, seed=6),
    "shift": normal(4, seed=7),
    "mean": normal(4, seed=8),
    "variance": normal(4, seed=9) ** 2 + 0.1,
    "v": normal(4, 4, 1, 1, seed=10),
    "six": np.float32(6),
    "zero": np.float32(0),
}


def net(body: str) -> onnx.ModelProto:
    """A net over images of any size, nodes called after what they make."""
    ends = "(float[N,3,H,W] x) => (float[A,B,C,D] y)"
    text = f'<ir_version: 8, opset_import: ["" : 17]> g {ends} {{{body}}}'
    model = onnx.parser.parse_model(text)
    read = {i for n in model.graph.node for i in n.input}
    for name in sorted(read & set(WEIGHTS)):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(WEIGHTS[name]), name))
    for node in model.graph.node:
        node.name = node.output[0]
    return onnx.shape_inference.infer_shapes(model)


def values(model: onnx.ModelProto, shape: tuple[int, ...]) -> np.ndarray:
    onnx.checker.check_model(model)
    return open_local(model.SerializeToString()).run({"x": normal(*shape, seed=20)})[0]


UP = "a = Conv(x, w) y = ConvTranspose<strides=[2,2]>(a, up, bias)"


@pytest.mark.parametrize(
    ("body", "replaced"),
    [
        (UP, {"y": "Conv and Transpose"}),
        (UP.replace(", bias", ""), {"y": "Conv and Transpose"}),
        (UP.replace("2,2", "2,3").replace("up", "wide"), {"y": "Conv and Transpose"}),
        (UP.replace("y =", "b =") + "y = Relu(b)", {"b": "Conv and Transpose"}),
        (UP.replace("y =", "b =") + "y = Clip(b, zero, six)", {"b": "Conv and Transpose"}),
        (UP.replace("y =", "b =") + "c = Relu(b) y = Add(b, c)", {"b": "Conv and Transpose"}),
        # Blocks that overlap, or leave gaps, or are cut.
        (UP.replace("up", "three"), {}),
        (UP.replace("2,2", "3,3"), {}),
        (UP.replace("2,2]", "2,2], pads=[1,1,1,1]"), {}),
        (UP.replace("2,2]", "2,2], output_padding=[1,1]"), {}),
        # Fed by float: nothing would become int8.
        (UP.replace("y =", "b = Tanh(a) y =").replace("(a, up", "(b, up"), {}),
        (
            "a = Conv(x, w) c = MaxPool<kernel_shape=[2,2]>(a)"
            "d = BatchNormalization<epsilon=0.01>(c, scale, shift, mean, variance)"
            "e = Relu(d) y = Conv(e, v)",
            {"d": "depthwise Conv"},
        ),
        # Nobody reads it in int8.
        (
            "a = Conv(x, w) d = BatchNormalization(a, scale, shift, mean, variance) y = Tanh(d)",
            {},
        ),
    ],
)
def test_the_same_function_in_other_operators(body: str, replaced: dict[str, str]) -> None:
    model = net(body)
    changed, plan, choices = rewritten(model, QuantizeSettings())
    assert {c["node"]: c["as"] for c in choices} == replaced
    assert all(c["step"] == "rewritten for int8" for c in choices)
    assert set(replaced) <= set(plan.nodes)
    if not replaced:
        assert changed == model
    left = {n.op_type for n in changed.graph.node}
    assert not replaced or not left & {"ConvTranspose", "BatchNormalization"}
    for shape in ((1, 3, 9, 12), (2, 3, 8, 7)):
        want, got = values(model, shape), values(changed, shape)
        assert got.shape == want.shape
        # Sums of up to four products in another order, and one rounding of the parameters.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_what_the_recipe_excludes_stays() -> None:
    model = net(UP)
    changed, plan, choices = rewritten(model, QuantizeSettings(exclude=("ConvTranspose",)))
    assert changed == model and not choices and plan.nodes == ("a",)
