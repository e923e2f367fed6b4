"""Folding within its limits, constants as initializers, dead and double things, names."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_passes_support import load, normal, ops, parse, prove, run

from edgewright.passes.constants import fold_constants, store_constants
from edgewright.passes.duplicates import merge_duplicates, remove_dead
from edgewright.passes.edit import all_nodes, constant
from edgewright.passes.names import assign_names, names_in

KIB = 1 << 10


def fold(model: ir.Model) -> None:
    fold_constants(model)
    remove_dead(model)


def test_a_chain_of_weights_folds():
    text = """g (float[N,4] x) => (float[N,6] y) {
        a = Transpose<perm=[1,0]>(w)  b = Unsqueeze(a, axis)  c = Reshape(b, shape)
        y = MatMul(x, c) }"""
    weights = {"w": normal(6, 4), "axis": np.array([0]), "shape": np.array([4, 6])}
    model = prove(parse(text, **weights), fold, ["MatMul"])
    np.testing.assert_array_equal(constant(all_nodes(model)[0].inputs[1]), weights["w"].T)


def test_a_large_weight_that_is_read_once_folds():
    """600 KiB in, 600 KiB out: nothing grows."""
    text = """g (float[N,384] x) => (float[N,400] y) {
        a = Transpose<perm=[1,0]>(w)  y = MatMul(x, a) }"""
    proto = parse(text, w=normal(400, 384))
    prove(proto, fold, ["MatMul"], rounding=64)  # sums of 384 in another order


def test_a_tied_table_keeps_its_transpose():
    """1200 KiB of copy for a table that is read untransposed as well."""
    text = """g (int64[N] i) => (float[N,800] y) {
        e = Gather(w, i)  a = Transpose<perm=[1,0]>(w)  y = MatMul(e, a) }"""
    prove(parse(text, w=normal(800, 384)), fold, ["Gather", "Transpose", "MatMul"])


def test_a_table_in_half_precision_stays_so():
    text = "g (int64[N] i) => (float[N,400] y) { a = Cast<to=1>(w)  y = Gather(a, i) }"
    prove(parse(text, w=normal(2000, 400).astype(np.float16)), fold, ["Cast", "Gather"])


def test_the_limits_are_in_bytes():
    text = "g (float[256] x) => (float[256,256] y) { a = ConstantOfShape(s)  y = Add(x, a) }"
    proto = parse(text, s=np.array([256, 256]))
    kept = load(proto)
    fold_constants(kept, growth=255 * KIB)
    assert ops(kept) == ["ConstantOfShape", "Add"]
    folded = load(proto)
    fold_constants(folded, growth=256 * KIB)
    assert ops(folded) == ["Add"]
    spent = load(proto)
    fold_constants(spent, growth=256 * KIB, total=255 * KIB)
    assert ops(spent) == ["ConstantOfShape", "Add"]


NOT_FOLDED = {
    "an input": ("g (float[2] x) => (float[2] y) { y = Neg(x) }", {}),
    "random numbers": ("g () => (float[2] y) { y = RandomNormal<shape=[2]>() }", {}),
    "quantized weights": (
        "g (float[2] x) => (float[2] y) { a = DequantizeLinear(w, s)  y = Mul(x, a) }",
        {"w": np.array([1, 2], np.int8), "s": np.float32(0.5)},
    ),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_what_must_not_fold_stays(name):
    text, weights = NOT_FOLDED[name]
    model = load(parse(text, **weights))
    before = ops(model)
    fold(model)
    assert ops(model) == before


def test_constants_of_branches_become_initializers_of_the_main_graph():
    text = """g (bool c, float[2] x) => (float[2] y) {
        y = If (c) <
            then_branch = a () => (float[2] t) { k = Constant<value = float[2] {1,2}>()
                d = Neg(k)  t = Add(x, d) },
            else_branch = b () => (float[2] u) { k = Constant<value = float[2] {5,6}>()
                u = Mul(x, k) }
        > }"""
    model = prove(parse(text), fold, ["If", "Add", "Mul"])
    assert sorted(v.const_value.numpy().tolist() for v in model.graph.initializers.values()) == [
        [-1, -2],
        [5, 6],
    ]


def test_a_constant_that_is_a_branch_output_stays():
    text = """g (bool c) => (float[2] y) {
        y = If (c) <
            then_branch = a () => (float[2] t) { t = Constant<value = float[2] {1,2}>() },
            else_branch = b () => (float[2] u) { u = Constant<value = float[2] {5,6}>() }
        > }"""
    prove(parse(text), fold, ["If", "Constant", "Constant"])


def test_the_branch_that_is_taken_takes_the_place_of_the_if():
    """With names both branches share, an outer value read in one, and weights only the other
    branch reads, which must not be left behind."""
    text = """g (float[2] x) => (float[2] y) {
        h = Neg(x)
        y = If (yes) <
            then_branch = a () => (float[2] t) { k = Add(h, one)  t = Mul(k, h) },
            else_branch = b () => (float[2] u) { k = Add(h, other)  u = Mul(k, h) }
        > }"""
    weights = {
        "yes": np.array(True),
        "one": np.ones(2, np.float32),
        "other": np.full(2, 2, np.float32),
    }
    model = prove(parse(text, **weights), fold, ["Neg", "Add", "Mul"])
    assert list(model.graph.initializers) == ["one"]


def test_store_constants_keeps_all_kinds():
    text = """g (float[2] x, int64[2] i) => (float[2] y, int64[2] j) {
        a = Constant<value_float=2.5>()  b = Constant<value_ints=[3,4]>()
        y = Mul(x, a)  j = Add(i, b) }"""
    prove(parse(text), store_constants, ["Mul", "Add"])


SHAPES = st.sampled_from([(3,), (2, 3), (1, 3), (2, 1)])
FLOATS = st.floats(-4, 4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3)
INTEGERS = st.integers(-9, 9)


def arrays_of(data: st.DataObject, numbers: st.SearchStrategy, kind: type) -> list[np.ndarray]:
    """Two arrays that broadcast."""
    shapes = data.draw(st.tuples(SHAPES, SHAPES))
    lists = [data.draw(st.lists(numbers, min_size=6, max_size=6)) for _ in shapes]
    return [
        np.array(values[: int(np.prod(shape))], kind).reshape(shape)
        for values, shape in zip(lists, shapes, strict=True)
    ]


def folded_and_run(text: str, kind: str, arrays: list[np.ndarray]) -> None:
    """The stored result of `d` must be what the runtime computes for it."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g ({kind}[1] x) => ({kind} y)'
        f" {{ {text}  y = Add(d, x) }}"
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    for name, array in zip("ab", arrays, strict=True):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    feed = {"x": np.zeros(1, arrays[0].dtype)}
    (expected,) = run(proto, feed)
    model = load(proto)
    with np.errstate(all="ignore"):
        fold(model)
    assert ops(model) == ["Add"]
    (got,) = run(ir.to_proto(model), feed)
    assert got.shape == expected.shape
    if expected.dtype.kind == "f":
        np.testing.assert_array_max_ulp(np.nan_to_num(got), np.nan_to_num(expected), maxulp=1)
    else:
        np.testing.assert_array_equal(got, expected)


