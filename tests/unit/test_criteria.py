"""Pruning criteria on cases computed by hand, and OBS against plain least squares."""

import itertools

import numpy as np
import onnx
import onnx.parser
import pytest
from graphs import normal, parsed

from edgewright.errors import BadInput
from edgewright.prune import obs
from edgewright.prune.criteria import CRITERIA, GRADIENT, scores
from edgewright.prune.labels import analyse
from edgewright.prune.obs import Reader, losses
from edgewright.stage import say_nothing


def two_layers(first: list, second: list) -> onnx.ModelProto:
    """x (n, 2) times `first` (2, 3), then times `second` (3, 1): three units."""
    text = "g (float[n, 2] x) => (float[n, 1] y) { h = MatMul (x, v) y = MatMul (h, w) }"
    return parsed(text, v=np.array(first, np.float32), w=np.array(second, np.float32))


def values(model: onnx.ModelProto, criterion: str, feeds: list | None = None) -> list[float]:
    """Scores of the only group's units, in order."""
    analysis = analyse(model)
    (group,) = analysis.groups
    source = None if feeds is None else lambda: iter(feeds)
    found = scores(model, analysis, criterion, source, say_nothing)
    return [found[u] for u in group.units]


FIRST, SECOND = [[1, -2, 0], [1, 2, 4]], [[3], [-1], [2]]


def test_norms_by_hand() -> None:
    model = two_layers(FIRST, SECOND)
    # Columns of v: 2, 4, 4 (mean 10/3); rows of w: 3, 1, 2 (mean 2); then shares of the sum 6.
    want = np.array([2, 4, 4]) / (10 / 3) + np.array([3, 1, 2]) / 2
    np.testing.assert_allclose(values(model, "l1"), want / 6, rtol=1e-12)
    want = np.array([2, 8, 16]) / (26 / 3) + np.array([9, 1, 4]) / (14 / 3)
    np.testing.assert_allclose(values(model, "l2"), want / 6, rtol=1e-12)


def test_activation_by_hand() -> None:
    # h = x v: mean squares of its channels over both places are 1, 4, 8.
    feeds = [{"x": np.array([[1, 0], [0, 1]], np.float32)}]
    want = np.array([3 * 1, 1 * 2, 2 * np.sqrt(8)])
    found = values(two_layers(FIRST, SECOND), "activation", feeds)
    np.testing.assert_allclose(found, want / want.sum(), rtol=1e-6)


def test_gammas_by_hand() -> None:
    text = """g (float[n, 2, 4, 4] x) => (float[n, 2, 4, 4] y) {
        a = Conv (x, v) b = BatchNormalization (a, gamma, beta, mean, var)
        c = Relu (b) y = Conv (c, w) }"""
    stored = {"v": normal(3, 2, 1, 1), "w": normal(2, 3, 1, 1), "beta": normal(3)}
    stored |= {"mean": normal(3), "var": np.ones(3, np.float32)}
    model = parsed(text, gamma=np.array([0.5, -2.5, 1.0], np.float32), **stored)
    np.testing.assert_allclose(values(model, "bn_gamma"), [0.125, 0.625, 0.25])
    with pytest.raises(BadInput, match="folded"):
        values(two_layers(FIRST, SECOND), "bn_gamma")


def test_random_is_the_same_every_time() -> None:
    model = two_layers(FIRST, SECOND)
    assert values(model, "random") == values(model, "random")
    assert len(set(values(model, "random"))) == 3


def test_hessian_of_independent_channels_is_their_part_of_the_output() -> None:
    # Channels with variances 1, 4, 9 (orthogonal over the places) and weights 3, -1, 2.
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], np.float32)
    text = "g (float[n, 3] x) => (float[n, 1] y) { h = MatMul (x, v) y = MatMul (h, w) }"
    model = parsed(text, v=np.diag([1, 2, 3]).astype(np.float32), w=np.array(SECOND, np.float32))
    energy = np.array([9 * 1, 1 * 4, 4 * 9])
    # Over 4096 places a ridge of about 2e-3 of the mean variance is in the moments.
    found = values(model, "hessian", [{"x": np.tile(signs, (64, 1))}] * 16)
    order = sorted(range(3), key=lambda j: energy[j])
    assert sorted(range(3), key=lambda j: found[j]) == order
    np.testing.assert_allclose(found, energy / energy.sum(), rtol=0.02)


