"""What users get wrong: one message that names the place, the right exit code, no leftovers."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import RECIPE, Ran, tiny_model

Edgewright = Callable[..., Ran]


def build(edgewright: Edgewright, recipe: Path, *words: object, **more: object) -> Ran:
    """Build for cpu into `out` beside the recipe."""
    out = recipe.parent / "out"
    return edgewright("build", recipe, "--target", "cpu", "--out", out, *words, **more)


def assert_refused(ran: Ran, code: int, *texts: str) -> None:
    """One line on standard error with all the texts."""
    assert ran.code == code, ran.err
    errors = [line for line in ran.err.splitlines() if line.startswith("edgewright:")]
    assert len(errors) == 1, ran.err
    for text in texts:
        assert text in errors[0]


@pytest.mark.parametrize(
    "words",
    [
        ("buidl",),
        ("build",),
        ("build", "recipe.toml"),
        ("build", "recipe.toml", "--target", "cpu", "--fast"),
        ("quantize", "model.onnx"),
        # Options that would say nothing here.
        ("verify", "x.bundle.tar", "--target", "arm"),
        ("self-test", "--root", ".", "--target", "arm"),
    ],
)
def test_usage(edgewright, words):
    ran = edgewright(*words)
    assert ran.code == 2
    assert ran.err.count("\n") == 1


def test_unknown_target(edgewright, tiny):
    assert_refused(edgewright("build", tiny, "--target", "amr"), 2, "amr", "did you mean 'arm'")


@pytest.mark.parametrize(
    ("old", "new", "texts"),
    [
        ("[gate]", "[gat]", ["unknown key 'gat'", "did you mean 'gate'"]),
        ("min_retained", "min_retaned", ["min_retaned", "min_retained"]),
        ("min_retained = 0.9", "min_retained = 1e999", ["min_retained", "inf"]),
        ("min_retained = 0.9", 'min_retained = "high"', ["min_retained", "number"]),
        ("min_retained = 0.9", "min_retained = -1", ["min_retained"]),
        ('name = "tiny"', 'name = "../tiny"', ["model.name"]),
        ('name = "tiny"', 'name = "tiny"\nname = "twice"', ["not valid TOML"]),
        ('source = "model.onnx"', 'source = "absent.onnx"', ["absent.onnx", "not found"]),
        ('"calibration.npz"', '"absent.npz"', ["absent.npz", "not found"]),
        ('"evaluation.npz"', '"absent.npz"', ["absent.npz", "not found"]),
        ('"score.py:score"', '"score.py:scores"', ["scores", "score.py"]),
        ("[model.inputs.x]", "[model.inputs.y]", ["model.inputs.y"]),
        ("[gate]", "[prune]\n[gate]", ["prune"]),
    ],
)
def test_recipe(edgewright, tiny, old, new, texts):
    tiny.write_text(RECIPE.replace(old, new))
    assert_refused(build(edgewright, tiny), 3, *texts)
    assert not list(tiny.parent.glob("out/cpu/*.tar"))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (tiny_model().SerializeToString()[:9000], "model.onnx"),
        (os.urandom(4096), "model.onnx"),
    ],
)
def test_model_file(edgewright, tiny, content, text):
    tiny.with_name("model.onnx").write_bytes(content)
    assert_refused(build(edgewright, tiny), 3, text)
    inspected = edgewright("inspect", tiny.with_name("model.onnx"))
    assert_refused(inspected, 3, text)


def test_a_result_that_cannot_be_written_is_refused_before_the_work(edgewright, tiny):
    tiny.with_name("calibration.npz").unlink()  # would be told first, had the work begun
    tiny.with_name("folder").mkdir()
    for name, text in (("folder", "found a folder"), ("score.py/x.onnx", "can be written")):
        words = (tiny.with_name("model.onnx"), "--recipe", tiny, "-o", tiny.parent / name)
        assert_refused(edgewright("quantize", *words), 2, "-o ", name, text)


@pytest.mark.parametrize("name", ["model.onnx", "calibration.npz", "evaluation.npz"])
def test_a_fifo_is_refused_and_nothing_hangs(edgewright, tiny, name):
    path = tiny.with_name(name)
    path.unlink()
    os.mkfifo(path)
    assert_refused(build(edgewright, tiny, timeout=60), 3, name)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({}, "calibration"),
        ({"y": np.zeros((4, 1, 12, 12), np.float32)}, "'y'"),
        ({"x": np.zeros((4, 1, 12), np.float32)}, "sample 0"),
        ({"x": np.zeros((0, 1, 12, 12), np.float32)}, "no samples"),
        ({"x": np.full((4, 1, 12, 12), np.nan, np.float32)}, "sample 0"),
    ],
)
def test_calibration_data(edgewright, tiny, arrays, text):
    np.savez(tiny.with_name("calibration.npz"), **arrays)
    assert_refused(build(edgewright, tiny), 3, text)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return float('nan')", "finite"),
        ("return 'good'", "a number"),
        ("return run({'z': data['x'][:1]})[0]", "z"),
        ("raise ValueError('my own words')", "my own words"),
        ("import os; os._exit(7)", "status 7"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
    ],
)
def test_metric(edgewright, tiny, body, text):
    tiny.with_name("score.py").write_text(f"def score(run, data):\n    {body}\n")
    tiny.write_text(RECIPE.replace('per_sample = "score.py:per_sample"\n', ""))
    assert_refused(build(edgewright, tiny), 3, text)


def test_prints_of_user_code_do_not_reach_the_results(edgewright, tiny):
    score = tiny.with_name("score.py")
    score.write_text("print('hello')\n" + score.read_text())
    ran = build(edgewright, tiny, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["exit_code"] == 0


def test_a_missing_instruction_set_is_told_before_any_work(edgewright, tiny):
    profile = tiny.with_name("mine.toml")
    profile.write_text('name = "mine"\ndescription = "x"\n[device]\narch = "aarch64"\n')
    ran = edgewright("build", tiny, "--target", profile, "--out", tiny.parent / "out")
    assert_refused(ran, 6, "aarch64")
    assert not (tiny.parent / "out").exists()


def test_an_unsafe_cache_folder_is_refused(edgewright, tiny):
    cache = tiny.parent / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    ran = build(edgewright, tiny, env={"EDGEWRIGHT_CACHE": str(cache)})
    assert_refused(ran, 6, str(cache), "--no-cache")
    assert not list(cache.iterdir())


def test_a_new_cache_folder_is_private(edgewright, tmp_path):
    cache = tmp_path / "deep" / "cache"
    ran = edgewright("cache", "show", env={"EDGEWRIGHT_CACHE": str(cache)}, umask=0)
    assert ran.code == 0
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("SOURCE_DATE_EPOCH", "yesterday", 2),
        ("SOURCE_DATE_EPOCH", "-1", 2),
        ("EDGEWRIGHT_CACHE_MAX_BYTES", "much", 2),
    ],
)
def test_environment_variables(edgewright, tiny, name, value, code):
    assert_refused(build(edgewright, tiny, env={name: value}), code, name)


def test_a_stage_that_takes_too_long_is_stopped(edgewright, tiny):
    tiny.with_name("score.py").write_text("def score(run, data):\n    while True: pass\n")
    tiny.write_text(RECIPE.replace('per_sample = "score.py:per_sample"\n', ""))
    ran = build(edgewright, tiny, env={"EDGEWRIGHT_STAGE_TIMEOUT_S": "4"}, timeout=60)
    assert_refused(ran, 3, "took more than 4 s")
