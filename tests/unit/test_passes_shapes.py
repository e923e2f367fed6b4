"""Shape inference beyond onnx's, shape graphs resolved, input shapes set."""

import numpy as np
import onnx_ir as ir
import pytest
from test_passes_support import load, ops, parse, prove

from edgewright.errors import BadInput
from edgewright.passes.branches import decide_branches
from edgewright.passes.constants import fold_constants
from edgewright.passes.duplicates import remove_dead
from edgewright.passes.edit import all_nodes, dims, integers
from edgewright.passes.entries import combine, follow
from edgewright.passes.inputs import forget_shapes, set_input_shapes
from edgewright.passes.shapes import infer, resolve_shapes


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def resolve(model: ir.Model) -> None:
    resolve_shapes(model)
    remove_dead(model)


def targets(model: ir.Model) -> list[list[int] | None]:
    """The stored targets of all Reshape nodes."""
    return [integers(n.inputs[1]) for n in all_nodes(model) if n.op_type == "Reshape"]


HEADS = """g (float[batch,seq,12] x) => (float[N,M,3,4] y) {
    s = Shape(x)
    b = Gather<axis=0>(s, zero)   b1 = Unsqueeze(b, axis)
    t = Gather<axis=0>(s, one)    t1 = Unsqueeze(t, axis)
    target = Concat<axis=0>(b1, t1, heads)
    y = Reshape(x, target)
}"""


def test_a_target_of_copied_dimensions_is_stored():
    weights = {"zero": np.int64(0), "one": np.int64(1), "axis": ints(0), "heads": ints(3, -1)}
    model = prove(parse(HEADS, **weights), resolve, ["Reshape"])
    assert targets(model) == [[0, 0, 3, -1]]


def test_an_unknown_dimension_becomes_the_rest():
    text = """g (float[batch,6] x, float[n,2] w) => (float[A,B] y) {
        s = Shape(w)  n1 = Slice(s, zero, one)  target = Concat<axis=0>(n1, six)
        y = Reshape(x, target) }"""
    model = load(parse(text, zero=ints(0), one=ints(1), six=ints(6)))
    resolve(model)
    assert targets(model) == [[-1, 6]]


NOT_STORED = {
    "two dimensions that are not the input's": """g (float[batch,6] x, float[n,m] w)
        => (float[A,B] y) { s = Shape(w)  y = Reshape(x, s) }""",
    "a target of data": """g (float[batch,6] x, int64[2] s) => (float[A,B] y)
        { y = Reshape(x, s) }""",
}


@pytest.mark.parametrize("name", NOT_STORED)
def test_a_target_that_is_not_known_stays(name):
    model = load(parse(NOT_STORED[name]))
    before = ops(model)
    resolve(model)
    assert ops(model) == before


ALLOW_ZERO = """g (float[batch,6] x) => (float[A,B,C] y) {
    s = Shape(x)  n = Gather(s, place)  target = Concat<axis=0>(n, rest)
    y = Reshape<allowzero=1>(x, target) }"""


def test_zero_copies_again_where_none_meant_empty():
    proto = parse(ALLOW_ZERO, place=ints(0), rest=ints(2, 3))
    model = prove(proto, resolve, ["Reshape"])
    assert targets(model) == [[0, 2, 3]]
    assert "allowzero" not in all_nodes(model)[0].attributes


def test_an_empty_dimension_stays_one():
    model = load(parse(ALLOW_ZERO, place=ints(0), rest=ints(0, 3)))
    before = ops(model)
    resolve(model)
    assert ops(model) == before


def test_numbers_are_stored():
    text = """g (float[batch,5,7] x) => (int64[1] y) {
        s = Shape(x)  t = Slice(s, start, end, axis, step)  p = ReduceProd<keepdims=1>(t)
        q = Div(p, two)  r = Cast<to=6>(q)  u = Cast<to=7>(r)  y = Identity(u) }"""
    weights = {"start": ints(-1), "end": ints(0), "axis": ints(0), "step": ints(-1)}
    model = prove(parse(text, two=np.int64(2), **weights), resolve, ["Identity"])
    assert integers(all_nodes(model)[-1].inputs[0]) == [17]


