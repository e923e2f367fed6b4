"""Affine maps folded into weights: hand-computed values, every layout, and what must stay."""

import numpy as np
import onnx_ir as ir
import pytest
from test_passes_support import load, normal, ops, parse, prove

from edgewright.passes.affine import Affine, affine_of, chain_at
from edgewright.passes.duplicates import remove_dead
from edgewright.passes.edit import all_nodes, constant
from edgewright.passes.linear import fold_affine

# Folded weights are rounded once more than the results they replace: a few eps per term of a
# sum of at most 100 terms here, hence this many eps of the largest output.
ROUNDING = 50.0


def fold(model: ir.Model) -> None:
    fold_affine(model)
    remove_dead(model)


def channel(n: int, seed: int = 2) -> np.ndarray:
    return normal(n, 1, 1, seed=seed)


def statistics(n: int) -> dict[str, np.ndarray]:
    return {
        "gamma": normal(n, seed=3),
        "beta": normal(n, seed=4),
        "mean": normal(n, seed=5),
        "var": np.abs(normal(n, seed=6)) + 0.5,
    }


NORM_A, NORM_X = (
    f"BatchNormalization<epsilon=0.01>({value}, gamma, beta, mean, var)" for value in "ax"
)

BEHIND = {
    "normalization behind Conv": (
        "g (float[N,3,5,5] x) => (float[A,4,3,3] y) { a = Conv(x, w, b)  y = " + NORM_A + " }",
        {"w": normal(4, 3, 3, 3), "b": normal(4), **statistics(4)},
        ["Conv"],
    ),
    "normalization behind Conv without bias": (
        "g (float[N,3,5,5] x) => (float[A,4,3,3] y) { a = Conv(x, w)  y = " + NORM_A + " }",
        {"w": normal(4, 3, 3, 3), **statistics(4)},
        ["Conv"],
    ),
    "normalization behind depthwise Conv": (
        "g (float[N,4,5] x) => (float[A,4,3] y) { a = Conv<group=4>(x, w)  y = " + NORM_A + " }",
        {"w": normal(4, 1, 3), **statistics(4)},
        ["Conv"],
    ),
    "normalization behind grouped Conv": (
        "g (float[N,4,5] x) => (float[A,6,5] y) { a = Conv<group=2>(x, w)  y = " + NORM_A + " }",
        {"w": normal(6, 2, 1), **statistics(6)},
        ["Conv"],
    ),
    "normalization behind grouped ConvTranspose": (
        "g (float[N,4,5] x) => (float[A,6,7] y)"
        " { a = ConvTranspose<group=2>(x, w, b)  y = " + NORM_A + " }",
        {"w": normal(4, 3, 3), "b": normal(6), **statistics(6)},
        ["ConvTranspose"],
    ),
    "normalization behind Gemm": (
        "g (float[N,3] x) => (float[A,4] y)"
        " { a = Gemm<transB=1,alpha=0.5,beta=2.0>(x, w, b)  y = " + NORM_A + " }",
        {"w": normal(4, 3), "b": normal(4), **statistics(4)},
        ["Gemm"],
    ),
    "normalization behind MatMul and Add": (
        "g (float[N,3] x) => (float[A,4] y) { h = MatMul(x, w) a = Add(h, b)  y = " + NORM_A + " }",
        {"w": normal(3, 4), "b": normal(4), **statistics(4)},
        ["MatMul", "Add"],
    ),
    "scale and shift behind Conv": (
        """g (float[N,3,5,5] x) => (float[A,4,5,5] y)
        { a = Conv(x, w)  b = Mul(s, a)  c = Add(b, t)  y = Div(c, six) }""",
        {"w": normal(4, 3, 1, 1), "s": channel(4), "t": channel(4, 9), "six": np.float32(6)},
        ["Conv"],
    ),
    "constant minus Conv": (
        "g (float[N,3,5] x) => (float[A,4,5] y) { a = Conv(x, w, b)  y = Sub(t, a) }",
        {"w": normal(4, 3, 1), "b": normal(4), "t": np.float32(1.5)},
        ["Conv"],
    ),
    "negated Conv": (
        "g (float[N,3,5] x) => (float[A,4,5] y) { a = Conv(x, w, b)  y = Neg(a) }",
        {"w": normal(4, 3, 1), "b": normal(4)},
        ["Conv"],
    ),
    "bias of a Conv written as Add": (
        "g (float[N,3,5] x) => (float[A,4,5] y) { a = Conv(x, w)  y = Add(a, t) }",
        {"w": normal(4, 3, 1), "t": normal(1, 4, 1)},
        ["Conv"],
    ),
    "scale behind MatMul": (
        "g (float[2,N,3] x) => (float[2,A,4] y) { a = MatMul(x, w)  y = Mul(a, s) }",
        {"w": normal(3, 4), "s": normal(4)},
        ["MatMul"],
    ),
    "bias and scale behind MatMul": (
        """g (float[2,N,3] x) => (float[2,A,4] y)
        { a = MatMul(x, w)  b = Add(a, t)  y = Mul(b, s) }""",
        {"w": normal(3, 4), "s": normal(4), "t": normal(4, seed=8)},
        ["MatMul", "Add"],
    ),
    "in the branch of an If": (
        """g (bool c, float[2,3,5] x) => (float[2,4,5] y) {
        y = If (c) <
            then_branch = p () => (float[2,4,5] t) { a = Conv(x, w)  t = Mul(a, s) },
            else_branch = q () => (float[2,4,5] u) { d = Conv(x, w)  u = Add(d, s) }
        > }""",
        {"w": normal(4, 3, 1), "s": normal(4, 1)},
        ["If", "Conv", "Conv"],
    ),
}

