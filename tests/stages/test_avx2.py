"""x86 without VNNI: which sums its kernels cut off, and that int8 models are exact there.

Needs the emulator (`edgewright setup --target cpu-avx2`), and is skipped without it.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewright import quantize
from edgewright.errors import EnvironmentMissing, IntegrityError
from edgewright.quantize import headroom
from edgewright.quantize.lstm import write_dynamic_lstm
from edgewright.recipe import parse_recipe
from edgewright.runtime.launch import launch_for, open_on_target
from edgewright.runtime.local import open_local
from edgewright.stage import Job
from edgewright.target import Target, load_target

HOT = 127


@pytest.fixture
def avx2() -> Target:
    target = load_target("cpu-avx2")
    try:
        launch_for(target)
    except EnvironmentMissing as error:
        pytest.skip(str(error))
    return target


def on_target(path: Path, target: Target, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    with open_on_target(path, target) as session:
        return session.run(feed)


# --- which sums are cut off ------------------------------------------------------------------

# Name, operator, shape of the input, shape of the weight but for its outputs, attributes.
LAYERS: list[tuple[str, str, list[int], tuple[int, ...], dict[str, Any]]] = [
    ("odd channels", "Conv", [1, 3, 4, 4], (3, 2, 2), {}),
    ("even channels", "Conv", [1, 4, 4, 4], (4, 2, 2), {}),
    ("one channel", "Conv", [1, 1, 4, 4], (1, 3, 3), {}),
    ("pointwise", "Conv", [1, 7, 3, 3], (7, 1, 1), {}),
    ("one axis", "Conv", [1, 3, 6], (3, 3), {}),
    ("three axes", "Conv", [1, 3, 3, 3, 3], (3, 2, 1, 2), {}),
    ("grouped", "Conv", [1, 6, 4, 4], (3, 2, 2), {"group": 2}),
    ("depthwise", "Conv", [1, 36, 4, 4], (1, 3, 3), {"group": 36}),
    ("depthwise by 16", "Conv", [1, 48, 4, 4], (1, 3, 3), {"group": 48}),
    ("gemm", "Gemm", [1, 9], (9,), {"transB": 1}),
    ("matmul", "MatMul", [3, 10], (10,), {}),
    ("long matmul", "MatMul", [2, 1500], (1500,), {}),
]


def pairs_to_try(columns: int) -> list[tuple[int, int]]:
    """All pairs of columns; of many columns all neighbours."""
    if columns <= 50:
        return list(itertools.combinations(range(columns), 2))
    return [(k, k + 1) for k in range(columns - 1)]


def layer_of_pairs(op: str, shape: tuple[int, ...], groups: int) -> np.ndarray:
    """A weight with two codes of 127 in each output, another pair in each."""
    columns = int(np.prod(shape))
    pairs = pairs_to_try(columns)
    rows = np.zeros((-(-len(pairs) // groups) * groups, columns), np.int8)
    for k, pair in enumerate(pairs):
        rows[k, pair] = HOT
    return rows.T.copy() if op == "MatMul" else rows.reshape(-1, *shape)


def model_of_layers(path: Path) -> dict[str, np.ndarray]:
    """Each of LAYERS in QDQ form on an input of its own; returns their weights."""
    nodes, inputs, outputs, weights = [], [], [], {}
    stored = {"one": np.float32(1), "zero": np.uint8(0), "big": np.float32(512)}
    stored["middle"] = np.int8(0)
    for k, (name, op, shape, kernel, attributes) in enumerate(LAYERS):
        weights[name] = layer_of_pairs(op, kernel, attributes.get("group", 1))
        stored[f"w{k}"] = weights[name]
        inputs.append(helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, shape))
        nodes += [
            helper.make_node("QuantizeLinear", [f"x{k}", "one", "zero"], [f"xq{k}"]),
            helper.make_node("DequantizeLinear", [f"xq{k}", "one", "zero"], [f"xd{k}"]),
            helper.make_node("DequantizeLinear", [f"w{k}", "one", "middle"], [f"wd{k}"]),
            helper.make_node(op, [f"xd{k}", f"wd{k}"], [f"y{k}"], **attributes),
            helper.make_node("QuantizeLinear", [f"y{k}", "big", "zero"], [f"yq{k}"]),
            helper.make_node("DequantizeLinear", [f"yq{k}", "big", "zero"], [f"z{k}"]),
        ]
        outputs.append(helper.make_tensor_value_info(f"z{k}", TensorProto.FLOAT, None))
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in stored.items()]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return weights


def test_kernels_cut_off_just_the_pairs_that_we_think(avx2: Target, tmp_path: Path) -> None:
    weights = model_of_layers(tmp_path / "layers.onnx")
    feed = {f"x{k}": np.full(la[2], 255, np.float32) for k, la in enumerate(LAYERS)}
    values = on_target(tmp_path / "layers.onnx", avx2, feed)
    for (name, op, _, kernel, attributes), value in zip(LAYERS, values, strict=True):
        pairs = pairs_to_try(int(np.prod(kernel)))
        axis = 1 if op == "Conv" else -1
        reached = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1).max(axis=1)
        # 2 * 127 * 255 = 64770, or 32767 where it is cut off.
        cut = {pair for pair, y in zip(pairs, reached, strict=False) if y < 50000}
        node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
        meeting = headroom.meeting(node, weights[name].shape)
        assert cut == {tuple(sorted(pair)) for pair in meeting.tolist()}, name


# --- the stage -------------------------------------------------------------------------------


OUTPUTS = ("conv", "padded", "gemm", "stack")
TEXT = """
net (float[1,6,8,8] a, float[1,6,8,8] b, float[1,33] c, float[2,4,33] d)
    => (float[1,20,6,6] conv, float[1,5,8,8] padded, float[1,12] gemm, float[2,4,12] stack) {
    conv = Conv(a, wa, ba)
    padded = Conv<auto_pad = "SAME_UPPER">(b, wb, bb)
    gemm = Gemm(c, wc, bc)
    stack = MatMul(d, wd)
}"""
SHAPES = {"wa": (20, 6, 3, 3), "wb": (5, 6, 3, 3), "wc": (33, 12), "wd": (2, 33, 12)}
SHAPES |= {"ba": (20,), "bb": (5,), "bc": (12,)}


def job(folder: Path, target: Target) -> Job:
    """A job of the stage for one layer of each kind, weights all positive: their pairs add up."""
    rng = np.random.default_rng(1)
    weights = {n: np.abs(rng.normal(size=s)).astype(np.float32) for n, s in SHAPES.items()}
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {TEXT}')
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    (folder / "out").mkdir(parents=True)
    onnx.save(onnx.shape_inference.infer_shapes(model), folder / "source.onnx")
    samples = {
        v.name: rng.random((16, *(d.dim_value for d in v.type.tensor_type.shape.dim)))
        for v in model.graph.input
    }
    for value in samples.values():
        value[..., -1] = 1.0
    np.savez(folder / "calibration.npz", **{n: v.astype(np.float32) for n, v in samples.items()})
    tables = {
        "model": {"name": "m", "version": "1", "source": "source.onnx"},
        "quantize": {"scope": "full", "ranges": "minmax"},
        "data": {"calibration": "calibration.npz"},
    }
    recipe = parse_recipe(tables, folder)
    return Job(recipe=recipe, target=target, folder=folder / "out", model=folder / "source.onnx")


def large_inputs(path: Path) -> dict[str, np.ndarray]:
    """An input whose codes are in the upper half, the largest among them."""
    rng = np.random.default_rng(2)
    feed = {}
    for value in onnx.load(path).graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        feed[value.name] = rng.uniform(0.6, 1.0, shape).astype(np.float32)
        feed[value.name][..., -1] = 1.0
    return feed


def by_integers(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What the layers of the written model give with exact sums, from their stored codes."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {n.output[0]: n for n in model.graph.node}
    results = {}
    for layer in (n for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")):
        weight = makers[layer.input[1]].input
        name = OUTPUTS["abcd".index(weight[0][1])]
        codes, scale, middle = (stored[i] for i in weight)
        entry = makers[layer.input[0]]
        _, step, zero = entry.input
        x = feed[makers[entry.input[0]].input[0]]
        q = np.clip(np.rint(x / stored[step]) + stored[zero], 0, 255).astype(np.int64)
        assert q.max() == 255 and not np.any(middle)
        q, codes, scale = q - int(stored[zero]), codes.astype(np.int64), scale.astype(np.float64)
        if layer.op_type == "Conv":
            edge = (1, 1) if name == "padded" else (0, 0)
            padded = np.pad(q, [(0, 0), (0, 0), edge, edge])
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
            sums = np.einsum("nchwij,ocij->nohw", windows, codes)
            scale = scale.reshape(1, -1, 1, 1)
        else:
            sums = q @ codes
        results[name] = sums * (scale * float(stored[step]))
        if len(layer.input) > 2:
            values, steps = (stored[i] for i in makers[layer.input[2]].input[:2])
            results[name] += (values * steps.astype(np.float64)).reshape(scale.shape)
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear" and node.input[0] == layer.output[0]:
                step, zero = (stored[i] for i in node.input[1:])
                ends = (np.array([0, 255]) - int(zero)) * float(step)
                results[name] = np.clip(results[name], *ends)
    return [results[name] for name in OUTPUTS]


def test_models_are_exact_on_the_target_and_not_without_head_room(
    avx2: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = job(tmp_path / "with", avx2)
    report = quantize.run(work)
    (told,) = [c for c in report["choices"] if c["step"] == "head-room"]
    assert told["outputs_over"] == told["outputs"] == 20 + 5 + 12 + 24
    assert told["pairs_over"] > 0
    assert 1 < told["range_gain"] < 2
    model, feed = onnx.load(work.output_model()), large_inputs(work.output_model())
    assert headroom.prove(model) == 25 * 27 + 36 * 16
    values = on_target(work.output_model(), avx2, feed)
    for name, value, exact in zip(OUTPUTS, values, by_integers(model, feed), strict=True):
        # Convolutions give 255 steps over their range, where a border case is one step.
        step = exact.max() / 255 if name in ("conv", "padded") else 0
        assert np.abs(value - exact).max() <= step * 1.01 + exact.max() * 1e-6, name

    monkeypatch.setattr(headroom, "needed", lambda scheme: False)
    work = job(tmp_path / "without", avx2)
    quantize.run(work)
    values, model = on_target(work.output_model(), avx2, feed), onnx.load(work.output_model())
    for name, value, exact in zip(OUTPUTS, values, by_integers(model, feed), strict=True):
        assert (value - exact).min() < -0.02 * exact.max(), name
    with pytest.raises(IntegrityError, match="cut off at 16 bits"):
        headroom.prove(model)


def test_dynamic_lstms_are_exact_and_not_without_head_room(avx2: Target, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {n: np.abs(rng.normal(0, 0.03, (1, 64, k))) for n, k in (("w", 33), ("r", 16))}
    text = "g (float[3,1,33] x) => (float[3,1,1,16] y) { y = LSTM<hidden_size = 16>(x, w, r) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    model.graph.node[0].name = "lstm"
    model.graph.initializer.extend(
        numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()
    )
    feed = {"x": rng.uniform(0.8, 1, (3, 1, 33)).astype(np.float32)}
    (exact,) = open_local(model.SerializeToString()).run(feed)
    errors = []
    for saturates in (True, False):
        scheme = dataclasses.replace(avx2.int8, saturates=saturates)
        written = write_dynamic_lstm(model, scheme, ["lstm"])
        onnx.save(written, tmp_path / "lstm.onnx")
        errors.append(np.abs(on_target(tmp_path / "lstm.onnx", avx2, feed)[0] - exact).max())
        if saturates:
            assert headroom.prove(written) == 64 * (16 + 8)
    # 0.0008 is what 8 bits cost here; cut off it is 0.039.
    assert errors[0] < 0.002 and errors[1] > 0.01
    with pytest.raises(IntegrityError, match="lstm"):
        headroom.prove(written)


def test_a_model_that_would_be_cut_off_does_not_leave_the_stage(
    avx2: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headroom, "repair", lambda written: None)
    monkeypatch.setattr(headroom, "with_room", lambda model, names, scales, scheme: scales)
    work = job(tmp_path, avx2)  # no emulator runs: it comes too late for that
    with pytest.raises(IntegrityError, match="cut off at 16 bits"):
        quantize.run(work)
    assert list(work.folder.iterdir()) == []
