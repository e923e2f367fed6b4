"""Ranges against hand-computed integers and brute force over the raw values."""

import math
from typing import get_args, get_type_hints

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.calibration.statistics import Statistics
from edgewright.quantize import entropy, ranges
from edgewright.quantize.response import responses
from edgewright.quantize.scales import ActivationRange
from edgewright.recipe import QuantizeSettings

METHODS = ("mse", "minmax", "moving-average", "percentile", "entropy")
SHARES = np.geomspace(1.0, 0.02, 60)  # what `mse` tries on each side


def statistics(values: np.ndarray) -> Statistics:
    found = Statistics()
    found.add(np.asarray(values, np.float32), 0)
    return found


def dequantized(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """x after uint8 with a range, as the ONNX standard has it; written anew for these tests."""
    scale = (high - low) / 255
    zero = round(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


# --- min-max -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([-3, 5], (-3, 5)),
        ([2, 5], (0, 5)),
        ([-5, -2], (-5, 0)),
        ([0, 0], (0, 0)),
        ([7, 7], (0, 7)),
    ],
)
def test_minmax(values: list[float], wanted: ActivationRange) -> None:
    assert ranges.minmax(statistics(np.array(values))) == wanted


# --- percentile ----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [60.0, 90.0, 99.0, 99.9])
@pytest.mark.parametrize("shift", [0.0, 0.7, -2.0])
def test_percentile_against_sorted_values(share: float, shift: float) -> None:
    count = 4999  # a prime: no cut falls on a border between two values
    values = np.random.default_rng(1).normal(shift, 1, count).astype(np.float32)
    found = statistics(values)
    low, high = ranges.percentile(found, share)
    ordered = np.sort(values)
    cut = (1 - share / 100) / 2
    lowest = ordered[math.ceil(cut * count) - 1]
    highest = ordered[math.ceil((1 - cut) * count) - 1]
    # The middle of the bin that the value lies in: half a bin off at most.
    width = 2.0 ** (found.exponent + 1) / 4096
    assert low == pytest.approx(min(lowest, 0.0), abs=0.501 * width)
    assert high == pytest.approx(max(highest, 0.0), abs=0.501 * width)


def test_percentile_by_hand() -> None:
    # 990 ones and 10 values of 64: 1 % lies above; half of 1 % stays above the 99 % range.
    found = statistics(np.repeat([1.0, 64.0], [990, 10]))
    bin_width = 2 * 128 / 4096
    assert ranges.percentile(found, 99.0) == (0.0, 64.0)  # 0.5 % is less than 1 %
    assert ranges.percentile(found, 97.0) == (0.0, 1.0 + bin_width / 2)  # 1.5 % is more


def test_percentile_100_is_minmax_to_half_a_bin() -> None:
    values = np.random.default_rng(2).normal(0, 1, 999)
    found = statistics(values)
    width = 2.0 ** (found.exponent + 1) / 4096
    assert ranges.percentile(found, 100.0) == pytest.approx(ranges.minmax(found), abs=width / 2)


# --- moving average ------------------------------------------------------------------------


def test_moving_average_by_hand() -> None:
    found = Statistics()
    for k, (low, high) in enumerate([(-1.0, 10.0), (-3.0, 20.0), (-1.0, 0.5)]):
        found.add(np.float32([low, 0, high]), k)
    # -1 -> -1.2 -> -1.18 and 10 -> 11 -> 9.95: each step a tenth of the way.
    assert ranges.moving_average(found) == pytest.approx((-1.18, 9.95), rel=1e-12)


def test_moving_average_of_many_samples_is_the_plain_recursion() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(700, 9)).astype(np.float32) * rng.lognormal(size=(700, 1))
    found = Statistics()
    for k in rng.permutation(700):  # as processes may take them
        found.add(values[k], int(k))
    low, high = values[0].min(), values[0].max()
    for value in values[1:]:
        low, high = 0.9 * low + 0.1 * value.min(), 0.9 * high + 0.1 * value.max()
    # What is older than the 256 samples kept weighs 0.9**256 = 2e-12.
    assert ranges.moving_average(found) == pytest.approx((low, high), rel=1e-9)


