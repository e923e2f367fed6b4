"""Calibration statistics: histograms against numpy's, exact merging, refusals, bounded memory."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgewright import taps
from edgewright.calibration.statistics import (
    BINS,
    RECENT,
    SUBSAMPLE,
    TINY,
    Statistics,
    from_arrays,
    to_arrays,
)
from edgewright.data import Feed
from edgewright.errors import BadInput
from edgewright.quantize.calibrate import collect, exposed


def statistics(*samples: np.ndarray) -> Statistics:
    """The statistics of some samples."""
    found = Statistics()
    for index, sample in enumerate(samples):
        found.add(np.asarray(sample, np.float32), index)
    return found


def numpy_counts(values: np.ndarray, exponent: int) -> np.ndarray:
    """The same histogram by numpy: its edges are exact here, and its last bin is closed, too."""
    counts, _ = np.histogram(
        np.asarray(values, np.float64), BINS, range=(-(2.0**exponent), 2.0**exponent)
    )
    return counts


def test_bins_of_hand_made_values() -> None:
    # Peak 3.9999 < 2**2, so a bin is 8 / 4096 = 1/512 wide and zero begins bin 2048.
    found = statistics([-3.5, -1, -1e-30, 0, 0.001, 1 / 512, 1, 3.9999])
    assert (found.low, found.high, found.exponent) == (-3.5, np.float32(3.9999), 2)
    assert np.flatnonzero(found.counts).tolist() == [256, 1536, 2047, 2048, 2049, 2560, 4095]
    assert found.counts[2048] == 2  # 0 and 0.001
    assert found.centers()[[0, 2048]].tolist() == [-4 + 1 / 1024, 1 / 1024]


@pytest.mark.parametrize(("scale", "exponent"), [(1, 2), (3e-7, -19), (1e5, 19), (1e-37, TINY)])
def test_histogram_is_numpys(scale: float, exponent: int) -> None:
    rng = np.random.default_rng(3)
    values = (rng.uniform(-3.9, 3.9, (7, 11, 13)) * scale).astype(np.float32)
    values[0, 0, :3] = np.float32(3.9 * scale), 0.0, -0.0
    found = statistics(values)
    assert found.exponent == exponent
    np.testing.assert_array_equal(found.counts, numpy_counts(values, exponent))
    assert (found.low, found.high) == (values.min(), values.max())
    assert (found.samples, found.size) == (1, values.size)


def test_a_peak_that_is_a_power_of_two_lies_inside() -> None:
    # At the end of [-4, 4) it would be counted below 4 at first and above after growing.
    found = statistics([4.0])
    assert found.exponent == 3
    found.add(np.float32([100.0]), 1)
    np.testing.assert_array_equal(found.counts, numpy_counts(np.array([4.0, 100.0]), 7))


def test_growing_merges_pairs_exactly() -> None:
    rng = np.random.default_rng(4)
    parts = [rng.normal(0, s, 500).astype(np.float32) for s in (0.01, 0.3, 40.0, 0.3)]
    found = Statistics()
    seen = []
    for index, part in enumerate(parts):
        found.add(part, index)
        seen.append(found.exponent)
        everything = np.concatenate(parts[: len(seen)])
        np.testing.assert_array_equal(found.counts, numpy_counts(everything, found.exponent))
    assert all(a <= b for a, b in pairwise(seen)) and seen[2] - seen[0] >= 8
    assert 2.0 ** (seen[-1] - 1) <= np.abs(np.concatenate(parts)).max() < 2.0 ** seen[-1]


def test_a_tiny_negative_value_keeps_its_side_beside_a_large_one() -> None:
    # Scaled to bins, -1e-30 is less than any float32, whatever came first.
    for order in ([-1e-30, 1e30], [1e30, -1e-30]):
        found = statistics(*([v] for v in order))
        assert found.counts[BINS // 2 - 1] == 1
        assert found.counts[BINS // 2] == 0


finite = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([s * 2.0**e for e in (-120, -100, -3, 0, 1, 40) for s in (-1, 1)]),
)
sample_lists = st.lists(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, min_side=0, max_side=5), elements=finite),
    max_size=6,
)


@settings(max_examples=80, deadline=None)
@given(sample_lists, st.data())
def test_merging_shards_in_any_order_is_one_pass(
    samples: list[np.ndarray], data: st.DataObject
) -> None:
    whole = statistics(*samples)
    order = data.draw(st.permutations(range(len(samples))))
    shards = [Statistics() for _ in range(data.draw(st.integers(1, 4)))]
    for k in order:
        shards[data.draw(st.integers(0, len(shards) - 1))].add(samples[k], k)
    merged = Statistics()
    for shard in data.draw(st.permutations(shards)):
        merged.merge(shard)
    for key in ("low", "high", "exponent", "samples", "size"):
        assert getattr(merged, key) == getattr(whole, key), key
    np.testing.assert_array_equal(merged.counts, whole.counts)
    np.testing.assert_array_equal(merged.last_extrema(), whole.last_extrema())


def test_merging_leaves_the_other_as_it_is() -> None:
    large, small = statistics([100.0]), statistics([0.5, -0.25])
    large.merge(small)
    assert (small.exponent, int(small.counts.sum()), small.samples) == (0, 2, 1)
    assert (large.low, large.high, large.samples, large.size) == (-0.25, 100.0, 2, 2)
    np.testing.assert_array_equal(large.counts, numpy_counts(np.array([100.0, 0.5, -0.25]), 7))


def test_empty_values_count_for_nothing() -> None:
    found = statistics(np.zeros((0, 3)))
    assert (found.samples, found.size, found.exponent) == (0, 0, TINY)
    assert not found.counts.any()
    found.add(np.float32([2.0]), 0)
    found.add(np.zeros(0, np.float32), 1)
    assert (found.samples, found.low, found.high) == (1, 2.0, 2.0)


def test_constant_and_all_zero_values() -> None:
    zeros = statistics(np.zeros((4, 5)))
    assert (zeros.low, zeros.high, zeros.exponent) == (0.0, 0.0, TINY)
    assert np.flatnonzero(zeros.counts).tolist() == [BINS // 2]
    zeros.add(np.full(3, -6.0, np.float32), 1)  # the 20 zeros stay in their bin while it grows
    assert zeros.exponent == 3
    assert zeros.counts[BINS // 2] == 20
    assert zeros.counts[BINS // 2 - 6 * BINS // 16] == 3
    assert zeros.counts.sum() == 23


def test_one_enormous_outlier() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(size=1000).astype(np.float32)
    for parts in ([values, [1e30]], [[1e30], values]):
        found = statistics(*parts)
        assert found.exponent == 100  # 2**99 < 1e30 < 2**100
        assert found.high == np.float32(1e30)
        assert found.counts[BINS // 2 - 1] == (values < 0).sum()
        assert found.counts[BINS // 2] == (values >= 0).sum()
        assert found.counts.sum() == 1001


def test_large_tensors_are_thinned_and_every_place_gets_its_turn() -> None:
    rng = np.random.default_rng(6)
    value = rng.uniform(-1, 1, 2 * SUBSAMPLE).astype(np.float32)
    found = Statistics()
    found.add(value, 0)
    assert 0 < found.counts.sum() <= SUBSAMPLE
    assert (found.low, found.high) == (value.min(), value.max())  # of all of it
    # Two elements for one place make a stride of 3, made odd; three samples cover all places.
    found.add(value, 1)
    found.add(value, 2)
    np.testing.assert_array_equal(found.counts, numpy_counts(value, 0))


def test_state_does_not_grow_with_samples() -> None:
    rng = np.random.default_rng(7)
    found = Statistics()
    sizes = []
    for k in range(RECENT + 50):
        found.add((rng.normal(size=64) * 1.01**k).astype(np.float32), k)
        sizes.append(sum(v.nbytes for v in vars(found).values() if isinstance(v, np.ndarray)))
    assert set(sizes) == {8 * BINS + 24 * RECENT}
    assert found.samples == RECENT + 50


def test_extrema_of_the_last_samples_in_order() -> None:
    values = [np.float32([k, -2 * k]) for k in range(RECENT + 3)]
    found = statistics(*values)
    wanted = [(-2.0 * k, 1.0 * k) for k in range(3, RECENT + 3)]
    assert found.last_extrema().tolist() == [list(w) for w in wanted]
    # An old sample that no newer one replaced, as the tensor was empty there, does not count.
    sparse = Statistics()
    sparse.add(np.float32([5]), 0)
    sparse.add(np.float32([6]), RECENT + 1)
    assert sparse.last_extrema().tolist() == [[6.0, 6.0]]


def test_statistics_cross_a_process_border_unchanged() -> None:
    some = [statistics([1.0, -3.5], [], [1e30]), Statistics(), statistics(np.arange(5.0))]
    for before, after in zip(some, from_arrays(to_arrays(some)), strict=True):
        for key, value in vars(before).items():
            np.testing.assert_array_equal(getattr(after, key), value)
            assert type(getattr(after, key)) is type(value)
    assert from_arrays(to_arrays([])) == []


# --- over a model ---------------------------------------------------------------------------


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>' + text)


LOG = "g (float[N] x) => (float[N] y) { a = Neg(x)  b = Neg(a)  y = Log(b) }"


def test_collect_sees_inputs_middles_and_outputs() -> None:
    feeds = [{"x": np.float32([1, 8])}, {"x": np.float32([0.5])}]
    told: list[tuple[str, int, int]] = []
    found = collect(parsed(LOG), ["x", "a", "y"], lambda: iter(feeds), lambda *a: told.append(a))
    assert list(found) == ["x", "a", "y"]
    assert (found["x"].low, found["x"].high) == (0.5, 8.0)
    assert (found["a"].low, found["a"].high) == (-8.0, -0.5)
    # ln by numpy; the runtime's may differ in the last bit.
    assert found["y"].low == pytest.approx(np.log(0.5), rel=1e-6)
    assert found["y"].high == pytest.approx(np.log(8), rel=1e-6)
    assert [s.samples for s in found.values()] == [2, 2, 2]
    assert found["y"].size == 2
    assert [done for _, done, _ in told] == [0, 1]


@pytest.mark.parametrize(("bad", "kind"), [(-1.0, "NaN"), (0.0, "Inf")])
def test_not_finite_values_are_refused_with_sample_and_tensor(bad: float, kind: str) -> None:
    feeds = [{"x": np.float32([1, 2])}, {"x": np.float32([3, 4])}, {"x": np.float32([5, bad])}]
    with pytest.raises(BadInput) as error:
        collect(parsed(LOG), ["a", "y"], lambda: iter(feeds))
    assert "sample 2" in str(error.value)
    assert "'y'" in str(error.value) and kind in str(error.value)


@pytest.mark.parametrize(("bad", "kind"), [(np.nan, "NaN"), (-np.inf, "Inf")])
def test_not_finite_inputs_are_refused(bad: float, kind: str) -> None:
    feeds = [{"x": np.float32([1])}, {"x": np.float32([bad])}]
    with pytest.raises(BadInput, match=f"sample 1 makes tensor 'x' of the model {kind}"):
        collect(parsed(LOG), ["x"], lambda: iter(feeds))


def test_tensors_that_are_empty_for_some_samples() -> None:
    text = "g (float[N] x, int64[1] n) => (float[M] y) { z = Sub(n, n)  y = Slice(x, z, n) }"
    value = np.float32([3, -7, 5])
    feeds = [{"x": value, "n": np.array([n])} for n in (0, 2, 0, 1)]
    found = collect(parsed(text), ["y"], lambda: iter(feeds))["y"]
    assert (found.samples, found.low, found.high, found.size) == (2, -7.0, 3.0, 2)
    assert found.counts.sum() == 3


def test_fetching_in_small_groups_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "g (float[8] x) => (float[8] d) { a = Neg(x)  b = Abs(a)  c = Exp(x)  d = Add(b, c) }"
    names = ["a", "b", "c", "d"]
    rng = np.random.default_rng(8)
    values = [rng.normal(size=8).astype(np.float32) for _ in range(3)]

    def feeds() -> Iterator[Feed]:
        return ({"x": v} for v in values)

    whole = collect(parsed(text), names, feeds)
    monkeypatch.setattr(taps, "FETCH_BYTES", 70)  # two tensors of 32 bytes
    session = taps.open_local(taps.expose(parsed(text), names).SerializeToString())
    assert taps.fetch_groups(session, {"x": values[0]}, names) == [["a", "b"], ["c", "d"]]
    parts = collect(parsed(text), names, feeds)
    for name in names:
        np.testing.assert_array_equal(parts[name].counts, whole[name].counts)
        assert (parts[name].low, parts[name].high) == (whole[name].low, whole[name].high)


def test_expose_leaves_the_model_alone() -> None:
    model = parsed(LOG)
    before = model.SerializeToString(deterministic=True)
    copies = [taps.expose(model, ["x", "b", "y"]), onnx.ModelProto()]
    copies[1].ParseFromString(exposed(model, ["x", "b", "y"]))
    for copy in copies:
        assert [o.name for o in copy.graph.output] == ["b", "y"]  # x is fed, not computed
    assert model.SerializeToString(deterministic=True) == before
