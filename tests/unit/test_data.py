"""Calibration data: every source, every rule, every refusal."""

import os
import wave
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgewright.data import InputSpec, file_digest, load_module, samples, source_digest
from edgewright.errors import BadInput
from edgewright.recipe import Recipe, parse_recipe

X = InputSpec("x", np.dtype(np.float32), (None, 4))


def recipe(folder: Path, calibration: str = "c.npz", **data: Any) -> Recipe:
    raw = {
        "model": {"name": "m", "version": "1", "source": "m.onnx"},
        "data": {"calibration": calibration, **data},
    }
    return parse_recipe(raw, folder)


def read(folder: Path, specs: list[InputSpec] | None = None, **options: Any) -> list[dict]:
    limit = options.pop("limit", 0)
    return list(samples(recipe(folder, **options), specs or [X], limit))


def refusal(folder: Path, specs: list[InputSpec] | None = None, **options: Any) -> str:
    with pytest.raises(BadInput) as caught:
        read(folder, specs, **options)
    message = str(caught.value)
    assert caught.value.exit_code == 3 and "\n" not in message
    return message


def store(folder: Path, **arrays: Any) -> None:
    np.savez(folder / "c.npz", **arrays)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# --- .npz -------------------------------------------------------------------------------------


def test_first_axis_counts_samples_and_a_missing_batch_axis_is_added(tmp_path: Path) -> None:
    values = normal(5, 4)
    store(tmp_path, x=values)
    feeds = read(tmp_path)
    assert [f["x"].shape for f in feeds] == [(1, 4)] * 5
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in feeds]), values)


def test_a_sample_of_full_rank_is_fed_as_it_is(tmp_path: Path) -> None:
    store(tmp_path, x=normal(5, 3, 4))
    assert [f["x"].shape for f in read(tmp_path)] == [(3, 4)] * 5


def test_scalars_and_states(tmp_path: Path) -> None:
    specs = [
        X,
        InputSpec("state", np.dtype(np.float32), (2, None, 8)),
        InputSpec("rate", np.dtype(np.int64), ()),
    ]
    store(tmp_path, x=normal(3, 4), state=normal(3, 2, 1, 8), rate=np.array([7, 8, 9]))
    feeds = read(tmp_path, specs)
    assert [int(f["rate"]) for f in feeds] == [7, 8, 9]
    assert feeds[0]["state"].shape == (2, 1, 8) and feeds[0]["rate"].shape == ()


def test_varying_lengths(tmp_path: Path) -> None:
    spec = InputSpec("ids", np.dtype(np.int64), (None, None))
    parts = {f"ids__{k:03d}": np.arange(k + 1) for k in range(12)}
    store(tmp_path, **parts)
    assert [f["ids"].shape for f in read(tmp_path, [spec])] == [(1, k + 1) for k in range(12)]


def test_numbered_parts_are_ordered_by_number(tmp_path: Path) -> None:
    parts = {f"x__{k}": np.full(4, k, np.float32) for k in (999, 1000, 1001, 2)}
    store(tmp_path, **parts)
    assert [f["x"][0, 0] for f in read(tmp_path)] == [2, 999, 1000, 1001]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_streaming_equals_loading(tmp_path: Path, save: Any) -> None:
    a, b = normal(7, 6, 4), np.asfortranarray(normal(7, 4))
    specs = [InputSpec("a", np.dtype(np.float32), (None, 4)), InputSpec("b", a.dtype, (None, 4))]
    save(tmp_path / "c.npz", a=a, b=b)
    loaded = np.load(tmp_path / "c.npz")
    feeds = read(tmp_path, specs)
    np.testing.assert_array_equal(np.stack([f["a"] for f in feeds]), loaded["a"])
    np.testing.assert_array_equal(np.concatenate([f["b"] for f in feeds]), loaded["b"])