def test_moving_average_holds_zero() -> None:
    assert ranges.moving_average(statistics(np.float32([2, 5]))) == (0.0, 5.0)
    assert ranges.moving_average(Statistics()) == (0.0, 0.0)


# --- relative entropy ----------------------------------------------------------------------


def plain_entropy(counts: list[int], first: int, end: int) -> float:
    """D(P || Q) of a histogram clipped to [first, end), written as the method is told."""
    size = end - first
    p = [float(c) for c in counts[first:end]]
    q = list(p)
    own = {0, size - 1, 2048 - first}  # both ends and zero have codes of their own
    for level in range(256):
        bins = [i for i in range(size) if level * size <= i * 256 < (level + 1) * size]
        bins = [i for i in bins if i not in own and p[i] > 0]
        for i in bins:
            q[i] = sum(p[j] for j in bins) / len(bins)
    p[0] += sum(counts[:first])
    p[-1] += sum(counts[end:])
    seen = [i for i in range(size) if p[i] > 0]
    total, kept = sum(p), sum(q)
    return sum(
        p[i] / total * math.log(p[i] / total / (0.9999 * q[i] / kept + 0.0001 / len(seen)))
        for i in seen
    )


def long_tailed(kind: str) -> np.ndarray:
    rng = np.random.default_rng(11)
    values = rng.laplace(0, 1, 30000)
    if kind == "relu":
        values = np.maximum(values, 0)
    if kind == "shifted":
        values = np.abs(values) * 3 - 0.3
    return values


@pytest.mark.parametrize("kind", ["both", "relu", "shifted"])
def test_entropy_against_plain_loops(kind: str) -> None:
    found = statistics(long_tailed(kind))
    counts = found.counts.tolist()
    filled = np.flatnonzero(found.counts)
    first, end = min(int(filled[0]), 2048), int(filled[-1]) + 1
    losses = {}
    for t in entropy.thresholds(first, end)[::9]:
        window = max(first, 2048 - t), min(end, 2048 + t)
        losses[t] = plain_entropy(counts, *window)
        assert entropy.relative_entropy(found.counts, *window) == pytest.approx(losses[t], rel=1e-9)
    assert max(losses.values()) > 1.2 * min(losses.values())  # something to choose from


@pytest.mark.parametrize("kind", ["both", "relu", "shifted"])
def test_entropy_takes_the_best_of_many_thresholds(kind: str) -> None:
    found = statistics(long_tailed(kind))
    filled = np.flatnonzero(found.counts)
    first, end = min(int(filled[0]), 2048), int(filled[-1]) + 1
    candidates = entropy.thresholds(first, end)
    assert len(candidates) == entropy.CANDIDATES
    losses = {
        t: entropy.relative_entropy(found.counts, max(first, 2048 - t), min(end, 2048 + t))
        for t in candidates
    }
    best = min(losses, key=lambda t: (losses[t], -t))
    width = 2.0 ** (found.exponent + 1) / 4096
    assert entropy.entropy(found) == (
        max(-best * width, min(found.low, 0.0)),
        min(best * width, found.high),
    )


def test_entropy_cuts_a_far_tail_and_keeps_what_is_even() -> None:
    rng = np.random.default_rng(12)
    even = rng.uniform(-1, 1, 60000)
    assert entropy.entropy(statistics(even)) == pytest.approx((-1, 1), rel=0.02)
    tail = np.append(rng.normal(0, 1, 60000), 30.0)
    low, high = entropy.entropy(statistics(tail))
    assert 2.5 < high < 8 and -5 < low < -2.5  # ONNX Runtime's stays at 30


