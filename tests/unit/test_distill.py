"""Distillation on small nets over real digits: what it gains, what it keeps, what it refuses."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from graphs import normal, parsed
from onnx import numpy_helper, parser

from edgewright.errors import BadInput
from edgewright.prune.outputs import opened
from edgewright.runtime.local import open_local

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("sklearn.datasets")

from edgewright.recipe import Distillation  # noqa: E402
from edgewright.recover import losses, training, variants  # noqa: E402
from edgewright.recover.batches import Pair, Wrapped, runtime_teacher  # noqa: E402
from edgewright.recover.distill import distill  # noqa: E402
from edgewright.recover.executor import to_module  # noqa: E402
from edgewright.recover.lesson import make_lesson  # noqa: E402
from edgewright.recover.losses import Target, find_target, output_loss  # noqa: E402

HIDDEN, LEFT = 48, 8
QUICK = Distillation(steps=200, rate=6e-2, threads=1)


def net(hidden: int, seed: int, end: str = "y = Identity (z)", opset: int = 18) -> onnx.ModelProto:
    """64 pixels -> `hidden` units -> 10 classes."""
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[N,64] x) => (float[N,10] y) {{'
        f" h = Gemm <transB=1> (x, w, b) a = Relu (h) z = Gemm <transB=1> (a, v, c) {end} }}"
    )
    rng = np.random.default_rng(seed)
    values = {"w": rng.normal(0, 64**-0.5, (hidden, 64)), "b": np.zeros(hidden)}
    values |= {"v": rng.normal(0, hidden**-0.5, (10, hidden)), "c": np.zeros(10)}
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(value.astype("f"), name))
    return model


def pictures() -> tuple[np.ndarray, np.ndarray]:
    digits = datasets.load_digits()
    return (digits.images.reshape(-1, 64) / 16).astype(np.float32), digits.target


X, Y = pictures()
TEST = slice(900, None)


@pytest.fixture(scope="module")
def teacher() -> onnx.ModelProto:
    """The net, trained on the labels of the first 900 digits."""
    model = net(HIDDEN, 0)
    module = to_module(model)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    truth = torch.from_numpy(Y[:900])
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(module({"x": X[:900]})[0], truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.write_back(model)
    return model


def narrowed(model: onnx.ModelProto, keep: np.ndarray, **options: object) -> onnx.ModelProto:
    """The net without some hidden units."""
    small = net(len(keep), 0, **options)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    values = {"w": stored["w"][keep], "b": stored["b"][keep], "v": stored["v"][:, keep]}
    for tensor in small.graph.initializer:
        value = values.get(tensor.name, stored[tensor.name])
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))
    return small


def pruned(model: onnx.ModelProto, seed: int, **options: object) -> tuple[onnx.ModelProto, dict]:
    """The net with LEFT of its hidden units, chosen by chance, and the map of what is kept."""
    keep = np.sort(np.random.default_rng(seed).permutation(HIDDEN)[:LEFT])
    return narrowed(model, keep, **options), dict.fromkeys((("h", 1), ("a", 1)), keep)


def answers(model: onnx.ModelProto) -> np.ndarray:
    return open_local(model.SerializeToString()).run({"x": X[TEST]})[0].argmax(1)


def calibration(count: int = 200):
    """Unlabelled pictures of the training half."""
    return ({"x": X[k : k + 1]} for k in range(count))


@pytest.mark.parametrize("seed", range(3))
def test_a_pruned_net_learns_to_agree_with_its_original_again(teacher, seed):
    student, kept = pruned(teacher, seed)
    before = (answers(student) == answers(teacher)).mean()
    report = distill(teacher, student, calibration, QUICK, kept=kept)
    after = (answers(student) == answers(teacher)).mean()
    # Of the answers lost on pictures never seen, most come back; without labels.
    assert 1 - after < 0.5 * (1 - before)
    assert report["best"]["distance"] < report["start"]["distance"]
    assert [m["loss"] for m in report["losses"]] == ["output", "feature"]
    assert report["samples"] == {"training": 160, "held out": 40}
    onnx.checker.check_model(student, full_check=True)


def test_inner_features_are_compared_with_what_was_kept_of_the_original(teacher):
    student, kept = pruned(teacher, 0)
    only = Distillation(steps=3, rate=1e-9, soft=0, feature=1, threads=1, mix=False)
    report = distill(teacher, student, calibration, only, kept=kept)
    # Its hidden units are those of the original still: nothing to learn.
    assert report["history"][0]["loss"] == pytest.approx(0, abs=1e-10)
    unknown = Distillation(steps=3, rate=1e-9, threads=1)
    report = distill(teacher, pruned(teacher, 0)[0], calibration, unknown)
    assert any("no feature loss on 'a'" in n for n in report["notes"])
    asked = Distillation(steps=3, features=("a",), threads=1)
    with pytest.raises(BadInput, match=r"shape of 'a'.*48.*8"):
        distill(teacher, pruned(teacher, 0)[0], calibration, asked)


def test_layers_behind_the_features_learn_from_the_outputs_where_nothing_else_does(teacher):
    def gradients(**options: float) -> dict[str, torch.Tensor]:
        student, kept = pruned(teacher, 0)
        for tensor in student.graph.initializer:  # so that the features are off, too
            if tensor.name == "w":
                moved = numpy_helper.to_array(tensor) * np.float32(1.1)
                tensor.CopyFrom(numpy_helper.from_array(moved, "w"))
        settings = Distillation(features=("a",), threads=1, **options)
        pupil, feeds = to_module(student), list(calibration(20))
        lesson, _ = make_lesson(teacher, pupil, student, feeds, settings, kept, None)
        lesson.gradient(lesson.train)
        return {name: w.grad for name, w in pupil.weights.items() if w.grad is not None}

    both, inner = gradients(soft=0.0, feature=1.0), gradients(soft=1.0, feature=1.0)
    outer = gradients(soft=1.0, feature=0.0)
    for name in ("v", "c"):  # what reads the features: as with the outputs' loss alone
        assert torch.equal(both[name], outer[name])
        assert both[name].abs().max() > 0
    for name in ("w", "b"):  # what makes them: as without it
        torch.testing.assert_close(both[name], inner[name] - outer[name], rtol=1e-3, atol=1e-6)


def test_features_alone_do_not_leave_the_last_layer_behind(teacher):
    student, kept = pruned(teacher, 0)  # its features are right, its last layer is not
    only = Distillation(steps=150, rate=0.01, soft=0, feature=1, threads=1)
    report = distill(teacher, student, calibration, only, kept=kept)
    assert report["best"]["distance"] < 0.8 * report["start"]["distance"]


def test_a_feature_that_is_not_there_is_an_error(teacher):
    student, kept = pruned(teacher, 0)
    settings = Distillation(steps=4, rate=1e-3, threads=1, features=("a", "aa"))
    with pytest.raises(BadInput, match=r"no tensor 'aa' in both models.*did you mean 'a'"):
        distill(teacher, student, calibration, settings, kept=kept)


def test_the_result_is_never_worse_than_the_start(teacher):
    student, kept = pruned(teacher, 1)
    start = student.SerializeToString(deterministic=True)
    wild = Distillation(steps=40, rate=0.5, threads=1, seed=3)
    report = distill(teacher, student, calibration, wild, kept=kept)
    assert report["best"]["distance"] <= report["start"]["distance"]
    if report["best_step"] == 0:
        assert student.SerializeToString(deterministic=True) == start
    assert report["steps"] <= 40


def test_two_runs_give_the_same_bytes_and_another_seed_others(teacher):
    results = []
    for seed in (0, 0, 1):
        student, kept = pruned(teacher, 0)
        settings = Distillation(steps=30, rate=3e-3, threads=1, seed=seed)
        distill(teacher, student, calibration, settings, kept=kept)
        results.append(student.SerializeToString(deterministic=True))
    assert results[0] == results[1] != results[2]


TRAINING = """
import sys, onnx, numpy as np
from pathlib import Path
from edgewright.recover.distill import distill
from edgewright.recipe import Distillation
folder = Path(sys.argv[1])
x = np.load(folder / "x.npy")
student = onnx.load(folder / "student.onnx")
def tell(text, done=0, total=0):
    if sys.argv[2] == "slow" and done == 45:
        (folder / "half").touch()
        import time
        time.sleep(60)