@settings(max_examples=50, deadline=None)
@given(
    binary=st.sampled_from(["Add", "Sub", "Mul", "Div", "Max", "Min"]),
    unary=st.sampled_from(["Neg", "Abs", "Relu", "Floor", "Ceil", "Sqrt", "Transpose"]),
    data=st.data(),
)
def test_folding_computes_what_the_runtime_computes(binary, unary, data):
    arrays = arrays_of(data, FLOATS, np.float32)
    folded_and_run(f"c = {binary}(a, b)  d = {unary}(c)", "float", arrays)


@settings(max_examples=50, deadline=None)
@given(
    binary=st.sampled_from(["Add", "Sub", "Mul", "Div", "Mod"]),
    unary=st.sampled_from(["Neg", "Abs", "Sign", "ReduceSum", "Transpose"]),
    data=st.data(),
)
def test_folding_integers_computes_what_the_runtime_computes(binary, unary, data):
    arrays = arrays_of(data, INTEGERS.filter(bool), np.int64)
    folded_and_run(f"c = {binary}(a, b)  d = {unary}(c)", "int64", arrays)


def test_dead_nodes_go_with_what_only_they_read():
    text = """g (float[2] x) => (float[2] y) {
        a = Mul(x, w)  b = Neg(a)
        c = If (yes) <
            then_branch = p () => (float[2] t) { t = Add(b, w) },
            else_branch = q () => (float[2] u) { u = Identity(b) }
        >
        y = Abs(x) }"""
    proto = parse(text, w=normal(2), yes=np.array(True))
    model = prove(proto, remove_dead, ["Abs"])
    assert not model.graph.initializers