def test_a_number_times_zero_is_zero_whatever_the_number():
    text = """g (int64 n, float[2] x) => (float[2] y)
        { z = Mul(n, zero) f = Cast<to=1>(z) y = Add(x, f) }"""
    proto = parse(text, zero=np.int64(0))
    prove(proto, lambda m: (resolve_shapes(m), fold_constants(m), remove_dead(m)), ["Add"])


def test_expand_to_the_own_shape_goes():
    text = """g (float[batch,1,4] x) => (float[A,B,C] y) {
        s = Shape(x)  a = Expand(x, s)  b = Expand(a, ones)  c = Expand(b, three)  y = Neg(c) }"""
    proto = parse(text, ones=ints(1, 1), three=ints(3, 1))
    prove(proto, resolve, ["Expand", "Neg"])


COMBINED = [
    ("Add", 2, 3, 5),
    ("Div", -7, 2, -3),
    ("Div", 7, -2, -3),
    ("Div", 1, 0, None),
    ("Mul", "n", 1, "n"),
    ("Mul", 0, None, 0),
    ("Mul", "n", 2, None),
    ("Add", 0, "n", "n"),
    ("Sub", 0, "n", None),
    ("Sub", "n", 0, "n"),
    ("Max", "n", "n", "n"),
    ("Equal", "n", "n", 1),
    ("Equal", "n", -1, 0),
    ("Equal", "n", 1, None),
    ("Equal", None, -1, None),
    ("Less", "n", 0, None),
]


@pytest.mark.parametrize(("operator", "a", "b", "expected"), COMBINED)
def test_entries_combine(operator, a, b, expected):
    assert combine(operator, a, b) == expected


def test_a_negative_size_is_replaced_as_exporters_write_it():
    """where(equal(target, -1), ones, target): how exporters write expand(..., -1, ...)."""
    text = """g (float[batch,seq] x, float[batch,1] v) => (float[A,B] y) {
        s = Shape(x)  last = Slice(s, one, two)
        n = ConstantOfShape<value: tensor = int64[1] {1}>(two)  t = Mul(n, minus)
        keep = Concat<axis=0>(minus, last)  e = Equal(keep, t)
        w = Where(e, n, keep)  y = Expand(v, w) }"""
    proto = parse(text, two=ints(2), one=ints(1), minus=ints(-1))
    model = load(proto)
    known = {v.name: e for v, e in follow(model).items()}
    assert known["keep"] == [-1, "seq"]
    assert known["w"] == [1, "seq"]
    assert dims(model.graph.outputs[0]) == ["A", "B"]


SYMBOLS = {
    "broadcast of equal names": ("z = Add(x, x)", ["batch", "seq", 8]),
    "power": ("z = Pow(x, two)", ["batch", "seq", 8]),
    "a name beside a number above 1": ("z = Add(x, five)", ["batch", 5, 8]),
    "reshape that splits": ("z = Reshape(x, split)", ["batch", "seq", 4, 2]),
    "reshape with the rest": ("z = Reshape(x, rest)", ["batch", "seq", 2, 4]),
    "slice of another axis": ("z = Slice(x, zero, four, last)", ["batch", "seq", 4]),
    "pad of another axis": ("z = Pad(x, pads)", ["batch", "seq", 9]),
    "table up to a free length": (
        "s = Shape(x)  n = Slice(s, one, two1)  t = Slice(table, zero, n, one)  z = Add(x, t)",
        ["batch", "seq", 8],
    ),
    "range over a free length": (
        "s = Shape(x)  n = Gather(s, i1)  t = Range(i0, n, i1)  z = Unsqueeze(t, zero)",
        [1, "seq"],
    ),
    "scores of an attention": (
        "k = Transpose<perm=[0,2,1]>(x)  z = MatMul(x, k)",
        ["batch", "seq", "seq"],
    ),
}


@pytest.mark.parametrize("name", SYMBOLS)
def test_names_of_free_dimensions_are_kept(name):
    body, expected = SYMBOLS[name]
    text = f"g (float[batch,seq,8] x) => (float[A] y) {{ {body}  y = Identity(z) }}"
    weights = {
        "two": np.float32(2),
        "five": np.zeros((1, 5, 8), np.float32),
        "split": ints(0, 0, 4, 2),
        "rest": ints(0, 0, -1, 4),
        "zero": ints(0),
        "one": ints(1),
        "two1": ints(2),
        "four": ints(4),
        "last": ints(2),
        "pads": ints(0, 0, 0, 0, 0, 1),
        "table": np.zeros((1, 16, 8), np.float32),
        "i0": np.int64(0),
        "i1": np.int64(1),
    }
    model = load(parse(text, **weights))
    (z,) = [o for n in all_nodes(model) for o in n.outputs if o.name == "z"]
    assert dims(z) == expected


