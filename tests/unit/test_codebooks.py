"""Codebooks: centres against an exhaustive search, codes against values in the runtime."""

from itertools import combinations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from edgewright import share
from edgewright.runtime.local import open_local


def error(values: np.ndarray, centres: np.ndarray) -> float:
    return float((np.abs(values[:, None] - centres[None]).min(axis=1) ** 2).sum())


def best_error(values: np.ndarray, entries: int) -> float:
    """Least squared error of any split of the sorted values into runs with their means."""
    ordered = np.sort(values)
    least = np.inf
    for cuts in combinations(range(1, len(ordered)), entries - 1):
        parts = np.split(ordered, cuts)
        least = min(least, sum(float(((p - p.mean()) ** 2).sum()) for p in parts))
    return least


@pytest.mark.parametrize("seed", range(5))
def test_centres_are_near_the_best_there_are(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=24)
    found = error(values, share.k_means(values, 4))
    # Lloyd's iteration ends in a local optimum; an even grid is what it must clearly beat.
    even = error(values, np.linspace(values.min(), values.max(), 4))
    assert best_error(values, 4) <= found * (1 + 1e-9) <= 0.75 * even


def test_few_distinct_values_are_kept_exactly() -> None:
    values = np.array([0.5, -1, 0.5, 2, -1], np.float32)
    assert share.k_means(values, 8).tolist() == [-1, 0.5, 2]


def test_zeros_stay_zero() -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    values[::3] = 0
    centres = share.k_means(values, 8)
    assert 0 in centres and len(centres) == 8
    assert (centres[share.nearest(values[::3], centres)] == 0).all()


def model() -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    parsed = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[1,8,6,6] x) => (float[1,4] y) {
            c = Conv<pads=[1,1,1,1]>(x, w)
            p = GlobalAveragePool(c)
            f = Flatten(p)
            y = MatMul(f, m)
        }"""
    )
    scale = np.geomspace(0.01, 10, 32).astype(np.float32)[:, None, None, None]
    weights = {
        "w": rng.normal(size=(32, 8, 3, 3)).astype(np.float32) * scale,
        "m": rng.normal(size=(32, 4)).astype(np.float32),  # below MIN_VALUES: stays
    }
    for name, value in weights.items():
        parsed.graph.initializer.append(numpy_helper.from_array(value, name))
    return parsed


def quiet(text: str, done: int, total: int) -> None:
    pass


def test_codes_make_the_same_weights_and_are_a_quarter() -> None:
    source = model()
    axes = share.weight_axes(source)
    assert axes == {"w": 0}
    found = share.clusters(source, axes, 64, "layer", quiet)
    values, codes = share.with_values(source, found), share.with_codes(source, found)
    onnx.checker.check_model(codes, full_check=True)
    x = {"x": np.random.default_rng(2).normal(size=(1, 8, 6, 6)).astype(np.float32)}
    same = [open_local(m.SerializeToString()).run(x)[0] for m in (values, codes)]
    assert np.array_equal(*same)
    weight = numpy_helper.to_array(source.graph.initializer[0])
    assert codes.ByteSize() < values.ByteSize() - 2.5 * weight.size
    # A scale per channel: the smallest channel is as exact, relative to itself, as the largest.
    made = found["w"].values()
    errors = np.linalg.norm((made - weight).reshape(32, -1), axis=1)
    assert (errors / np.linalg.norm(weight.reshape(32, -1), axis=1)).max() < 0.05


def test_one_codebook_for_the_model_is_stored_once() -> None:
    source = model()
    twin = numpy_helper.to_array(source.graph.initializer[0]) * 2
    source.graph.initializer.append(numpy_helper.from_array(twin, "w2"))
    source.graph.node.add().CopyFrom(onnx.helper.make_node("Conv", ["x", "w2"], ["d"]))
    found = share.clusters(source, share.weight_axes(source), 16, "model", quiet)
    # Twice the weights: the same shares of the channel's peak, so the same codes.
    assert np.array_equal(found["w"].codes, found["w2"].codes)
    codes = share.with_codes(source, found)
    assert sum("codebook" in t.name for t in codes.graph.initializer) == 1


def test_row_says_entropy_and_error() -> None:
    source = model()
    weight = numpy_helper.to_array(source.graph.initializer[0])
    codes = (np.arange(weight.size) % 4).reshape(weight.shape).astype(np.uint8)
    one = share.Clustered(codes, np.zeros(4, np.float32), np.ones((32, 1, 1, 1), np.float32))
    row = share.row(source, "w", one)
    assert (row["entropy_bits"], row["relative_error"], row["entries"]) == (2.0, 1.0, 4)


def test_each_channel_keeps_its_peak_so_int8_codes_stay_few() -> None:
    source = model()
    found = share.clusters(source, {"w": 0}, 16, "layer", quiet)["w"].values()
    weight = numpy_helper.to_array(source.graph.initializer[0])
    peaks = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
    assert np.array_equal(np.abs(found).max(axis=(1, 2, 3), keepdims=True), peaks)
    codes = np.round(found / (peaks / np.float32(127)))
    assert len(np.unique(codes)) <= 16
