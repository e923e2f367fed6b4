"""Runs ahead of a metric in several processes: the answers of one, and nothing left over."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import tiny_model
from onnx import TensorProto, helper
from test_emulator import CHANNELS, SIZE, write_convs

from edgewright.errors import BadInput, EnvironmentMissing
from edgewright.runtime import ahead
from edgewright.runtime.ahead import Recorder, fingerprint, running_ahead
from edgewright.runtime.launch import open_on_target
from edgewright.runtime.local import open_local
from edgewright.runtime.session import Session
from edgewright.target import load_target


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(tiny_model(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def inputs(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [{"x": rng.normal(size=(1, 1, 12, 12)).astype(np.float32)} for _ in range(count)]


class Counting(Session):
    """A session that says how often it ran."""

    runs = 0

    def run(self, *words, **more):
        self.runs += 1
        return super().run(*words, **more)


def test_answers_are_those_of_one_process_in_the_order_asked(model):
    feeds, opened = inputs(20), []

    def open_one() -> Session:
        opened.append(Counting(model, threads=1))
        return opened[-1]

    with open_one() as one:
        expected = [one.run(feed)[0] for feed in feeds]
    opened.clear()
    recorder = Recorder(open_local(model).run)
    for feed in feeds:
        recorder(feed)
    with running_ahead(open_one, recorder.feeds) as run:
        order = [*range(20), 3, 3, 17]  # asked again later, it runs again
        for k in order:
            np.testing.assert_array_equal(run(feeds[k])[0], expected[k])
    assert len(opened) == 2 and all(session.runs >= 5 for session in opened)
    assert sum(session.runs for session in opened) <= len(order) + 2 * ahead.FAR * 2
    assert all(session.process.poll() is not None for session in opened)


def test_states_that_hang_on_the_answer_are_run_when_asked_for(tmp_path):
    """A running sum: after its first step nothing is as it was with another model."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["state", "x"], ["sum"])],
        "sum",
        [value("x", TensorProto.FLOAT, [2]), value("state", TensorProto.FLOAT, [2])],
        [value("sum", TensorProto.FLOAT, [2])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "sum.onnx"
    onnx.save(made, path)
    steps = np.random.default_rng(5).normal(size=(12, 2)).astype(np.float32)
    before = [{"x": x, "state": np.full(2, k, np.float32)} for k, x in enumerate(steps)]
    opened: list[Counting] = []

    def open_one() -> Session:
        opened.append(Counting(path, threads=1))
        return opened[-1]

    with running_ahead(open_one, before) as run:
        state = np.zeros(2, np.float32)
        for x in steps:
            [state] = run({"x": x, "state": state})
    np.testing.assert_allclose(state, steps.sum(0), rtol=1e-5)
    assert sum(s.runs for s in opened) <= len(steps) + 2 * ahead.FAR  # one guess, then none


def test_errors_belong_to_who_asks(model):
    bad = {"x": np.zeros((1, 1, 12, 12), np.int64)}
    good = inputs(3)
    with running_ahead(lambda: Session(model), [good[0], bad, good[1]]) as run:
        run(good[0])
        run(good[1])  # the bad one has run by then, and nobody asked for it
        with pytest.raises(BadInput, match="Unexpected input data type"):
            run(bad)
        run(good[2])


def test_a_model_that_does_not_load_is_told_and_leaves_nothing(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with (
        pytest.raises(BadInput, match="refused"),
        running_ahead(lambda: Session(tmp_path / "model.onnx"), inputs(4)),
    ):
        pytest.fail("opened")


def test_the_recorder_keeps_copies_and_no_more_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(ahead, "KEPT_BYTES", 50)
    recorder = Recorder(lambda feeds: [feeds["x"]])
    x = np.ones(5)
    recorder({"x": x})
    x[:] = 2
    recorder({"x": x})
    assert [feeds["x"].tolist() for feeds in recorder.feeds] == [[1.0] * 5]


def test_a_scalar_input_has_a_fingerprint():
    one, two = (fingerprint({"x": np.array(v)}) for v in (1, 2))
    assert one != two


def test_an_emulated_target_answers_as_this_machine_does(tmp_path):
    """Of a model whose int8 sums are exact everywhere."""
    target = load_target("arm")
    path = write_convs(tmp_path / "model.onnx", "int8")
    rng = np.random.default_rng(7)
    shape = (1, CHANNELS, SIZE, SIZE)
    feeds = [{"x": rng.random(shape).astype(np.float32)} for _ in range(6)]
    here = open_local(path)
    try:
        with running_ahead(lambda: open_on_target(path, target), feeds) as run:
            for feed in feeds:
                np.testing.assert_array_equal(run(feed)[0], here.run(feed)[0])
    except EnvironmentMissing as error:
        pytest.skip(str(error))
