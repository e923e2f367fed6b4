"""The rules, one by one, on tiny graphs whose units are counted by hand.

Labels are written as letters in the order of their numbers, '.' where an index is frozen. The
first and the last layer of most graphs are there to give indices an owner that may lose them.
"""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from edgewright.prune.cut import cut
from edgewright.prune.labels import Analysis, analyse
from edgewright.prune.rules_reshape import blocks
from edgewright.prune.untie import untie
from edgewright.runtime.local import open_local


def built(body: str, opset: int = 18, **weights: tuple[int, ...] | np.ndarray) -> onnx.ModelProto:
    """A model from its text, with weights: random of a shape, or as given."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{body}')
    rng = np.random.default_rng(0)
    for name, what in weights.items():
        values = rng.normal(0, 1, what).astype(np.float32) if isinstance(what, tuple) else what
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def see(analysis: Analysis, name: str, axis: int) -> str:
    return "".join("." if v == 0 else chr(96 + int(v)) for v in analysis.labels[name][axis])


def same(analysis: Analysis, *places: tuple[str, int]) -> str:
    """The labels all these axes have."""
    found = {see(analysis, *place) for place in places}
    assert len(found) == 1, dict(zip(places, (see(analysis, *p) for p in places), strict=True))
    return found.pop()


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def between(body: str, wide: int, out: int, **weights: tuple[int, ...] | np.ndarray) -> Analysis:
    """x (1,3,4,4) -> Conv to `wide` channels -> a ... b -> Conv from `out` channels -> y."""
    text = f"""g (float[1,3,4,4] x) => (float[1,2,P,Q] y) {{
      a = Conv (x, w)
      {body}
      y = Conv (b, v)
    }}"""
    return analyse(built(text, w=(wide, 3, 1, 1), v=(2, out, 1, 1), **weights))


def test_convolutions():
    a = between("b = Relu(a)", 3, 3)
    assert same(a, ("w", 0), ("a", 1), ("b", 1), ("v", 1)) == "abc"
    assert same(a, ("x", 1), ("w", 1)) == "..."
    assert same(a, ("y", 1), ("v", 0)) == ".."
    assert see(a, "a", 2) == "...."


def test_depthwise_convolution_with_a_multiplier():
    a = between("b = Conv <group=3> (a, d, e)", 3, 6, d=(6, 1, 1, 1), e=(6,))
    assert same(a, ("w", 0), ("a", 1)) == "abc"
    assert same(a, ("d", 0), ("e", 0), ("b", 1), ("v", 1)) == "aabbcc"
    small, _ = cut_of(a, {2}, "b = Conv <group=3> (a, d, e)", 3, 6, d=(6, 1, 1, 1), e=(6,))
    node = next(n for n in small.graph.node if n.output[0] == "b")
    assert [attr.i for attr in node.attribute if attr.name == "group"] == [2]


def cut_of(
    analysis: Analysis, remove: set[int], body: str, wide: int, out: int, **weights: object
) -> tuple[onnx.ModelProto, dict]:
    text = f"""g (float[1,3,4,4] x) => (float[1,2,P,Q] y) {{
      a = Conv (x, w)
      {body}
      y = Conv (b, v)
    }}"""
    model = built(text, w=(wide, 3, 1, 1), v=(2, out, 1, 1), **weights)  # type: ignore[arg-type]
    return cut(model, analysis, remove)


def test_grouped_convolution_ties_the_same_place_in_each_group():
    a = between("b = Conv <group=2> (a, d)", 4, 6, d=(6, 2, 1, 1))
    assert same(a, ("w", 0), ("a", 1)) == "abab"
    assert see(a, "d", 1) == "ab"
    assert same(a, ("d", 0), ("b", 1), ("v", 1)) == "cdecde"


def test_transposed_convolutions():
    a = between("b = ConvTranspose (a, d, e)", 2, 3, d=(2, 3, 1, 1), e=(3,))
    assert same(a, ("w", 0), ("a", 1), ("d", 0)) == "ab"
    assert same(a, ("d", 1), ("e", 0), ("b", 1)) == "cde"
    a = between("b = ConvTranspose <group=3> (a, d)", 3, 3, d=(3, 1, 1, 1))
    assert same(a, ("a", 1), ("d", 0), ("b", 1), ("v", 1)) == "abc"
    a = between("b = ConvTranspose <group=2> (a, d)", 4, 6, d=(4, 3, 1, 1))
    assert same(a, ("a", 1), ("d", 0)) == "abab"
    assert (see(a, "d", 1), see(a, "b", 1)) == ("cde", "cdecde")


@pytest.mark.parametrize("side", ["transB=0", "transB=1"])
def test_gemm(side):
    text = f"""g (float[N,3] x) => (float[N,2] y) {{
      a = Gemm <{side}> (x, w, c)
      y = Gemm <{side}> (a, v)
    }}"""
    shapes = {"w": (3, 4), "v": (4, 2)}
    if side == "transB=1":
        shapes = {name: shape[::-1] for name, shape in shapes.items()}
    a = analyse(built(text, **shapes, c=(4,)))
    k = 1 if side == "transB=1" else 0
    assert same(a, ("w", 1 - k), ("c", 0), ("a", 1), ("v", k)) == "abcd"


def test_weights_on_the_left_of_a_product():
    text = """g (float[3,N] x) => (float[2,N] y) {
      a = MatMul (w, x)
      y = MatMul (v, a)
    }"""
    a = analyse(built(text, w=(4, 3), v=(2, 4)))
    assert same(a, ("w", 0), ("a", 0), ("v", 1)) == "abcd"


def test_einsum():
    text = """g (float[1,5,3] x) => (float[1,5,2] y) {
      a = Einsum <equation="btc,oc->bto"> (x, w)
      y = Einsum <equation="bto,op->btp"> (a, v)
    }"""
    a = analyse(built(text, w=(4, 3), v=(4, 2)))
    assert same(a, ("w", 0), ("a", 2), ("v", 0)) == "abcd"
    strange = text.replace("btc,oc->bto", "...c,oc->...o")
    (row,) = analyse(built(strange, w=(4, 3), v=(4, 2))).frozen
    assert row["op"] == "Einsum" and "outside" in row["reason"]


def test_batch_normalization_and_squeeze_and_excite():
    body = """n = BatchNormalization (a, s, o, m, r)
      p = GlobalAveragePool (n)
      q = Conv (p, d)
      u = Relu (q)
      t = Conv (u, e)
      f = Sigmoid (t)
      b = Mul (n, f)"""
    vectors = dict.fromkeys("somr", (3,))
    a = between(body, 3, 3, **vectors, d=(2, 3, 1, 1), e=(3, 2, 1, 1))
    places = [("w", 0), ("s", 0), ("r", 0), ("d", 1), ("e", 0), ("f", 1), ("b", 1), ("v", 1)]
    assert same(a, *places) == "abc"
    assert same(a, ("d", 0), ("e", 1)) == "de"


def test_broadcast_of_a_dimension_of_1_ties_nothing():
    body = """s = Conv (x, d)
      b = Mul (a, s)"""
    a = between(body, 3, 3, d=(1, 3, 1, 1))
    assert same(a, ("a", 1), ("b", 1)) == "abc"
    assert see(a, "s", 1) == "."


def test_concat_and_split():
    body = """c = Conv (x, d)
      j = Concat <axis=1> (a, c)
      p, b = Split <axis=1> (j, k)
      z = Relu (p)"""
    a = between(body, 3, 3, d=(2, 3, 1, 1), k=ints(2, 3))
    assert see(a, "j", 1) == "abcde"
    assert (see(a, "p", 1), see(a, "b", 1), see(a, "v", 1)) == ("ab", "cde", "cde")
    assert (see(a, "w", 0), see(a, "d", 0)) == ("abc", "de")


def test_slice_gather_and_pad_move_channels():
    a = between("b = Slice (a, s, e, c)", 5, 3, s=ints(1), e=ints(-1), c=ints(1))
    assert (see(a, "a", 1), see(a, "b", 1)) == ("abcde", "bcd")
    a = between("b = Slice (a, s, e, c, t)", 4, 2, s=ints(0), e=ints(9), c=ints(1), t=ints(2))
    assert same(a, ("b", 1), ("v", 1)) == ".." and see(a, "a", 1) == "...."
    a = between("b = Gather <axis=1> (a, i)", 3, 4, i=ints(2, 0, -1, 1))
    assert same(a, ("b", 1), ("v", 1)) == "cacb"
    a = between("b = Pad (a, p)", 3, 5, p=ints(0, 1, 0, 0, 0, 1, 0, 0))
    assert same(a, ("b", 1), ("v", 1)) == ".abc."


def test_rewritten_bounds_and_indices():
    body, sizes = "b = Gather <axis=1> (a, i)", {"i": ints(2, 0, -1, 1)}
    small, kept = cut_of(between(body, 3, 4, **sizes), {1}, body, 3, 4, **sizes)
    stored = {t.name: numpy_helper.to_array(t) for t in small.graph.initializer}
    node = next(n for n in small.graph.node if n.op_type == "Gather")
    assert stored[node.input[1]].tolist() == [1, 1, 0]
    assert kept["b", 1].tolist() == [0, 2, 3]
    body = "b = Slice (a, s, e, c)"
    sizes = {"s": np.array([-4], np.int32), "e": np.array([99], np.int32)}
    sizes["c"] = np.array([1], np.int32)
    small, _ = cut_of(between(body, 5, 4, **sizes), {1, 3}, body, 5, 4, **sizes)
    stored = {t.name: numpy_helper.to_array(t) for t in small.graph.initializer}
    node = next(n for n in small.graph.node if n.op_type == "Slice")
    assert [stored[name].tolist() for name in node.input[1:]] == [[0], [3], [1], [1]]
    assert {stored[name].dtype for name in node.input[1:]} == {np.dtype(np.int64)}


def test_depth_to_space_in_both_orders():
    for mode, order in (("DCR", "abababab"), ("CRD", "aaaabbbb")):
        a = between(f'b = DepthToSpace <blocksize=2, mode="{mode}"> (a)', 8, 2)
        assert (see(a, "a", 1), see(a, "b", 1)) == (order, "ab")
    a = between("b = SpaceToDepth <blocksize=2> (a)", 2, 8)
    assert same(a, ("b", 1), ("v", 1)) == "abababab"


def test_tile_and_expand():
    a = between("b = Tile (a, r)", 2, 4, r=ints(1, 2, 1, 1))
    assert same(a, ("b", 1), ("v", 1)) == "abab"
    body = """p = GlobalMaxPool (a)
      b = Expand (p, t)"""
    assert same(between(body, 2, 2, t=ints(1, 2, 4, 4)), ("a", 1), ("b", 1)) == "ab"


def test_softmax_and_reductions_over_channels():
    assert not between("b = Softmax <axis=1> (a)", 3, 3).groups
    assert not between("b = ReduceMax <keepdims=1> (a, k)", 3, 1, k=ints(1)).groups
    body = """m = ReduceMean <keepdims=1> (a, k)
      b = Sub (a, m)"""
    (group,) = between(body, 3, 3, k=ints(1)).groups
    assert not group.exact and len(group.units) == 3


def test_flatten_takes_a_hyperplane_with_a_channel():
    text = """g (float[N,3,2,2] x) => (float[N,2] y) {
      a = Conv (x, w)
      f = Flatten (a)
      y = MatMul (f, v)
    }"""
    a = analyse(built(text, w=(2, 3, 1, 1), v=(8, 2)))
    assert same(a, ("f", 1), ("v", 0)) == "aaaabbbb"


def test_channel_shuffle():
    body = """r = Reshape (a, k)
      t = Transpose <perm=[0,2,1,3,4]> (r)
      b = Reshape (t, j)"""
    a = between(body, 8, 8, k=ints(0, 2, 4, 4, 4), j=ints(0, 8, 4, 4))
    # Four units of two channels; the other way, two of four, would be no choice.
    assert same(a, ("a", 1), ("w", 0)) == "abcdabcd"
    assert same(a, ("b", 1), ("v", 1)) == "aabbccdd"
    assert a.policy == "inner"


@pytest.mark.parametrize(
    ("x", "y", "found"),
    [
        ([2, 12], [2, 3, 4], [([1], [1, 2]), ([0], [0])]),
        (["N", "T", 12], ["N", "T", 3, 4], [([2], [2, 3]), ([1], [1]), ([0], [0])]),
        ([4, 6], [6, 4], [([0, 1], [0, 1])]),
        (["N", 4, 5], [None, 5], [([2], [1])]),
        (["N", 3, "H", "W"], ["N", 3, None], [([0], [0]), ([1], [1])]),
        ([1, 6, 1, 1], [6], [([1], [0])]),
        ([0, 6], [6, 0], []),
    ],
)
def test_reshapes_are_cut_into_blocks(x, y, found):
    assert blocks(x, y) == found


HEADS = """g (float[1,5,6] x) => (float[1,5,2] y) {
  p = MatMul (x, w)
  r = Reshape (p, k)
  t = Transpose <perm=[2,0,3,1,4]> (r)
  q0, q1, q2 = Split <axis=0, num_outputs=3> (t)
  a = Squeeze (q0, z)
  b = Squeeze (q1, z)
  c = Squeeze (q2, z)
  d = Transpose <perm=[0,1,3,2]> (b)
  s = MatMul (a, d)
  f = Softmax <axis=-1> (s)
  o = MatMul (f, c)
  u = Transpose <perm=[0,2,1,3]> (o)
  e = Reshape (u, j)
  y = MatMul (e, v)
}"""


def test_heads_of_a_packed_projection():
    weights = {"w": (6, 12), "v": (4, 2), "k": ints(0, 0, 3, 2, 2), "z": ints(0)}
    model = built(HEADS, **weights, j=ints(0, 0, 4))
    a = analyse(model)
    (group,) = a.groups
    assert (group.kind, group.exact, group.slices) == ("heads", True, (("w", 1), ("v", 0)))
    assert see(a, "w", 1) == "aabbaabbaabb"
    assert see(a, "s", 1) == "ab"
    small, _ = cut(model, a, [1])
    x = {"x": np.random.default_rng(1).normal(size=(1, 5, 6)).astype(np.float32)}
    # One head by hand.
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    q, k, v = (x["x"][0] @ stored["w"][:, i : i + 2] for i in (2, 6, 10))
    scores = np.exp(q @ k.T)
    want = scores / scores.sum(1, keepdims=True) @ v @ stored["v"][2:]
    got = open_local(small.SerializeToString()).run(x)[0][0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_hidden_units(op, gates):
    """A bidirectional layer and one on top: rows of every gate, recurrence, both bias halves."""
    text = f"""g (float[5,1,3] x) => (float[5,1,2] y) {{
      a = {op} <hidden_size=2, direction="bidirectional"> (x, w, r, b)
      t = Transpose <perm=[0,2,1,3]> (a)
      c = Reshape (t, k)
      d, h = {op} <hidden_size=3> (c, u, q)
      e = Squeeze (d, z)
      y = MatMul (e, v)
    }}"""
    shapes = {"w": (2, 2 * gates, 3), "r": (2, 2 * gates, 2), "b": (2, 4 * gates)}
    shapes |= {"u": (1, 3 * gates, 4), "q": (1, 3 * gates, 3), "v": (3, 2)}
    model = built(text, **shapes, k=ints(0, 0, 4), z=ints(1))
    a = analyse(model)
    first, second = a.groups
    assert (first.kind, second.kind, first.exact) == ("hidden", "hidden", True)
    assert same(a, ("w", 1), ("r", 1)) == "ab" * gates
    assert see(a, "b", 1) == "ab" * 2 * gates
    assert same(a, ("r", 2), ("a", 3)) == "ab"
    assert same(a, ("c", 2), ("u", 2)) == "abab"  # both directions lose the same unit
    assert same(a, ("q", 2), ("d", 3), ("h", 2), ("v", 0)) == "cde"
    assert see(a, "a", 1) == ".."
    small, _ = cut(model, a, [2, 3])
    sizes = [attr.i for n in small.graph.node for attr in n.attribute if attr.name == "hidden_size"]
    assert sizes == [1, 2]
    assert {t.name: list(t.dims) for t in small.graph.initializer}["u"] == [1, 2 * gates, 2]


def test_a_state_that_is_an_output_keeps_its_width():
    text = """g (float[5,1,3] x) => (float[1,1,2] h) {
      a, h = GRU <hidden_size=2> (x, w, r)
    }"""
    assert not analyse(built(text, w=(1, 6, 3), r=(1, 6, 2))).groups


def test_layer_normalization_is_the_narrow_network():
    """Against a network built with the narrow weights, not against a mask."""
    text = """g (float[N,3] x) => (float[N,2] y) {
      a = MatMul (x, w)
      b = LayerNormalization <axis=-1> (a, s, o)
      y = MatMul (b, v)
    }"""
    model = built(text, w=(3, 5), s=(5,), o=(5,), v=(5, 2))
    a = analyse(model)
    (group,) = a.groups
    assert not group.exact
    assert same(a, ("w", 1), ("s", 0), ("o", 0), ("v", 0)) == "abcde"
    small, _ = cut(model, a, [2, 4])
    x = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    left = [0, 2, 4]
    h = x @ stored["w"][:, left]
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
    want = (h * stored["s"][left] + stored["o"][left]) @ stored["v"][left]
    got = open_local(small.SerializeToString()).run({"x": x})[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_embeddings_lose_width_not_words():
    text = """g (int64[N,5] x) => (float[N,5,2] y) {
      a = Gather (w, x)
      y = MatMul (a, v)
    }"""
    a = analyse(built(text, w=(7, 3), v=(3, 2)))
    assert see(a, "w", 0) == "......."
    assert same(a, ("w", 1), ("a", 2), ("v", 0)) == "abc"


def test_unknown_operators_and_nested_graphs_freeze_what_they_touch():
    a = between("b = LRN <size=3> (a)", 3, 3)
    assert not a.groups
    (row,) = a.frozen
    assert row["op"] == "LRN" and row["reason"] == "no rule for this operator"
    text = """g (float[N,3] x, bool c) => (float[N,2] y) {
      a = MatMul (x, w)
      b = Relu (a)
      d = If (c) <then_branch = t () => (float[N,4] p) { p = Tanh (b) },
                  else_branch = e () => (float[N,4] q) { q = Sigmoid (b) }>
      f = MatMul (d, u)
      h = Relu (f)
      y = MatMul (h, v)
    }"""
    a = analyse(built(text, w=(3, 4), u=(4, 5), v=(5, 2)))
    assert see(a, "b", 1) == see(a, "d", 1) == "...."
    (group,) = a.groups
    assert group.slices == (("u", 1), ("v", 0))
    assert [row["op"] for row in a.frozen] == ["If"]


def test_a_length_that_is_read_stays():
    body = """s = Shape (a)
      i = Gather (s, k)
      f = Cast <to=1> (i)
      b = Mul (a, f)"""
    assert not between(body, 3, 3, k=np.array(1, np.int64)).groups
    assert len(between(body, 3, 3, k=np.array(0, np.int64)).groups[0].units) == 3


def test_weights_with_two_readers_lose_the_same_units():
    text = """g (float[N,3] x, float[N,3] z) => (float[N,2] y) {
      a = MatMul (x, w)
      b = MatMul (z, w)
      c = Relu (a)
      d = Mul (b, s)
      e = Concat <axis=1> (c, d)
      y = MatMul (e, v)
    }"""
    a = analyse(built(text, w=(3, 2), v=(4, 2), s=(2,)))
    assert same(a, ("a", 1), ("b", 1), ("s", 0)) == "ab"
    assert see(a, "v", 0) == "abab"


def test_equal_vectors_are_untied_and_weights_are_not():
    text = """g (float[N,3] x) => (float[N,2] y) {
      a = MatMul (x, w)
      b = Mul (a, s)
      c = MatMul (b, u)
      d = Mul (c, s)
      e = MatMul (d, u)
      y = MatMul (e, v)
    }"""
    model = built(text, w=(3, 4), u=(4, 4), v=(4, 2), s=(4,))
    assert see(analyse(model), "u", 0) == see(analyse(model), "u", 1) == "abcd"
    assert [t.name for t in untie(model).graph.initializer] == ["w", "u", "v", "s", "s_2"]
    assert same(analyse(untie(model)), ("w", 1), ("u", 0), ("u", 1), ("s_2", 0)) == "abcd"
    model = built(text.replace("(d, u)", "(d, t)"), w=(3, 4), u=(4, 4), t=(4, 4), v=(4, 2), s=(4,))
    assert len(analyse(model).groups) == 2
    assert len(analyse(untie(model)).groups) == 3


def test_a_unit_that_fills_an_axis_is_none():
    a = between("b = Conv (a, d)", 1, 3, d=(3, 1, 1, 1))
    assert (see(a, "w", 0), see(a, "d", 1), see(a, "d", 0)) == (".", ".", "abc")
    # One output per group, and the same place of each group tied: that is all there are.
    body = "b = Conv <group=2> (a, d)"
    a = between(body, 8, 2, d=(2, 4, 1, 1))
    assert (see(a, "a", 1), see(a, "b", 1)) == ("abcdabcd", "..")


def test_groups_are_the_same_in_every_run():
    body = """c = Conv (x, d)
      j = Concat <axis=1> (a, c)
      b = Relu (j)"""
    a, b = (between(body, 3, 5, d=(2, 3, 1, 1)) for _ in range(2))
    assert a.groups == b.groups
    assert [g.name for g in a.groups] == ["w", "d"]


def test_a_slice_with_computed_bounds_freezes_its_own_axis_only():
    text = """g (int64[N,S] x) => (float[N,T,2] y) {
      h = Shape <start=1, end=2> (x)
      p = Slice (w, z, h, z)
      e = Gather (u, x)
      a = Add (e, p)
      y = MatMul (a, v)
    }"""
    model = built(text, w=(9, 3), u=(7, 3), v=(3, 2), z=ints(0))
    a = analyse(model)
    assert same(a, ("w", 1), ("u", 1), ("a", 2), ("v", 0)) == "abc"
    assert see(a, "w", 0) == "........."
    small, _ = cut(model, a, [2])
    x = np.array([[3, 1, 4, 1]])
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    want = (stored["u"][x] + stored["w"][:4])[..., [0, 2]] @ stored["v"][[0, 2]]
    got = open_local(small.SerializeToString()).run({"x": x})[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_first_states_of_zeros_tie_no_layers():
    text = """g (float[5,N,3] x) => (float[5,1,N,2] y) {
      n = Shape <start=1, end=2> (x)
      t = Concat <axis=0> (o, n, k)
      m = Expand (z, t)
      s = Slice (m, i, o, i)
      a, c = GRU <hidden_size=4> (x, w, r, "", "", s)
      b = Squeeze (a, o)
      y, d = GRU <hidden_size=2> (b, u, q, "", "", f)
    }""".replace('""', "")
    shapes = {"w": (1, 12, 3), "r": (1, 12, 4), "u": (1, 6, 4), "q": (1, 6, 2)}
    zeros = {"z": np.zeros((1, 1, 4), np.float32), "f": np.zeros((1, 1, 2), np.float32)}
    model = built(text, **shapes, **zeros, o=ints(1), k=ints(4), i=ints(0))
    free = untie(model)
    assert [n.op_type for n in free.graph.node] == ["GRU", "Squeeze", "GRU"]
    x = {"x": np.random.default_rng(0).normal(size=(5, 1, 3)).astype(np.float32)}
    a, b = (open_local(m.SerializeToString()).run(x)[0] for m in (model, free))
    np.testing.assert_array_equal(a, b)
