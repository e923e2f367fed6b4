"""Smoothing: factors by hand, the same function in float, and nothing where it is not exact."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper

from edgewright.quantize.smooth import find_folds, smooth


def net(text: str, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>' + text)
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    for node in model.graph.node:
        node.name = node.output[0]
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def normal(*shape: int, seed: int = 1, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})


def values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def all_layers(model: onnx.ModelProto) -> list[str]:
    return [n.name for n in model.graph.node]


def test_factors_by_hand() -> None:
    # max|x| = 16, 1; max|w| = 1, 4: s = sqrt(16 / 1), sqrt(1 / 4) = 4, 1/2; divided by their
    # geometric mean sqrt(2), which every channel shares.
    model = net(
        """g (float[1,2] x) => (float[1,2] y) {
            n = LayerNormalization<axis=-1>(x, g, b)  y = MatMul(n, w)
        }""",
        g=np.float32([3, 5]),
        b=np.float32([7, -2]),
        w=np.float32([[1, -0.5], [2, -4]]),
    )
    folds, refused = find_folds(model, ["y"])
    assert refused == {} and [f.tensor for f in folds] == ["n"]
    smooth(model, folds, {"n": np.float32([16, 1])}, 0.5)
    s = np.array([4, 0.5]) / np.sqrt(2)
    stored = values(model)
    np.testing.assert_allclose(stored["g"], [3, 5] / s, rtol=1e-6)
    np.testing.assert_allclose(stored["b"], [7, -2] / s, rtol=1e-6)
    np.testing.assert_allclose(stored["w"], [[1, -0.5], [2, -4]] * s[:, None], rtol=1e-6)
    # alpha = 1 takes the activation's peaks alone: 16 and 1, over 4.
    other = net(
        "g (float[1,2] x) => (float[1,2] y) { n = Mul(x, v)  y = MatMul(n, w) }",
        v=np.float32([1, 1]),
        w=np.float32([[1, -0.5], [2, -4]]),
    )
    smooth(other, find_folds(other, ["y"])[0], {"n": np.float32([16, 1])}, 1.0)
    np.testing.assert_allclose(values(other)["v"], [1 / 4, 4], rtol=1e-6)


HEADS = """
    q = MatMul(x, wq)  qr = Reshape(q, heads)  qt = Transpose<perm=[0,2,3,1]>(qr)
    k = MatMul(x, wk)  kr = Reshape(k, heads)  kt = Transpose<perm=[0,2,1,3]>(kr)
    p = MatMul(kt, qt)  a = Softmax(p)
    v = MatMul(x, wv)  vb = Add(v, bv)  vr = Reshape(vb, heads)  vt = Transpose<perm=[0,2,1,3]>(vr)
    o = MatMul(a, vt)  ot = Transpose<perm=[0,2,1,3]>(o)  n = Reshape(ot, flat)
