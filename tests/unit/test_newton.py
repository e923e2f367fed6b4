"""Learning from few samples: coordinates, the descent in them, and the samples made of others."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from edgewright.errors import BadInput

torch = pytest.importorskip("torch")

from edgewright.recipe import Distillation  # noqa: E402
from edgewright.recover.batches import runtime_teacher  # noqa: E402
from edgewright.recover.coordinates import Coordinates, Scaled, make_coordinates  # noqa: E402
from edgewright.recover.distill import distill  # noqa: E402
from edgewright.recover.executor import to_module  # noqa: E402
from edgewright.recover.lesson import make_lesson  # noqa: E402
from edgewright.recover.newton import descend  # noqa: E402
from edgewright.recover.training import Schedule, Score  # noqa: E402

GRAPH = """<ir_version: 8, opset_import: ["" : 18]> g (float[N,3,12,12] x) => (float[N,5] y) {
    a = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (x, w1, b1) r = Relu (a)
    d = Conv <kernel_shape=[3,3], pads=[1,1,1,1], group=8> (r, w2, b2) e = Relu (d)
    t = ConvTranspose <kernel_shape=[2,2], strides=[2,2]> (e, w3, b3) u = Relu (t)
    p = GlobalAveragePool (u) f = Flatten (p)
    m = MatMul (f, w4) n = Add (m, b4) o = LayerNormalization (n, s5, b5) q = Relu (o)
    y = Gemm <transB=1> (q, w6, b6) }"""
SHAPES = {
    "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "b2": (8,), "w3": (8, 6, 2, 2), "b3": (6,),
    "w4": (6, 7), "b4": (7,), "s5": (7,), "b5": (7,), "w6": (5, 7), "b6": (5,),
}  # fmt: skip
FEW = Distillation(threads=1, temperature=1.0, steps=40, vary=0)  # 26 passes over 24 pictures


def net(noise: float = 0.0) -> onnx.ModelProto:
    """The graph with fixed weights, each moved by noise relative to its size."""
    model = parser.parse_model(GRAPH)
    rng, other = np.random.default_rng(0), np.random.default_rng(1)
    for name, shape in SHAPES.items():
        value = rng.normal(0.1, 1, shape) * (0.4 if len(shape) > 1 else 0.2) + (name == "s5")
        value = value * (1 + noise * other.normal(size=shape))
        model.graph.initializer.append(numpy_helper.from_array(value.astype("f"), name))
    return model


def pictures(count: int = 30):
    rng = np.random.default_rng(2)
    return [{"x": rng.normal(0.5, 1, (1, 3, 12, 12)).astype("f")} for _ in range(count)]


def fitted(every: bool) -> onnx.ModelProto:
    """A student nearer to the original where it was fitted on all samples."""
    return net(0.12 if every else 0.15)


def coordinates_of(model: onnx.ModelProto):
    module = to_module(model)
    lesson, _ = make_lesson(net(), module, model, pictures(), FEW, {}, None)
    return make_coordinates(model, module, lesson, 0), lesson


def test_a_gradient_in_the_coordinates_is_how_the_loss_changes_along_them():
    coordinates, lesson = coordinates_of(net(0.1))
    kinds = [type(b).__name__ for b in coordinates.blocks]
    assert kinds == ["Mixing"] * 4 + ["Apart"] + ["Scaled"] * 2
    assert sorted(n for b in coordinates.blocks for n in b.names) == sorted(SHAPES)
    nowhere = torch.zeros(coordinates.size)
    coordinates.put(nowhere)
    for name, weight in coordinates.weights.items():
        assert torch.equal(weight.detach(), coordinates.start[name])
    lesson.whole_gradient()
    slope = coordinates.gradient()
    random = torch.Generator().manual_seed(0)
    at = 0
    for block in coordinates.blocks:  # each by itself: a large one would hide a small one's error
        size = sum(coordinates.start[n].numel() for n in block.names)
        way = torch.zeros(coordinates.size)
        way[at : at + size] = torch.randn(size, generator=random) * slope[at : at + size].abs()
        at += size
        way *= 1e-3 / way.norm()
        losses = []
        for sign in (1, -1):
            coordinates.put(sign * way)
            with torch.no_grad():
                mine, theirs = lesson.values(lesson.train, None)
            losses.append(loss_of(lesson, mine, theirs))
        # Central differences in float32: the losses differ in the fourth digit or so.
        assert (losses[0] - losses[1]) / 2 == pytest.approx(float(slope @ way), rel=0.05)


def loss_of(lesson, mine, theirs) -> float:
    from edgewright.recover.lesson import pair_loss

    pairs = zip(lesson.matches, mine, theirs, strict=True)
    return sum(m.weight * float(pair_loss(m, s.double(), t.double(), 1.0)) for m, s, t in pairs)


def test_a_bias_makes_up_for_the_mean_and_a_weight_changes_outputs_alike_in_all_directions():
    coordinates, lesson = coordinates_of(net())
    block = next(b for b in coordinates.blocks if b.names == ("w6", "b6"))
    pair = lesson.pair
    feeds = torch.from_numpy(np.concatenate([pair.feeds[k]["x"] for k in lesson.train]))
    with torch.no_grad():
        (z,) = pair.student({"x": feeds}, ["q"])
    changes = [
        block.move([torch.eye(35)[k].reshape(5, 7), torch.zeros(5)])
        for k in range(7)  # of the first output
    ]
    moved = torch.stack([z @ w[0] + b[0] for w, b in changes])
    # A step of 1 changes the layer's output by mean 0 and standard deviation 1 / gain.
    assert torch.allclose(moved.mean(1), torch.zeros(7), atol=0.2 / float(block.gain[0]))
    spread = (moved.std(1) * block.gain[0]).numpy()
    alive = spread[spread > 0]  # behind a Relu some inputs are always 0
    assert len(alive) >= 3 and alive.max() < 1.3 and alive.min() > 0.5


def quadratic(sizes: np.ndarray):
    """Coordinates of one weight vector and the loss 0.5 sum(sizes * (w - 1)^2) of it."""
    weights = {"w": torch.nn.Parameter(torch.full((len(sizes),), 3.0))}
    curve = torch.from_numpy(sizes).float()

    def gradient() -> float:
        loss = 0.5 * (curve * (weights["w"] - 1).square()).sum()
        loss.backward()
        return float(loss.detach())

    def measure() -> Score:
        return Score(float((weights["w"].detach() - 1).square().sum()), 1.0)

    return Coordinates(weights, [Scaled(("w",), 1.0)]), gradient, measure


def test_the_descent_finds_the_lowest_point_of_a_bowl():
    coordinates, gradient, measure = quadratic(np.geomspace(1, 30, 8))
    schedule = Schedule(patience=100)
    told = []
    outcome = descend(coordinates, gradient, measure, schedule, 60, digest="",
                      tell=lambda *a: told.append(a))  # fmt: skip
    assert outcome.start.distance == 32
    assert outcome.best.distance < 1e-6
    losses = [row["loss"] for row in outcome.history]
    assert losses == sorted(losses, reverse=True)
    assert len(told) == outcome.steps or "no step lowers" in outcome.stopped


def test_a_loss_that_is_not_finite_is_walked_around_or_ends_it():
    coordinates, real, measure = quadratic(np.ones(4))
    weight = coordinates.weights["w"]

    def walled() -> float:
        value = real()
        return value if float(weight.detach().min()) > 2 else float("nan")

    def seen() -> Score:
        return measure() if float(weight.detach().min()) > 2 else Score(float("inf"), 0.0)

    outcome = descend(coordinates, walled, seen, Schedule(patience=100), 40, digest="",
                      tell=lambda *a: None)  # fmt: skip
    assert 4 <= outcome.best.distance < 4.5 and float(weight.detach().min()) > 2
    never = descend(quadratic(np.ones(4))[0], lambda: real() * float("nan"), measure, Schedule(),
                    40, digest="", tell=lambda *a: None)  # fmt: skip
    assert "not finite" in never.stopped and never.steps == 0


def test_few_samples_bring_a_graph_near_its_original_and_it_never_ends_farther_away():
    student = net(0.15)
    report = distill(net(), student, pictures, FEW)
    assert report["solver"] == "newton" and report["steps"] > 3
    assert report["best"]["distance"] < 0.05 * report["start"]["distance"]
    held = pictures()[4::5]
    run = runtime_teacher(student, ["y"], 1), runtime_teacher(net(), ["y"], 1)
    gap = [run[0](f, ["y"])[0] - run[1](f, ["y"])[0] for f in held]
    before = runtime_teacher(net(0.15), ["y"], 1)
    first = [before(f, ["y"])[0] - run[1](f, ["y"])[0] for f in held]
    assert np.square(gap).mean() < 0.05 * np.square(first).mean()


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(tmp_path):
    class Killed(Exception):
        pass

    def kill(text: str, done: int = 0, total: int = 0) -> None:
        if done >= 8:
            raise Killed

    whole, cut = net(0.15), net(0.15)
    plain = distill(net(), whole, pictures, FEW)
    with pytest.raises(Killed):
        distill(net(), cut, pictures, FEW, folder=tmp_path, tell=kill)
    assert (tmp_path / "checkpoint.npz").exists()
    cut = net(0.15)
    report = distill(net(), cut, pictures, FEW, folder=tmp_path)
    assert report["resumed_at"] > 0 and report["history"] == plain["history"]
    assert cut.SerializeToString(deterministic=True) == whole.SerializeToString(deterministic=True)
    assert not (tmp_path / "checkpoint.npz").exists()


def test_what_held_out_samples_have_shown_is_done_again_with_all_of_them():
    first, second = net(0.15), net(0.15)
    distill(net(), first, pictures, FEW)
    report = distill(net(), second, pictures, FEW, start=fitted)
    again = report["with all samples"]
    assert again["samples"] == 30 and again["steps"] == report["best_step"]
    assert again["loss after"] < 0.5 * again["loss before"]
    assert first.SerializeToString() != second.SerializeToString()
    run = [runtime_teacher(model, ["y"], 1) for model in (net(), second, net(0.12))]
    new = np.random.default_rng(3).normal(0.5, 1, (40, 3, 12, 12)).astype("f")
    want, found, start = (one({"x": new}, ["y"])[0] for one in run)
    assert np.square(found - want).mean() < 0.3 * np.square(start - want).mean()


def test_where_training_gains_nothing_what_was_fitted_on_all_samples_is_the_result():
    student, still = net(0.15), Distillation(threads=1, steps=2, rate=1e-12, vary=0)
    report = distill(net(), student, pictures, still, start=fitted)
    assert report["best_step"] == 0 and report["with all samples"]["steps"] == 0
    assert student.SerializeToString() == net(0.12).SerializeToString()


def test_newton_is_refused_where_it_cannot_be_and_left_out_where_other_settings_ask():
    for settings in ({"quantized": True}, {"keep_zeros": True}):
        asked = Distillation(threads=1, solver="newton", steps=2, **settings)
        with pytest.raises(BadInput, match=r"solver newton.*weights that are"):
            distill(net(), net(0.1), pictures, asked)
        free = Distillation(threads=1, steps=2, rate=1e-3, **settings)
        assert distill(net(), net(0.1), pictures, free)["solver"] == "adam"


def test_varied_samples_are_learned_from_and_judged_by():
    """With newton they are the same ones at every step. 6 samples are held out, 24 not."""
    settings = Distillation(threads=1, vary=2, steps=30, solver="newton")
    report = distill(net(), net(0.15), pictures, settings)
    assert report["samples"] == {"training": 72, "held out": 18}
    assert report["best"]["distance"] < report["start"]["distance"]


def test_samples_that_can_be_varied_without_end_are_learned_from_in_batches():
    """From a start that was fitted on all, and no varied sample comes twice."""
    settings = Distillation(threads=1, vary=2, steps=60, batch=12, rate=0.01)
    student = net(0.15)
    report = distill(net(), student, pictures, settings, start=fitted)
    assert report["solver"] == "adam" and report["with all samples"] is None
    nothing = distill(net(), net(0.12), pictures, replace(settings, steps=1, rate=1e-12))
    assert report["start"] == nothing["start"]
    assert report["best"]["distance"] < 0.5 * report["start"]["distance"]
    seen: list[int] = []
    lesson, _ = make_lesson(net(), to_module(student), student, pictures(), settings, {}, None)
    lesson.gradient = lambda rows, mix: seen.extend(rows) or 0.0
    for step in range(12):  # two passes over 24 samples and 48 varied ones
        lesson.backward(step, np.random.default_rng(0))
    real, made = [k for k in seen if k < 30], [k for k in seen if k >= 30]
    assert sorted(real) == sorted(2 * lesson.train[:24])
    assert len(made) == len(set(made)) == 96 and not set(made) & set(lesson.held)


def test_layers_that_no_coordinates_are_made_for_are_trained_all_the_same():
    """A recurrent layer alone, and a convolution of groups with two inputs each."""
    rng = np.random.default_rng(0)
    shapes = {"w": (1, 16, 3), "r": (1, 16, 4)}
    weights = {n: 0.3 * rng.normal(size=s).astype("f") for n, s in shapes.items()}
    lstm = """<ir_version: 8, opset_import: ["" : 17]>
    lone (float[5, 1, 3] x) => (float[5, 1, 1, 4] y) { y = LSTM <hidden_size = 4> (x, w, r) }"""
    grouped = """<ir_version: 8, opset_import: ["" : 17]>
    groups (float[1, 8, 6, 6] x) => (float[1, 4, 4, 4] y) { y = Conv <group = 4> (x, w, b) }"""
    parts = {"w": rng.normal(size=(4, 2, 3, 3)).astype("f"), "b": np.zeros(4, "f")}
    for text, stored, shape in ((lstm, weights, (5, 1, 3)), (grouped, parts, (1, 8, 6, 6))):
        teacher = onnx.parser.parse_model(text)
        student = onnx.parser.parse_model(text)
        for model, scale in ((teacher, 1.0), (student, 1.3)):
            model.graph.initializer.extend(
                onnx.numpy_helper.from_array(np.float32(scale) * v, n) for n, v in stored.items()
            )
        feeds = [{"x": rng.normal(size=shape).astype("f")} for _ in range(20)]
        settings = Distillation(threads=1, steps=20, solver="newton")
        report = distill(teacher, student, lambda feeds=feeds: feeds, settings)
        assert report["solver"] == "newton"
        assert report["best"]["distance"] < 0.5 * report["start"]["distance"]
