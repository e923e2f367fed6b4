"""Cutting units out of small graphs: equal to the graph in which nothing reads them."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from edgewright.errors import BadInput
from edgewright.prune.cut import cut, masked
from edgewright.prune.labels import analyse
from edgewright.runtime.local import open_local


def built(text: str, seed: int = 0, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """A model from its text, with random weights of the shapes named."""
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>\n' + text)
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        values = rng.normal(0, 0.5, shape).astype(np.float32)
        if name.startswith("var"):
            values = np.abs(values) + 0.5
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def outputs(model: onnx.ModelProto, seed: int = 1, optimize: bool = True) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    feed = {
        v.name: rng.normal(0, 1, [d.dim_value or 2 for d in v.type.tensor_type.shape.dim]).astype(
            np.float32
        )
        for v in model.graph.input
    }
    return open_local(model.SerializeToString(), optimize=optimize).run(feed)


def check(model: onnx.ModelProto, remove: list[int]) -> onnx.ModelProto:
    """Cut and masked agree to float rounding; returns the cut model."""
    analysis = analyse(model)
    small, _ = cut(model, analysis, remove)
    for a, b in zip(outputs(small), outputs(masked(model, analysis, remove)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    return small


RESIDUAL = """
g (float[N,3,6,6] x) => (float[N,5] y) {
  a = Conv <pads=[1,1,1,1]> (x, w0, b0)
  r = Relu(a)
  c = Conv <pads=[1,1,1,1], group=8> (r, w1)
  d = Conv (c, w2)
  s = Add(r, d)
  p = GlobalAveragePool(s)
  f = Flatten(p)
  y = Gemm <transB=1> (f, w3, b3)
}
"""
SHAPES = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 1, 3, 3), "w2": (8, 8, 1, 1)}
HEAD = {"w3": (5, 8), "b3": (5,)}


def test_a_residual_ties_all_convolutions_around_it():
    model = built(RESIDUAL, **SHAPES, **HEAD)
    analysis = analyse(model)
    (group,) = analysis.groups
    assert (len(group.units), group.kind, group.exact) == (8, "channels", True)
    assert group.slices == (
        ("w0", 0), ("b0", 0), ("w1", 0), ("w2", 0), ("w2", 1), ("w3", 1)
    )  # fmt: skip
    labels = list(group.units)
    for name, axis in (("x", 1), ("w0", 1), ("y", 1), ("w3", 0), ("s", 2)):
        assert not analysis.labels[name][axis].any()
    for name in ("a", "r", "c", "d", "s", "p", "f"):
        assert analysis.labels[name][1].tolist() == labels
    small, kept = cut(model, analysis, [labels[1], labels[6]])
    assert kept["s", 1].tolist() == [0, 2, 3, 4, 5, 7]
    assert {t.name: list(t.dims) for t in small.graph.initializer} == {
        "w0": [6, 3, 3, 3], "b0": [6], "w1": [6, 1, 3, 3], "w2": [6, 6, 1, 1],
        "w3": [5, 6], "b3": [5],
    }  # fmt: skip
    check(model, [labels[1], labels[6]])


def test_an_axis_is_never_emptied():
    model = built(RESIDUAL, **SHAPES, **HEAD)
    analysis = analyse(model)
    with pytest.raises(BadInput, match="would become empty"):
        cut(model, analysis, analysis.groups[0].units)
    with pytest.raises(BadInput, match="expected a label"):
        cut(model, analysis, [10**6])
