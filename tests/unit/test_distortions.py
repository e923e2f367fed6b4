"""How one sample is turned into another, by hand-computed values."""

import numpy as np
import pytest

from edgewright.recover.distortions import (
    looked_at,
    pieced,
    remade,
    reversed_at_times,
    shaded,
    slanted,
    stretched,
    taken,
    used,
)


def line(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[None, None]


def test_stretching_keeps_one_place_where_it_is() -> None:
    assert stretched(line(0, 1, 2, 3, 4), 2, 2.0, 0.0).ravel().tolist() == [0, 0.5, 1, 1.5, 2]
    assert stretched(line(0, 1, 2, 3, 4), 2, 0.5, 1.0).ravel().tolist() == [0, 0, 0, 2, 4]


def test_places_between_two_values_and_beyond_the_ends() -> None:
    got = taken(line(0, 10, 30), 2, np.array([-1, 0.5, 1.25, 2, 7]))
    assert got.ravel().tolist() == [0, 5, 15, 30, 30]


def test_slanting_moves_each_row_by_its_distance_from_the_middle() -> None:
    page = np.tile(np.array([0, 10, 20, 30, 40], np.float32), (3, 1))[None, None]
    got = slanted(page, 3, 0.5)
    assert got[0, 0].tolist() == [[0, 5, 15, 25, 35], [0, 10, 20, 30, 40], [5, 15, 25, 35, 40]]


def test_each_axis_is_turned_round_now_and_then_and_channels_never() -> None:
    page = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)
    rng = np.random.default_rng(0)
    found = {reversed_at_times(page, rng).tobytes() for _ in range(200)}
    flips = [page, page[:, :, ::-1], page[..., ::-1], page[:, :, ::-1, ::-1]]
    assert found == {np.ascontiguousarray(f).tobytes() for f in flips}


def test_padding_is_what_holds_one_number_to_the_end() -> None:
    page = np.zeros((1, 2, 3, 5), np.float32)
    page[0, 1, 2, 1] = 1
    assert used(page, 3) == 2 and used(page, 2) == 3
    assert used(np.zeros((1, 1, 4), "f"), 2) == 4  # nothing else: the whole
    assert used(line(0, 1, 2), 2) == 3  # any last value is one number all over
    assert used(line(0, 1, *[2] * 100), 2) == 2 and used(line(*range(98), 2, 2, 2), 2) == 101


def test_a_close_look_shows_a_part_and_nothing_new() -> None:
    rng = np.random.default_rng(0)
    ramp = np.arange(100, dtype=np.float32)[None, None]
    spans = []
    for _ in range(200):
        seen = looked_at(ramp, rng).ravel()
        assert seen.shape == (100,) and (np.diff(seen) >= -1e-4).all()
        assert seen.min() >= 0 and seen.max() <= 99
        spans.append(float(seen[-1] - seen[0]))
    assert min(spans) < 40 and max(spans) > 95


def test_pieces_come_from_all_samples_and_padding_only_at_the_end() -> None:
    rng = np.random.default_rng(0)
    pool = [np.full((1, 1, 4, 60), k, np.float32) for k in (1, 2, 3)]
    for sample in pool:
        sample[..., 0, :] += 0.25  # not one number all over
        sample[..., 50:] = 0
    lengths, kinds = [], set()
    for _ in range(60):
        new = pieced(pool[0], pool, (0.0, 4.0), rng)
        assert new.shape == (1, 1, 4, 60)
        live = new[0, 0].any(axis=0)
        lengths.append(int(live.sum()))
        assert live[: lengths[-1]].all()  # no padding in between
        kinds |= set(np.round(new[0, 0, -1, : lengths[-1]]).astype(int).tolist())
    assert {1, 2, 3} <= kinds
    assert min(lengths) < 50 and max(lengths) > 55
    whole = [sample[..., :50] for sample in pool]
    assert all(used(pieced(whole[0], whole, (0.0, 4.0), rng), 3) >= 47 for _ in range(20))


@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (1, 1, 50), (1, 2, 4, 5, 6), (1, 3, 1, 2)])
def test_remade_samples_have_the_shape_and_the_range(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    pool = [rng.uniform(-2, 3, shape).astype(np.float32) for _ in range(4)]
    for k in range(50):
        new = remade(pool[k % 4], pool, (-2.0, 3.0), rng)
        assert new.shape == shape and new.dtype == np.float32 and np.isfinite(new).all()
        assert new.min() >= -2 and new.max() <= 3


def test_shading_is_affine() -> None:
    value = np.random.default_rng(0).normal(size=(1, 2, 30))
    new = shaded(value, np.random.default_rng(3))
    slope, shift = np.polyfit(value.ravel(), new.ravel(), 1)
    assert 0.6 <= slope <= 1.3
    np.testing.assert_allclose(new, slope * value + shift, atol=1e-12)