def test_zeros_of_a_relu_do_not_narrow_the_range() -> None:
    values = np.random.default_rng(13).uniform(0, 1, 30000)
    with_zeros = np.append(values, np.zeros(30000))
    assert entropy.entropy(statistics(with_zeros)) == pytest.approx((0, 1), rel=0.02)


def test_entropy_of_constants_and_nothing() -> None:
    assert entropy.entropy(Statistics()) == (0.0, 0.0)
    assert entropy.entropy(statistics(np.zeros(4))) == (0.0, 0.0)
    assert entropy.entropy(statistics(np.full(4, 3.0))) == (0.0, 3.0)
    assert entropy.entropy(statistics(np.full(4, -3.0))) == (-3.0, 0.0)


# --- mean squared error --------------------------------------------------------------------


def test_errors_by_hand() -> None:
    line = np.array([-1e4, 1e4])
    x = np.array([0.4, 300.0, -2.0, 7.0])
    weight = np.array([1.0, 1.0, 3.0, 1.0])
    # 0..255, step 1, zero 0: codes 0, 255, 0, 7, so errors 0.4, 45, 2, 0.
    # -128..127, step 1, zero 128: values 0, 127, -2, 7, so errors 0.4, 173, 0, 0.
    # 0..510, step 2: 0.4 -> 0, 300 -> 300, -2 -> 0, 7 -> 3.5 -> code 4 = 8.
    found = ranges.errors(
        x, weight, np.array([0.0, -128.0, 0.0]), np.array([255.0, 127.0, 510.0]), (line, line)
    )
    wanted = [0.16 + 45**2 + 3 * 4, 0.16 + 173**2, 0.16 + 0 + 3 * 4 + 1]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_mse_keeps_a_range_that_has_no_error() -> None:
    # Integers 0..255 have a code each; any narrower range cuts 255 or moves the others.
    assert ranges.mse(statistics(np.arange(256.0))) == (0.0, 255.0)
    low, high = ranges.mse(statistics(np.arange(-128.0, 128.0)))
    assert (low, high) == (-128.0, 127.0)


def tails(left: float, right: float) -> tuple[np.ndarray, np.ndarray]:
    """Values and how often each comes: exponential on both sides, with one of 30 times the width.

    Half a million or more, because at 8 bits cutting some off pays only where they are few.
    """
    x = np.arange(-6000, 6001) * 0.01
    counts = np.rint(5000 * np.exp(np.where(x < 0, x / left, -x / right))).astype(int)
    for far in (-30 * left, 30 * right):
        counts[np.argmin(np.abs(x - far))] += 1
    return x[counts > 0], counts[counts > 0]


def statistics_of(x: np.ndarray, counts: np.ndarray) -> Statistics:
    found = Statistics()
    # Parts below what a sample is thinned to.
    for k, part in enumerate(np.array_split(np.repeat(x, counts), 40)):
        found.add(part.astype(np.float32), k)
    return found


def mean_loss(x: np.ndarray, counts: np.ndarray, low: float, high: float) -> float:
    return float(((dequantized(x, low, high) - x) ** 2 @ counts) / counts.sum())


@pytest.mark.parametrize(("left", "right"), [(1.0, 1.0), (0.5, 2.0), (1.5, 0.2)])
def test_mse_against_brute_force(left: float, right: float) -> None:
    x, counts = tails(left, right)
    low, high = ranges.mse(statistics_of(x, counts))
    best = min(
        mean_loss(x, counts, x.min() * a, x.max() * b) for a in SHARES[:30] for b in SHARES[:30]
    )
    # The bins say where a value lies to a sixteenth of a step or less, which is 1 % of the
    # error; the two ends are searched in turn, not together.
    assert mean_loss(x, counts, low, high) < 1.03 * best
    assert mean_loss(x, counts, low, high) < 0.8 * mean_loss(x, counts, x.min(), x.max())