def test_unread_outputs_of_a_read_node_stay():
    text = "g (float[4] x) => (float[2] y) { y, z = Split(x) }"
    prove(parse(text), remove_dead, ["Split"])


def test_equal_tensors_and_nodes_are_merged():
    text = """g (float[2] x) => (float[2] y) {
        a = Mul(x, v)  b = Mul(x, w)  c = Add(a, b)  d = Neg(x)  e = Neg(x)
        f = Add(d, e)  y = Add(c, f) }"""
    w = normal(2)

    def apply(model: ir.Model) -> None:
        merge_duplicates(model)
        remove_dead(model)

    model = prove(parse(text, v=w, w=w), apply, ["Mul", "Add", "Neg", "Add", "Add"])
    assert list(model.graph.initializers) == ["v"]


NOT_MERGED = {
    "another attribute": """g (float[2,2] x) => (float[2,2] y)
        { a = Softmax<axis=0>(x)  b = Softmax<axis=1>(x)  y = Add(a, b) }""",
    "random numbers": """g (float[2] x) => (float[2] y) { a = RandomNormal<shape=[2]>()
        b = RandomNormal<shape=[2]>()  c = Add(a, b)  y = Add(c, x) }""",
}


@pytest.mark.parametrize("name", NOT_MERGED)
def test_things_that_only_look_equal_stay(name):
    model = load(parse(NOT_MERGED[name]))
    before = ops(model)
    merge_duplicates(model)
    assert ops(model) == before


def test_tensors_of_another_type_or_shape_stay():
    text = (
        "g (float[1] x, double[1] z) => (float[1,1] y, double[1] q) { y = Mul(x, v) q = Mul(z, w) }"
    )
    proto = parse(text, v=np.zeros((1, 1), np.float32), w=np.zeros(1, np.float64))
    model = prove(proto, merge_duplicates, ["Mul", "Mul"])
    assert len(model.graph.initializers) == 2


def test_two_equal_outputs_keep_both_names():
    text = "g (float[2] x) => (float[2] y, float[2] z) { y = Neg(x)  z = Neg(x) }"
    prove(parse(text), merge_duplicates)


def test_names_are_unique_in_the_whole_model_and_the_same_each_time():
    text = """g (bool c, float[2] x) => (float[2] y) {
        y = If (c) <
            then_branch = a () => (float[2] t) { k = Neg(x)  t = Abs(k) },
            else_branch = b () => (float[2] t) { k = Abs(x)  t = Neg(k) }
        > }"""
    runs = []
    for _ in range(2):
        model = ir.from_proto(parse(text))
        assign_names(model, names_in(model))
        nodes = all_nodes(model)
        names = [n.name for n in nodes]
        values = [o.name for n in nodes for o in n.outputs]
        assert names == ["If_0", "Neg_1", "Abs_2", "Abs_3", "Neg_4"]
        assert len(set(values)) == len(values)
        runs.append((names, values, ir.to_proto(model).SerializeToString(deterministic=True)))
    assert runs[0] == runs[1]


def test_given_names_stay():
    proto = parse("g (float[2] x) => (float[2] y) { h = Neg(x)  y = Abs(h) }")
    proto.graph.node[0].name = "Abs_1"
    model = ir.from_proto(proto)
    assign_names(model, names_in(model))
    assert [n.name for n in all_nodes(model)] == ["Abs_1", "Abs_1_1"]
    assert [o.name for n in all_nodes(model) for o in n.outputs] == ["h", "y"]
