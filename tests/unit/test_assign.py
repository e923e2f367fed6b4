"""Soft, trained assignment to codebooks: mixtures by hand, and what training gains over k-means."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from edgewright import share
from edgewright.errors import BadInput
from edgewright.recipe import parse_recipe
from edgewright.runtime.local import open_local
from edgewright.stage import Job
from edgewright.target import load_target

torch = pytest.importorskip("torch")

from edgewright.recover.assign import mixture  # noqa: E402

BOOK = [-1.0, -0.2, 0.0, 0.4, 1.0]


def test_a_mixture_is_the_softmax_over_the_two_entries_around():
    value, heat = torch.tensor([-0.9, -0.1, 0.1, 0.39, 1.0]), 0.5
    found = mixture(value, torch.tensor(BOOK), heat)
    for got, v, (low, high) in zip(
        found, value, [(-1, -0.2), (-0.2, 0), (0, 0.4), (0, 0.4), (0.4, 1)], strict=True
    ):
        ends = torch.tensor([low, high], dtype=torch.float32)
        share = torch.softmax(-((v - ends) ** 2) / (heat * (high - low) ** 2), 0)
        assert float(got) == pytest.approx(float((share * ends).sum()), abs=1e-6)


def test_cold_it_is_the_nearest_entry_and_only_entries_get_gradients():
    value = torch.tensor([-0.7, 0.15, 0.25, 0.9], requires_grad=True)
    book = torch.tensor(BOOK, requires_grad=True)
    found = mixture(value, book, 0.0)
    nearest = [BOOK[k] for k in share.nearest(value.detach().numpy(), np.array(BOOK))]
    assert found.tolist() == pytest.approx(nearest)
    found.sum().backward()
    assert value.grad is None and book.grad.tolist() == [1, 0, 1, 1, 1]
    warm = mixture(value, book, 0.5).sum()
    warm.backward()
    assert (value.grad > 0).all()


X = np.random.default_rng(1).normal(size=(120, 16)).astype(np.float32)


def net() -> onnx.ModelProto:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[N,16] x) => (float[N,5] y) {'
        " h = Gemm <transB=1> (x, w, b) r = Relu (h) k = MatMul (r, v) y = MatMul (k, u) }"
    )
    rng = np.random.default_rng(0)
    shapes = {"w": (32, 16), "b": (32,), "v": (32, 24), "u": (24, 5)}
    for name, shape in shapes.items():
        value = rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
        if name == "v":
            value[rng.random(shape) < 0.5] = 0  # as unstructured pruning leaves it
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for k, node in enumerate(model.graph.node):
        node.name = f"n{k}"
    return onnx.shape_inference.infer_shapes(model)


def shared(folder, **settings) -> tuple[onnx.ModelProto, dict]:
    """The stage on `net`; what quantize makes of it is not the matter here."""
    folder.mkdir()
    onnx.save(net(), folder / "model.onnx")
    np.savez(folder / "c.npz", x=X[:100])
    words = {
        "model": {"name": "net", "version": "1", "source": "model.onnx"},
        "data": {"calibration": "c.npz"},
        "share": {"codebook": 5, **settings},
    }
    (folder / "out").mkdir()
    job = Job(
        recipe=parse_recipe(words, folder), target=load_target("cpu"), folder=folder / "out",
        model=folder / "model.onnx",
    )  # fmt: skip
    report = share.run(job)
    return onnx.load(job.output_model()), report


def error(model: onnx.ModelProto) -> float:
    """Squared error on inputs that nothing learned from, over the original's variance."""
    mine, want = (open_local(m.SerializeToString()).run({"x": X[100:]})[0] for m in (model, net()))
    return float(((mine - want) ** 2).mean() / want.var())


TRAIN = {"steps": 120, "rate": 0.01, "threads": 1}


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_training_gains_over_k_means_and_ends_on_the_codebook(tmp_path, scope):
    hard, _ = shared(tmp_path / "hard", scope=scope)
    soft, report = shared(tmp_path / "soft", scope=scope, assignment="soft", train=TRAIN)
    again, _ = shared(tmp_path / "again", scope=scope, assignment="soft", train=TRAIN)
    assert soft.SerializeToString() == again.SerializeToString()
    told = report["training"]
    assert told["best"]["distance"] < 0.7 * told["start"]["distance"]
    assert error(soft) < 0.8 * error(hard)
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (net(), soft)
    )
    books = set()
    for name, axis in {"w": 0, "v": 1}.items():
        peaks = np.abs(before[name]).max(axis=1 - axis, keepdims=True)
        shares = np.unique((after[name] / peaks).round(5))
        assert len(shares) <= 5 and {-1, 1} <= set(shares)
        books.add(tuple(shares))
    assert (after["v"][before["v"] == 0] == 0).all()
    assert len(books) == (1 if scope == "model" else 2)
    for name in ("b", "u"):  # too small to cluster
        np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"codebook": 0, "assignment": "soft"}, "assignment without share.codebook"),
        ({"train": {"steps": 50}}, "share.train without a soft assignment"),
        ({"assignment": "soft", "train": {"steps": 0}}, "share.train.steps"),
        ({"assignment": "soft", "train": {"rate": 0.9}}, "share.train.rate"),
        ({"assignment": "softly"}, "hard"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, text):
    with pytest.raises(BadInput, match=text):
        shared(tmp_path / "bad", **settings)
