"""Outputs as wide as an inner stream of channels: a product of their own gives the width back."""

import numpy as np
import onnx
import pytest
from graphs import normal, parsed
from onnx import numpy_helper

from edgewright.model import input_specs, parameter_count
from edgewright.prune.costs import Costs
from edgewright.prune.cut import cut, masked
from edgewright.prune.labels import analyse
from edgewright.prune.outputs import MATRIX, closed, opened, whole
from edgewright.prune.select import select
from edgewright.recover.compensate import compensate
from edgewright.runtime.local import open_local
from edgewright.stage import say_nothing

WIDE = 8


def stream() -> onnx.ModelProto:
    """Two residual layers on a stream of 8 channels, which is an output and is pooled, too."""
    text = """g (float[N,T,3] x) => (float[N,T,8] y, float[N,2] z) {
      a = MatMul(x, in)
      b = MatMul(a, up) c = Relu(b) d = MatMul(c, down) y = Add(a, d)
      p = ReduceMean<axes=[1], keepdims=0>(y)
      z = Gemm(p, head)
    }"""
    given = {"in": normal(3, WIDE), "up": normal(WIDE, 5, seed=2), "down": normal(5, WIDE, seed=3)}
    return parsed(text, **given, head=normal(WIDE, 2, seed=4))


def features() -> onnx.ModelProto:
    """The same with convolutions: channels on axis 1."""
    text = """g (float[1,3,5,5] x) => (float[1,8,5,5] y) {
      a = Conv(x, in) b = Conv(a, up) c = Relu(b) d = Conv(c, down) y = Add(a, d)
    }"""
    shape = {"in": (WIDE, 3, 1, 1), "up": (6, WIDE, 1, 1), "down": (WIDE, 6, 1, 1)}
    return parsed(text, **{n: normal(*s, seed=k) for k, (n, s) in enumerate(shape.items())})


