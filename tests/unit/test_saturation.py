"""Pair sums in 16 bits: pairs and bounds by hand, and against all products there are."""

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewright.errors import IntegrityError
from edgewright.quantize import headroom, saturation
from edgewright.quantize.rounding import round_by_output
from edgewright.quantize.scales import WeightScales
from edgewright.target import load_target

SCHEME = load_target("cpu-avx2").int8


def test_neighbours_meet_channels_innermost_by_hand() -> None:
    # Columns 0..8 are three channels of three places; the kernel reads 0 3 6, 1 4 7, 2 5 8.
    assert saturation.pairs(9, 3).tolist() == [[0, 3], [6, 1], [4, 7], [2, 5]]
    assert saturation.pairs(4, 1).tolist() == [[0, 1], [2, 3]]
    assert saturation.pairs(3, 3).tolist() == [[0, 1]]  # one channel: neighbouring places
    assert saturation.pairs(1).shape == (0, 2)


def test_bound_by_hand() -> None:
    codes = np.array([[127, 1], [127, 2], [64, 64], [64, 65], [-128, 127], [-64, -65]], np.int8)
    found = saturation.unsafe(codes, saturation.pairs(2))[:, 0]
    assert found.tolist() == [False, True, False, True, False, True]


def every_pair() -> np.ndarray:
    return np.array(list(itertools.product(range(-128, 128), repeat=2)), np.int8)


def test_safe_is_just_what_no_activation_takes_out_of_16_bits() -> None:
    codes = every_pair()
    # A sum of products is largest or smallest where each activation is 0 or 255.
    corners = np.array(list(itertools.product((0, 255), repeat=2)))
    products = codes.astype(int) @ corners.T
    out = (products.max(axis=1) > 2**15 - 1) | (products.min(axis=1) < -(2**15))
    np.testing.assert_array_equal(saturation.unsafe(codes, saturation.pairs(2))[:, 0], out)


def test_repair_is_the_nearest_safe_pair() -> None:
    codes, meeting = every_pair(), saturation.pairs(2)
    fixed = saturation.repaired(codes, meeting)
    assert not saturation.unsafe(fixed, meeting).any()
    bad = saturation.unsafe(codes, meeting)[:, 0]
    np.testing.assert_array_equal(fixed[~bad], codes[~bad])
    before, after = codes.astype(int), fixed.astype(int)
    assert (np.abs(after) <= np.abs(before)).all()  # none grows: layers may share a weight
    assert (before * after >= 0).all()
    over = saturation.sums(codes, meeting)[bad, 0] - 128
    lost = ((before - after)[bad] ** 2).sum(axis=1)
    np.testing.assert_array_equal(lost, (over // 2) ** 2 + (over - over // 2) ** 2)


def test_repair_by_hand() -> None:
    codes = np.array([[127, 100, 5, -120, -10, 127, 127]], np.int8)
    # 227 is 99 too much: 50 from the larger, 49 from the other. The other pairs have two signs,
    # and the last one is alone.
    assert saturation.repaired(codes, saturation.pairs(7)).tolist() == [
        [77, 51, 5, -120, -10, 127, 127]
    ]


def test_least_scale_by_hand() -> None:
    weight = np.array([[[3.0, 1.0, -2.0, 4.0], [-3.0, -0.2, 1.0, 1.0]]])
    found = saturation.least_scales(weight, saturation.pairs(4))
    np.testing.assert_allclose(found, [[4 / 128, 3.2 / 128]])
    assert saturation.least_scales(weight, saturation.pairs(0)).tolist() == [[0, 0]]


def test_rounding_keeps_pairs_safe_and_moves_what_they_lose_by_hand() -> None:
    # All inputs alike: only the sum counts. The pair may keep 128 of 160; the third weight,
    # which has no partner, takes the 32.
    weight, scales = np.array([[[100.0, 60.0, 0.0]]]), np.ones((1, 1))
    moments, pairs = np.ones((1, 3, 3)), saturation.pairs(3)
    assert round_by_output(weight, scales, moments, 1e-6, pairs).tolist() == [[[84, 44, 32]]]
    assert round_by_output(weight, scales, moments, 1e-6).tolist() == [[[100, 60, 0]]]


@pytest.mark.parametrize(("columns", "places"), [(300, 1), (27, 9), (257, 1), (75, 25)])
def test_rounding_keeps_every_pair_safe(columns: int, places: int) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, columns, 1)) + rng.normal(size=(2, columns, 400)) / 2
    weight = rng.normal(size=(2, 6, columns))
    pairs = saturation.pairs(columns, places)
    scales = saturation.least_scales(weight, pairs) * 0.9  # a few pairs lie above the bound
    moments = x @ np.swapaxes(x, 1, 2) / 400
    codes = round_by_output(weight, scales, moments, pairs=pairs)
    assert not saturation.unsafe(codes, pairs).any()
    assert saturation.unsafe(round_by_output(weight, scales, moments), pairs).any()
    # And it still is a rounding: with room enough, pairs change nothing but the order.
    roomy = round_by_output(weight, scales * 2, moments, pairs=pairs)
    assert np.abs(roomy - weight / (scales * 2)[..., None]).max() < 4


# --- graphs --------------------------------------------------------------------------------


def conv(weight: np.ndarray, **attributes: object) -> onnx.NodeProto:
    return helper.make_node("Conv", ["x", "w"], ["y"], name="layer", **attributes)


