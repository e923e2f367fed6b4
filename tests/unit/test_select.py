"""Budgets: costs agree with the graph that is really cut, and the selection meets them."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from graphs import normal, parsed
from onnx import numpy_helper

from edgewright.errors import BadInput
from edgewright.model import parameter_count
from edgewright.prune.costs import Costs
from edgewright.prune.cut import cut
from edgewright.prune.labels import Analysis, analyse
from edgewright.prune.select import Selection, for_latency, select
from edgewright.target import load_target, target_names
from edgewright.work import work


def conv_net() -> onnx.ModelProto:
    """A stem, a residual block with a depthwise convolution, a transposed one, a classifier."""
    text = """g (float[1, 3, 8, 8] x) => (float[1, 5] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, wa, ba)
        b = Conv (a, wb)
        c = Relu (b)
        d = Conv <group = 32, pads = [1, 1, 1, 1]> (c, wd)
        e = Conv (d, we)
        f = Add (a, e)
        g = ConvTranspose <strides = [2, 2]> (f, wg)
        h = GlobalAveragePool (g)
        i = Flatten (h)
        y = Gemm <transB = 1> (i, wy, by) }"""
    return parsed(
        text,
        wa=normal(16, 3, 3, 3), ba=normal(16), wb=normal(32, 16, 1, 1), wd=normal(32, 1, 3, 3),
        we=normal(16, 32, 1, 1), wg=normal(16, 24, 2, 2), wy=normal(5, 24), by=normal(5),
    )  # fmt: skip


def lstm_net() -> onnx.ModelProto:
    text = """g (float[6, 1, 4] x) => (float[6, 1, 3] y) {
        h = LSTM <hidden_size = 16> (x, w, r, b)
        s = Squeeze (h, one)
        y = MatMul (s, v) }"""
    return parsed(
        text, w=normal(1, 64, 4), r=normal(1, 64, 16), b=normal(1, 128), v=normal(16, 3),
        one=np.array([1]),
    )  # fmt: skip


def attention_net() -> onnx.ModelProto:
    """Four heads of eight dimensions."""
    heads = "".join(
        f"{p}s = Reshape ({p}, {p}shape)\n{p}t = Transpose <perm = [0, 2, {o}]> ({p}s)\n"
        for p, o in (("q", "1, 3"), ("k", "3, 1"), ("v", "1, 3"))
    )
    text = f"""g (float[1, 6, 20] x) => (float[1, 6, 20] y) {{
        q = MatMul (x, wq)
        k = MatMul (x, wk)
        v = MatMul (x, wv)
        {heads}
        p = MatMul (qt, kt)
        s = Softmax (p)
        o = MatMul (s, vt)
        t = Transpose <perm = [0, 2, 1, 3]> (o)
        m = Reshape (t, merged)
        y = MatMul (m, wo) }}"""
    return parsed(
        text, wq=normal(20, 32), wk=normal(20, 32), wv=normal(20, 32), wo=normal(32, 20),
        qshape=np.array([1, 6, 4, 8]), kshape=np.array([1, 6, 4, 8]),
        vshape=np.array([1, 6, 4, 8]), merged=np.array([1, 6, 32]),
    )  # fmt: skip


NETS = {"conv": conv_net, "lstm": lstm_net, "attention": attention_net}


def made_up(analysis: Analysis, seed: int = 0) -> dict[int, float]:
    generator = np.random.default_rng(seed)
    return {u: float(generator.random()) for g in analysis.groups for u in g.units}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("seed", range(3))
def test_costs_are_those_of_the_graph_that_is_cut(net: str, seed: int) -> None:
    model = NETS[net]()
    analysis = analyse(model)
    generator = np.random.default_rng(seed)
    remove = []
    for group in analysis.groups:
        count = int(generator.integers(0, len(group.units)))
        remove += generator.permutation(group.units)[:count].tolist()
    smaller, _ = cut(model, analysis, remove)
    macs, params = Costs(model, analysis, "macs"), Costs(model, analysis, "params")
    size = Costs(model, analysis, "size_bytes")
    assert macs.total == sum(work(model)[0].values())
    assert params.total == parameter_count(model)
    saved = macs.saving(remove)
    half = len(remove) // 2  # in two steps: what a unit saves depends on what is gone
    for part in (remove[:half], remove[half:]):
        for costs in (macs, params, size):
            costs.remove(part)
    assert macs.now == sum(work(smaller)[0].values()) == macs.total - saved
    assert params.now == parameter_count(smaller)
    stored = sum(numpy_helper.to_array(t).nbytes for t in smaller.graph.initializer)
    assert size.now == stored


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("kind", ["macs", "params", "size_bytes"])
@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
def test_the_budget_is_met_within_one_step(allocation: str, kind: str, share: float) -> None:
    model = conv_net()
    analysis = analyse(model)
    scores = made_up(analysis)
    costs = Costs(model, analysis, kind)
    found = select(analysis, scores, costs, share, 4, allocation)
    assert found.share <= share
    again = Costs(model, analysis, kind)
    again.remove(sorted(found.remove))
    assert again.now / again.total == pytest.approx(found.share)
    for row, group in zip(found.rows, analysis.groups, strict=True):
        assert row["kept"] % 4 == 0 and row["kept"] > 0
        gone = [u for u in group.units if u in found.remove]
        assert len(gone) == row["units"] - row["kept"]
        left = [u for u in group.units if u not in found.remove]
        # The least important ones of each group went.
        assert not gone or max(scores[u] for u in gone) < min(scores[u] for u in left)
    # One step back, in some group, is above the budget; for `uniform` in all groups at once.
    back = []
    for row, group in zip(found.rows, analysis.groups, strict=True):
        order = sorted(group.units, key=lambda u: scores[u])
        step = 4 if row["kept"] < row["units"] else 0
        fewer = set(order[: row["units"] - row["kept"] - step])
        back.append({u for u in group.units if u in found.remove} - fewer)
    steps = back if allocation == "global" else [set().union(*back)]
    above = []
    for put_back in steps:
        again = Costs(model, analysis, kind)
        again.remove(sorted(found.remove - put_back))
        above.append(again.now / again.total > share)
    assert any(above)


def test_global_allocation_takes_the_cheap_group_first() -> None:
    # Equal scores; the wide layer saves more per unit, so it gives everything.
    text = """g (float[1, 4] x) => (float[1, 4] y) {
        a = MatMul (x, wa)  b = MatMul (a, wb)  c = MatMul (b, wc)  y = MatMul (c, wy) }"""
    model = parsed(
        text.replace("  ", "\n"),
        wa=normal(4, 8), wb=normal(8, 64), wc=normal(64, 8), wy=normal(8, 4),
    )  # fmt: skip
    analysis = analyse(model)
    scores = {u: 1.0 for g in analysis.groups for u in g.units}
    # A unit of the narrow groups saves 4 + 64 products, one of the wide group 8 + 8.
    found = select(analysis, scores, Costs(model, analysis, "macs"), 0.9)
    assert [r["kept"] for r in found.rows if r["units"] == 64] == [64]
    uniform = select(analysis, scores, Costs(model, analysis, "macs"), 0.5, 1, "uniform")
    shares = [r["kept"] / r["units"] for r in uniform.rows]
    assert max(shares) - min(shares) < 1 / 8


def test_heads_are_rounded_as_heads() -> None:
    model = attention_net()
    analysis = analyse(model)
    heads = [g for g in analysis.groups if g.kind == "heads"]
    assert heads and len(heads[0].units) == 4
    scores = made_up(analysis)
    found = select(analysis, scores, Costs(model, analysis, "macs"), 0.6, 16)
    (row,) = [r for r in found.rows if r["kind"] == "heads"]
    assert row["kept"] == 2 and row["reason"] == ""


def test_groups_that_rounding_leaves_whole_say_so() -> None:
    model = conv_net()
    analysis = analyse(model)
    found = select(analysis, made_up(analysis), Costs(model, analysis, "macs"), 0.8, 16)
    rows = {r["units"]: r for r in found.rows}
    assert rows[16]["kept"] == 16
    assert rows[16]["reason"] == "16 units: none can go when multiples of 16 remain"
    assert rows[32]["kept"] in (16, 32) and rows[24]["kept"] in (16, 24)
    unscored = {u: s for u, s in made_up(analysis).items() if u not in analysis.groups[0].units}
    found = select(analysis, unscored, Costs(model, analysis, "macs"), 0.8, 1)
    assert found.rows[0]["reason"] == "the criterion says nothing about it"
    assert not found.remove & set(analysis.groups[0].units)


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.2, float("nan")])
def test_shares_that_mean_nothing_are_refused(share: float) -> None:
    model = conv_net()
    analysis = analyse(model)
    with pytest.raises(BadInput, match="above 0 and below 1"):
        select(analysis, made_up(analysis), Costs(model, analysis, "macs"), share)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_budget_below_what_can_go_is_refused(allocation: str) -> None:
    model = conv_net()
    analysis = analyse(model)
    with pytest.raises(BadInput, match=r"a budget of 0.05 cannot be met; expected at least 0\.\d+"):
        select(analysis, made_up(analysis), Costs(model, analysis, "macs"), 0.05, 8, allocation)


def test_a_graph_without_prunable_units_is_refused() -> None:
    text = "g (float[1, 4] x) => (float[1, 4] y) { y = MatMul (x, w) }"
    model = parsed(text, w=normal(4, 4))
    analysis = analyse(model)
    with pytest.raises(BadInput, match="nothing in this model can be pruned"):
        select(analysis, {}, Costs(model, analysis, "macs"), 0.5)


def test_latency_is_bisected_by_measuring() -> None:
    tried: list[float] = []

    def choose(work_share: float) -> Selection:
        if work_share < 0.2:
            raise BadInput("too little")
        return Selection(frozenset(), work_share, ())

    def measure(found: Selection) -> float:
        tried.append(found.share)
        return 0.3 + 0.7 * found.share  # part of the time does not shrink

    found = for_latency(choose, measure, 0.65)
    assert found.share == pytest.approx(0.5, abs=0.02)
    assert 0.3 + 0.7 * found.share <= 0.65
    assert tried[0] == 0.65 and len(tried) <= 12
    with pytest.raises(BadInput, match="cannot be reached"):
        for_latency(choose, measure, 0.4)


def test_every_shipped_profile_has_a_multiple() -> None:
    for name in target_names():
        assert load_target(name).prune.multiple in (4, 8, 16, 32), name
    assert load_target("cpu").prune.multiple == 16  # facts: int8 at 8 is no faster than dense


def test_a_multiple_below_one_is_refused(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "targets" / "cpu.toml").read_text("utf-8")
    profile = tmp_path / "mine.toml"
    profile.write_text(text.replace("multiple = 16", "multiple = 0"), "utf-8")
    with pytest.raises(BadInput, match="at least 1"):
        load_target(str(profile))