def ran(model: onnx.ModelProto, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    feed = {s.name: rng.normal(size=[d or 4 for d in s.shape]).astype(np.float32)
            for s in input_specs(model)}  # fmt: skip
    return list(open_local(model.SerializeToString()).run(feed))


def stream_units(model: onnx.ModelProto) -> list[int]:
    analysis = analyse(model)
    (group,) = [g for g in analysis.groups if ("y" + MATRIX) in {t for t, _ in g.slices}]
    return list(group.units)


@pytest.mark.parametrize("make", [stream, features])
def test_nothing_changes_until_units_go(make) -> None:
    model = make()
    assert not any(len(g.units) == WIDE for g in analyse(model).groups)
    wide = opened(model)
    assert whole(wide) == ["y"]
    for mine, theirs in zip(ran(wide), ran(model), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert len(stream_units(wide)) == WIDE
    again = closed(wide)
    assert [n.op_type for n in again.graph.node] == [n.op_type for n in model.graph.node]
    assert [list(n.input) for n in again.graph.node] == [list(n.input) for n in model.graph.node]
    assert parameter_count(again) == parameter_count(model)
    assert opened(wide) == wide  # an output has one product at most


@pytest.mark.parametrize("make", [stream, features])
def test_a_cut_stream_still_gives_the_whole_output(make) -> None:
    wide = opened(make())
    analysis, units = analyse(wide), stream_units(wide)
    remove = [units[1], units[4], units[6]]
    small, kept = cut(wide, analysis, remove)
    assert list(kept["y" + MATRIX, 0 if make is stream else 1]) == [0, 2, 3, 5, 7]
    before, after = ran(wide)[0], ran(small)[0]
    assert after.shape == before.shape
    channels = np.moveaxis(after, -1 if make is stream else 1, 0)
    assert not channels[[1, 4, 6]].any() and channels[[0, 2, 3, 5, 7]].any()
    for mine, theirs in zip(ran(small), ran(masked(wide, analysis, remove)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)  # float32 sums of 8, another order


def test_other_cuts_leave_no_product_behind() -> None:
    wide = opened(stream())
    analysis = analyse(wide)
    inner = next(g for g in analysis.groups if len(g.units) == 5)
    small, _ = cut(wide, analysis, inner.units[:2])
    assert not any(t.name.startswith("y.") for t in small.graph.initializer)
    # And the original loses it, too, when the cut model is compensated.
    feeds = [{"x": normal(1, 6, 3, seed=k)} for k in range(20)]
    kept = cut(wide, analysis, inner.units[:2])[1]
    rows = compensate(wide, small, kept, lambda: iter(feeds), say_nothing)
    assert any(row["node"] == "n3" and not row["reason"] for row in rows)


def test_least_squares_give_back_what_the_others_tell() -> None:
    # Channel 7 of the stream is twice channel 2 less channel 5, for every input.
    model = stream()
    for tensor in model.graph.initializer:
        if tensor.name in ("in", "down"):
            value = numpy_helper.to_array(tensor).copy()
            value[:, 7] = 2 * value[:, 2] - value[:, 5]
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    wide = opened(model)
    analysis, gone = analyse(wide), [stream_units(wide)[7]]
    small, kept = cut(wide, analysis, gone)
    feeds = [{"x": normal(1, 16, 3, seed=k)} for k in range(40)]
    compensate(wide, small, kept, lambda: iter(feeds), say_nothing)
    for mine, theirs in zip(ran(small, 5), ran(model, 5), strict=True):
        # The ridge keeps a little of the plain slice: 0.1 % of outputs of size 10.
        np.testing.assert_allclose(mine, theirs, atol=0.05)


def test_the_product_costs_nothing_while_it_is_whole() -> None:
    model = stream()
    wide = opened(model)
    sizes = {"x": (1, 4, 3)}
    plain = Costs(model, analyse(model), "macs", sizes)
    costs = Costs(wide, analyse(wide), "macs", sizes)
    assert costs.total == plain.total == 4 * (3 * 8 + 8 * 5 + 5 * 8) + 8 * 2
    units = stream_units(wide)
    # One unit: 4 positions of 3 + 5 + 5 weights, 2 of the head; the product now costs 4 * 7 * 8.
    assert costs.saving(units[:1]) == 4 * 13 + 2 - 4 * 7 * 8
    costs.remove(units[:4])
    assert costs.now == 4 * (3 * 4 + 4 * 5 + 5 * 4) + 4 * 2 + 4 * 4 * 8
    scores = {u: 1.0 for g in analyse(wide).groups for u in g.units}
    chosen = select(analyse(wide), scores, Costs(wide, analyse(wide), "params"), 0.7, 1, "uniform")
    small, _ = cut(wide, analyse(wide), chosen.remove)
    shift = WIDE  # what is added to the product is not counted
    left = (parameter_count(small) - shift) / parameter_count(model)
    assert left == pytest.approx(chosen.share) and left <= 0.7


def test_several_units_go_at_once_where_one_alone_saves_nothing() -> None:
    """The first unit of the stream costs 4 * 7 * 8 for the product and saves 4 * 13 + 2."""
    wide = opened(stream())
    analysis, units = analyse(wide), stream_units(wide)
    least = {u: 1e-3 if u in units else 1.0 for g in analysis.groups for u in g.units}

    def chosen(share: float) -> tuple[set[int], float]:
        costs = Costs(wide, analysis, "macs", {"x": (1, 4, 3)})
        found = select(analysis, least, costs, share)
        return set(found.remove), found.share * costs.total

    # 432 at first. With 7, 6, 5, 4, 3, 2 channels left it is 602, 516, 430, 344, 258, 172.
    gone, left = chosen(0.5)  # four at once, then one by one down to 216
    assert gone <= set(units) and len(gone) == 6 and left == 172
    gone, left = chosen(0.7)
    assert gone <= set(units) and len(gone) == 5 and left == 258
    gone, left = chosen(0.9)  # four at once would be more than is asked for: a dear inner unit goes
    assert not gone & set(units) and len(gone) == 1 and left == 368


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("h = Gemm(x, in) y = Sigmoid(h)", "nothing else reads the channels"),
        ("y = Gemm(x, in)", "the product's own channels"),
        ("h = Gemm(x, in) y = Softmax(h) z0 = Gemm(y, other)", "sums over all channels"),
    ],
)
def test_outputs_that_stay_as_they_are(body: str, why: str) -> None:
    model = parsed(
        f"g (float[N,3] x) => (float[N,8] y) {{ {body} }}",
        **{"in": normal(3, 8), "other": normal(8, 2)},
    )
    assert opened(model) == model, why
