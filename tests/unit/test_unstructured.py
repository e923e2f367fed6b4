"""Zeros in the weights: counted by hand, and what they are worth."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from edgewright import pruning
from edgewright.errors import BadInput
from edgewright.prune.unstructured import block_mask, n_of_m, prunable, sparse
from edgewright.recipe import parse_recipe
from edgewright.stage import Job
from edgewright.target import load_target


def net() -> onnx.ModelProto:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[N,8,6,6] x) => (float[N,3] y) {'
        " a = Conv <kernel_shape=[3,3]> (x, w, b) r = Relu (a) m = GlobalAveragePool (r)"
        " f = Flatten (m) y = Gemm <transB=1> (f, v, c) }"
    )
    rng = np.random.default_rng(0)
    shapes = {"w": (16, 8, 3, 3), "b": (16,), "v": (3, 16), "c": (3,)}
    for name, shape in shapes.items():
        value = rng.normal(0, 10 if name == "v" else 0.1, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


def values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def test_weights_are_known_with_the_axis_they_are_summed_over():
    assert prunable(net()) == {"w": (0, 1), "v": (0, 1)}


def test_two_of_four_are_the_two_largest():
    weight = np.array([[1, -5, 2, 3, 0, 0, 0, 0, 7], [4, 3, 2, 1, -1, 2, -3, 4, 0]], float)
    want = [[0, 1, 0, 1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 1, 1, 1]]  # the rest stays whole
    np.testing.assert_array_equal(n_of_m(weight, 1, 2, 4), np.array(want, bool))


def test_n_of_m_holds_along_the_summed_axis_of_every_weight():
    result, report = sparse(net(), "2:4")
    for name, (_, axis) in prunable(net()).items():
        parts = np.moveaxis(values(result)[name], axis, -1)
        counts = (parts.reshape(-1, 4) != 0).sum(1)
        assert (counts == 2).all()
    assert report["zeros"] * 2 == report["weights"] == 16 * 8 * 9 + 48


@pytest.mark.parametrize("pattern", ["magnitude", "tensor", "1x4", "2x4"])
def test_the_share_goes_and_what_stays_is_larger(pattern):
    model = net()
    result, report = sparse(model, pattern, 0.75)
    assert report["zeros"] / report["weights"] == pytest.approx(0.75, abs=0.01)
    before, after = values(model), values(result)
    for name in ("b", "c"):
        np.testing.assert_array_equal(before[name], after[name])
    for name in ("w", "v"):
        kept = after[name] != 0
        np.testing.assert_array_equal(after[name][kept], before[name][kept])
        if pattern == "tensor":
            assert np.abs(before[name][kept]).min() >= np.abs(before[name][~kept]).max()
        if "x" in pattern:
            tall = int(pattern[0]) if name == "w" else 1  # three outputs: the last block is short
            runs = np.moveaxis(kept[: kept.shape[0] // tall * tall], 1, -1)
            runs = runs.reshape(-1, tall, runs[0, ..., 0].size, runs.shape[-1] // 4, 4)
            assert set(runs.sum((1, 4)).reshape(-1)) == {0, 4 * tall}


def test_blocks_are_counted_by_hand():
    # Rows are outputs, columns inputs; 2x2 blocks, the last row and column short. Mean squares:
    # 1, 9, 16 / 4, 0.25: a half of the six blocks with the least mean square goes.
    weight = np.array([[1, 1, 3, 3, 5], [1, 1, 3, 3, 5], [2, 2, 0.5, 0.5, 6]])
    want = [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(block_mask(weight, (0, 1), (2, 2), 0.5), np.array(want, bool))
    turned = block_mask(weight.T, (1, 0), (2, 2), 0.5)  # outputs last, as MatMul stores them
    np.testing.assert_array_equal(turned, np.array(want, bool).T)


def test_blocks_of_a_matmul_join_outputs():
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[N,6] x) => (float[N,8] y) {'
        " y = MatMul (x, w) }"
    )
    value = np.random.default_rng(0).normal(size=(6, 8)).astype("f")
    model.graph.initializer.append(numpy_helper.from_array(value, "w"))
    kept = values(sparse(model, "4x1", 0.5)[0])["w"] != 0
    assert set(kept.reshape(6, 2, 4).sum(-1).reshape(-1)) == {0, 4}


def test_tensors_of_all_sizes_lose_their_share():
    _, report = sparse(net(), "magnitude", 0.5)
    # v is a hundred times larger than w, and still loses about half.
    shares = {r["tensor"]: r["zeros"] / r["weights"] for r in report["tensors"]}
    assert 0.3 < shares["v"] < 0.7 and 0.45 < shares["w"] < 0.55


def test_the_gain_is_told_as_it_is():
    result, report = sparse(net(), "magnitude", 0.9)
    assert report["bytes"][0] == report["bytes"][1] == len(result.SerializeToString())
    assert report["compressed_bytes"][1] < 0.4 * report["compressed_bytes"][0]
    assert "no gain in latency" in report["notes"][1]
    onnx.checker.check_model(result, full_check=True)


@pytest.mark.parametrize(
    ("pattern", "share"),
    [
        ("magnitude", 0.0),
        ("magnitude", 1.0),
        ("tensor", 1.5),
        ("4:2", 0.5),
        ("1x1", 0.5),
        ("0x4", 0.5),
        ("4x1", 1.0),
        ("x", 0.5),
        ("0:4", 0.5),
    ],
)
def test_bad_patterns_and_shares_are_refused(pattern, share):
    with pytest.raises(BadInput, match="expected"):
        sparse(net(), pattern, share)


def test_a_recipe_asks_for_it(tmp_path):
    onnx.save(net(), tmp_path / "model.onnx")
    inputs = np.random.default_rng(1).normal(size=(4, 8, 6, 6)).astype("f")
    np.savez(tmp_path / "c.npz", x=inputs)
    words = {
        "model": {"name": "net", "version": "1.0.0", "source": "model.onnx"},
        "data": {"calibration": "c.npz", "evaluation": "e.npz", "metric": "score.py:score"},
        "prune": {"budget": {"params": 0.3}, "zero": "magnitude"},
    }
    recipe = parse_recipe(words, tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    job = Job(
        recipe=recipe, target=load_target("cpu"), folder=folder, model=tmp_path / "model.onnx"
    )
    report = pruning.run(job)
    assert report["budget"] == {"of": "weights", "asked": 0.3, "left": pytest.approx(0.3, abs=1e-3)}
    stored = values(onnx.load(job.output_model()))
    zeros = sum((stored[k] == 0).sum() for k in ("w", "v"))
    assert zeros == round(0.7 * (16 * 8 * 9 + 48))
    assert 0.5 < report["cpu_ratio"] < 2  # the same kernels multiply zeros as well
    assert any("latency stay" in n["text"] for n in report["notes"])
