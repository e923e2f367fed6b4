"""Weight clipping: peaks by hand and by brute force, statistics against numpy's."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from edgewright.quantize.clip import RATIOS, clipped_peaks, input_statistics
from edgewright.quantize.layers import find_layers


def error(w: np.ndarray, peak: float, mean: np.ndarray, variance: np.ndarray, limit: int) -> float:
    """Output error of one channel, w (n,), by the formula of the file, term by term."""
    step = peak / limit
    lost = [v - min(max(round(v / step), -limit), limit) * step for v in w.astype(float)]
    parts = zip(lost, mean, variance, strict=True)
    first = [(d * d * v, d * m) for d, m, v in parts]
    return sum(a for a, _ in first) + sum(b for _, b in first) ** 2


def test_a_loud_weight_on_a_silent_input_is_cut_by_hand() -> None:
    # Steps of 1: 0.4 and 0.4 are lost, 3 is kept; the input of 3 is always 0, so all codes may
    # go to 0.4, and the nearest ratio to that is taken.
    weight = np.float32([[[3.0, 0.4, 0.4]]])
    mean, variance = np.zeros((1, 3)), np.array([[0.0, 1.0, 1.0]])
    peak = clipped_peaks(weight, mean, variance, joint=False, limit=3)
    assert peak.shape == (1, 1)
    assert abs(0.4 - round(0.4 / (peak[0, 0] / 3)) * peak[0, 0] / 3) < 0.02
    assert peak[0, 0] < 1.5
    # Where that input counts as much as the others, nothing is gained by cutting 2.5 off.
    kept = clipped_peaks(weight, mean, np.array([[100.0, 1, 1]]), joint=False, limit=3)
    assert kept[0, 0] == pytest.approx(3.0)


@pytest.mark.parametrize("limit", [7, 63, 127])
@pytest.mark.parametrize("joint", [False, True])
def test_against_brute_force(limit: int, joint: bool) -> None:
    rng = np.random.default_rng(limit)
    weight = rng.standard_t(3, size=(2, 3, 9)).astype(np.float32)
    mean, variance = rng.normal(size=(2, 9)), rng.random((2, 9))
    peaks = clipped_peaks(weight, mean, variance, joint=joint, limit=limit)
    assert peaks.shape == (2, 3)
    channels = [(g, c) for g in range(2) for c in range(3)]

    def total(ratios: float) -> float:
        top = float(np.abs(weight).max())
        return sum(
            error(weight[g, c], ratios * top, mean[g], variance[g], limit) for g, c in channels
        )

    if joint:
        assert len(set(peaks.reshape(-1).tolist())) == 1
        best = min(total(r) for r in RATIOS)
        assert total(peaks[0, 0] / np.abs(weight).max()) == pytest.approx(best, rel=1e-3)
        return
    for g, c in channels:
        top = float(np.abs(weight[g, c]).max())
        best = min(error(weight[g, c], r * top, mean[g], variance[g], limit) for r in RATIOS)
        got = error(weight[g, c], peaks[g, c], mean[g], variance[g], limit)
        assert got == pytest.approx(best, rel=1e-3)  # float32 against float64
        assert peaks[g, c] <= top * (1 + 1e-6)


def test_channels_of_zeros_and_inputs_of_nothing() -> None:
    weight = np.float32([[[0, 0], [1, -2]]])
    peaks = clipped_peaks(weight, np.zeros((1, 2)), np.zeros((1, 2)), joint=False)
    np.testing.assert_allclose(peaks, [[0, 2]])  # no error anywhere: the peak stays


def test_statistics_are_numpys() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4,5,5] x) => (float[N,6,3,3] y, float[N,4,5,2] z) {
            y = Conv<group=2>(x, w)  r = Relu(x)  z = MatMul(r, v)
        }"""
    )
    rng = np.random.default_rng(1)
    for name, shape in (("w", (6, 2, 3, 3)), ("v", (5, 2))):
        value = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for node in model.graph.node:
        node.name = node.output[0]
    feeds = [{"x": rng.normal(1, 2, (k, 4, 5, 5)).astype(np.float32)} for k in (1, 3)]
    found = input_statistics(model, find_layers(model, ["y", "z"]), feeds)
    whole = np.concatenate([f["x"] for f in feeds]).astype(float)
    wanted = np.repeat(whole.mean(axis=(0, 2, 3)).reshape(2, 2), 9, axis=1)
    np.testing.assert_allclose(found["y"][0], wanted, rtol=1e-4)
    wanted = np.repeat(whole.var(axis=(0, 2, 3)).reshape(2, 2), 9, axis=1)
    np.testing.assert_allclose(found["y"][1], wanted, rtol=1e-4)
    positive = np.maximum(whole, 0)
    np.testing.assert_allclose(found["z"][0], positive.mean(axis=(0, 1, 2))[None], rtol=1e-4)
    np.testing.assert_allclose(found["z"][1], positive.var(axis=(0, 1, 2))[None], rtol=1e-4)