def test_mse_of_one_sided_values_is_the_best_of_all_shares() -> None:
    x, counts = tails(1e-9, 1.0)
    low, high = ranges.mse(statistics_of(x, counts))
    losses = [mean_loss(x, counts, 0.0, x.max() * s) for s in SHARES]
    assert low == 0.0
    assert 0 < np.argmin(losses) < 59  # neither the whole range nor the narrowest
    assert mean_loss(x, counts, 0.0, high) < 1.01 * min(losses)


def test_negative_values_only() -> None:
    x, counts = tails(1.0, 1e-9)
    low, high = ranges.mse(statistics_of(x, counts))
    losses = [mean_loss(x, counts, x.min() * s, 0.0) for s in SHARES]
    assert high == 0.0
    assert mean_loss(x, counts, low, 0.0) < 1.01 * min(losses) < 0.8 * losses[0]


def test_symmetric_range_against_brute_force() -> None:
    x, counts = tails(0.2, 1.0)
    low, high = ranges.mse(statistics_of(x, counts), symmetric=True)
    losses = [mean_loss(x, counts, -p, p) for p in x.max() * SHARES]
    assert mean_loss(x, counts, -high, high) < 1.01 * min(losses)
    assert min(losses) < 0.8 * losses[0]
    assert low == pytest.approx(x.min(), rel=1e-6)  # what is never there is not claimed
    one_sided = ranges.mse(statistics(np.arange(100.0)), symmetric=True)
    assert one_sided == (0.0, 99.0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_zero_and_missing_values(symmetric: bool) -> None:
    assert ranges.mse(statistics(np.zeros(5)), symmetric) == (0.0, 0.0)
    assert ranges.mse(Statistics(), symmetric) == (0.0, 0.0)
    low, high = ranges.mse(statistics(np.full(9, 3.0)), symmetric)
    assert low == 0.0
    assert dequantized(np.array([3.0]), -high if symmetric else low, high) == pytest.approx(
        3.0, abs=high / 255
    )


# --- the response of what follows ----------------------------------------------------------


def hard_swish(x: np.ndarray) -> np.ndarray:
    return x * np.clip(x / 6 + 0.5, 0, 1)


def before_hard_swish() -> np.ndarray:
    """Half of the values lie where HardSwish is flat."""
    rng = np.random.default_rng(20)
    values = np.concatenate([rng.uniform(-30, -3, 4000), rng.uniform(-3, 6, 4000)])
    return values.astype(np.float32)


def test_what_hard_swish_ignores_costs_no_range() -> None:
    values = before_hard_swish()
    found = statistics(values)
    aware = ranges.mse(found, response=hard_swish(found.centers()))
    blind = ranges.mse(found)
    assert -4 < aware[0] <= -2.5
    assert blind[0] < -20  # without the response the flat part has most of the range
    x = values.astype(np.float64)
    noise = {
        name: ((hard_swish(dequantized(x, *r)) - hard_swish(x)) ** 2).mean()
        for name, r in (("aware", aware), ("blind", blind))
    }
    # Steps of 36/255 against 9/255 are 4 times wider: 16 times the noise.
    assert noise["blind"] > 10 * noise["aware"]


SWISH = """g (float[N] x) => (float[N] y) {
    a = Neg(x)  s = HardSwish(a)  y = Neg(s)
}"""
SWISH_IN_PARTS = """g (float[N] x) => (float[N] y) {
    a = Neg(x)  t = Add(a, three)  c = Clip(t, zero, six)  m = Mul(a, c)  d = Div(m, six)
    y = Neg(d)
}"""


def parsed(text: str, **scalars: float) -> onnx.ModelProto:
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>' + text)
    for name, value in scalars.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), name))
    return model


@pytest.mark.parametrize("text", [SWISH, SWISH_IN_PARTS])
def test_the_response_is_found_in_the_graph(text: str) -> None:
    model = parsed(text, zero=0, three=3, six=6)
    found = {"a": statistics(before_hard_swish())}
    table = responses(model, ["a"], found)
    # The last bit of float32, several operations in a row.
    centers = found["a"].centers()
    np.testing.assert_allclose(table["a"], -hard_swish(centers), rtol=1e-5, atol=1e-5)
    assert -4 < ranges.mse(found["a"], response=table["a"])[0] <= -2.5