IN_FRONT = {
    "normalization in front of Conv": (
        "g (float[N,4,5,5] x) => (float[A,3,3,3] y) { a = " + NORM_X + "  y = Conv(a, w, b) }",
        {"w": normal(3, 4, 3, 3), "b": normal(3), **statistics(4)},
        ["Conv"],
    ),
    "normalization in front of grouped Conv": (
        "g (float[N,4,5] x) => (float[A,6,5] y) { a = " + NORM_X + "  y = Conv<group=2>(a, w) }",
        {"w": normal(6, 2, 1), **statistics(4)},
        ["Conv"],
    ),
    "normalization in front of Gemm": (
        "g (float[N,4] x) => (float[A,3] y) { a = " + NORM_X + "  y = Gemm(a, w, b) }",
        {"w": normal(4, 3), "b": normal(3), **statistics(4)},
        ["Gemm"],
    ),
    "scale in front of padded Conv": (
        "g (float[N,4,5] x) => (float[A,3,5] y) { a = Mul(x, s)  y = Conv<pads=[1,1]>(a, w) }",
        {"w": normal(3, 4, 3), "s": normal(4, 1)},
        ["Conv"],
    ),
    "scale in front of grouped ConvTranspose": (
        "g (float[N,4,5] x) => (float[A,6,7] y)"
        " { a = Mul(x, s)  y = ConvTranspose<group=2>(a, w) }",
        {"w": normal(4, 3, 3), "s": normal(4, 1)},
        ["ConvTranspose"],
    ),
    "scale in front of MatMul": (
        "g (float[2,N,4] x) => (float[2,A,3] y) { a = Mul(x, s)  y = MatMul(a, w) }",
        {"w": normal(4, 3), "s": normal(4)},
        ["MatMul"],
    ),
    "one number passes a padded Conv, the shift stays": (
        """g (float[N,4,5] x) => (float[A,3,5] y)
        { a = Mul(x, s)  b = Add(a, t)  y = Conv<pads=[1,1]>(b, w) }""",
        {"w": normal(3, 4, 3), "s": np.float32(0.3), "t": np.float32(0.7)},
        ["Add", "Conv"],
    ),
}

ELSEWHERE = {
    "three become two": (
        """g (float[N,4,5] x) => (float[A,4,5] y)
        { r = Relu(x)  a = Div(r, six)  b = Mul(a, s)  c = Add(b, t)  y = Relu(c) }""",
        {"six": np.float32(6), "s": normal(4, 1), "t": np.float32(0.5)},
        ["Relu", "Mul", "Add", "Relu"],
    ),
    "two shifts become one": (
        """g (float[N,4] x) => (float[A,4] y)
        { r = Relu(x)  a = Add(r, s)  b = Sub(a, t)  y = Relu(b) }""",
        {"s": normal(4), "t": np.float32(0.5)},
        ["Relu", "Add", "Relu"],
    ),
}


