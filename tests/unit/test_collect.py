"""Calibration over a model: processes, batches, states, varying shapes, subgraphs, refusals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from edgewright import process
from edgewright.calibration.statistics import Statistics
from edgewright.data import Feed
from edgewright.errors import BadInput, EnvironmentMissing
from edgewright.quantize import calibrate, helpers
from edgewright.quantize.calibrate import collect, numbered
from edgewright.recipe import load_recipe


def parsed(text: str, **stored: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>' + text)
    for name, value in stored.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return model


NET = """g (float[batch, 3, 40, 40] x) => (float[batch, 5] y) {
    a = Conv(x, w)  b = Relu(a)  c = GlobalAveragePool(b)  d = Flatten(c)  y = MatMul(d, m)
}"""
TENSORS = ["x", "a", "b", "c", "y"]


def net() -> onnx.ModelProto:
    """A small network; `a` of one row has 92,416 elements, more than enter its histogram."""
    rng = np.random.default_rng(1)
    return parsed(
        NET,
        w=rng.normal(size=(64, 3, 3, 3)).astype(np.float32),
        m=rng.normal(size=(64, 5)).astype(np.float32),
    )


def pictures(count: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    scale = rng.lognormal(size=(count, 1, 1, 1))
    return (rng.normal(size=(count, 3, 40, 40)) * scale).astype(np.float32)


def in_batches(values: np.ndarray, size: int) -> Callable[[], Iterator[Feed]]:
    return lambda: ({"x": values[k : k + size]} for k in range(0, len(values), size))


def assert_same(found: dict[str, Statistics], wanted: dict[str, Statistics]) -> None:
    """Every number of both, to the last bit."""
    assert list(found) == list(wanted)
    for name, s in found.items():
        for key, value in vars(s).items():
            np.testing.assert_array_equal(value, getattr(wanted[name], key), f"{name}.{key}")


# --- several processes ----------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Helpers from the second sample on; the samples that they took."""
    monkeypatch.setattr(calibrate, "HIRE_AFTER", 0)
    indices: list[int] = []
    take = helpers.Helpers.take

    def noted(self: helpers.Helpers, sample: calibrate.Sample) -> bool:
        got = take(self, sample)
        if got:
            indices.append(sample.index)
        return got

    monkeypatch.setattr(helpers.Helpers, "take", noted)
    return indices


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_find_the_same(taken: list[int], processes: int) -> None:
    values = pictures(12)
    alone = collect(net(), TENSORS, in_batches(values, 1), processes=1)
    assert not taken
    found = collect(net(), TENSORS, in_batches(values, 1), processes=processes)
    assert taken[0] == 1 and len(taken) >= processes - 1
    assert_same(found, alone)
    assert process.children() == []