def test_hessian_knows_that_one_of_two_equal_channels_can_go() -> None:
    # Channels 0 and 1 are equal and the strongest; 2 and 3 are weaker, and nobody replaces them.
    v = np.array([[5, 5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)
    w = np.array([[5], [5], [4], [4]], np.float32)
    text = "g (float[n, 3] x) => (float[n, 1] y) { h = MatMul (x, v) y = MatMul (h, w) }"
    feeds = [{"x": normal(400, 3, seed=k)} for k in range(4)]
    model = parsed(text, v=v, w=w)
    found = values(model, "hessian", feeds)
    # The first to go is one of the equal ones; afterwards the other one is the dearest of all.
    assert int(np.argmin(found)) in (0, 1)
    assert int(np.argmax(found)) in (0, 1)
    assert int(np.argmin(values(model, "activation", feeds))) in (2, 3)


def test_losses_are_those_of_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obs, "STRENGTH", 1e-9)
    generator = np.random.default_rng(3)
    x = generator.normal(size=(4000, 6)) @ generator.normal(size=(6, 6))
    weight = generator.normal(size=(6, 5))
    gram = x.T @ x / len(x)
    energy = np.trace(weight.T @ gram @ weight)
    labels = np.array([1, 1, 2, 2, 3, 0])
    reader = Reader(labels, gram, weight @ weight.T / energy, np.diag(gram), 10**9)
    found = losses([reader], [1, 2, 3])

    def refitted(gone: np.ndarray) -> float:
        """Loss of the best weights on the channels left."""
        left = ~gone
        best = np.linalg.lstsq(x[:, left], x @ weight, rcond=None)[0]
        return float(((x @ weight - x[:, left] @ best) ** 2).sum() / len(x) / energy)

    alone = {u: refitted(labels == u) for u in (1, 2, 3)}
    order = sorted(alone, key=alone.get)
    assert min(found, key=found.get) == order[0]
    np.testing.assert_allclose(found[order[0]], alone[order[0]], rtol=1e-6)
    # The second to go: what it adds, the first one being gone and made up for.
    pair = min(
        (refitted((labels == order[0]) | (labels == u)) for u in order[1:]),
    )
    second = sorted(found, key=found.get)[1]
    np.testing.assert_allclose(found[order[0]] + found[second], pair, rtol=1e-6)


def test_head_units_are_scored_as_blocks_and_losses_never_fall() -> None:
    generator = np.random.default_rng(5)
    mix = generator.normal(size=(12, 12))
    gram = mix @ mix.T
    weight = generator.normal(size=(12, 3))
    labels = np.repeat([1, 2, 3, 4], 3)
    reader = Reader(labels, gram, weight @ weight.T, np.diag(gram), 10**9)
    found = losses([reader], [1, 2, 3, 4])
    in_order = sorted(found.values())
    assert list(found.values()) == in_order
    assert all(a <= b for a, b in itertools.pairwise(in_order))


@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
def test_unknown_criteria_are_refused(criterion: str) -> None:
    with pytest.raises(BadInput, match="l1, l2"):
        values(two_layers(FIRST, SECOND), criterion)


def test_label_free_criteria_need_samples() -> None:
    for criterion, needs in CRITERIA.items():
        if needs == "label-free" and criterion not in GRADIENT:
            with pytest.raises(BadInput, match="samples"):
                values(two_layers(FIRST, SECOND), criterion)
            with pytest.raises(BadInput, match="samples"):
                values(two_layers(FIRST, SECOND), criterion, [])


def test_units_nobody_reads_are_left_out() -> None:
    # q and k meet each other only: no weight reads them, so OBS has nothing to say of them.
    text = """g (float[n, 2, 4] x) => (float[n, 2, 2] y) {
        q = MatMul (x, a) k = MatMul (x, b) t = Transpose <perm = [0, 2, 1]> (k)
        y = MatMul (q, t) }"""
    model = parsed(text, a=normal(4, 3), b=normal(4, 3))
    analysis = analyse(model)
    assert len(analysis.groups) == 1
    feeds = [{"x": normal(3, 2, 4)}]
    assert scores(model, analysis, "hessian", lambda: iter(feeds), say_nothing) == {}
    assert len(scores(model, analysis, "l2", None, say_nothing)) == 3


def test_few_places_teach_less_than_many() -> None:
    # 30 channels that share 3 causes: over 20 places chance adds relations, over 2000 it does not.
    generator = np.random.default_rng(2)
    mix = generator.normal(size=(3, 30))
    x = generator.normal(size=(2000, 3)) @ mix + 0.1 * generator.normal(size=(2000, 30))
    few, many = (obs.ridge(x[:n].T @ x[:n] / n, n) for n in (20, 2000))
    variance = float((x * x).mean())
    assert few > 0.05 * variance > 0.01 * variance > many >= obs.STRENGTH * 0.9 * variance
    # Equal variances and no relations: nothing to keep but the mean.
    assert obs.ridge(np.eye(5), 10) == pytest.approx(obs.LARGEST_PART / (1 - obs.LARGEST_PART))
