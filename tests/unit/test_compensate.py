"""Compensation: what is exactly redundant costs nothing, the rest costs less than plain slicing."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from graphs import normal, parsed
from onnx import numpy_helper

from edgewright import shelf as shelf_module
from edgewright.errors import BadInput
from edgewright.mixers import channels, find_mixers
from edgewright.recover import compensate as module
from edgewright.recover import moments as moments_module
from edgewright.recover.compensate import compensate
from edgewright.recover.moments import Moments, fit
from edgewright.stage import say_nothing

Kept = dict[tuple[str, int], np.ndarray]


def sliced(model: onnx.ModelProto, kept: Kept) -> onnx.ModelProto:
    """The model with its stored tensors cut as the map says: a cut made by hand."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        for (name, axis), indices in kept.items():
            if name == tensor.name:
                value = np.take(numpy_helper.to_array(tensor), indices, axis=axis)
                tensor.CopyFrom(numpy_helper.from_array(value, name))
    return copy


def computed(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)[0]


def error(one: onnx.ModelProto, other: onnx.ModelProto, feeds: list) -> float:
    """Relative squared difference of the first output over some feeds."""
    pairs = [(computed(one, f), computed(other, f)) for f in feeds]
    return sum(((a - b) ** 2).sum() for a, b in pairs) / sum((a**2).sum() for a, _ in pairs)


def always(feeds: list) -> Callable[[], Iterator]:
    return lambda: iter(feeds)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm", "GemmT", "MatMul", "LSTM"])
def test_a_channel_that_others_make_up_goes_without_loss(op: str) -> None:
    # Channel 3 is 0.5 * channel 0 - channel 1 + 2 for every input (of a transposed convolution
    # without the 2: with strides a constant input reaches each output through other weights).
    rows = normal(4, 5)
    rows[3] = 0.5 * rows[0] - rows[1]
    shift = 0 if op == "ConvTranspose" else 2
    bias = np.array([0.1, 0.2, -0.3, 0.5 * 0.1 - 0.2 + shift], np.float32)
    keep = np.arange(3)
    kept: Kept = {("w", 0): keep, ("b", 0): keep}
    second = normal(6, 4, seed=2)
    body, rank = {
        "Conv": ("h = Conv (x, w, b)  y = Conv <strides = [2, 2]> (h, v)", 4),
        "ConvTranspose": ("h = Conv (x, w, b)  y = ConvTranspose <strides = [2, 2]> (h, v)", 4),
        "Gemm": ("h = Gemm <transB = 1> (x, w, b)  y = Gemm (h, v)", 2),
        "GemmT": ("h = Gemm <transB = 1> (x, w, b)  y = Gemm <transB = 1> (h, v, c)", 2),
        "MatMul": ("m = MatMul (x, w)  h = Add (m, b)  g = MatMul (h, v)  y = Add (c, g)", 3),
        "LSTM": ("m = MatMul (x, w)  h = Add (m, b)  y = LSTM <hidden_size = 2> (h, v, r)", 3),
    }[op]
    stored = {"w": rows, "b": bias, "v": second}
    shape = {4: (1, 5, 6, 6), 2: (40, 5), 3: (9, 4, 5)}[rank]
    if rank == 4:
        stored["w"] = rows[:, :, None, None]
        stored["v"] = normal(6, 4, 2, 2) if op == "Conv" else normal(4, 6, 2, 2)
    elif op == "Gemm":
        stored["v"] = second.T.copy()
    elif op == "GemmT":
        stored["c"] = normal(6, seed=5)
    elif op == "MatMul":
        stored |= {"w": rows.T.copy(), "v": second.T.copy(), "c": normal(6, seed=5)}
    else:
        stored |= {"w": rows.T.copy(), "v": normal(1, 8, 4), "r": normal(1, 8, 2)}
    if rank == 3:
        kept = {("w", 1): keep, ("b", 0): keep, ("m", 2): keep}
    in_axis = {"ConvTranspose": 0, "Gemm": 0, "MatMul": 0, "LSTM": 2}.get(op, 1)
    kept |= {("v", in_axis): keep, ("h", rank - 1 if rank < 4 else 1): keep}
    dims = ", ".join("abcd"[:rank])
    out = 4 if op == "LSTM" else rank
    text = f"g (float[{dims}] x) => (float[{', '.join('efgh'[:out])}] y) {{ {body} }}"
    original = parsed(text.replace("  ", "\n"), **stored)
    pruned = sliced(original, kept)
    feeds = [{"x": normal(*shape, seed=k)} for k in range(8)]
    plain = error(original, pruned, feeds)
    entry = compensate(original, pruned, kept, always(feeds), say_nothing)[0]
    assert plain > 0.01
    # 1e-6 of ridge on a squared error, and float32.
    assert error(original, pruned, [{"x": normal(*shape, seed=99)}]) < 1e-8
    assert (entry["channels"], entry["lost"], entry["reason"]) == (4, 1, "")
    onnx.checker.check_model(pruned)