@pytest.mark.parametrize(
    "text",
    [
        # Somebody else reads it, too.
        "g (float[N] x) => (float[N] y) { a = Neg(x) s = HardSwish(a) t = Softmax(a) y = Sum(s,t)}",
        # It is an output of the model.
        "g (float[N] x) => (float[N] y, float[N] a) { a = Neg(x) s = HardSwish(a) y = Neg(s) }",
        # A vector is no function of one number.
        "g (float[3] x) => (float[3] y) { a = Neg(x) s = Mul(a, v) y = Neg(s) }",
        # What goes into the squashing end of a model is judged itself.
        "g (float[N] x) => (float[N] y) { a = Neg(x) y = Sigmoid(a) }",
        "g (float[N] x) => (float[1,N] y) { a = Neg(x) s = HardSigmoid(a) y = Unsqueeze(s, k) }",
    ],
)
def test_tensors_that_must_be_exact_have_no_response(text: str) -> None:
    model = parsed(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "v"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "k"))
    assert responses(model, ["a"], {"a": statistics(np.arange(-4.0, 4.0))}) == {}


def test_the_response_ends_before_the_squashing_end_of_a_model() -> None:
    model = parsed("g (float[N] x) => (float[N] y) { a = Neg(x) r = Relu(a) y = Sigmoid(r) }")
    found = {"a": statistics(np.arange(-4.0, 5.0))}
    table = responses(model, ["a"], found)["a"]
    np.testing.assert_array_equal(table, np.maximum(found["a"].centers(), 0))


def test_values_outside_a_functions_domain_count_as_zero() -> None:
    model = parsed("g (float[N] x) => (float[N] y) { a = Abs(x) b = Log(a) y = Neg(b) }")
    found = {"a": statistics(np.arange(1.0, 5.0))}
    table = responses(model, ["a"], found)["a"]
    below = found["a"].centers() < 0
    assert np.isfinite(table).all() and not table[below].any()
    np.testing.assert_allclose(
        table[~below], -np.log(found["a"].centers()[~below]), rtol=1e-5, atol=1e-6
    )


# --- all methods ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    st.sampled_from(METHODS),
    st.sampled_from([60.0, 99.9, 100.0]),
    st.booleans(),
    st.booleans(),
)
def test_zero_is_always_inside_and_nothing_unseen(
    values: list[float], method: str, share: float, symmetric: bool, swish: bool
) -> None:
    found = statistics(np.array(values))
    response = hard_swish(found.centers()) if swish else None
    low, high = ranges.choose(found, method, share, symmetric, response)
    assert min(found.low, 0.0) <= low <= 0.0 <= high <= max(found.high, 0.0)


def test_choose_does_what_the_method_says() -> None:
    found = statistics_of(*tails(1.0, 2.0))
    assert ranges.choose(found, "minmax", 99.0, False) == ranges.minmax(found)
    assert ranges.choose(found, "percentile", 99.0, False) == ranges.percentile(found, 99.0)
    assert ranges.choose(found, "mse", 99.0, False) == ranges.mse(found)
    assert ranges.choose(found, "mse", 99.0, True) == ranges.mse(found, symmetric=True)
    assert ranges.choose(found, "entropy", 99.0, False) == entropy.entropy(found)
    assert ranges.choose(found, "moving-average", 99.0, False) == ranges.moving_average(found)
    assert len({ranges.choose(found, m, 99.0, False) for m in METHODS}) == len(METHODS)


def test_every_method_of_the_recipe_is_known() -> None:
    assert get_args(get_type_hints(QuantizeSettings)["ranges"]) == METHODS
    with pytest.raises(KeyError):
        ranges.choose(Statistics(), "median", 99.0, False)