def test_helpers_are_hired_only_once_there_was_enough_to_do(
    taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # x, a, b, c and y of one sample, float32.
    each = 4 * (4800 + 2 * 64 * 38 * 38 + 64 + 5)
    monkeypatch.setattr(calibrate, "HIRE_AFTER", 3 * each)
    collect(net(), TENSORS, in_batches(pictures(3), 1), processes=2)
    assert taken == []
    collect(net(), TENSORS, in_batches(pictures(5), 1), processes=2)
    assert taken[0] == 3


def test_processes_by_default_have_a_core_and_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    mb = 10**6
    # 130 + 6 + 4 of 303 MB are its own, a helper takes 60 + 4.5 + 4.
    assert calibrate.useful_processes(3 * mb, 4 * mb) == 1 + (303 - 140) // 68.5
    assert calibrate.useful_processes(1 * mb, 1 * mb) == 3  # (301 - 133) // 62.5 = 2
    assert calibrate.useful_processes(14 * mb, 52 * mb) == 1
    assert calibrate.useful_processes(500 * mb, 1 * mb) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert calibrate.useful_processes(1 * mb, 1 * mb) == 1


def test_fewer_than_no_processes_are_refused(tiny: Path) -> None:
    tiny.write_text(tiny.read_text() + "\n[quantize]\nprocesses = -1\n")
    with pytest.raises(BadInput, match=r"quantize.processes; expected 0 or more; found -1"):
        load_recipe(tiny)


LOG = "g (float[N] x) => (float[N] y) { a = Neg(x)  b = Neg(a)  y = Log(b) }"


@pytest.mark.parametrize("bad", [[1], [1, 2], [2, 7], [0, 1], [9]])
def test_the_first_bad_sample_is_named_whoever_took_it(taken: list[int], bad: list[int]) -> None:
    feeds = [{"x": np.float32([-1 if k in bad else 1, 2])} for k in range(10)]
    messages = set()
    for processes in (1, 2, 3):
        with pytest.raises(BadInput, match=f"sample {bad[0]} makes tensor 'y'") as error:
            collect(parsed(LOG), ["a", "y"], lambda: iter(feeds), processes=processes)
        messages.add(str(error.value))
    assert len(messages) == 1
    assert process.children() == []


def test_a_source_that_fails_later_does_not_hide_a_bad_sample(taken: list[int]) -> None:
    def feeds() -> Iterator[Feed]:
        yield {"x": np.float32([1])}
        yield {"x": np.float32([-1])}
        raise BadInput("the source broke")

    for processes in (1, 2):
        with pytest.raises(BadInput, match="sample 1 makes"):
            collect(parsed(LOG), ["y"], feeds, processes=processes)


def test_a_source_of_any_exception_leaves_no_helper(taken: list[int]) -> None:
    def feeds() -> Iterator[Feed]:
        yield from ({"x": np.float32([1])} for _ in range(3))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collect(parsed(LOG), ["y"], feeds, processes=3)
    assert process.children() == []


def test_a_helper_that_dies_is_told(taken: list[int]) -> None:
    def feeds() -> Iterator[Feed]:
        for k in range(50):
            if k == 4:
                os.kill(process.children()[0], signal.SIGKILL)
            yield {"x": np.float32([1])}

    with pytest.raises(EnvironmentMissing, match=r"helper process.*SIGKILL"):
        collect(parsed(LOG), ["y"], feeds, processes=2)
    assert process.children() == []


ENDLESS = """
import itertools, sys
import numpy as np, onnx.parser
from edgewright.quantize import calibrate
calibrate.HIRE_AFTER = 0
model = onnx.parser.parse_model(
    '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { y = Neg(x) }'
)
def tell(text, done, total):
    if done == 2:
        print("ready", flush=True)
feeds = lambda: ({"x": np.ones(4, np.float32)} for _ in itertools.count())
calibrate.collect(model, ["y"], feeds, tell, processes=3)
"""


def test_helpers_die_with_a_killed_calibration() -> None:
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        listing = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        pids = [int(p) for p in listing.read_text().split()]
        assert len(pids) == 2
        parent.kill()
    for _ in range(100):
        alive = [p for p in pids if running(p)]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive


def running(pid: int) -> bool:
    """Whether the process exists and is no zombie that its new parent has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 8, 11])
def test_batches_find_the_same_as_single_samples(size: int) -> None:
    values = pictures(11)
    single = collect(net(), TENSORS, in_batches(values, 1))
    assert_same(collect(net(), TENSORS, in_batches(values, size)), single)
    assert single["a"].samples == 11
    assert single["a"].size == 64 * 38 * 38
    rows = [s.tolist() for s in single["x"].last_extrema()]
    assert rows == [[v.min(), v.max()] for v in values]


def test_a_bad_row_is_named() -> None:
    model = parsed("g (float[n, 2] x) => (float[n, 2] y) { y = Log(x) }")
    values = np.ones((3, 2), np.float32)
    values[2, 1] = -1
    with pytest.raises(BadInput, match="sample 1, row 2, makes tensor 'y'"):
        collect(model, ["y"], lambda: iter([{"x": np.ones((1, 2), np.float32)}, {"x": values}]))


STATEFUL = """g (float[batch, 4] x, float[2, batch, 3] h, int64 rate)
    => (float[batch, 3] y, float[2, batch, 3] new) {
    u = MatMul(x, w)  v = Add(u, h)  new = Tanh(v)  y = ReduceSum <keepdims: int = 0> (new, zero)
}"""


def stateful() -> onnx.ModelProto:
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(4, 3)).astype(np.float32)
    return parsed(STATEFUL, w=weight, zero=np.array([0]))


def test_a_state_with_the_batch_elsewhere_is_split_along_its_own_axis() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(6, 4)).astype(np.float32)
    h = rng.normal(size=(2, 6, 3)).astype(np.float32)
    rate = np.array(16000)
    names = ["x", "h", "v", "new", "y"]
    whole = collect(stateful(), names, lambda: iter([{"x": x, "h": h, "rate": rate}]))
    single = [{"x": x[[k]], "h": h[:, [k]], "rate": rate} for k in range(6)]
    assert_same(whole, collect(stateful(), names, lambda: iter(single)))
    assert whole["h"].last_extrema().tolist() == [[h[:, k].min(), h[:, k].max()] for k in range(6)]


@pytest.mark.parametrize(
    "text",
    [
        # Rows that know of each other.
        "g (float[n, 3] x) => (float[n, 3] y) { y = Softmax <axis: int = 0> (x) }",
        # A pooled output has no rows.
        "g (float[n, 3] x) => (float y) { y = ReduceMax <keepdims: int = 0> (x) }",
        # A fixed size is no batch that could be taken apart.
        "g (float[4, 3] x) => (float[4, 3] y) { y = Neg(x) }",
    ],
)
def test_what_cannot_be_taken_apart_is_one_sample(text: str) -> None:
    value = np.arange(12, dtype=np.float32).reshape(4, 3)
    found = collect(parsed(text), ["x"], lambda: iter([{"x": value}]))["x"]
    assert (found.samples, found.size) == (1, 12)


def test_samples_count_through_over_feeds() -> None:
    feeds = [{"x": v} for v in (pictures(3), pictures(1), pictures(2))]
    named = [(s.index, s.name) for s in numbered(net(), feeds)]
    assert named == [
        (0, "sample 0, row 0,"),
        (1, "sample 0, row 1,"),
        (2, "sample 0, row 2,"),
        (3, "sample 1"),
        (4, "sample 2, row 0,"),
        (5, "sample 2, row 1,"),
    ]


# --- shapes, subgraphs, odd tensors ---------------------------------------------------------


def test_varying_shapes(taken: list[int]) -> None:
    text = "g (float[n, t, 4] x) => (float[n, t, 3] y) { a = MatMul(x, w)  y = Relu(a) }"
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(4, 3)).astype(np.float32)
    values = [rng.normal(size=(1, t, 4)).astype(np.float32) for t in (7, 1, 30, 2, 11, 4)]
    made = [v @ weight for v in values]
    for processes in (1, 3):
        found = collect(
            parsed(text, w=weight), ["x", "a"], lambda: ({"x": v} for v in values),
            processes=processes,
        )  # fmt: skip
        assert found["a"].counts.sum() == sum(m.size for m in made)
        assert found["a"].size == 90
        # Sums of four products in another order: the last bits.
        wanted = [[m.min(), m.max()] for m in made]
        np.testing.assert_allclose(found["a"].last_extrema(), wanted, rtol=1e-5)


BRANCHES = """g (float[n, 3] x, bool flag) => (float[n, 3] y) {
    a = Mul(x, two)
    b = If (flag) <
        then_branch = t () => (float[n, 3] r) { r = Neg(a) },
        else_branch = e () => (float[n, 3] s) { i = Exp(a)  s = Add(i, a) }
    >
    y = Relu(b)
}"""


def test_tensors_around_a_branch_are_seen_those_within_refused() -> None:
    model = parsed(BRANCHES, two=np.float32([2]))
    x = np.float32([[1, -2, 3]])
    feeds = [{"x": x, "flag": np.array(f)} for f in (True, False)]
    found = collect(model, ["a", "b", "y"], lambda: iter(feeds))
    assert (found["a"].low, found["a"].high) == (-4.0, 6.0)  # read inside both branches
    both = np.stack([-2 * x, np.exp(2 * x) + 2 * x])
    assert (found["b"].low, found["b"].high) == pytest.approx((both.min(), both.max()), rel=1e-6)
    with pytest.raises(BadInput, match=r"tensor 'i' cannot be calibrated.*main graph"):
        collect(model, ["a", "i"], lambda: iter(feeds))


def test_scalars_constants_and_empty_tensors() -> None:
    text = """g (float[n, 3] x, int64[1] k) => (float[m, 3] part, float whole, float[n, 3] zero) {
        part = Slice(x, from, k)
        whole = ReduceSum <keepdims: int = 0> (x)
        zero = Sub(x, x)
    }"""
    model = parsed(text, **{"from": np.array([0])})
    feeds = [{"x": np.float32([[k, 2, 3]]), "k": np.array([0])} for k in range(3)]
    found = collect(model, ["part", "whole", "zero"], lambda: iter(feeds))
    assert found["part"].samples == 0
    assert found["whole"].last_extrema().tolist() == [[5, 5], [6, 6], [7, 7]]
    assert (found["zero"].low, found["zero"].high, found["zero"].counts.sum()) == (0, 0, 9)