def deep_net(widths: tuple[int, ...] = (12, 24, 24, 24, 6)) -> onnx.ModelProto:
    """Gemm and Relu in turn, inputs of a low rank: much of each layer follows from the rest."""
    body, stored, name = "", {}, "x"
    for k, (i, o) in enumerate(itertools.pairwise(widths)):
        stored |= {f"w{k}": normal(i, o, seed=k) / np.sqrt(i).astype(np.float32)}
        stored |= {f"b{k}": normal(o, seed=k + 10) * np.float32(0.1)}
        last = k == len(widths) - 2
        body += f"{'y' if last else f'g{k}'} = Gemm ({name}, w{k}, b{k})\n"
        body += "" if last else f"h{k} = Relu (g{k})\n"
        name = f"h{k}"
    text = f"g (float[n, {widths[0]}] x) => (float[n, {widths[-1]}] y) {{ {body} }}"
    return parsed(text, **stored)


def half_of(model: onnx.ModelProto) -> Kept:
    """Half of the channels of every hidden layer of `deep_net`."""
    kept: Kept = {}
    count = sum(t.name.startswith("w") for t in model.graph.initializer)
    for k in range(count - 1):
        keep = np.sort(np.random.default_rng(k).permutation(24)[:14])
        kept |= {(f"w{k}", 1): keep, (f"b{k}", 0): keep, (f"w{k + 1}", 0): keep}
        kept |= {(f"g{k}", 1): keep, (f"h{k}", 1): keep}
    return kept


def low_rank(seed: int, places: int = 64) -> dict[str, np.ndarray]:
    mix = normal(4, 12, seed=77)
    return {"x": normal(places, 4, seed=seed) @ mix + 0.5}


def in_parallel(original: onnx.ModelProto, kept: Kept, feeds: list) -> onnx.ModelProto:
    """All layers repaired for the original's own activations: one does not know the other."""
    pruned = sliced(original, kept)
    readers = {m.input: m for m in find_mixers(original)[0]}
    exposed = onnx.ModelProto()
    exposed.CopyFrom(original)
    inner = [name for name in readers if (name, 1) in kept]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    session = onnxruntime.InferenceSession(exposed.SerializeToString())
    for name in inner:
        moments, mixer, keep = Moments(), readers[name], kept[name, 1]
        for k, feed in enumerate(feeds):
            x = channels(session.run([name], feed)[0], 1, k)
            moments.add(x, x[keep])
        weight = next(t for t in original.graph.initializer if t.name == mixer.weight)
        value = module.sliced(numpy_helper.to_array(weight), mixer, kept)
        found = fit(moments, keep, (mixer.matrix(value) ** 2).sum(axis=1), True)
        module.rewrite(pruned, mixer, value, found)
    return pruned


def test_sequential_beats_parallel_beats_slicing() -> None:
    original = deep_net()
    kept = half_of(original)
    feeds, unseen = [low_rank(k) for k in range(16)], [low_rank(k + 100) for k in range(4)]
    plain, pruned = sliced(original, kept), sliced(original, kept)
    rows = compensate(original, pruned, kept, always(feeds), say_nothing)
    errors = [
        error(original, m, unseen) for m in (plain, in_parallel(original, kept, feeds), pruned)
    ]
    assert errors[0] > 2 * errors[1] > 2 * errors[2], errors
    assert len(rows) == 3
    assert all(row["error"] < row["plain"] for row in rows)


def test_same_inputs_give_the_same_bytes_and_files_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = deep_net()
    kept = half_of(original)
    feeds = [low_rank(k) for k in range(6)]
    bytes_of, spilled = [], []

    class Watched(shelf_module.Shelf):
        def sample(self) -> shelf_module.Arrays:
            spilled.append(self)
            return super().sample()

    monkeypatch.setattr(module, "Shelf", Watched)
    for room in (1 << 20, 1 << 20, 10_000):
        monkeypatch.setattr(module, "LIVE_BYTES", room)
        pruned = sliced(original, kept)
        compensate(original, pruned, kept, always(feeds), say_nothing)
        bytes_of.append(pruned.SerializeToString(deterministic=True))
    assert bytes_of[0] == bytes_of[1] == bytes_of[2]
    assert spilled[0].peak_spilled == 0 < spilled[-1].peak_spilled


def test_few_samples_leave_a_plain_slice_and_say_so() -> None:
    original = deep_net()
    kept = half_of(original)
    plain, pruned = sliced(original, kept), sliced(original, kept)
    rows = compensate(original, pruned, kept, always([low_rank(1)]), say_nothing)
    assert pruned == plain
    assert {row["reason"] for row in rows} == {"plain slice: too few samples: one half must judge"}
    with pytest.raises(BadInput, match="no samples"):
        compensate(original, pruned, kept, always([]), say_nothing)


def test_samples_that_teach_nothing_leave_a_plain_slice() -> None:
    # x has nothing to do with z: any map fitted on one half is wrong on the other.
    moments = Moments()
    for k in range(4):
        x = normal(6, 3, seed=k)
        moments.add(x, np.concatenate([x[:3], np.zeros((0, 3), np.float32)]))
    found = fit(moments, np.arange(3), np.array([1.0, 1, 1, 0, 0, 0]), True)
    np.testing.assert_array_equal(found.matrix, np.eye(6)[:, :3])
    assert found.reason == "no map does better on samples held out"