def test_lzma_archives_as_the_measuring_kit_has_them(tmp_path: Path) -> None:
    values = normal(4, 4)
    np.save(tmp_path / "x.npy", values)
    with zipfile.ZipFile(tmp_path / "c.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.write(tmp_path / "x.npy", "x.npy")
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in read(tmp_path)]), values)


def test_only_the_current_sample_is_in_memory(tmp_path: Path) -> None:
    """64 MiB of zeros, packed small, read one row of 64 KiB at a time."""
    import tracemalloc

    spec = InputSpec("x", np.dtype(np.float32), (None, 1 << 14))
    np.savez_compressed(tmp_path / "c.npz", x=np.ones((1 << 10, 1 << 14), np.float32))
    stream = samples(recipe(tmp_path), [spec])
    next(stream)
    tracemalloc.start()
    for _ in stream:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_limit(tmp_path: Path) -> None:
    store(tmp_path, x=normal(9, 4))
    assert len(read(tmp_path, limit=4)) == 4
    assert len(read(tmp_path, limit=100)) == 9


def test_safe_casts(tmp_path: Path) -> None:
    store(tmp_path, x=np.arange(8, dtype=np.float64).reshape(2, 4))
    assert read(tmp_path)[0]["x"].dtype == np.float32
    store(tmp_path, x=np.arange(8, dtype=">f4").reshape(2, 4))
    np.testing.assert_array_equal(read(tmp_path)[1]["x"][0], [4, 5, 6, 7])
    spec = InputSpec("x", np.dtype(np.int32), (None, 4))
    store(tmp_path, x=np.arange(8, dtype=np.int64).reshape(2, 4))
    assert read(tmp_path, [spec])[0]["x"].dtype == np.int32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nonfinite_sample_is_named_by_its_index(tmp_path: Path, bad: float) -> None:
    values = normal(6, 4)
    values[4, 2] = bad
    store(tmp_path, x=values)
    message = refusal(tmp_path)
    assert "calibration sample 4, input 'x'" in message
    assert ("NaN" if np.isnan(bad) else "Inf") in message


I32 = InputSpec("x", np.dtype(np.int32), (None, 4))


@pytest.mark.parametrize(
    ("arrays", "specs", "words"),
    [
        ({"y": normal(2, 4)}, None, "'y', which is no input"),
        ({"x": normal(2, 4), "xx": normal(2, 4)}, None, "did you mean 'x'?"),
        ({}, None, "lacks input 'x'"),
        ({"x": normal(2, 5)}, None, "expected shape ['any', 4]; found shape [1, 5]"),
        ({"x": normal(2, 1, 1, 4)}, None, "found shape [1, 1, 4]"),
        ({"x": np.float32(3)}, None, "a single number"),
        ({"x": normal(0, 4)}, None, "no samples"),
        ({"x": normal(2, 0, 4)}, None, "an empty array"),
        ({"x": np.array([["a"] * 4])}, None, "expected float32"),
        ({"x": np.array([[None] * 4])}, None, "pickled Python objects"),
        ({"x": normal(2, 4)}, [I32], "expected int32; found float32"),
        ({"x": np.full((1, 4), 1 << 40)}, [I32], "values that fit int32"),
        ({"x": normal(2, 4), "z": normal(3, 4)}, [X, InputSpec("z", X.dtype, (None, 4))], "same"),
        ({"x__000": normal(4), "x__001": normal(5)}, None, "sample 1"),
    ],
)
def test_npz_refusals(
    tmp_path: Path, arrays: dict[str, Any], specs: list[InputSpec] | None, words: str
) -> None:
    store(tmp_path, **arrays)
    assert words in refusal(tmp_path, specs)