report = distill(onnx.load(folder / "teacher.onnx"), student,
                 lambda: ({"x": row[None]} for row in x),
                 Distillation(steps=80, solver="adam", threads=1), folder=folder, tell=tell)
(folder / "out.onnx").write_bytes(student.SerializeToString(deterministic=True))
(folder / "resumed").write_text(str(report["resumed_at"]))
"""


def test_a_killed_run_goes_on_and_ends_with_the_bytes_of_one_that_was_not(teacher, tmp_path):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        np.save(folder / "x.npy", X[:100])
        onnx.save(teacher, folder / "teacher.onnx")
        onnx.save(net(LEFT, 0), folder / "student.onnx")
    words = [sys.executable, "-c", TRAINING]
    with subprocess.Popen([*words, str(folders[1]), "slow"]) as child:
        deadline = time.monotonic() + 120
        while not (folders[1] / "half").exists() and time.monotonic() < deadline:
            assert child.poll() is None
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
    assert (folders[1] / "checkpoint.npz").exists()
    for folder in folders:
        subprocess.run([*words, str(folder), "quick"], check=True)
    resumed = [int((f / "resumed").read_text()) for f in folders]
    assert resumed == [0, 44]  # the last check before step 45: every 4 steps
    whole, killed = ((f / "out.onnx").read_bytes() for f in folders)
    assert whole == killed
    assert not (folders[1] / "checkpoint.npz").exists()


def test_a_checkpoint_of_other_data_or_damaged_is_not_used(teacher, tmp_path):
    (tmp_path / "checkpoint.npz").write_bytes(b"PK\x03\x04 no archive")
    settings = Distillation(steps=8, rate=1e-3, threads=1)
    student, kept = pruned(teacher, 0)
    report = distill(teacher, student, calibration, settings, kept=kept, folder=tmp_path)
    assert report["resumed_at"] == 0 and report["steps"] == 8


def test_a_loss_that_is_not_finite_ends_the_training_with_the_last_good(teacher, monkeypatch):
    real, calls = losses.output_loss, []

    def broken(target, student, teacher, temperature, balanced=False):
        calls.append(temperature)
        value = real(target, student, teacher, temperature)
        return value * float("nan") if calls.count(2.0) > 20 and temperature == 2.0 else value

    monkeypatch.setattr(losses, "output_loss", broken)
    student, kept = pruned(teacher, 0)
    settings = Distillation(steps=60, rate=3e-3, threads=1, outputs="soft")
    report = distill(teacher, student, calibration, settings, kept=kept)
    assert "not finite in step 21" in report["stopped"] and report["steps"] == 20
    assert report["best"]["distance"] < report["start"]["distance"]
    for tensor in student.graph.initializer:
        assert np.isfinite(numpy_helper.to_array(tensor)).all()


def test_a_run_that_the_clock_ends_says_so(teacher):
    student, kept = pruned(teacher, 0)
    settings = Distillation(steps=500, rate=1e-3, minutes=1e-6, threads=1)
    report = distill(teacher, student, calibration, settings, kept=kept)
    assert report["steps"] == 1 and not report["repeatable"]
    assert "clock ended it after 1 of 500" in report["stopped"]


def test_training_stops_early_when_nothing_is_gained(teacher):
    student, kept = pruned(teacher, 0)
    settings = Distillation(steps=100, rate=1e-9, patience=2, threads=1)
    report = distill(teacher, student, calibration, settings, kept=kept)
    assert report["steps"] < 100 or report["best_step"] > 0


def test_outputs_are_compared_by_what_goes_into_the_softmax(teacher):
    end = "y = Softmax <axis=-1> (z)"
    whole = narrowed(teacher, np.arange(HIDDEN), end=end)
    student, kept = pruned(teacher, 0, end=end)
    assert find_target(student, "y") == Target("y", "soft", "z", -1)
    assert find_target(teacher, "y") == Target("y", "logits", "z")
    report = distill(whole, student, calibration, QUICK, kept=kept)
    assert report["outputs"] == [{"name": "y", "compared as": "soft"}]
    assert report["losses"][0]["tensor"] == "z"
    assert report["best"]["agreement"] > report["start"]["agreement"]
    # A function as teacher shows probabilities only; the distance it starts from is the same.
    student, kept = pruned(teacher, 0, end=end)
    session = open_local(whole.SerializeToString())
    again = distill(
        lambda feed, names: session.run(feed, list(names)),
        student,
        calibration,
        Distillation(steps=1, rate=1e-6, feature=0, threads=1),
    )
    assert again["start"]["distance"] == pytest.approx(report["start"]["distance"], rel=1e-4)
    with pytest.raises(BadInput, match="probabilities on both sides"):
        distill(teacher, student, calibration, QUICK, kept=kept)


def test_an_output_with_a_product_of_its_own_is_compared_as_what_that_reads():
    """`prune.outputs` multiplies features; they are no logits for that."""
    text = """g (float[N,3] x) => (float[N,8] y, float[N,2] z) {
      a = Gemm(x, w) y = Relu(a) z = Gemm(y, head)
    }"""
    weights = {"w": normal(3, 8), "head": normal(8, 2, seed=2)}
    model = parsed(text, **weights)
    wide = opened(model)
    assert wide != model
    assert find_target(model, "y") == find_target(wide, "y") == Target("y", "value", "y")
    assert find_target(wide, "z").kind == "logits"


def test_distances_are_those_of_the_formulas():
    p, q = np.array([[0.7, 0.2, 0.1]]), np.array([[0.5, 0.25, 0.25]])
    logs = [torch.from_numpy(np.log(v)) for v in (q, p)]
    soft = Target("y", "soft", "y")
    assert float(output_loss(soft, *logs, 1.0)) == pytest.approx((p * np.log(p / q)).sum())
    hot = [np.sqrt(v) / np.sqrt(v).sum() for v in (q, p)]  # temperature 2 halves the logits
    want = 4 * (hot[1] * np.log(hot[1] / hot[0])).sum()
    assert float(output_loss(soft, *logs, 2.0)) == pytest.approx(want)
    chance = [0.4, 0.8]
    logits = [torch.tensor([np.log(v / (1 - v))]) for v in chance]
    want = 0.8 * np.log(0.8 / 0.4) + 0.2 * np.log(0.2 / 0.6)
    assert float(output_loss(Target("y", "binary", "y"), *logits, 1.0)) == pytest.approx(want)
    values = [torch.tensor([1.0, 2, 4, 4]), torch.tensor([1.0, 2, 3, 6])]
    want = (1 + 4) / 4 / np.var([1, 2, 3, 6])
    assert float(output_loss(Target("y", "value", "y"), *values, 1.0)) == pytest.approx(want)
    a, b = torch.zeros(1, 2, 1, 2), torch.zeros(1, 3, 1, 2)
    a[0, 0, 0, 0], b[0, 1, 0, 1] = 2, 5  # all the energy in one place, in another one
    assert float(losses.spatial_loss(a, b)) == pytest.approx(2)
    assert float(losses.spatial_loss(a, 3 * a)) == pytest.approx(0)


def test_of_many_answers_the_common_one_counts_half() -> None:
    teacher = torch.zeros(1, 5, 3)
    teacher[0, :4, 0] = teacher[0, 4, 2] = 4.0  # four times the first class, once the last
    np.testing.assert_allclose(losses.even(teacher.argmax(-1)), [[0.625] * 4 + [2.5]])
    student = teacher.clone()
    student[0, 4] = 0.0  # wrong only where the answer is rare
    soft = Target("y", "soft", "y")
    plain, even = (float(output_loss(soft, student, teacher, 1.0, b)) for b in (False, True))
    assert even == pytest.approx(2.5 * plain)
    # No answer of more than half, or no other: all alike.
    assert losses.even(torch.tensor([0, 0, 1, 2])).tolist() == [1, 1, 1, 1]
    assert losses.even(torch.zeros(3, dtype=torch.long)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("wild", [True, False])
def test_varied_samples_stay_near_where_that_is_asked(wild, monkeypatch):
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[N,2,8] x) => (float[N,2,8] y)'
        " { h = Conv (x, w) y = Sigmoid (h) }"
    )
    weight = np.random.default_rng(0).normal(size=(2, 2, 1)).astype("f")
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    calls = []

    def far(value, pool, ends, rng):
        calls.append(value.shape)
        return value

    monkeypatch.setattr(variants, "remade", far)
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.normal(size=(1, 2, 8)).astype("f")} for _ in range(20)]
    settings = Distillation(steps=4, rate=1e-3, batch=8, solver="adam", wild=wild, threads=1)
    distill(model, model, lambda: feeds, settings)
    assert bool(calls) == wild


def test_one_cycle_rises_then_falls_to_nothing():
    shares = [training.one_cycle(k, 100) for k in range(101)]
    assert shares[14] == shares[15] == 1 and shares[0] == pytest.approx(1 / 15)
    assert shares[100] == pytest.approx(0) and shares[15:] == sorted(shares[15:])[::-1]


def test_any_torch_module_can_be_the_student_and_any_function_the_teacher(teacher):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    session = open_local(teacher.SerializeToString())
    report = distill(
        lambda feed, names: session.run(feed, list(names)),
        Wrapped(module, ["x"], ["y"]),
        calibration,
        Distillation(steps=300, rate=0.1, outputs="soft", feature=0, threads=1),
    )
    assert report["best"]["agreement"] > 0.8 > 0.3 > report["start"]["agreement"]


def test_labels_are_used_where_they_are_given(teacher):
    results = []
    for labels in (None, Y[:200], (Y[:200] + 1) % 10):
        student, kept = pruned(teacher, 0)
        settings = Distillation(steps=60, rate=1e-2, hard=0.3, threads=1)
        distill(teacher, student, calibration, settings, kept=kept, labels=labels)
        results.append(answers(student))
    truth = Y[TEST]
    wrong = [(r == (truth + 1) % 10).mean() for r in results]
    assert wrong[2] > wrong[1] and not np.array_equal(results[0], results[1])


def test_labels_beyond_the_classes_are_refused(teacher):
    student, kept = pruned(teacher, 0)
    settings = Distillation(steps=4, rate=1e-2, hard=0.3, threads=1)
    with pytest.raises(BadInput, match="classes 0 to 9"):
        distill(teacher, student, calibration, settings, kept=kept, labels=Y[:200] + 1)


def test_zeros_stay_zero_when_asked(teacher):
    student, kept = pruned(teacher, 0)
    (weight,) = [t for t in student.graph.initializer if t.name == "w"]
    values = numpy_helper.to_array(weight).copy()
    mask = np.random.default_rng(0).random(values.shape) < 0.5
    values[mask] = 0
    for keep in (True, False):
        weight.CopyFrom(numpy_helper.from_array(values, "w"))
        settings = Distillation(steps=20, rate=3e-2, keep_zeros=keep, threads=1)
        distill(teacher, student, calibration, settings, kept=kept)
        after = numpy_helper.to_array(weight)
        assert (after[~mask] != values[~mask]).any()
        assert (after[mask] == 0).all() == keep


def fixed_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same net, with a Reshape that knows only one sample."""
    model.graph.node[0].input[0] = "flat"
    shape = numpy_helper.from_array(np.array([1, 64]), "shape")
    model.graph.initializer.append(shape)
    node = onnx.helper.make_node("Reshape", ["x", "shape"], ["flat"])
    nodes = [node, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def test_a_graph_for_one_sample_adds_up_gradients_and_ends_alike(teacher):
    results = []
    for single in (False, True):
        student, kept = pruned(teacher, 0)
        student = fixed_batch(student) if single else student
        settings = Distillation(
            steps=10, rate=3e-3, mix=False, feature=0, outputs="soft", threads=1
        )
        report = distill(teacher, student, calibration, settings, kept=kept)
        assert single == any("one sample at a time" in n for n in report["notes"])
        results.append(report["best"]["distance"])
    assert results[0] == pytest.approx(results[1], rel=1e-3)  # the same sums in another order


def test_samples_of_several_lengths_are_stacked_with_their_like():
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[1,T,4] x) => (float[1,2] y) {'
        " h = MatMul (x, w) m = ReduceMean <keepdims=0> (h, one) y = MatMul (m, v) }"
    )
    rng = np.random.default_rng(0)
    values = {"w": rng.normal(size=(4, 6)), "v": rng.normal(size=(6, 2))}
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(value.astype("f"), name))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    feeds = [{"x": rng.normal(size=(1, t, 4)).astype("f")} for t in (9, 3, 5, 3, 5, 5, 3, 3)]
    student = onnx.ModelProto()
    student.CopyFrom(model)
    session = open_local(model.SerializeToString())
    pair = Pair(to_module(student), lambda f, n: session.run(f, list(n)), [("y", "y")], feeds)
    assert pair.stacked and not pair.teacher_stacked  # the runtime holds the graph to one sample
    assert pair.groups(range(8)) == [[0], [1, 3, 6, 7], [2, 4, 5]]
    (mine,), (theirs,) = pair.both([1, 3, 6, 7])
    np.testing.assert_allclose(mine.detach().numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6)