@pytest.mark.parametrize("name", {**BEHIND, **IN_FRONT, **ELSEWHERE})
def test_folds(name):
    text, weights, expected = {**BEHIND, **IN_FRONT, **ELSEWHERE}[name]
    prove(parse(text, **weights), fold, expected, rounding=ROUNDING)


STAYS = {
    "bias of MatMul": (
        "g (float[N,3] x) => (float[A,4] y) { a = MatMul(x, w)  y = Add(a, t) }",
        {"w": normal(3, 4), "t": normal(4)},
    ),
    "shift in front of a padded Conv": (
        "g (float[N,4,5] x) => (float[A,3,5] y) { a = Add(x, t)  y = Conv<pads=[1,1]>(a, w) }",
        {"w": normal(3, 4, 3), "t": np.float32(0.7)},
    ),
    "shift in front of a Conv that pads by itself": (
        "g (float[N,4,5] x) => (float[A,3,5] y)"
        ' { a = Add(x, t)  y = Conv<auto_pad="SAME_UPPER">(a, w) }',
        {"w": normal(3, 4, 3), "t": np.float32(0.7)},
    ),
    "shift in front of ConvTranspose": (
        "g (float[N,4,5] x) => (float[A,3,7] y) { a = Add(x, t)  y = ConvTranspose(a, w) }",
        {"w": normal(4, 3, 3), "t": np.float32(0.7)},
    ),
    "a value that is read twice": (
        """g (float[N,3,5] x) => (float[A,4,5] y)
        { a = Conv(x, w)  b = Mul(a, s)  y = Add(a, b) }""",
        {"w": normal(4, 3, 1), "s": np.float32(2)},
    ),
    "a Conv that is an output": (
        "g (float[N,3,5] x) => (float[A,4,5] a, float[B,4,5] y) { a = Conv(x, w)  y = Mul(a, s) }",
        {"w": normal(4, 3, 1), "s": np.float32(2)},
    ),
    "factors along the width": (
        "g (float[N,3,5] x) => (float[A,4,5] y) { a = Conv(x, w)  y = Mul(a, s) }",
        {"w": normal(4, 3, 1), "s": normal(5)},
    ),
    "factors along two axes": (
        "g (float[N,3,5] x) => (float[A,4,5] y) { a = Conv(x, w)  y = Mul(a, s) }",
        {"w": normal(4, 3, 1), "s": normal(4, 5)},
    ),
    "one channel that grows to four": (
        "g (float[N,3,5] x) => (float[A,4,5] y) { a = Conv(x, w)  y = Mul(a, s) }",
        {"w": normal(1, 3, 1), "s": normal(4, 1)},
    ),
    "channels that are not the last axis": (
        "g (float[N,4,3] x) => (float[A,4,5] y) { a = MatMul(x, w)  y = " + NORM_A + " }",
        {"w": normal(3, 5), **statistics(4)},
    ),
    "a number divided by": (
        "g (float[N,3,5] x) => (float[A,4,5] y) { a = Conv(x, w)  y = Div(s, a) }",
        {"w": normal(4, 3, 1), "s": np.float32(2)},
    ),
    "normalization in training": (
        """g (float[2,3,5] x) => (float[A,4,5] y) { a = Conv(x, w)
        y, m, v = BatchNormalization<training_mode=1>(a, gamma, beta, mean, var) }""",
        {"w": normal(4, 3, 1), **statistics(4)},
    ),
    "weights that are computed": (
        "g (float[N,3,5] x, float[4,3,1] w) => (float[A,4,5] y) { a = Conv(x, w)  y = Mul(a, s) }",
        {"s": np.float32(2)},
    ),
    "the last factor of a GELU": (
        """g (float[N,4] x) => (float[A,3] y) {
        a = Div(x, root)  b = Erf(a)  c = Add(b, one)  d = Mul(x, c)  e = Mul(d, half)
        y = MatMul(e, w) }""",
        {
            "root": np.float32(2**0.5),
            "one": np.float32(1),
            "half": np.float32(0.5),
            "w": normal(4, 3),
        },
    ),
    "whole numbers": (
        "g (int64[N] x) => (int64[A] y) { a = Mul(x, s)  y = Mul(a, s) }",
        {"s": np.int64(2)},
    ),
    "factors whose product underflows": (
        """g (float[N,4] x) => (float[A,4] y)
        { r = Relu(x)  a = Mul(r, s)  y = Mul(a, s) }""",
        {"s": np.float32(1e-30)},
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name):
    text, weights = STAYS[name]
    model = load(parse(text, **weights))
    before = ops(model)
    fold(model)
    assert ops(model) == before


def test_conv_then_normalization_by_hand():
    """w = 2, b = 1; gamma = 3, beta = 5, mean = 4, var + eps = 4: scale 1.5, shift -1.
    (2 x + 1) * 1.5 - 1 = 3 x + 0.5."""
    text = "g (float[1,1,2] x) => (float[1,1,2] y) { a = Conv(x, w, b)  y = " + NORM_A + " }"
    weights = {
        "w": np.full((1, 1, 1), 2, np.float32),
        "b": np.ones(1, np.float32),
        "gamma": np.full(1, 3, np.float32),
        "beta": np.full(1, 5, np.float32),
        "mean": np.full(1, 4, np.float32),
        "var": np.full(1, 3.99, np.float32),
    }
    model = load(parse(text, **weights))
    fold(model)
    (conv,) = all_nodes(model)
    np.testing.assert_allclose(constant(conv.inputs[1]), [[[3.0]]], rtol=1e-6)
    np.testing.assert_allclose(constant(conv.inputs[2]), [0.5], rtol=1e-6)


def test_shift_in_front_by_hand():
    """w = (1, 2) over two inputs, x + 10: b = 3 + 10 * (1 + 2) = 33."""
    text = "g (float[1,2,1] x) => (float[1,1,1] y) { a = Add(x, t)  y = Conv(a, w, b) }"
    weights = {
        "w": np.array([[[1], [2]]], np.float32),
        "b": np.full(1, 3, np.float32),
        "t": np.float32(10),
    }
    model = load(parse(text, **weights))
    fold(model)
    (conv,) = all_nodes(model)
    np.testing.assert_array_equal(constant(conv.inputs[1]), weights["w"])
    np.testing.assert_array_equal(constant(conv.inputs[2]), [33])


def test_maps_follow_each_other():
    first = Affine(np.array([2.0]), np.array([1.0]), None)
    second = Affine(np.array([3.0, 4.0]), np.zeros(1), 1)
    both = first.then(second)
    assert both is not None and both.axis == 1
    np.testing.assert_array_equal(both.scale, [6, 8])
    np.testing.assert_array_equal(both.shift, [3, 4])
    assert second.then(Affine(np.array([1.0]), np.array([1.0, 2.0]), 2)) is None


def test_a_chain_starts_at_its_first_node_only():
    text = "g (float[N,4] x) => (float[A,4] y) { a = Mul(x, s)  b = Add(a, s)  y = Div(b, s) }"
    model = load(parse(text, s=np.float32(4)))
    nodes = all_nodes(model)
    chain = chain_at(nodes[0])
    assert chain is not None and list(chain.nodes) == nodes
    assert (chain.affine.scale.item(), chain.affine.shift.item()) == (1.0, 1.0)
    assert chain_at(nodes[1]) is None and affine_of(nodes[1]) is not None


def test_shared_weights_are_copied_only_where_they_are_small():
    text = """g (float[N,600] x) => (float[A,600] y) {
        a = MatMul(x, w)  b = Mul(a, s)  c = MatMul(x, w)  y = Add(b, c) }"""
    large = load(parse(text, w=normal(600, 600), s=normal(600)))
    fold(large)
    assert ops(large) == ["MatMul", "Mul", "MatMul", "Add"]
    small = text.replace("600", "6")
    proto = parse(small, w=normal(6, 6), s=normal(6))
    prove(proto, fold, ["MatMul", "MatMul", "Add"], rounding=ROUNDING)


def test_half_precision_stays_half_precision():
    text = "g (float16[N,3,5] x) => (float16[A,4,5] y) { a = Conv(x, w)  y = Mul(a, s) }"
    model = load(parse(text, w=normal(4, 3, 1).astype(np.float16), s=np.float16(2)))
    fold(model)
    (conv,) = all_nodes(model)
    assert constant(conv.inputs[1]).dtype == np.float16
    too_large = load(parse(text, w=normal(4, 3, 1).astype(np.float16), s=np.float16(6e4)))
    fold(too_large)
    assert ops(too_large) == ["Conv", "Mul"]