"""
SHAPES = {"heads": np.array([0, 0, 2, 3]), "flat": np.array([0, 0, 6])}
ATTENTION = {
    "wq": normal(6, 6, seed=2),
    "wk": normal(6, 6, seed=3),
    "wv": normal(6, 6, seed=4),
    "bv": normal(6, seed=5),
}
G, B = normal(6, seed=6), normal(6, seed=7)
FOLDS: dict[str, tuple[str, dict[str, np.ndarray], set[str]]] = {
    "layer norm": ("n = LayerNormalization<axis=-1>(x, g, b)", {"g": G, "b": B}, {"g", "b"}),
    "layer norm without bias": ("n = LayerNormalization<axis=-1>(x, g)", {"g": G}, {"g"}),
    "rms norm in pieces": (
        """s = Mul(x, x)  m = ReduceMean<axes=[-1]>(s)  r = Sqrt(m)  d = Div(x, r)
        n = Mul(g, d)""",
        {"g": G},
        {"g"},
    ),
    "norm in pieces, with half and bias": (
        """m = ReduceMean<axes=[-1]>(x)  d = Sub(x, m)  s = Sigmoid(m)  k = Mul(s, g)
        h = Mul(d, k)  t = Mul(h, half)  n = Add(t, b)""",
        {"g": G, "b": B.reshape(1, 1, 6), "half": np.float32(0.5)},
        {"g", "b"},
    ),
    "gated": (
        "h = MatMul(x, w1)  k = MatMul(x, w2)  s = Sigmoid(k)  n = Mul(s, h)",
        {"w1": normal(6, 6, seed=8), "w2": normal(6, 6, seed=9)},
        {"w1"},
    ),
    "relu": (
        "h = MatMul(x, w1)  k = Add(b, h)  n = Relu(k)",
        {"w1": normal(6, 6, seed=8), "b": B},
        {"w1", "b"},
    ),
    "the other axis": (
        "t = Transpose<perm=[0,2,1]>(x)  e = Mul(t, g)  n = Transpose<perm=[0,2,1]>(e)",
        {"g": G.reshape(6, 1)},
        {"g"},
    ),
    "values of an attention": (HEADS, ATTENTION | SHAPES, {"wv", "bv"}),
}


@pytest.mark.parametrize("name", FOLDS)
def test_the_float_model_stays_the_same(name: str) -> None:
    before, weights, places = FOLDS[name]
    text = f"""g (float[B,S,6] x) => (float[B,S,4] y, float[B,S,5] z) {{
        {before}
        y = MatMul(n, w)  z = MatMul(n, u)
    }}"""
    model = net(text, **weights, w=normal(6, 4, seed=10), u=normal(6, 5, seed=11))
    folds, refused = find_folds(model, ["y", "z"])
    assert refused == {} and [f.tensor for f in folds] == ["n"]
    assert set(folds[0].places) == places
    original = onnx.ModelProto()
    original.CopyFrom(model)
    smooth(model, folds, {"n": np.float32([9, 1, 0.1, 3, 0, 30])}, 0.5)
    changed = {n for n, v in values(model).items() if not np.array_equal(v, values(original)[n])}
    assert changed == places | {"w", "u"}
    for shape in ((1, 3, 6), (2, 5, 6)):
        x = normal(*shape, seed=12)
        for a, b in zip(run(original, x), run(model, x), strict=True):
            np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5 * np.abs(a).max())


def test_gemm_reads_and_takes_factors() -> None:
    model = net(
        """g (float[N,6] x) => (float[N,4] y) {
            h = Gemm<transB=1>(x, w1, b)  r = Relu(h)  k = Gemm(r, w2, c)
            y = Gemm<transB=1>(k, w3)
        }""",
        w1=normal(5, 6),
        b=normal(5, seed=2),
        w2=normal(5, 3, seed=3),
        c=normal(1, 3, seed=4),
        w3=normal(4, 3, seed=5),
    )
    folds, _ = find_folds(model, all_layers(model))
    assert [(f.tensor, set(f.places)) for f in folds] == [("r", {"w1", "b"}), ("k", {"w2", "c"})]
    original = onnx.ModelProto()
    original.CopyFrom(model)
    smooth(model, folds, {"r": np.abs(normal(5)), "k": np.abs(normal(3))}, 0.6)
    x = normal(7, 6, seed=9)
    (a,), (b,) = run(original, x), run(model, x)
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max())
    assert not np.allclose(values(model)["w1"], values(original)["w1"])


REFUSED: dict[str, tuple[str, str]] = {
    # text up to the tensor n that y = MatMul(n, w) reads; what the reason says
    "the residual path": (
        "n = LayerNormalization<axis=-1>(x, g, b)  z = Sigmoid(n)",
        "Sigmoid 'z' reads it, too",
    ),
    "an output": (
        "z = LayerNormalization<axis=-1>(x, g, b)  n = Identity(z)",
        "output of the model",
    ),
    "an input": ("n = Identity(x)  z = Sigmoid(x)", "'x' before it is read by Identity, Sigmoid"),
    "a curve": ("z = Sigmoid(x)  e = Mul(x, g)  n = Erf(e)", "Erf 'n' before it does not pass"),
    "a scalar": (
        "z = Sigmoid(x)  e = Mul(x, g)  n = Add(e, one)",
        "stored 'one' before it has no value for each channel",
    ),
    "a shared norm": (
        "n = LayerNormalization<axis=-1>(x, g, b)  z = Mul(x, g)",
        "'g' before it has other readers",
    ),
    "mixed channels": (
        "e = Mul(x, g)  r = Reshape(e, mix)  n = Reshape(r, back)  z = Sigmoid(x)",
        "mixes channels",
    ),
    "another axis": (
        "e = LayerNormalization<axis=-1>(x, g, b)  n = Transpose<perm=[0,2,1]>(e)  z = Sigmoid(x)",
        "stored 'g' before it has no value for each channel",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_left_with_a_reason(name: str) -> None:
    text, why = REFUSED[name]
    model = net(
        f"g (float[2,6,6] x) => (float[2,6,4] y, float[2,6,6] z) {{ {text}  y = MatMul(n, w) }}",
        g=G,
        b=B,
        one=np.float32(1),
        mix=np.array([2, 9, 4]),
        back=np.array([2, 6, 6]),
        w=normal(6, 4),
    )
    folds, refused = find_folds(model, ["y"])
    assert folds == []
    assert why in refused["n"]


def test_a_shared_weight_is_left() -> None:
    model = net(
        """g (float[1,6] x) => (float[1,4] y, float[1,4] z) {
            n = Mul(x, g)  y = MatMul(n, w)  s = Sigmoid(x)  z = MatMul(s, w)
        }""",
        g=G,
        w=normal(6, 4),
    )
    folds, refused = find_folds(model, ["y"])
    assert folds == [] and "'y' has other readers" in refused["n"]


def test_dead_channels_keep_their_size() -> None:
    model = net(
        "g (float[1,3] x) => (float[1,2] y) { n = Mul(x, g)  y = MatMul(n, w) }",
        g=np.float32([1, 2, 3]),
        w=np.float32([[1, 1], [0, 0], [2, -3]]),
    )
    folds, _ = find_folds(model, ["y"])
    smooth(model, folds, {"n": np.float32([0, 1, 5])}, 0.5)
    stored = values(model)
    # One channel alone is left, and a factor for all is none.
    np.testing.assert_allclose(stored["g"], [1, 2, 3], rtol=1e-6)
    assert np.isfinite(stored["w"]).all()
