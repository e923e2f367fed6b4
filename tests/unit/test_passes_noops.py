"""Operators without effect: what goes, and what only looks as if it could."""

import numpy as np
import pytest
from test_passes_support import normal, parse, prove

from edgewright.passes.noops import remove_noops

IO = "g (float[N,3,4] x) => (float[A,B,C] y)"
W = {
    "zero": np.float32(0),
    "one": np.float32(1),
    "ones": np.ones((3, 1), np.float32),
    "grow": np.ones((2, 1, 1, 1), np.float32),
    "pads": np.zeros(6, np.int64),
    "pad1": np.array([0, 0, 0, 0, 0, 1]),
    "i0": np.array([0]),
    "i1": np.array([1]),
    "i2": np.array([2]),
    "i3": np.array([3]),
    "far": np.array([np.iinfo(np.int64).max]),
    "own": np.array([0, 3, 4]),
    "flat": np.array([-1, 12]),
    "back": np.array([-1, 3, 4]),
    "no": np.array(False),
    "yes": np.array(True),
    "half": np.float32(0.5),
}

GONE = {
    "identity": ("a = Identity(x)", ["Neg"]),
    "identities in a row": ("b = Identity(x) c = Identity(b) a = Identity(c)", ["Neg"]),
    "dropout": ("a = Dropout(x)", ["Neg"]),
    "dropout, training off": ("a = Dropout(x, half, no)", ["Neg"]),
    "cast to the own type": ("a = Cast<to=1>(x)", ["Neg"]),
    "cast to a wider type and back": ("b = Cast<to=11>(x) a = Cast<to=1>(b)", ["Neg"]),
    "order kept": ("a = Transpose<perm=[0,1,2]>(x)", ["Neg"]),
    "order there and back": (
        "b = Transpose<perm=[2,0,1]>(x) a = Transpose<perm=[1,2,0]>(b)",
        ["Neg"],
    ),
    "own shape": ("a = Reshape(x, own)", ["Neg"]),
    "shape there and back": ("b = Reshape(x, flat) a = Reshape(b, back)", ["Neg"]),
    "pad by nothing": ("a = Pad(x, pads)", ["Neg"]),
    "slice of all": ("a = Slice(x, i0, far, i1)", ["Neg"]),
    "slice to the size": ("a = Slice(x, i0, i3, i1)", ["Neg"]),
    "concat of one": ("a = Concat<axis=1>(x)", ["Neg"]),
    "add 0": ("a = Add(x, zero)", ["Neg"]),
    "0 add": ("a = Add(zero, x)", ["Neg"]),
    "subtract 0": ("a = Sub(x, zero)", ["Neg"]),
    "times 1 per channel": ("a = Mul(ones, x)", ["Neg"]),
    "divided by 1": ("a = Div(x, one)", ["Neg"]),
    "power 1": ("a = Pow(x, one)", ["Neg"]),
    "squeeze what was just put in": ("b = Unsqueeze(x, i2) a = Squeeze(b, i2)", ["Neg"]),
    "two orders become one": (
        "b = Transpose<perm=[2,0,1]>(x) c = Transpose<perm=[2,0,1]>(b)"
        " d = Relu(c) a = Transpose<perm=[2,0,1]>(d)",
        ["Transpose", "Relu", "Transpose", "Neg"],
    ),
}


@pytest.mark.parametrize("name", GONE)
def test_goes(name):
    body, expected = GONE[name]
    prove(parse(f"{IO} {{ {body} y = Neg(a) }}", **W), remove_noops, expected)


STAYS = {
    "dropout in training": "g (float[2] x) => (float[2] y) { y = Dropout(x, zero, yes) }",
    "cast that cuts": """g (float[2] x) => (float[2] y)
        { a = Cast<to=7>(x) y = Cast<to=1>(a) }""",
    "another order": "g (float[2,3] x) => (float[3,2] y) { y = Transpose<perm=[1,0]>(x) }",
    "order read in between": """g (float[2,3] x) => (float[2,3] y, float[3,2] z) {
        a = Transpose<perm=[1,0]>(x)  y = Transpose<perm=[1,0]>(a)  z = Neg(a) }""",
    "another shape": "g (float[2,12] x) => (float[A,B,C] y) { y = Reshape(x, back) }",
    "pad by one": "g (float[2,3,4] x) => (float[2,3,5] y) { y = Pad(x, pad1) }",
    "slice of a part": "g (float[2,5] x) => (float[2,3] y) { y = Slice(x, i0, i3, i1) }",
    "slice of a free dimension": "g (float[N,5] x) => (float[A,5] y) { y = Slice(x, i0, i3, i0) }",
    "times 1 that adds a dimension": """g (float[2,3,4] x) => (float[2,2,3,4] y)
        { y = Mul(x, grow) }""",
    "1 divided by": "g (float[2] x) => (float[2] y) { y = Div(one, x) }",
    "0 minus": "g (float[2] x) => (float[2] y) { y = Sub(zero, x) }",
    "times a half": "g (float[2] x) => (float[2] y) { y = Mul(x, half) }",
    "squeeze of another axis": """g (float[2,1] x) => (float[1,2] y)
        { a = Unsqueeze(x, i0)  y = Squeeze(a, i2) }""",
    "identity from input to output": "g (float[2] x) => (float[2] y) { y = Identity(x) }",
    "identity of a stored output": "g () => (float y) { y = Identity(half) }",
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name):
    text = STAYS[name]
    proto = parse(text, **W)
    before = [n.op_type for n in proto.graph.node]
    prove(proto, remove_noops, before)


def test_an_output_keeps_its_name():
    text = "g (float[2] x) => (float[2] out) { a = Neg(x)  b = Identity(a)  out = Identity(b) }"
    prove(parse(text), remove_noops, ["Neg"])


def test_one_value_cannot_be_two_outputs():
    text = (
        "g (float[2] x) => (float[2] y, float[2] z) { a = Neg(x) y = Identity(a) z = Identity(a) }"
    )
    prove(parse(text), remove_noops, ["Neg", "Identity"])


def test_a_branch_may_not_return_a_value_of_the_outer_graph():
    text = """g (bool c, float[2] x) => (float[2] y) {
        h = Neg(x)
        y = If (c) <
            then_branch = a () => (float[2] t) { t = Identity(h) },
            else_branch = b () => (float[2] u) { k = Identity(h)  u = Abs(k) }
        > }"""
    prove(parse(text), remove_noops, ["Neg", "If", "Identity", "Abs"])


def test_a_dropout_whose_mask_is_read_stays():
    text = "g (float[2] x) => (float[2] y, bool[2] m) { a, m = Dropout(x)  y = Neg(a) }"
    prove(parse(text), remove_noops, ["Dropout", "Neg"])


def test_weights_are_not_renamed():
    proto = parse("g (float[2] x) => (float[2] y) { a = Mul(x, w) y = Identity(a) }", w=normal(2))
    model = prove(proto, remove_noops, ["Mul"])
    assert list(model.graph.initializers) == ["w"]
