"""Padding, pooling, limits, normalisation, look-up tables and hard activations."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from test_passes_support import EPS, load, normal, ops, parse, prove, run

from edgewright.passes.activations import canonical_activations
from edgewright.passes.clips import unify_clips
from edgewright.passes.duplicates import remove_dead
from edgewright.passes.edit import all_nodes, attribute, constant
from edgewright.passes.gelu import order_gelus
from edgewright.passes.layer_norm import find_layer_norms
from edgewright.passes.pads import fold_pads
from edgewright.passes.pooling import pool_means
from edgewright.passes.tables import gather_one_hot, tabulate
from edgewright.runtime.local import open_local


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


F = np.float32
W = {
    "w": normal(4, 3, 3, 3),
    "around": ints(0, 0, 1, 2, 0, 0, 2, 1),
    "channels": ints(0, 1, 0, 0, 0, 0, 0, 0),
    "cut": ints(0, 0, -1, 0, 0, 0, 0, 0),
    "zero": F(0),
    "third": F(1 / 3),
    "three": F(3),
    "one": F(1),
    "two": F(2),
    "six": F(6),
    "sixth": F(1 / 6),
    "half": F(0.5),
    "five": F(5),
    "neg": F(-1),
    "minus": F(-0.5),
    "huge": F(np.finfo(F).max),
    "eps": F(1e-5),
    "gamma": normal(8, seed=3),
    "beta": normal(8, seed=4),
    "cube": normal(2, 8, seed=5),
    "last": ints(-1),
}


def used(text: str) -> dict[str, np.ndarray]:
    """The weights that the text reads; more would only warn."""
    words = set("".join(c if c.isalnum() or c == "_" else " " for c in text).split())
    return {name: array for name, array in W.items() if name in words}


IMAGE = "g (float[N,3,6,5] x) => (float[A,B,C,D] y)"
PADS = {
    "into Conv": (f"{IMAGE} {{ a = Pad(x, around)  y = Conv(a, w) }}", ["Conv"]),
    "into Conv that pads": (
        f"{IMAGE} {{ a = Pad(x, around, zero)  y = Conv<pads=[1,0,0,1],strides=[2,2]>(a, w) }}",
        ["Conv"],
    ),
    "into two of them": (
        f"{IMAGE} {{ a = Pad(x, around)  b = Conv(a, w)  c = Conv(a, w)  y = Add(b, c) }}",
        ["Conv", "Conv", "Add"],
    ),
    "into AveragePool": (
        f"{IMAGE} {{ a = Pad(x, around)  y = AveragePool<kernel_shape=[3,3]>(a) }}",
        ["AveragePool"],
    ),
}
PADS_STAY = {
    "another value": f"{IMAGE} {{ a = Pad(x, around, one)  y = Conv(a, w) }}",
    "reflection": f'{IMAGE} {{ a = Pad<mode="reflect">(x, around)  y = Conv(a, w) }}',
    "cutting": f"{IMAGE} {{ a = Pad(x, cut)  y = Conv(a, w) }}",
    "of channels": "g (float[N,2,6,5] x) => (float[A,B,C,D] y)"
    " { a = Pad(x, channels)  y = Conv(a, w) }",
    "into MaxPool": f"{IMAGE} {{ a = Pad(x, around)  y = MaxPool<kernel_shape=[3,3]>(a) }}",
    "into Conv that finds its pads": f"{IMAGE} {{ a = Pad(x, around)"
    '  y = Conv<auto_pad="SAME_UPPER">(a, w) }',
    "read elsewhere too": f"{IMAGE} {{ a = Pad(x, around)  b = Conv(a, w)  c = Relu(a)"
    "  d = ReduceMax(b)  y = Add(c, d) }",
    "AveragePool that counts no padding": f"{IMAGE} {{ a = Pad(x, around)"
    "  y = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(a) }",
}


@pytest.mark.parametrize("name", PADS)
def test_pads_fold(name):
    text, expected = PADS[name]
    prove(parse(text, **used(text)), fold_pads, expected, rounding=8)


@pytest.mark.parametrize("name", PADS_STAY)
def test_pads_stay(name):
    text = PADS_STAY[name]
    model = load(parse(text, **used(text)))
    assert fold_pads(model) == 0
    assert "Pad" in ops(model)


POOLS = {
    "kept axes": ("float[N,3,6,5]", "ReduceMean<axes=[2,3]>", ["GlobalAveragePool"]),
    "kept axes, negative": ("float[N,3,6,5]", "ReduceMean<axes=[-1,-2]>", ["GlobalAveragePool"]),
    "dropped axes": (
        "float[N,3,6,5]",
        "ReduceMean<axes=[2,3],keepdims=0>",
        ["GlobalAveragePool", "Flatten"],
    ),
    "volume": ("float[N,3,2,2,2]", "ReduceMean<axes=[2,3,4]>", ["GlobalAveragePool"]),
}
POOLS_STAY = {
    "one axis": ("float[N,3,6,5]", "ReduceMean<axes=[3]>"),
    "channels": ("float[N,3,6,5]", "ReduceMean<axes=[1,2,3]>"),
    "all": ("float[N,3,6,5]", "ReduceMean"),
    "features of a sequence": ("float[N,7,8]", "ReduceMean<axes=[2]>"),
    "whole numbers": ("int64[N,3,6,5]", "ReduceMean<axes=[2,3]>"),
}


@pytest.mark.parametrize("name", POOLS)
def test_means_become_pools(name):
    kind, operator, expected = POOLS[name]
    rank = 2 if "keepdims=0" in operator else kind.count(",") + 1
    out = "float[" + ",".join("ABCDE"[:rank]) + "]"
    proto = parse(f"g ({kind} x) => ({out} y) {{ y = {operator}(x) }}")
    prove(proto, pool_means, expected, rounding=8)


@pytest.mark.parametrize("name", POOLS_STAY)
def test_means_stay(name):
    kind, operator = POOLS_STAY[name]
    assert pool_means(load(parse(f"g ({kind} x) => ({kind} y) {{ y = {operator}(x) }}"))) == 0


def test_means_with_axes_as_input():
    text = "g (float[N,3,6,5] x) => (float[A,3,1,1] y) { y = ReduceMean(x, axes) }"
    prove(parse(text, 18, axes=ints(2, 3)), pool_means, ["GlobalAveragePool"], rounding=8)


LIMITS = {
    "minimum and maximum": ("a = Max(x, zero)  y = Min(six, a)", ["Clip"], (0, 6)),
    "relu and minimum": ("a = Relu(x)  y = Min(a, six)", ["Clip"], (0, 6)),
    "relu and clip": ("a = Relu(x)  y = Clip(a, neg, six)", ["Clip"], (0, 6)),
    "two clips": ("a = Clip(x, minus, five)  y = Clip(a, neg, half)", ["Clip"], (-0.5, 0.5)),
    "two clips apart": ("a = Clip(x, half, one)  y = Clip(a, two, five)", ["Clip"], (2, 2)),
    "no upper one": ("y = Clip(x, zero)", ["Relu"], None),
    "the largest number": ("y = Clip(x, zero, huge)", ["Relu"], None),
    "two relus": ("a = Relu(x)  y = Relu(a)", ["Relu"], None),
    "no limits": ("a = Neg(x)  b = Clip(a)  y = Neg(b)", ["Neg", "Neg"], None),
    "an upper one only": ("y = Min(x, half)", ["Clip"], (None, 0.5)),
}
LIMITS_STAY = {
    "two values": "g (float[N] x, float[N] z) => (float[N] y) { y = Max(x, z) }",
    "a limit that is computed": """g (float[N] x, float z) => (float[N] y)
        { a = Clip(x, neg)  y = Clip(a, z) }""",
    "three values": "g (float[N] x) => (float[N] y) { y = Max(x, zero, one) }",
    "whole numbers": "g (int64[N] x) => (int64[N] y) { y = Max(x, last) }",
    "read in between": """g (float[N] x) => (float[N] y)
        { a = Clip(x, zero, six)  b = Clip(a, one, two)  y = Add(a, b) }""",
    "limits per column": "g (float[N,8] x) => (float[N,8] y) { y = Max(x, gamma) }",
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_written_in_one_way(name):
    body, expected, bounds = LIMITS[name]
    proto = parse(f"g (float[N,4] x) => (float[N,4] y) {{ {body} }}", **used(body))
    feed = {"x": np.linspace(-8, 8, 32, dtype=F).reshape(8, 4)}
    model = prove(proto, unify_clips, expected, feed=feed)
    if bounds is not None:
        (clip,) = all_nodes(model)
        got = [None if v is None else constant(v) for v in clip.inputs[1:]]
        assert [None if v is None else float(v) for v in got] == list(bounds)
        assert all(v is None or v.ndim == 0 for v in got)


@pytest.mark.parametrize("name", LIMITS_STAY)
def test_limits_stay(name):
    text = LIMITS_STAY[name]
    model = load(parse(text, **used(text)))
    before = ops(model)
    unify_clips(model)
    assert ops(model) == before


NORM = "m = ReduceMean<axes=[-1]>(x)  d = Sub(x, m)  {square}  v = ReduceMean<axes=[-1]>(s)  {root}"
SQUARES = {"power": "s = Pow(d, two)", "product": "s = Mul(d, d)"}
ROOTS = {
    "division": "e = Add(v, eps)  r = Sqrt(e)  n = Div(d, r)",
    "reciprocal": "e = Add(eps, v)  r = Sqrt(e)  q = Reciprocal(r)  n = Mul(d, q)",
    "negative power": "e = Add(v, eps)  q = Pow(e, minus)  n = Mul(q, d)",
}
FACTORS = {
    "both": ("t = Mul(n, gamma)  y = Add(t, beta)", 3),
    "scale": ("y = Mul(gamma, n)", 2),
    "none": ("y = Identity(n)", 2),
}


def find_norms(model: ir.Model) -> None:
    find_layer_norms(model)
    remove_dead(model)


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("factors", FACTORS)
def test_layer_norms_are_found(square, root, factors):
    body, inputs = FACTORS[factors]
    body = NORM.format(square=SQUARES[square], root=ROOTS[root]) + "  " + body
    proto = parse(f"g (float[N,T,8] x) => (float[N,T,8] y) {{ {body} }}", **used(body))
    model = prove(proto, find_norms, rounding=32)
    norm = all_nodes(model)[0]
    assert ops(model) in (["LayerNormalization"], ["LayerNormalization", "Identity"])
    assert len(norm.inputs) == inputs
    assert attribute(norm, "axis") == -1
    assert attribute(norm, "epsilon") == pytest.approx(1e-5)


def test_layer_norm_over_two_axes():
    body = """m = ReduceMean<axes=[1,2]>(x)  d = Sub(x, m)  s = Mul(d, d)
        v = ReduceMean<axes=[2,1]>(s)  e = Add(v, eps)  r = Sqrt(e)  n = Div(d, r)
        y = Mul(n, cube)"""
    proto = parse(f"g (float[N,2,8] x) => (float[N,2,8] y) {{ {body} }}", **used(body))
    model = prove(proto, find_norms, ["LayerNormalization"], rounding=32)
    assert attribute(all_nodes(model)[0], "axis") == -2


NORMS_STAY = {
    "over channels": """m = ReduceMean<axes=[1]>(x)  d = Sub(x, m)  s = Mul(d, d)
        v = ReduceMean<axes=[1]>(s)  e = Add(v, eps)  r = Sqrt(e)  y = Div(d, r)""",
    "means over different axes": """m = ReduceMean<axes=[1]>(x)  d = Sub(x, m)  s = Mul(d, d)
        v = ReduceMean<axes=[2]>(s)  e = Add(v, eps)  r = Sqrt(e)  y = Div(d, r)""",
    "third power": """m = ReduceMean<axes=[2]>(x)  d = Sub(x, m)  s = Pow(d, three)
        v = ReduceMean<axes=[2]>(s)  e = Add(v, eps)  r = Sqrt(e)  y = Div(d, r)""",
    "root over difference": """m = ReduceMean<axes=[2]>(x)  d = Sub(x, m)  s = Mul(d, d)
        v = ReduceMean<axes=[2]>(s)  e = Add(v, eps)  r = Sqrt(e)  y = Div(r, d)""",
    "mean of something else": """z = Neg(x)  m = ReduceMean<axes=[2]>(z)  d = Sub(x, m)
        s = Mul(d, d)  v = ReduceMean<axes=[2]>(s)  e = Add(v, eps)  r = Sqrt(e)
        y = Div(d, r)""",
}


@pytest.mark.parametrize("name", NORMS_STAY)
def test_other_norms_stay(name):
    body = NORMS_STAY[name]
    model = load(parse(f"g (float[N,4,8] x) => (float[N,4,8] y) {{ {body} }}", **used(body)))
    assert find_layer_norms(model) == 0


def test_layer_norms_need_operator_set_17():
    body = NORM.format(square=SQUARES["product"], root=ROOTS["division"]) + " y = Identity(n)"
    model = load(parse(f"g (float[N,8] x) => (float[N,8] y) {{ {body} }}", 16, **used(body)))
    assert find_layer_norms(model) == 0


ONE_HOT = """g (int64[N,T,1] i) => (float[A,B,C] y)
    { e = Equal(i, line)  f = Cast<to=1>(e)  y = MatMul(f, w) }"""


def test_one_hot_rows_are_gathered():
    """Indices outside 0..4 have no row: zeros, to the last bit."""
    proto = parse(ONE_HOT, line=np.arange(5), w=normal(5, 3))
    feed = {"i": np.array([[[0], [4], [5]], [[-1], [2], [10**12]]])}

    def apply(model: ir.Model) -> None:
        assert gather_one_hot(model) == 1
        remove_dead(model)

    prove(proto, apply, ["Squeeze", "Clip", "Gather"], feed=feed)


ONE_HOT_STAYS = {
    "other numbers": {"line": np.arange(1, 6), "w": normal(5, 3)},
    "in another order": {"line": np.array([1, 0, 2, 3, 4]), "w": normal(5, 3)},
}


@pytest.mark.parametrize("name", ONE_HOT_STAYS)
def test_other_comparisons_stay(name):
    assert gather_one_hot(load(parse(ONE_HOT, **ONE_HOT_STAYS[name]))) == 0


def test_an_index_of_several_columns_stays():
    text = ONE_HOT.replace("int64[N,T,1]", "int64[N,T,5]")
    assert gather_one_hot(load(parse(text, line=np.arange(5), w=normal(5, 3)))) == 0


def evaluate(model: ir.Model) -> np.ndarray:
    return open_local(ir.to_proto(model).SerializeToString(), optimize=False).run({})[0]


def move_into_tables(model: ir.Model) -> None:
    tabulate(model, evaluate)
    remove_dead(model)


def test_what_is_done_to_rows_is_done_to_the_table():
    """A GELU that reads the row three times, a bias per column, a limit."""
    text = """g (int64[N,T] i) => (float[A,B,8] y) {
        a = Gather(w, i)  b = Add(beta, a)  c = Mul(b, half)  d = Tanh(b)  e = Add(d, one)
        f = Mul(c, e)  h = Clip(f, neg, two)  y = Neg(h) }"""
    proto = parse(text, **used(text) | {"w": normal(6, 8)})
    model = prove(proto, move_into_tables, ["Gather"])
    assert constant(all_nodes(model)[0].inputs[0]).shape == (6, 8)
    assert len(model.graph.initializers) == 1


TABLES_STAY = {
    "two results": """g (int64[N] i) => (float[A,8] y, float[B,8] z)
        { a = Gather(w, i)  y = Tanh(a)  z = Exp(a) }""",
    "another value": """g (int64[N] i, float[8] x) => (float[A,8] y)
        { a = Gather(w, i)  y = Add(a, x) }""",
    "a value per row": "g (int64[6] i) => (float[6,8] y) { a = Gather(w, i)  y = Add(a, square) }",
    "an operator along the row": """g (int64[N] i) => (float[A,8] y)
        { a = Gather(w, i)  y = Softmax(a) }""",
    "another axis": "g (int64[N] i) => (float[6,A] y) { a = Gather<axis=1>(w, i)  y = Tanh(a) }",
    "a large vocabulary": """g (int64[N] i) => (float[A,8] y)
        { a = Gather(words, i)  y = Tanh(a) }""",
}


@pytest.mark.parametrize("name", TABLES_STAY)
def test_tables_stay(name):
    text = TABLES_STAY[name]
    weights = {"w": normal(6, 8), "square": normal(6, 8), "words": normal(5000, 8)}
    model = load(parse(text, **{k: v for k, v in weights.items() if k in text}))
    before = ops(model)
    move_into_tables(model)
    assert ops(model) == before


SWISH = {
    "product, then division": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c)"
    " y = Div(m, six)",
    "division, then product": "a = Add(three, x) c = Clip(a, zero, six) d = Div(c, six)"
    " y = Mul(x, d)",
    "times a sixth": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(c, x) y = Mul(m, sixth)",
    "factor first": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, sixth) y = Mul(m, c)",
    "hard sigmoid": "h = HardSigmoid<alpha=0.16666667,beta=0.5>(x) y = Mul(h, x)",
    "limits 0 and 1": "b = Div(x, six) a = Add(b, half) c = Clip(a, zero, one) y = Mul(c, x)",
    "relu and minimum": "a = Add(x, three) b = Relu(a) c = Min(b, six) m = Mul(x, c)"
    " y = Div(m, six)",
}


def canonical(text: str, opset: int = 17) -> tuple[list[str], float]:
    """Operators after canonical_activations, and the largest error in eps of the largest value."""
    proto = parse(text, opset, **used(text))
    data = proto.SerializeToString(deterministic=True)
    after = canonical_activations(proto)
    assert proto.SerializeToString(deterministic=True) == data
    onnx.checker.check_model(after)
    feed = {"x": np.linspace(-8, 8, 321, dtype=F).reshape(1, 3, 107)}
    (a,), (b,) = run(proto, feed), run(after, feed)
    error = float(np.abs(a - b).max() / (EPS * np.abs(a).max()))
    return [n.op_type for n in after.graph.node], error


@pytest.mark.parametrize("name", SWISH)
def test_hard_swish_is_found(name):
    text = f"g (float[1,3,N] x) => (float[1,3,N] y) {{ {SWISH[name]} }}"
    operators, error = canonical(text)
    assert operators == ["HardSwish"]
    assert error < 4


def test_hard_swish_with_another_factor_keeps_it():
    text = """g (float[1,3,N] x) => (float[1,3,N] y)
        { a = Add(x, three) c = Clip(a, zero, six) y = Mul(x, c) }"""
    operators, error = canonical(text)
    assert operators == ["HardSwish", "Mul"]
    assert error < 4


def test_hard_sigmoid_is_found():
    text = """g (float[1,3,N] x) => (float[1,3,N] y)
        { a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six) }"""
    operators, error = canonical(text)
    assert operators == ["HardSigmoid"]
    assert error < 4


SWISH_STAYS = {
    "another shift": "a = Add(x, two) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",
    "another value": "a = Add(x, three) c = Clip(a, zero, six) z = Exp(x) m = Mul(z, c)"
    " y = Div(m, six)",
    "another limit": "a = Add(x, three) c = Clip(a, neg, six) m = Mul(x, c) y = Div(m, six)",
    "relu6": "y = Clip(x, zero, six)",
}


@pytest.mark.parametrize("name", SWISH_STAYS)
def test_other_activations_are_no_hard_swish(name):
    text = f"g (float[1,3,N] x) => (float[1,3,N] y) {{ {SWISH_STAYS[name]} }}"
    operators, error = canonical(text)
    assert "HardSwish" not in operators
    assert error < 4


def test_hard_swish_needs_operator_set_14():
    text = f"g (float[1,3,N] x) => (float[1,3,N] y) {{ {SWISH['times a sixth']} }}"
    assert "HardSwish" not in canonical(text, 13)[0]


GELU = """g (float[1,4,8] x) => (float[1,4,8] y) {
    a = Mul(x, root)  b = Erf(a)  c = Add(b, one)  d = Mul(c, half)  y = Mul(x, d)
}"""


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        ({}, True),
        ({"d = Mul(c, half)": "d = Mul(half, c)", "y = Mul(x, d)": "y = Mul(d, x)"}, True),
        ({"c = Add(b, one)": "c = Add(one, b)"}, True),
        ({"c = Add(b, one)": "c = Add(b, two)"}, False),
        ({"d = Mul(c, half)": "d = Mul(c, third)"}, False),
        ({"y = Mul(x, d)": "e = Mul(x, d)  y = Add(e, d)"}, False),
    ],
)
def test_gelu_in_the_order_that_the_runtime_fuses(change: dict[str, str], fused: bool) -> None:
    text = GELU
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    before = parse(text, **used(text), root=F(0.5**0.5))
    model = load(before)
    assert order_gelus(model) == fused
    remove_dead(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after)
    x = np.linspace(-9, 9, 32, dtype=np.float32).reshape(1, 4, 8)
    # Halving rounds nothing, so the order of factors changes no bit.
    same = [
        open_local(m.SerializeToString(), optimize=False).run({"x": x})[0] for m in (before, after)
    ]
    np.testing.assert_array_equal(*same)
    assert order_gelus(model) == 0