def test_fit_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "STRENGTHS", (1e-6,))
    monkeypatch.setattr(moments_module, "START", 0)
    # One channel left, x0 = z and x1 = 3 z + 2 exactly: M = [1, 3], c = [0, 2].
    z = np.array([[0.0, 1, 2, 3]], np.float32)
    moments = Moments()
    for k in range(2):
        moments.add(np.concatenate([z + k, 3 * (z + k) + 2]), z + k)
    found = fit(moments, np.array([0]), np.ones(2), True)
    np.testing.assert_allclose(found.matrix, [[1], [3]], atol=1e-5)
    np.testing.assert_allclose(found.offset, [0, 2], atol=1e-5)
    # Without an intercept x1 ~ m z over z = 0 1 2 3 1 2 3 4: m = sum(3 z^2 + 2 z) / sum(z^2).
    found = fit(moments, np.array([0]), np.ones(2), False)
    np.testing.assert_allclose(found.matrix[1], (3 * 44 + 2 * 16) / 44, atol=1e-4)
    np.testing.assert_array_equal(found.offset, [0, 0])


def test_what_is_not_finite_teaches_nothing() -> None:
    moments = Moments()
    for k in range(4):
        x = normal(3, 9, seed=k)
        x[2, k] = np.inf if k == 1 else 0
        moments.add(x, x[:2])
    found = fit(moments, np.arange(2), np.ones(3), True)
    assert found.reason == "its input is not finite"
    np.testing.assert_array_equal(found.matrix, np.eye(3)[:, :2])


def test_the_ladder_is_walked_downhill() -> None:
    ladder = (1.0, 2.0, 3.0, 4.0, 5.0)
    for lowest in ladder:
        asked: list[float] = []

        def judged(value: float, lowest: float = lowest, asked: list[float] = asked) -> float:
            asked.append(value)
            return abs(value - lowest)

        assert moments_module.downhill(judged, ladder, 2) == (0.0, lowest)
        assert len(asked) == len(set(asked)) <= 4


def test_a_map_that_explodes_is_refused() -> None:
    # x2 is the difference of two channels that are almost equal: M = [1000, -1000].
    moments = Moments()
    for k in range(4):
        a, d = normal(2, 500, seed=k)
        z = np.stack([a, a + np.float32(1e-3) * d])
        moments.add(np.stack([*z, d]), z)
    found = fit(moments, np.arange(2), np.array([0, 0, 1.0]), True)
    assert "explodes" in found.reason or np.abs(found.matrix[2]).max() <= 10
    assert np.abs(found.matrix).max() <= 10


def test_a_layer_before_the_cut_is_left_alone() -> None:
    original = deep_net()
    kept = {k: v for k, v in half_of(original).items() if k[0] in ("w1", "b1", "w2", "g1", "h1")}
    kept = {k: v for k, v in kept.items() if k not in {("w1", 0), ("w2", 1)}}
    pruned = sliced(original, kept)
    rows = compensate(original, pruned, kept, always([low_rank(k) for k in range(8)]), say_nothing)
    stored = [{t.name: t for t in m.graph.initializer} for m in (original, pruned)]
    assert [row["node"] for row in rows] == ["n4", "n6"]
    assert stored[0]["w0"] == stored[1]["w0"]
    assert stored[0]["w3"] != stored[1]["w3"]  # nothing cut there, but its input changed


def test_what_cannot_be_repaired_is_said() -> None:
    text = """g (float[n, 4, 5, 5] x) => (float[n, 4, 5, 5] y) {
        h = Conv (x, w) g = Conv <group = 2> (h, u) y = Conv (g, v) }"""
    stored = {"w": normal(4, 4, 1, 1), "u": normal(4, 2, 1, 1), "v": normal(4, 4, 1, 1)}
    original = parsed(text, **stored)
    keep = np.array([0, 2])
    kept = {("w", 0): keep, ("h", 1): keep, ("u", 1): np.array([0])}
    pruned = sliced(original, kept)
    feeds = [{"x": normal(1, 4, 5, 5, seed=k)} for k in range(8)]
    rows = compensate(original, pruned, kept, always(feeds), say_nothing)
    assert rows[0]["reason"] == "not repaired: it does not mix channels across its groups"
    assert rows[1]["node"] == "n2" and not rows[1]["reason"]


def test_shelf_keeps_what_does_not_fit_in_files(tmp_path: Path) -> None:
    shelf = shelf_module.Shelf(tmp_path, room=100)
    one, two = shelf.sample(), shelf.sample()
    small, large = np.arange(10.0), np.arange(5.0) + 0.5
    one["a"], two["a"] = small, large
    assert len(list(tmp_path.iterdir())) == 1 and shelf.spilled > 0
    np.testing.assert_array_equal(one["a"], small)
    np.testing.assert_array_equal(two["a"], large)
    del one["a"], two["a"]
    assert not list(tmp_path.iterdir()) and shelf.spilled == 0 and shelf.room == 100
    one["b"] = small
    one["b"] = large
    assert list(one) == ["b"] and shelf.room == 60