def test_damaged_archives(tmp_path: Path) -> None:
    (tmp_path / "c.npz").write_bytes(b"not a zip archive")
    assert "cannot be read" in refusal(tmp_path)
    np.savez_compressed(tmp_path / "c.npz", x=normal(200, 4))
    data = bytearray((tmp_path / "c.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "c.npz").write_bytes(data)
    assert "'x' in" in refusal(tmp_path)


def test_an_array_that_ends_early(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", normal(9, 4))
    whole = (tmp_path / "x.npy").read_bytes()
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("x.npy", whole[:-20])
    assert "truncated" in refusal(tmp_path)


def test_sources_that_are_none(tmp_path: Path) -> None:
    assert "not found" in refusal(tmp_path)
    (tmp_path / "c.csv").write_text("1,2")
    assert "'.csv'" in refusal(tmp_path, calibration="c.csv")
    (tmp_path / "empty").mkdir()
    assert "no samples" in refusal(tmp_path, calibration="empty")


# --- folders ----------------------------------------------------------------------------------


def pictures(folder: Path) -> Path:
    home = folder / "pictures"
    home.mkdir()
    for k, name in enumerate(("b.png", "a.png")):
        pixels = np.full((6, 8, 3), (0, 128, 255), np.uint8)
        pixels[..., 0] = k
        Image.fromarray(pixels).save(home / name)
    return home


def test_folder_of_pictures(tmp_path: Path) -> None:
    pictures(tmp_path)
    spec = InputSpec("x", np.dtype(np.float32), (None, 3, 6, 8))
    first, second = read(
        tmp_path, [spec], calibration="pictures", mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.5]
    )
    assert first["x"].shape == (1, 3, 6, 8) and first["x"].dtype == np.float32
    # in the order of the names: a.png, whose red is 1, comes first
    expected = (np.array([1, 128, 255]) / 255 - 0.5) / [0.25, 0.25, 0.5]
    np.testing.assert_allclose(first["x"][0, :, 0, 0], expected, atol=1e-6)
    assert second["x"][0, 0, 0, 0] == -2.0


def test_pictures_are_resized_and_channels_may_come_last(tmp_path: Path) -> None:
    pictures(tmp_path)
    spec = InputSpec("x", np.dtype(np.uint8), (1, 12, 16, 3))
    feed = read(tmp_path, [spec], calibration="pictures")[0]
    assert feed["x"].shape == (1, 12, 16, 3) and feed["x"].dtype == np.uint8
    assert feed["x"][0, 5, 5].tolist() == [1, 128, 255]


def test_grey_pictures(tmp_path: Path) -> None:
    pictures(tmp_path)
    spec = InputSpec("x", np.dtype(np.float32), (None, 1, 6, 8))
    feed = read(tmp_path, [spec], calibration="pictures")[0]
    assert feed["x"].shape == (1, 1, 6, 8) and 0 < feed["x"].mean() < 1


def test_folder_of_arrays_and_sounds(tmp_path: Path) -> None:
    home = tmp_path / "mixed"
    home.mkdir()
    np.save(home / "a.npy", normal(4))
    with wave.open(str(home / "b.wav"), "wb") as file:
        file.setparams((2, 2, 16000, 0, "NONE", ""))
        file.writeframes(np.array([[16384, 0], [-32768, -32768]] * 2, "<i2").tobytes())
    first, second = read(tmp_path, calibration="mixed")
    np.testing.assert_array_equal(first["x"][0], normal(4))
    np.testing.assert_array_equal(second["x"][0], [0.25, -1, 0.25, -1])


def test_folder_refusals(tmp_path: Path) -> None:
    home = pictures(tmp_path)
    spec = InputSpec("x", np.dtype(np.float32), (None, 3, 6, 8))
    two = [spec, InputSpec("y", spec.dtype, (None, 4))]
    assert "2 inputs: x, y" in refusal(tmp_path, two, calibration="pictures")
    assert "takes no pictures" in refusal(tmp_path, calibration="pictures")
    (home / "c.png").write_bytes(b"\x89PNG broken")
    assert "c.png is not a readable picture" in refusal(tmp_path, [spec], calibration="pictures")
    (home / "c.png").rename(home / "c.txt")
    message = refusal(tmp_path, [spec], calibration="pictures")
    assert "c.txt" in message and "skipped silently" in message
    (home / "c.txt").unlink()
    np.save(home / "d.npy", np.array([None]), allow_pickle=True)
    assert "d.npy cannot be read" in refusal(tmp_path, [spec], calibration="pictures")
    (home / "d.npy").write_bytes(b"")
    assert "d.npy cannot be read" in refusal(tmp_path, [spec], calibration="pictures")


def test_a_picture_that_unpacks_to_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    spec = InputSpec("x", np.dtype(np.float32), (None, 3, 6, 8))
    assert "not a readable picture" in refusal(tmp_path, [spec], calibration="pictures")


# --- functions --------------------------------------------------------------------------------


def source(folder: Path, code: str) -> None:
    (folder / "d.py").write_text("import numpy as np\n" + code)


def test_function_source(tmp_path: Path) -> None:
    source(
        tmp_path,
        "def feeds():\n"
        "    for k in range(3):\n"
        "        yield {'x': np.full((1, 4), k, np.float32)}\n",
    )
    assert [f["x"][0, 0] for f in read(tmp_path, calibration="d.py:feeds")] == [0, 1, 2]


def test_function_may_import_files_beside_it_even_late(tmp_path: Path) -> None:
    (tmp_path / "beside_it_late.py").write_text("VALUE = 5.0\n")
    source(
        tmp_path,
        "def feeds():\n"
        "    from beside_it_late import VALUE\n"
        "    yield {'x': np.full((1, 4), VALUE, np.float32)}\n",
    )
    assert read(tmp_path, calibration="d.py:feeds")[0]["x"][0, 0] == 5


def test_module_with_dataclasses(tmp_path: Path) -> None:
    (tmp_path / "d.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Size:\n    width: int = 4\n"
    )
    assert load_module(tmp_path / "d.py", "data.calibration").Size().width == 4


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def feeds():\n    yield {'x': np.zeros(4)}\n    raise KeyError('k')", "line 4"),
        ("def feeds():\n    return 1 / 0", "ZeroDivisionError"),
        ("def feeds():\n    return [np.zeros(4)]", "expected a dict"),
        ("def feeds():\n    return []", "no samples"),
        ("def feeds():\n    return None", "found NoneType"),
        ("def other():\n    pass", "no function 'feeds'"),
        ("raise RuntimeError('at import')", "RuntimeError: at import"),
        ("def feeds(:\n", "SyntaxError"),
        ("def feeds():\n    yield {'y': np.zeros(4)}", "'y', which is no input"),
        ("def feeds():\n    yield {}", "input 'x' is missing"),
    ],
)
def test_function_refusals(tmp_path: Path, code: str, words: str) -> None:
    source(tmp_path, code)
    assert words in refusal(tmp_path, calibration="d.py:feeds")


def test_function_file_missing(tmp_path: Path) -> None:
    assert "not found" in refusal(tmp_path, calibration="none.py:feeds")


# --- digests ----------------------------------------------------------------------------------


def test_digests_follow_the_content(tmp_path: Path) -> None:
    store(tmp_path, x=normal(2, 4))
    settings = recipe(tmp_path)
    first = source_digest(settings, "c.npz")
    os.utime(tmp_path / "c.npz", (1, 1))
    assert source_digest(settings, "c.npz") == first == file_digest(tmp_path / "c.npz")
    store(tmp_path, x=normal(3, 4))
    assert source_digest(settings, "c.npz") != first


def test_digest_of_code_sees_the_files_beside_it(tmp_path: Path) -> None:
    source(tmp_path, "def feeds():\n    yield {}")
    settings = recipe(tmp_path)
    first = source_digest(settings, "d.py:feeds")
    (tmp_path / "helper.py").write_text("VALUE = 1\n")
    second = source_digest(settings, "d.py:feeds")
    (tmp_path / "helper.py").write_text("VALUE = 2\n")
    assert len({first, second, source_digest(settings, "d.py:feeds")}) == 3