def test_a_recurrent_layer_whose_batch_is_the_second_axis_runs_all_samples_at_once():
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[N,6,4] x) => (float[N,2] y) {'
        " t = Transpose <perm=[1,0,2]> (x) a = LSTM <hidden_size=3> (t, w, r, b)"
        " s = Squeeze (a, one) m = ReduceMean <keepdims=0> (s, zero) y = MatMul (m, v) }"
    )
    rng = np.random.default_rng(0)
    shapes = {"w": (1, 12, 4), "r": (1, 12, 3), "b": (1, 24), "v": (3, 2)}
    for name, shape in shapes.items():
        value = rng.normal(size=shape).astype("f")
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for name, number in (("one", 1), ("zero", 0)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([number]), name))
    feeds = [{"x": rng.normal(size=(1, 6, 4)).astype("f")} for _ in range(5)]
    wanted = [("y", "y"), ("s", "s")]
    for single in (False, True):  # the runtime takes all samples, or holds the graph to one
        graph = onnx.ModelProto()
        graph.CopyFrom(model)
        if single:
            graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        teacher = runtime_teacher(graph, ["y", "s"], 1)
        pair = Pair(to_module(model), teacher, wanted, feeds)
        assert pair.stacked and pair.axes == [0, 1] and pair.teacher_stacked != single
        for mine, theirs in zip(*pair.both(range(5)), strict=True):
            np.testing.assert_allclose(mine.detach().numpy(), theirs.numpy(), atol=1e-6)


