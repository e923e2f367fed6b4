"""Scores by gradients: against differences of the loss, and against closed forms."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from edgewright.errors import BadInput
from edgewright.prune.labels import analyse
from edgewright.runtime.local import open_local
from edgewright.stage import say_nothing

torch = pytest.importorskip("torch")

from edgewright.recover.gradients import scores  # noqa: E402

UNITS, CLASSES = 6, 4


def net(end: str, outputs: int = CLASSES) -> onnx.ModelProto:
    """5 inputs -> 6 units -> the outputs."""
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 18]> g (float[1,5] x) => (float[1,{outputs}] y) {{'
        " h = Gemm <transB=1> (x, w, b) a = Relu (h) z = Gemm <transB=1> (a, v, c) "
        f"{end} }}"
    )
    rng = np.random.default_rng(0)
    shapes = {"w": (UNITS, 5), "b": (UNITS,), "v": (outputs, UNITS), "c": (outputs,)}
    for name, shape in shapes.items():
        value = rng.normal(0, 0.7, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


def samples(count: int = 40):
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(1, 5)).astype(np.float32)} for _ in range(count)]


def scaled(model: onnx.ModelProto, unit: int, factor: float) -> onnx.ModelProto:
    """The model with what reads one hidden unit multiplied."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (weight,) = [t for t in copy.graph.initializer if t.name == "v"]
    value = numpy_helper.to_array(weight).copy()
    value[:, unit] *= factor
    weight.CopyFrom(numpy_helper.from_array(value, "v"))
    return copy


def losses(model: onnx.ModelProto, truth: np.ndarray) -> np.ndarray:
    """Cross entropy of each sample in ONNX Runtime."""
    session = open_local(model.SerializeToString())
    logits = np.concatenate([session.run(f)[0] for f in samples()]).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -logs[np.arange(len(logs)), truth]


def in_order(model: onnx.ModelProto, found: dict[int, float]) -> np.ndarray:
    """Scores in the order of the hidden units."""
    return np.array([found[u] for u in analyse(model).labels["a"][1]])


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_with_labels_they_are_the_derivative_of_the_loss_by_a_factor_on_the_unit(criterion):
    model = net("y = Identity (z)")
    truth = np.random.default_rng(2).integers(0, CLASSES, 40)
    found = scores(model, analyse(model), criterion, samples, say_nothing, truth=truth)
    step = 1e-2
    want = []
    for unit in range(UNITS):
        high, low = (losses(scaled(model, unit, 1 + s), truth) for s in (step, -step))
        slope = (high - low) / (2 * step)
        want.append(np.abs(slope).mean() if criterion == "taylor" else (slope**2).mean() / 2)
    # Central differences of float32 losses of about 1: 1e-7 / 1e-2, and 1e-4 of curvature.
    np.testing.assert_allclose(in_order(model, found), want, rtol=2e-3, atol=1e-5)


def test_without_labels_fisher_is_the_energy_a_unit_gives_to_a_value():
    model = net("y = Tanh (z)", outputs=1)
    found = scores(model, analyse(model), "fisher", samples, say_nothing, seed=5)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    x = np.concatenate([f["x"] for f in samples()])
    a = np.maximum(x @ stored["w"].T + stored["b"], 0)
    slope = 1 - np.tanh(a @ stored["v"].T + stored["c"]) ** 2
    random = torch.Generator().manual_seed(5)
    noise = np.array([torch.randn((1, 1), generator=random).item() for _ in x])[:, None]
    # The derivative of noise * f by a factor on v_j a_j; the mean of noise squared is 1.
    want = ((noise * slope * stored["v"] * a) ** 2).mean(0) / 2
    np.testing.assert_allclose(in_order(model, found), want, rtol=1e-4, atol=1e-9)


def test_what_may_be_logits_or_values_is_drawn_as_both():
    model = net("y = Identity (z)")
    many = samples() * 50
    found = scores(model, analyse(model), "fisher", lambda: many, say_nothing)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    x = np.concatenate([f["x"] for f in samples()])
    a = np.maximum(x @ stored["w"].T + stored["b"], 0)
    z = a @ stored["v"].T + stored["c"]
    slopes = stored["v"][None] * a[:, None]  # (samples, outputs, units), by a factor on a unit
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    # Fisher of a categorical distribution, J'(diag p - p p')J, and of normal noise, J'J / variance.
    classes = (p[:, :, None] * slopes**2).sum(1) - (p[:, :, None] * slopes).sum(1) ** 2
    noise = (slopes**2).mean(1) / z.var(1)[:, None]
    want = (classes + noise).mean(0) / 2
    # 2000 draws; the classes alone are less than half of it, the noise alone 0.6 for some units.
    assert (classes.mean(0) / 2 < 0.5 * want).all() and (noise.mean(0) / 2 < 0.7 * want).any()
    np.testing.assert_allclose(in_order(model, found), want, rtol=0.15)


def test_a_unit_that_gives_nothing_scores_nothing_and_runs_repeat():
    model = scaled(net("y = Softmax <axis=-1> (z)"), 3, 0.0)
    for criterion in ("taylor", "fisher"):
        found = in_order(model, scores(model, analyse(model), criterion, samples, say_nothing))
        assert found[3] == 0 and (np.delete(found, 3) > 0).sum() >= UNITS - 2
        again = in_order(model, scores(model, analyse(model), criterion, samples, say_nothing))
        np.testing.assert_array_equal(found, again)
        other = scores(model, analyse(model), criterion, samples, say_nothing, seed=1)
        assert not np.array_equal(found, in_order(model, other))


def test_hidden_units_of_an_lstm_are_scored_by_all_that_reads_them():
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[4,1,3] x) => (float[4,1,2] y) {'
        " h = LSTM <hidden_size=5> (x, w, r, b) s = Squeeze (h, one) y = MatMul (s, v) }"
    )
    rng = np.random.default_rng(0)
    shapes = {"w": (1, 20, 3), "r": (1, 20, 5), "b": (1, 40), "v": (5, 2)}
    for name, shape in shapes.items():
        value = rng.normal(0, 0.5, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    feeds = [{"x": rng.normal(size=(4, 1, 3)).astype(np.float32)} for _ in range(20)]
    analysis = analyse(model)
    found = scores(model, analysis, "taylor", lambda: feeds, say_nothing)
    assert sorted(found) == sorted(u for g in analysis.groups for u in g.units)
    assert len(found) == 5 and min(found.values()) > 0


def test_no_samples_and_short_labels_are_refused():
    model = net("y = Identity (z)")
    with pytest.raises(BadInput, match="needs calibration samples"):
        scores(model, analyse(model), "taylor", list, say_nothing)
    with pytest.raises(BadInput, match="one for each sample"):
        scores(model, analyse(model), "taylor", samples, say_nothing, truth=[1, 2])
    other = net("y = Tanh (z)")
    with pytest.raises(BadInput, match="labels do not fit output 'y'"):
        scores(other, analyse(other), "taylor", samples, say_nothing, truth=[1] * 40)