def test_which_pairs_each_layer_has() -> None:
    ones = np.ones
    cases = [
        (conv(ones(1)), (8, 6, 1, 1), saturation.pairs(6)),
        (conv(ones(1)), (8, 3, 3, 3), saturation.pairs(27, 9)),
        (conv(ones(1), group=2), (8, 3, 3), saturation.pairs(9, 3)),
        (conv(ones(1), group=4), (8, 1, 3, 3), saturation.pairs(9, 9)),  # two outputs a group
        (conv(ones(1), group=8), (8, 1, 3, 3), saturation.pairs(0)),  # depthwise
        (conv(ones(1)), (8, 1, 3, 3), saturation.pairs(9, 9)),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (5, 7), saturation.pairs(5)),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (2, 6, 7), saturation.pairs(6)),
        (helper.make_node("Gemm", ["x", "w"], ["y"]), (5, 8), saturation.pairs(5)),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), (5, 8), saturation.pairs(8)),
    ]
    for node, shape, expected in cases:
        assert headroom.meeting(node, shape).tolist() == expected.tolist(), (node.op_type, shape)
        weight = np.arange(np.prod(shape), dtype=np.int8).reshape(shape)
        rows = headroom.matrix(node, weight)
        np.testing.assert_array_equal(headroom.stored(node, rows, weight), weight)
    # A row holds what one output reads.
    stack = np.arange(12).reshape(2, 3, 2)
    rows = headroom.matrix(helper.make_node("MatMul", ["x", "w"], ["y"]), stack)
    assert rows.tolist() == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]


def dequantized(op: str, codes: np.ndarray, **attributes: object) -> onnx.ModelProto:
    """A layer with int8 weights behind a DequantizeLinear, as written models have it."""
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"]),
        helper.make_node(op, ["x", "w"], ["y"], name="layer", **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(codes, "codes"),
            numpy_helper.from_array(np.float32(0.5), "scale"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_an_unsafe_pair_is_refused_by_name_and_repaired_in_place() -> None:
    codes = np.array([[127, 1], [2, 1], [0, 127]], np.int8)  # 127 + 2 in the first output
    model = dequantized("MatMul", codes)
    with pytest.raises(IntegrityError, match=r"MatMul 'layer'.*1 of 2 pairs"):
        headroom.prove(model)
    headroom.repair(model)
    assert headroom.prove(model) == 2
    stored = numpy_helper.to_array(model.graph.initializer[0])
    assert stored.tolist() == [[126, 1], [2, 1], [0, 127]]
    # Along the other axis the same codes are safe but for none: 127 + 1 is 128.
    assert headroom.prove(dequantized("Gemm", codes, transB=1)) == 3


def test_layers_in_subgraphs_and_dynamic_layers_are_proved() -> None:
    hot = np.full((1, 2, 8), 100, np.int8)
    lstm = helper.make_node(
        "DynamicQuantizeLSTM", ["x", "w", "r"], ["y"], name="lstm", domain="com.microsoft"
    )
    body = helper.make_graph(
        [lstm], "body", [], [], [numpy_helper.from_array(hot // 2, n) for n in ("w", "r")]
    )
    branch = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    graph = helper.make_graph([branch], "g", [], [])
    assert headroom.prove(helper.make_model(graph)) == 4 * 8
    body.initializer[1].CopyFrom(numpy_helper.from_array(hot, "r"))
    branch = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    with pytest.raises(IntegrityError, match="lstm"):
        headroom.prove(helper.make_model(helper.make_graph([branch], "g", [], [])))


def test_scales_leave_room_where_pairs_need_it() -> None:
    # Peak 1.27. Pairs of the first output sum to 1.27 + 0.64, those of the second to 1.28 and
    # -1.28: the peak alone decides, but for rounding.
    weight = np.float32([[1.27, 0.64, 0.1], [0.64, 0.64, 1.27]])
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="layer", transB=1)
    graph = helper.make_graph([node], "g", [], [], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph)
    plain = {"w": WeightScales(0, np.float32([0.01, 0.01]))}
    roomy = headroom.with_room(model, ["layer"], plain, SCHEME)
    np.testing.assert_allclose(roomy["w"].values, [1.91 / 128, 0.01], rtol=1e-6)
    assert plain["w"].values.tolist() == np.float32([0.01, 0.01]).tolist()
    one = headroom.with_room(
        model, ["layer"], {"w": WeightScales(None, np.float32([0.01]))}, SCHEME
    )
    np.testing.assert_allclose(one["w"].values, [1.91 / 128], rtol=1e-6)
    assert headroom.with_room(model, ["another"], plain, SCHEME) == plain
    # What has no scale yet gets one.
    none = headroom.with_room(model, ["layer"], {}, SCHEME)
    assert none["w"].axis is None
    np.testing.assert_allclose(none["w"].values, [1.91 / 128], rtol=1e-6)


def test_figures_by_hand() -> None:
    # First output: step 1.5 / 100 instead of 1.27 / 127; the second as large as it can be.
    weight = np.float32([[1.27, 0.3], [1.27, -0.3], [0, 0]])
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="layer", transB=1)
    graph = helper.make_graph([node], "g", [], [], [numpy_helper.from_array(weight, "w")])
    written = dequantized("Gemm", np.array([[85, 20], [127, -30], [0, 0]], np.int8), transB=1)
    written.graph.initializer[1].CopyFrom(
        numpy_helper.from_array(np.float32([0.015, 0.01, 1.0]), "scale")
    )
    found = headroom.figures(helper.make_model(graph), written)
    assert found == {
        "outputs": 2,
        "outputs_over": 1,  # 127 + 30 > 128
        "pairs": 3,
        "pairs_over": 1,
        "range_gain": pytest.approx((127 / 63 / 1.5 + 127 / 63) / 2, abs=1e-3),
        "range_gain_all": pytest.approx((127 / 63 / 1.5 + 127 / 63) / 2, abs=1e-3),
    }


def test_only_int8_weights_need_room() -> None:
    assert headroom.needed(SCHEME)
    assert not headroom.needed(load_target("cpu").int8)
