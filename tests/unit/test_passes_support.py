"""What the tests of the passes share: models from ONNX text, and proof by running them."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from edgewright.passes.edit import all_nodes
from edgewright.passes.names import assign_names, names_in
from edgewright.passes.shapes import infer
from edgewright.runtime.local import open_local

Pass = Callable[[ir.Model], object]
EPS = float(np.finfo(np.float32).eps)


def parse(text: str, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    """A checked model from the text of its graph; `weights` become its initializers."""
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(head + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    onnx.checker.check_model(proto)
    return proto


def load(proto: onnx.ModelProto) -> ir.Model:
    """The model as passes get it: unique names, inferred shapes."""
    model = ir.from_proto(proto)
    assign_names(model, names_in(model))
    infer(model)
    return model


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in all_nodes(model)]


def feed_for(proto: onnx.ModelProto, seed: int = 0, free: int = 3) -> dict[str, np.ndarray]:
    """Random inputs; free dimensions get the size `free`."""
    rng = np.random.default_rng(seed)
    stored = {t.name for t in proto.graph.initializer}
    feed = {}
    for value in proto.graph.input:
        if value.name in stored:
            continue
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [d.dim_value or free for d in value.type.tensor_type.shape.dim]
        if kind.kind == "f":
            feed[value.name] = rng.normal(size=shape).astype(kind)
        elif kind.kind == "b":
            feed[value.name] = rng.integers(0, 2, shape).astype(kind)
        else:
            feed[value.name] = rng.integers(0, 5, shape).astype(kind)
    return feed


def run(proto: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs with every node run as it is written."""
    return open_local(proto.SerializeToString(), optimize=False).run(feed)


def prove(
    proto: onnx.ModelProto,
    apply: Pass,
    expected: list[str] | None = None,
    *,
    rounding: float = 0.0,
    feed: dict[str, np.ndarray] | None = None,
) -> ir.Model:
    """Apply a pass and compare operators with `expected` and outputs with those before.

    `rounding`: allowed difference in units of float32 eps times the largest output value;
    0 asks for equal bits. Returns the model after.
    """
    model = load(proto)
    before_names = [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]
    apply(model)
    after_names = [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]
    assert after_names == before_names
    if expected is not None:
        assert ops(model) == expected
    assign_names(model, names_in(model))
    after = ir.to_proto(model)
    onnx.checker.check_model(after)
    feed = feed if feed is not None else feed_for(proto)
    for a, b in zip(run(proto, feed), run(after, feed), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if rounding and a.dtype.kind == "f":
            limit = rounding * EPS * max(float(np.abs(a).max()), 1e-30)
            assert np.abs(a - b).max() <= limit
        else:
            np.testing.assert_array_equal(a, b)
    return model


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_prove_sees_a_wrong_value():
    proto = parse("g (float[2] x) => (float[2] y) <float c = {2}> { y = Mul(x, c) }")

    def spoil(model: ir.Model) -> None:
        model.graph.initializers["c"].const_value = ir.tensor(np.float32(2.001), name="c")

    try:
        prove(proto, spoil, rounding=4)
    except AssertionError:
        return
    raise AssertionError("a wrong result was not seen")
