"""Inputs made of other inputs."""

import numpy as np

from edgewright.recipe import FEW
from edgewright.recover import variants
from edgewright.recover.variants import Grown, make_pool, with_variants


def pictures(count: int) -> list[dict[str, np.ndarray]]:
    """All numbers of picture k lie between k and k + 0.5."""
    rng = np.random.default_rng(2)
    return [{"x": k + rng.uniform(0, 0.5, (1, 3, 8, 9)).astype("f")} for k in range(count)]


def test_varied_samples_keep_shape_and_range_and_are_the_same_every_time() -> None:
    samples = pictures(6)
    pool, again, other = make_pool(samples, 0), make_pool(samples, 0), make_pool(samples, 1)
    for k in range(12):
        new, old = pool.variant(k)["x"], samples[k % 6]["x"]
        assert new.shape == old.shape and new.dtype == np.float32
        assert np.array_equal(new, again.variant(k)["x"]) and not np.array_equal(new, old)
        assert new.min() >= 0 and new.max() <= 5.5
        assert not np.array_equal(new, other.variant(k)["x"])
    assert not make_pool([{"v": np.ones((1, 7), "f")}], 0).bases  # numbers without places


def test_token_samples_are_joined_the_same_way_in_all_inputs() -> None:
    samples = [
        {"ids": np.arange(100 * k, 100 * k + n)[None], "mask": np.full((1, n), k)}
        for k, n in ((1, 6), (2, 9), (3, 4))
    ]
    pool = make_pool(samples, 0)
    for k in range(9):
        new, old = pool.variant(k), samples[k % 3]
        assert new["ids"].shape == old["ids"].shape
        kinds = new["mask"][0]
        assert np.array_equal(new["ids"][0] // 100, kinds) and kinds[0] == k % 3 + 1
        end = samples[kinds[-1] - 1]["ids"][0, -1]
        assert new["ids"][0, -1] == end  # the end of a sample stays at the end


def test_wild_variants_keep_shape_and_range_and_mix_inputs_alike() -> None:
    samples = pictures(6)
    pool, again = make_pool(samples, 0, wild=True), make_pool(samples, 0, wild=True)
    for k in range(40):
        new = pool.variant(k)["x"]
        assert new.shape == (1, 3, 8, 9) and new.dtype == np.float32
        assert np.array_equal(new, again.variant(k)["x"])
        assert new.min() >= 0 and new.max() <= 5.5
    texts = [{"ids": np.arange(100 * k, 100 * k + n)[None], "mask": np.full((1, n), k)}
             for k, n in ((1, 30), (2, 40), (3, 35))]  # fmt: skip
    pool = make_pool(texts, 0, wild=True)
    kinds = [np.unique(pool.variant(k)["mask"]).size for k in range(12)]
    assert max(kinds) == 3  # more than the two that joining gives
    for k in range(12):
        new = pool.variant(k)
        assert new["ids"].shape == texts[k % 3]["ids"].shape
        assert np.array_equal(new["ids"] // 100, new["mask"])
        assert new["ids"][0, 0] == 100 * (k % 3 + 1)  # the beginning stays at the beginning
        end = texts[new["mask"][0, -1] - 1]["ids"][0, -1]
        assert new["ids"][0, -1] == end


def test_what_cannot_be_varied_is_left_out_and_the_rest_is_not() -> None:
    """A text of one token, and a batch of two, which is no sample."""
    long, short = {"ids": np.arange(8)[None]}, {"ids": np.zeros((1, 1), int)}
    pool = make_pool([long, short, {"ids": np.zeros((2, 8), int)}], 0)
    assert pool.bases == [long] and pool.variant(5)["ids"].shape == (1, 8)


def test_samples_in_even_places_are_made_of_samples_in_even_places() -> None:
    """So that what is fitted on one half can be judged by the other, whatever their number."""
    for count in (6, 7):
        found = list(with_variants(pictures(count), 2))
        assert len(found) == count + 2 * 2 * 3
        kinds = [np.unique(np.floor(f["x"])) for f in found[:count]]
        assert [k.tolist() for k in kinds] == [[k] for k in range(count)]
    # Pieces come from the same half: pictures of two kinds, told apart by their sign.
    signs = [{"x": np.full((1, 1, 4, 4), (-1.0) ** k, "f")} for k in range(7)]
    found = [np.sign(f["x"].mean()) for f in with_variants(signs, 3)]
    assert found == [(-1.0) ** k for k in range(len(found))]


def test_many_or_large_samples_are_not_varied(monkeypatch) -> None:
    many = [{"x": np.zeros((1, 1, 2), "f")} for _ in range(FEW + 1)]
    assert len(list(with_variants(many, 3))) == FEW + 1
    assert len(list(with_variants(many[:-1], 3))) == 4 * FEW
    monkeypatch.setattr(variants, "MEMORY", 4 * 8 - 1)
    assert len(list(with_variants(many[:4], 3))) == 4


def test_samples_some_variants_and_endless_ones_stand_in_one_row() -> None:
    samples = pictures(5)
    some, more = make_pool(samples[:2], 0), make_pool(samples[2:], 0)
    row = Grown(samples, some, 4, more)
    assert row[4] is samples[4]
    assert np.array_equal(row[5 + 3]["x"], some.variant(3)["x"])
    assert np.array_equal(row[5 + 4 + 10**6]["x"], more.variant(10**6)["x"])