def test_different_names_are_not_merged():
    text = "g (float[n,4] x, float[m,4] w) => (float[k,4] y) { y = Add(x, w) }"
    model = load(parse(text))
    assert [dims(v) for v in model.graph.inputs] == [["n", 4], ["m", 4]]
    assert dims(model.graph.outputs[0]) == ["k", 4]


BRANCHES = """g (float[batch,4,len] x) => (float[A,B,C,D] y) {
    s = Shape(x)  n = Gather(s, two)  c = Equal(n, one)
    e = If (c) <
        then_branch = a () => (float[P,Q] t) { t = Squeeze(x, last) },
        else_branch = b () => (float[P,Q,R] u) { u = Identity(x) }
    >
    f = Unsqueeze(e, zero)
    y = LSTM<hidden_size=2>(f, w, r)
}"""


def branch_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "two": np.int64(2),
        "one": np.int64(1),
        "zero": ints(0),
        "last": ints(2),
        "w": rng.normal(size=(1, 8, 4)).astype(np.float32),
        "r": rng.normal(size=(1, 8, 2)).astype(np.float32),
    }


def test_a_branch_of_the_wrong_rank_is_never_taken():
    proto = parse(BRANCHES, **branch_weights())
    feed = {"x": np.ones((3, 4, 1), np.float32)}

    def apply(model: ir.Model) -> None:
        assert decide_branches(model) == 1
        fold_constants(model)
        remove_dead(model)

    prove(proto, apply, ["Squeeze", "Unsqueeze", "LSTM"], feed=feed)


def test_branches_of_equal_rank_stay():
    text = """g (bool c, float[3,4] x) => (float[3,4] y) {
        e = If (c) <
            then_branch = a () => (float[3,4] t) { t = Neg(x) },
            else_branch = b () => (float[3,4] u) { u = Abs(x) }
        >
        y = Relu(e) }"""
    assert decide_branches(load(parse(text))) == 0


def test_input_shapes_are_set_and_shared_names_follow():
    text = """g (float[N,T] x, float[N,H] s) => (float[N,Q] y, float[U,V] z) {
        y = Neg(x)  z = Abs(s) }"""
    model = load(parse(text))
    changed, notes = set_input_shapes(model, {"x": ["batch", 16], "s": ["batch", "H"]})
    assert (changed, notes) == (3, [])
    assert [dims(v) for v in model.graph.inputs] == [["batch", 16], ["batch", "H"]]
    assert [dims(v) for v in model.graph.outputs] == [["batch", "Q"], ["U", "V"]]


def test_fixing_the_batch_fixes_it_in_the_outputs():
    text = "g (float[N,T] x) => (float[N,T] y) { a = Neg(x)  y = Relu(a) }"
    model = load(parse(text))
    set_input_shapes(model, {"x": [1, "T"]})
    forget_shapes(model)
    infer(model)
    assert dims(model.graph.outputs[0]) == [1, "T"]
    assert dims(all_nodes(model)[0].outputs[0]) == [1, "T"]


def test_a_name_for_a_fixed_dimension_is_told():
    model = load(parse("g (float[1,8] x) => (float[1,8] y) { y = Neg(x) }"))
    changed, notes = set_input_shapes(model, {"x": ["batch", 8]})
    assert changed == 0
    assert len(notes) == 1 and "fixed to 1" in notes[0]


WRONG = {
    "no such input": ({"q": [1, 8]}, "no input of that name"),
    "rank": ({"x": [1, 8, 1]}, "2 dimensions"),
    "number": ({"x": [4, 8]}, "1, which the model fixes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_shapes_are_errors(name):
    shapes, said = WRONG[name]
    model = load(parse("g (float[1,8] x) => (float[1,8] y) { y = Neg(x) }"))
    with pytest.raises(BadInput, match=said):
        set_input_shapes(model, shapes)