def test_the_teacher_is_asked_once_about_what_is_held_out(teacher):
    asked = []

    def counting(feed, names):
        asked.append(len(feed["x"]))
        return run(feed, names)

    run = runtime_teacher(teacher, ["y"], 1)
    feeds = [{"x": X[k : k + 1]} for k in range(6)]
    pair = Pair(to_module(teacher), counting, [("y", "y")], feeds)
    asked.clear()
    first, second = (pair.both([0, 1, 2], None, again=True)[1][0] for _ in range(2))
    assert asked == [3]
    np.testing.assert_array_equal(first.numpy(), second.numpy())
    pair.room = 0  # no memory left: asked again, the same answer
    pair.both([3, 4], None, again=True)
    pair.both([3, 4], None, again=True)
    assert asked == [3, 2, 2]


def test_few_samples_other_names_and_short_labels_are_refused(teacher):
    student, kept = pruned(teacher, 0)
    with pytest.raises(BadInput, match="too few"):
        distill(teacher, student, lambda: calibration(3), QUICK, kept=kept)
    with pytest.raises(BadInput, match="labels"):
        distill(teacher, student, calibration, QUICK, kept=kept, labels=Y[:5])
    other = onnx.ModelProto()
    other.CopyFrom(teacher)
    other.graph.node[-1].output[0] = other.graph.output[0].name = "scores"
    with pytest.raises(BadInput, match=r"no output 'y'.*scores"):
        distill(other, student, calibration, QUICK, kept=kept)


def test_where_the_usual_rates_lead_away_slower_ones_are_tried():
    weights = {"w": torch.nn.Parameter(torch.ones(8))}

    def backward(step: int, rng: np.random.Generator) -> float:
        loss = weights["w"].sum()  # always the same way: each step is as long as its rate
        loss.backward()
        return float(loss.detach())

    def measure() -> training.Score:
        return training.Score(1 + 1000 * float((weights["w"].detach() - 1).abs().max()), 1.0)

    rate, tried = training.find_rate(
        weights, backward, measure, measure(), training.Schedule(steps=100), lambda *a: None
    )
    # Five steps of one cycle are 3.5 of the rate long: 1.5 times as far away is 0.00014.
    assert rate == 1e-4 and [row["rate"] for row in tried] == [1e-3, 3e-4, 1e-4]
    assert tried[0]["distance"] == pytest.approx(4.5, abs=0.2)
    assert torch.equal(weights["w"].detach(), torch.ones(8))
