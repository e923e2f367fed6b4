"""What a group's loss costs at the outputs, and the layers that keep channels apart."""

import numpy as np
import onnx
import onnx.parser
import pytest
from graphs import normal, parsed
from onnx import numpy_helper

from edgewright.model import initializers
from edgewright.prune.criteria import scores
from edgewright.prune.labels import analyse
from edgewright.prune.obs import Reader, taken_over
from edgewright.prune.sensitivity import difference, rescale
from edgewright.recover.channelwise import Spread, apply, find_channelwise, refit
from edgewright.recover.compensate import compensate
from edgewright.stage import say_nothing


def test_a_branch_that_hardly_reaches_the_output_is_cheap() -> None:
    # Two equal branches; one enters the output a hundred times weaker. Relative to their own
    # outputs both lose the same, at the model's output one loses 10,000 times less.
    text = """g (float[n, 6] x) => (float[n, 6] y) {
        a = MatMul (x, va)
        p = MatMul (a, wa)
        b = MatMul (x, vb)
        q = MatMul (b, wb)
        s = Mul (q, hundredth)
        y = Add (p, s) }"""
    v, w = normal(6, 8), normal(8, 6, seed=2)
    model = parsed(text, va=v, wa=w, vb=v, wb=w, hundredth=np.array(0.01, np.float32))
    before = model.SerializeToString(deterministic=True)
    analysis = analyse(model)
    feeds = [{"x": normal(64, 6, seed=k)} for k in range(8)]
    found = scores(model, analysis, "hessian", lambda: iter(feeds), say_nothing)
    strong, weak = ([found[u] for u in g.units] for g in analysis.groups)
    np.testing.assert_allclose(np.array(weak) / np.array(strong), 1e-4, rtol=0.05)
    assert model.SerializeToString(deterministic=True) == before


def test_the_others_take_over_what_they_can() -> None:
    # x2 = x0 + 2 x1 + 3: the map finds it; x0 and x1 stay what they are.
    x = np.random.default_rng(1).normal(size=(50_000, 2))
    x = np.column_stack([x, x[:, 0] + 2 * x[:, 1] + 3])
    mean = x.mean(axis=0)
    gram = (x - mean).T @ (x - mean) / len(x)
    reader = Reader(np.arange(3), gram, np.eye(3), np.ones(3), len(x), mean)
    matrix, offset = taken_over(reader, np.array([False, False, True]))
    # The ridge of 1e-3 of the mean variance shrinks a little.
    np.testing.assert_allclose(matrix, [[1, 0, 0], [0, 1, 0], [1, 2, 0]], atol=0.01)
    np.testing.assert_allclose(offset, [0, 0, 3], atol=0.01)


def test_scores_add_up_to_the_damage_and_never_fall() -> None:
    found = {5: 1.0, 3: 1.0, 9: 2.0, 7: 4.0}
    # Two units cost 0.1 together, three 0.5; the last one is scaled as the one before it.
    rescale([5, 3, 9, 7], [2, 3], [0.1, 0.5], found)
    assert found == pytest.approx({5: 0.05, 3: 0.05, 9: 0.4, 7: 0.8})
    # A measured damage that falls (noise) leaves the later ones at least as dear.
    found = {1: 1.0, 2: 1.0, 3: 1.0}
    rescale([1, 2, 3], [1, 2], [0.3, 0.2], found)
    assert found == pytest.approx({1: 0.3, 2: 0.3, 3: 0.3})


def test_difference_by_hand() -> None:
    # Output of variance 1 over 4 values: squared error 4 * 0.25 of 4; the second output is equal.
    truth = [[np.array([1.0, -1]), np.ones(2)], [np.array([1.0, -1]), np.zeros(2)]]
    now = [[t[0] + 0.5, t[1]] for t in truth]
    assert difference(truth, now) == pytest.approx(0.25 / 2)


def test_scale_and_shift_are_those_of_least_squares() -> None:
    halves = Spread(), Spread()
    for half, seed in zip(halves, (1, 2), strict=True):
        z = normal(3, 200, seed=seed)
        half.add(np.array([[2.0], [0.5], [1.0]]) * z + np.array([[1.0], [0.0], [-3.0]]), z)
    found = refit(halves)
    assert found is not None
    scale, shift, before, after = found
    np.testing.assert_allclose(scale, [2, 0.5, 1], rtol=1e-5)
    np.testing.assert_allclose(shift, [1, 0, -3], atol=1e-5)
    assert before > 0.2 and after < 1e-9
    # Scales beyond the limit, and channels that say nothing, are left at 1.
    wild = Spread()
    z = np.concatenate([normal(1, 50), np.ones((1, 50), np.float32)])
    wild.add(z * np.array([[50.0], [7.0]]), z)
    np.testing.assert_array_equal(wild.affine()[0], [1, 1])
    assert refit((Spread(), wild)) is None


@pytest.mark.parametrize("op", ["BatchNormalization", "Conv"])
def test_layers_that_keep_channels_apart_follow_what_changed_before(op: str) -> None:
    # Half of the channels go in front of a grouped convolution, which is not repaired: it loses
    # mean and spread, and the layer behind it gets both back.
    layer = {
        "BatchNormalization": "b = BatchNormalization (a, s, t, mean, var)",
        "Conv": "b = Conv <group = 4> (a, s, t)",
    }[op]
    text = f"""g (float[1, 3, 6, 6] x) => (float[1, 4, 6, 6] y) {{
        z = Conv (x, u)
        h = Relu (z)
        a = Conv <group = 2> (h, v)
        {layer}
        y = Relu (b) }}"""
    stored = {"u": normal(4, 3, 1, 1), "v": np.abs(normal(4, 2, 1, 1, seed=2)), "t": normal(4)}
    if op == "Conv":
        stored["s"] = normal(4, 1, 1, 1, seed=4)
    else:
        stored |= {"s": normal(4, seed=4), "mean": normal(4), "var": np.full(4, 2, np.float32)}
    original = parsed(text, **stored)
    pruned = onnx.ModelProto()
    pruned.CopyFrom(original)
    keep = np.array([0, 2])
    kept = {("u", 0): keep, ("z", 1): keep, ("h", 1): keep, ("v", 1): np.array([0])}
    for name, axis in (("u", 0), ("v", 1)):
        tensor = initializers(pruned.graph)[name]
        value = np.take(numpy_helper.to_array(tensor), kept[name, axis], axis=axis)
        tensor.CopyFrom(numpy_helper.from_array(value, name))
    (layer_found,) = find_channelwise(pruned)
    assert (layer_found.scale, layer_found.shift) == ("s", "t")
    feeds = [{"x": normal(1, 3, 6, 6, seed=k)} for k in range(12)]
    rows = compensate(original, pruned, kept, lambda: iter(feeds), say_nothing)
    assert [r["node"] for r in rows] == ["n2", layer_found.node]
    assert rows[1]["error"] < 0.7 * rows[1]["plain"]
    before = initializers(pruned.graph)["s"].SerializeToString()
    apply(pruned, layer_found, np.array([1.0, 2, 1, 1]), np.zeros(4))
    changed = onnx.TensorProto.FromString(before)
    new = numpy_helper.to_array(initializers(pruned.graph)["s"]).reshape(4)
    np.testing.assert_allclose(new, numpy_helper.to_array(changed).reshape(4) * [1, 2, 1, 1])
