"""Dynamic int8 LSTMs: in the main graph and in branches, shared weights, forms that stay float."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_quantize import here, job, net, normal, outputs, reason, sqnr_db

from edgewright import quantize
from edgewright.model import all_graphs, all_nodes
from edgewright.quantize.lstm import write_dynamic_lstm

WIDTH, HIDDEN = 8, 16
# 8-bit weights and activations leave about 1 % noise, see docs/quantize.md.
FLOOR_DB = 30.0


def weights(directions: int = 1) -> dict[str, np.ndarray]:
    return {
        "w": normal(directions, 4 * HIDDEN, WIDTH, scale=0.3),
        "r": normal(directions, 4 * HIDDEN, HIDDEN, seed=2, scale=0.3),
        "b": normal(directions, 8 * HIDDEN, seed=3, scale=0.1),
    }


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in all_nodes(model.graph):
        node.name = node.output[0]
    return model


def branched() -> onnx.ModelProto:
    """An LSTM in each branch, over the same outer weights, and one with weights of its own."""
    model = net(
        """g (float[6,1,8] x, bool c) => (float[6,1,1,16] y) {
            y = If(c) <
                then_branch = one () => (float[6,1,1,16] p) {
                    p = LSTM<hidden_size=16>(x, w, r, b)
                },
                else_branch = two () => (float[6,1,1,16] q) {
                    q = LSTM<hidden_size=16>(x, v, r)
                }
            >
        }""",
        **weights(),
        v=normal(1, 4 * HIDDEN, WIDTH, seed=7, scale=0.3),
    )
    own = model.graph.initializer.pop()  # v moves into the branch that reads it
    inner = next(a.g for a in model.graph.node[0].attribute if a.name == "else_branch")
    inner.initializer.append(own)
    return named(model)


def test_lstms_in_branches_become_dynamic_int8(tmp_path: Path) -> None:
    source = branched()
    onnx.checker.check_model(source)
    data = {"x": normal(16, 6, 1, 8, seed=5), "c": np.arange(16) % 2 == 0}
    work = job(tmp_path, source, data, here())
    report = quantize.run(work)
    assert not report["stayed_float"]
    model = onnx.load(work.output_model())
    assert [n.op_type for n in all_nodes(model.graph)] == ["If", *["DynamicQuantizeLSTM"] * 2]
    rows = {r["node"]: r["runs_as"] for r in report["placement"]}
    assert rows["p"] == rows["q"] == "int8"
    assert report["audit"]["int8_kernels"] == {"DynamicQuantizeLSTM": 2}
    for choice in (True, False):
        feed = {"x": data["x"][0], "c": np.array(choice)}
        assert sqnr_db(source, model, feed) > FLOOR_DB
    # Each weight once, r for both; no float weight is left in any graph.
    stored = [t for g in all_graphs(model.graph) for t in g.initializer]
    names = sorted(t.name for t in stored if t.data_type == t.INT8 and len(t.dims) == 3)
    assert names == ["r_lstm_int8", "v_lstm_int8", "w_lstm_int8"]
    assert not {"w", "r", "v"} & {t.name for t in stored}


@pytest.mark.parametrize("direction", ["reverse", "bidirectional"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_directions_and_scales(direction: str, per_channel: bool) -> None:
    count = 2 if direction == "bidirectional" else 1
    source = net(
        f"""g (float[6,1,8] x) => (float[6,{count},1,16] y) {{
            y = LSTM<hidden_size=16, direction="{direction}">(x, w, r, b)
        }}""",
        **weights(count),
    )
    scheme = here(per_channel=per_channel).int8
    model = write_dynamic_lstm(source, scheme, ["y"])
    codes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert codes["w_lstm_int8"].shape == (count, WIDTH, 4 * HIDDEN)
    assert codes["w_lstm_scale"].shape == ((count, 4 * HIDDEN) if per_channel else (count,))
    if not scheme.saturates:
        axis = 1 if per_channel else (1, 2)
        assert (np.abs(codes["r_lstm_int8"].astype(int)).max(axis=axis) == 127).all()
    assert sqnr_db(source, model, {"x": normal(6, 1, 8, seed=5)}) > FLOOR_DB


def test_columns_of_their_own_scale_are_closer() -> None:
    # Gates whose weights are 30 times apart: one scale leaves the small ones 4 codes.
    spread = weights()
    spread["w"][:, :HIDDEN] *= 30
    source = net(
        "g (float[6,1,8] x) => (float[6,1,1,16] y) { y = LSTM<hidden_size=16>(x, w, r, b) }",
        **spread,
    )
    feed = {"x": normal(6, 1, 8, seed=5)}
    fine, coarse = (
        sqnr_db(source, write_dynamic_lstm(source, here(per_channel=p).int8, ["y"]), feed)
        for p in (True, False)
    )
    assert fine > FLOOR_DB
    assert fine > coarse + 6


def test_forms_without_an_int8_operator_are_named(tmp_path: Path) -> None:
    source = net(
        """g (float[1,6,8] x, float[1,64,8] k) => (float[1,6,1,16] y, float[6,1,1,16] z) {
            y = LSTM<hidden_size=16, layout=1>(x, w, r)
            t = Transpose<perm=[1,0,2]>(x)
            z = LSTM<hidden_size=16>(t, k, r)
        }""",
        **weights(),
    )
    # ONNX Runtime's CPU kernel has no layout=1 at all, so only the rewrite is asked.
    model = write_dynamic_lstm(source, here().int8, ["y", "z"])
    assert [n.op_type for n in model.graph.node] == ["LSTM", "Transpose", "LSTM"]
    assert model == source
    computed = net(
        "g (float[6,1,8] x, float[1,64,8] k) => (float[6,1,1,16] z) "
        "{ z = LSTM<hidden_size=16>(x, k, r) }",
        **weights(),
    )
    data = {"x": normal(8, 6, 1, 8), "k": normal(8, 1, 64, 8, scale=0.3)}
    report = quantize.run(job(tmp_path, computed, data))
    assert report["stayed_float"]
    assert "computed, not stored" in reason(report, "z")


def test_an_excluded_lstm_stays_float(tmp_path: Path) -> None:
    source = branched()
    data = {"x": normal(16, 6, 1, 8, seed=5), "c": np.arange(16) % 2 == 0}
    work = job(tmp_path, source, data, here(), exclude=["q"])
    report = quantize.run(work)
    assert reason(report, "q") == "excluded by the recipe"
    model = onnx.load(work.output_model())
    ops = {n.name: n.op_type for n in all_nodes(model.graph)}
    assert (ops["p"], ops["q"]) == ("DynamicQuantizeLSTM", "LSTM")
    feed = {"x": data["x"][0], "c": np.array(False)}
    np.testing.assert_array_equal(outputs(model, feed)[0], outputs(source, feed)[0])
