"""Prices on recorded profiles: units, names of optimised graphs, borders, the cheapest choice."""

import itertools
import random

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from edgewright.quantize import pricing
from edgewright.quantize.cut import cheapest
from edgewright.quantize.placement import Placement
from edgewright.quantize.pricing import Price, Session
from edgewright.quantize.profile import joined
from edgewright.quantize.units import Timed, Units, assign, crossings, plain, units_of


def net() -> onnx.ModelProto:
    """Three layers, a float activation behind the first, a skip connection around the second."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,4,8,8] x) => (float[1,4,8,8] y) {
            a = Conv(x, w)
            b = HardSwish(a)
            c = Conv(b, w)
            d = Relu(c)
            e = Add(d, d2)
            d2 = Relu(b)
            y = Conv(e, w)
        }"""
    )
    order = [0, 1, 5, 2, 3, 4, 6]
    nodes = [model.graph.node[k] for k in order]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    weight = np.zeros((4, 4, 1, 1), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return model


ALL = Placement(("node_a", "node_c", "node_d", "node_e", "node_y"), {})


def timed(name: str, op: str, us: float, *ends: str, elements: int = 0) -> Timed:
    """`ends`: inputs, then the output."""
    return Timed(name, op, ends[:-1], ends[-1:], us, elements)


def test_a_unit_is_a_layer_and_what_follows_it() -> None:
    units = units_of(net(), ALL)
    assert units.cores == ("", "node_a", "node_c", "node_y")
    assert units.of == {
        "node_a": 1,
        "node_b": 1,
        "node_d2": 1,
        "node_c": 2,
        "node_d": 2,
        "node_e": 2,
        "node_y": 3,
    }


@pytest.mark.parametrize(
    ("fused", "own"),
    [
        ("getitem_3_nchwc", "getitem_3"),
        ("node_Conv_347_token_16", "node_Conv_347"),
        ("mul_QuantizeLinear", "mul"),
        ("a_DequantizeLinear_Output", "a"),
        ("node_MatMul_6/MatMulAddFusion", "node_MatMul_6"),
        ("node_matmul/MatMulScaleFusion/", "node_matmul"),
        ("fused node_Conv_1", "node_Conv_1"),
        ("view_q_to_dq", "view"),
        ("transpose_post_dq1", "transpose"),
        ("Transpose_token_24_out0", "Transpose"),
    ],
)
def test_names_of_fused_nodes(fused: str, own: str) -> None:
    assert plain(fused) == own


def test_a_float_profile_comes_back_to_units() -> None:
    """As ONNX Runtime 1.31 names its blocked layout; `b` is inside the first convolution."""
    profile = [
        timed("ReorderInput", "ReorderInput", 2, "x", "reorder"),
        timed("a_nchwc", "Conv", 10, "reorder", "reorder_token_1"),
        timed("ReorderOutput_token_9", "ReorderOutput", 3, "reorder_token_1", "b"),
        timed("fused node_c", "FusedConv", 20, "b", "d"),
        timed("node_e", "Add", 4, "d", "d2", "e"),
        timed("node_y", "Conv", 30, "e", "y"),
    ]
    owners = assign(profile, net(), units_of(net(), ALL))
    assert owners == [0, 1, 1, 2, 2, 3]
    assert pricing.totals(profile, owners, 4) == [2, 13, 24, 30]


def test_an_int8_profile_comes_back_to_units() -> None:
    """A Q node is its reader's, a DQ node its maker's, a node without a name what it reads."""
    profile = [
        timed("x_QuantizeLinear", "QuantizeLinear", 1, "x", "x_QuantizeLinear_Output"),
        timed("Transpose", "Transpose", 2, "x_QuantizeLinear_Output", "Transpose_out0"),
        timed("node_a_token_16", "QLinearConv", 5, "Transpose_out0", "node_a"),
        timed("a_DequantizeLinear", "DequantizeLinear", 3, "node_a", "a_DequantizeLinear"),
        timed("", "HardSigmoid", 4, "a_DequantizeLinear", "_token_154"),
        timed("", "Mul", 6, "a_DequantizeLinear", "_token_154", "_token_156"),
        timed("b_QuantizeLinear", "QuantizeLinear", 7, "_token_156", "b_q"),
        timed("node_c_token_20", "QLinearConv", 8, "b_q", "node_c"),
    ]
    owners = assign(profile, net(), units_of(net(), ALL))
    # The input's Q goes to the start with the Transpose that reads it, which no name places.
    assert owners == [0, 0, 1, 1, 1, 1, 2, 2]
    assert pricing.totals(profile, owners, 4) == [3, 18, 15, 0]


def test_only_int8_tensors_between_units_are_borders() -> None:
    model = net()
    sizes = dict.fromkeys("abcdexy", 100)
    # a -> b is float; d and e are int8, and d stays within its unit.
    assert crossings(model, ALL, units_of(model, ALL), sizes) == {(2, 3): 100}


def test_events_join_nodes_by_name_and_order() -> None:
    graph = onnx.parser.parse_graph(
        "g (float[1] x) => (float[1] y) { a = Exp(x) b = Exp(a) c = Log(b) y = Neg(c) }"
    )
    graph.node[2].name, graph.node[3].name = "named", "never run"

    def event(name: str, op: str, us: int) -> dict[str, object]:
        return {"name": name, "op": op, "us": us, "elements": 5}

    events = [event("Exp_7", "Exp", 4), event("Exp_8", "Exp", 40), event("named", "Log", 9)]
    events += [event("Exp_7", "Exp", 6), event("Exp_8", "Exp", 20), event("named", "Log", 7)]
    events += [event("Exp_7", "Exp", 900), event("Exp_8", "Exp", 30), event("named", "Log", 8)]
    nodes = joined(graph, events)
    # Of three runs the faster two count: (4 + 6) / 2, (20 + 30) / 2, (7 + 8) / 2.
    assert [n.us for n in nodes] == [5, 25, 7.5, 0]
    assert [n.elements for n in nodes] == [5, 5, 5, 0]


def test_the_rate_of_borders_by_hand() -> None:
    profile = [
        timed("q", "QuantizeLinear", 10, "x", "a", elements=100),
        timed("d", "DequantizeLinear", 20, "a", "b", elements=200),
        timed("t", "Transpose", 6, "b", "c", elements=300),
    ]
    assert pricing.border_rate([profile, profile]) == pytest.approx(30 / 300 + 6 / 300)
    assert pricing.border_rate([[]]) == pricing.BORDER_US


def test_a_price_by_hand() -> None:
    """Units 2 and 3 of a chain 1 - 2 - 3 - 4 in float: borders at 1-2 and 3-4."""
    session = Session([0, 10, 20, 30, 40], [0, 5, 50, 60, 20], rate=0.01)
    crossing = {(1, 2): 200, (2, 3): 1000, (3, 4): 300}
    found = pricing.price((2, 3), session, crossing)
    assert found == Price(float_us=50, int8_us=110, border_us=5)
    assert found.lost_us() == 55
    assert pricing.losers(session, crossing) == {2, 3}
    # With borders ten times as dear all of it in float is cheapest: 100, against 135 with all
    # in int8 and 5 + 50 + 20 + 50 = 125 with 2 and 3 in float.
    dear = Session(session.floats, session.int8s, 0.1)
    assert pricing.losers(dear, crossing) == {1, 2, 3, 4}
    # Where 1 and 4 gain more: 5 + 50 + 20 + 50 = 125 against 1 + 110 + 2 = 113 with all in int8.
    kept = Session([0, 90, 20, 30, 90], [0, 5, 50, 40, 20], 0.1)
    assert pricing.losers(kept, crossing) == set()


def test_only_wide_margins_count() -> None:
    assert pricing.clearly(Price(80, 120, 20), total_us=1000)
    assert not pricing.clearly(Price(80, 114, 20), total_us=1000)  # 1.14 times float
    assert not pricing.clearly(Price(8, 17, 0), total_us=1000)  # 0.9 % of the model
    assert not pricing.clearly(Price(2, 6, 0), total_us=20)  # too little to be told by the clock


def test_small_losers_count_together() -> None:
    """Totals of 1000 us: 9 us are too little alone; three times that is not."""
    sessions = [Session([0.0], [1000.0], 0.01)] * 2
    small = {(k,): [Price(10, 19, 0)] * 2 for k in (3, 4, 5)}
    prices = {(1,): [Price(10, 60, 0)] * 2, (2,): [Price(10, 90, 0)] * 2, **small}
    assert pricing.clear_losers(prices, sessions) == ([(2,), (1,)], [(3,), (4,), (5,)])
    # One alone, or with one session in which it does not lose by the factor.
    assert pricing.clear_losers({(3,): small[3,]}, sessions) == ([], [])
    unsure = {g: [Price(10, 19, 0), Price(10, 11, 0)] for g in small}
    assert pricing.clear_losers(unsure, sessions) == ([], [])


def test_neighbours_make_one_region() -> None:
    crossing = {(1, 2): 5, (2, 5): 5, (3, 4): 5}
    assert pricing.neighbourhoods({5, 1, 2, 4}, crossing) == [(1, 2, 5), (4,)]


def test_gains_are_rounded_shares() -> None:
    units = Units({}, ("", "a", "b", "c"))
    sessions = [
        Session([0, 30, 10, 5], [0, 10, 4, 9], 0),
        Session([0, 30, 10, 5], [0, 11, 3, 9], 0),
    ]
    # a saves 20 + 19, b 6 + 7, c nothing: 39 / 52 and 13 / 52.
    assert pricing.gains(sessions, units) == pytest.approx({"a": 0.75, "b": 0.25, "c": 0})


def test_the_cut_is_the_cheapest_of_all_choices() -> None:
    rng = random.Random(7)
    for _ in range(50):
        floats = [rng.randint(0, 9) for _ in range(6)]
        int8s = [rng.randint(0, 9) for _ in range(6)]
        pairs = rng.sample(list(itertools.permutations(range(6), 2)), 9)
        borders = {pair: float(rng.randint(0, 5)) for pair in pairs}

        def cost(chosen: set[int], floats=floats, int8s=int8s, borders=borders) -> float:
            own = sum(floats[k] if k in chosen else int8s[k] for k in range(6))
            return own + sum(c for (a, b), c in borders.items() if a in chosen and b not in chosen)

        every = [set(c) for n in range(7) for c in itertools.combinations(range(6), n)]
        found = cheapest(floats, int8s, borders)
        assert cost(found) == min(map(cost, every))
        # Of equally cheap choices, one with the fewest units in float.
        assert len(found) == min(len(c) for c in every if cost(c) == cost(found))
