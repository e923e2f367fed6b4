"""Soft pruning on a small net over digits: units are emptied, and the cut then costs nothing."""

import copy
import dataclasses

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from edgewright.prune.cut import cut
from edgewright.prune.labels import analyse
from edgewright.runtime.local import open_local

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("sklearn.datasets")

from edgewright.recipe import Distillation  # noqa: E402
from edgewright.recover.executor import to_module  # noqa: E402
from edgewright.recover.soft import Owned, grow, lasso, left, regrow  # noqa: E402

HIDDEN, GONE = 32, 24
X = (datasets.load_digits().images.reshape(-1, 64) / 16).astype(np.float32)
Y = datasets.load_digits().target
SETTINGS = Distillation(steps=200, rate=3e-2, feature=0, threads=1, outputs="soft")


@pytest.fixture(scope="module")
def original() -> onnx.ModelProto:
    """64 pixels -> 32 units -> 10 classes, trained on labels."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[N,64] x) => (float[N,10] y) {'
        " h = Gemm <transB=1> (x, w, b) a = Relu (h) y = Gemm <transB=1> (a, v, c) }"
    )
    rng = np.random.default_rng(0)
    values = {"w": rng.normal(0, 0.125, (HIDDEN, 64)), "b": np.zeros(HIDDEN)}
    values |= {"v": rng.normal(0, 0.18, (10, HIDDEN)), "c": np.zeros(10)}
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(value.astype("f"), name))
    module = to_module(model)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(60):
        (logits,) = module({"x": X[:900]})
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(Y[:900]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.write_back(model)
    return model


def feeds():
    return ({"x": X[k : k + 1]} for k in range(200))


def answers(model: onnx.ModelProto) -> np.ndarray:
    return open_local(model.SerializeToString()).run({"x": X[900:]})[0].argmax(1)


def outputs(model: onnx.ModelProto) -> np.ndarray:
    return open_local(model.SerializeToString()).run({"x": X[900:]})[0]


def test_a_units_energy_is_that_of_all_its_slices(original):
    analysis = analyse(original)
    module = to_module(original)
    owned = Owned(module.weights, analysis)
    stored = {t.name: numpy_helper.to_array(t).astype(float) for t in original.graph.initializer}
    sizes = {k: (v**2).mean() + 1e-12 for k, v in stored.items()}
    want = (stored["w"] ** 2).sum(1) / sizes["w"] + stored["b"] ** 2 / sizes["b"]
    want += (stored["v"] ** 2).sum(0) / sizes["v"]
    units = analysis.labels["a"][1]
    np.testing.assert_allclose(owned.energy().detach().numpy()[units], want, rtol=1e-4)
    owned.clear(units[:3].tolist())
    left = {n: w.detach().numpy() for n, w in module.weights.items()}
    assert not left["w"][:3].any() and not left["v"][:, :3].any() and left["w"][3:].all(1).any()


def test_growing_empties_the_chosen_units_and_beats_the_cut_alone(original):
    analysis = analyse(original)
    rng = np.random.default_rng(0)
    remove = rng.permutation(analysis.labels["a"][1])[:GONE].tolist()
    hard = cut(original, analysis, remove)[0]
    model = copy.deepcopy(original)
    report = grow(original, model, analysis, remove, feeds, SETTINGS)
    small = cut(model, analysis, remove)[0]
    # What the cut takes is nothing by now. Sums over other lengths differ in the last bits.
    np.testing.assert_allclose(outputs(small), outputs(model), rtol=1e-4, atol=1e-4)
    truth = answers(original)
    assert (answers(small) == truth).mean() > (answers(hard) == truth).mean() + 0.2
    assert report["steps"] == SETTINGS.steps


def test_lasso_gathers_the_energy_in_fewer_units(original):
    analysis = analyse(original)
    model = copy.deepcopy(original)
    lasso(original, model, analysis, feeds, SETTINGS, strength=1.0)

    def weakest(candidate: onnx.ModelProto) -> float:
        """Share of all energy in the weaker half of the units."""
        energy = Owned(to_module(candidate).weights, analysis).energy().detach().numpy()[1:]
        return float(np.sort(energy)[: HIDDEN // 2].sum() / energy.sum())

    assert weakest(model) < 0.9 * weakest(original)  # measured: 0.81


def test_regrowth_ends_with_the_chosen_units_at_zero(original):
    analysis = analyse(original)
    picked: list[frozenset[int]] = []

    def choose(energy: dict[int, float]) -> list[int]:
        weakest = sorted(energy, key=energy.__getitem__)[:GONE]
        picked.append(frozenset(weakest))
        return weakest

    model = copy.deepcopy(original)
    report, units = regrow(original, model, analysis, choose, feeds, SETTINGS, every=10)
    assert units == picked[-1] and len(units) == GONE and len(picked) == 16
    small = cut(model, analysis, units)[0]
    np.testing.assert_allclose(outputs(small), outputs(model), rtol=1e-4, atol=1e-4)
    hard = cut(original, analysis, picked[0])[0]
    truth = answers(original)
    assert (answers(small) == truth).mean() > (answers(hard) == truth).mean()
    assert report["steps"] == SETTINGS.steps


@pytest.mark.parametrize("killed", [35, 55])  # of 60 steps: while units are chosen, and after
def test_regrowth_that_was_killed_ends_with_the_same_bytes(original, tmp_path, killed):
    analysis = analyse(original)
    settings = dataclasses.replace(SETTINGS, steps=60)

    def choose(energy: dict[int, float]) -> list[int]:
        return sorted(energy, key=energy.__getitem__)[:GONE]

    class Killed(Exception):
        pass

    def kill(text: str, done: int = 0, total: int = 0) -> None:
        if text == "training" and done == killed:
            raise Killed

    plain, other = copy.deepcopy(original), copy.deepcopy(original)
    _, units = regrow(original, plain, analysis, choose, feeds, settings, every=10)
    with pytest.raises(Killed):
        regrow(original, other, analysis, choose, feeds, settings, every=10, folder=tmp_path,
               tell=kill)  # fmt: skip
    other = copy.deepcopy(original)
    report, again = regrow(original, other, analysis, choose, feeds, settings, every=10,
                           folder=tmp_path)  # fmt: skip
    assert 0 < report["resumed_at"] <= killed and again == units
    assert other.SerializeToString(deterministic=True) == plain.SerializeToString(
        deterministic=True
    )


def test_what_falls_is_gone_at_half_of_the_steps():
    assert left(-1, 100) == 1 and left(24, 100) == pytest.approx(0.5)
    assert left(49, 100) == left(99, 100) == 0
