"""A build that is killed, interrupted or runs out of disk leaves nothing half-written."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from conftest import Ran, command, write_tiny

from edgewright.cache import ENTRY, verified

STAGES = ["export", "simplify", "quantize", "validate", "measure", "gate", "bundle"]
Edgewright = Callable[..., Ran]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, edgewright: Edgewright) -> Path:
    """The recipe, and in `out/cpu` beside it what an undisturbed build makes of it."""
    recipe = write_tiny(tmp_path_factory.mktemp("undisturbed") / "tiny")
    ran = edgewright("build", recipe, "--target", "cpu", "--out", recipe.parent / "out")
    assert ran.code == 0, ran.err
    return recipe


@contextlib.contextmanager
def started(recipe: Path, out: Path, cache: Path) -> Iterator[subprocess.Popen[str]]:
    """A build at work; its processes all carry its `mark` in their environment."""
    mark = uuid.uuid4().hex
    env = {**os.environ, "EDGEWRIGHT_CACHE": str(cache), "TEST_MARK": mark}
    words = command("build", recipe, "--target", "cpu", "--out", out)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Whoever runs the tests in the background has SIGINT ignored, and children inherit that.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(words, env=env, preexec_fn=heed, **pipes) as build:
        try:
            yield build
        finally:
            build.kill()
            build.wait()
    wait_until_gone(mark)


def wait_until_gone(mark: str) -> None:
    """Fail unless every process with the mark ends soon."""
    for _ in range(150):
        left = [p.name for p in Path("/proc").glob("[0-9]*") if carries(p, mark)]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"processes left behind: {left}")


def carries(process: Path, mark: str) -> bool:
    try:
        return f"TEST_MARK={mark}".encode() in (process / "environ").read_bytes()
    except OSError:
        return False


def wait_for(build: subprocess.Popen[str], stage: str) -> str:
    """Read the build's lines until the stage is finished; what it said."""
    said = ""
    assert build.stderr is not None
    for line in build.stderr:
        said += line
        if f" {stage} " in line:
            break
    return said


def assert_whole(out: Path, cache: Path) -> None:
    """Everything that carries its final name is complete."""
    for path in out.rglob("*"):
        if ".work" in path.parts or not path.is_file():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".onnx":
            onnx.checker.check_model(str(path))
    for folder in out.glob("cpu/stages/*"):
        assert (folder / "report.json").exists()
    if (out / "cpu" / "report.json").exists():
        assert list((out / "cpu").glob("*.bundle.tar"))
    for entry in cache.glob(f"??/*/{ENTRY}"):
        verified(entry.parent, entry.parent.name)


def assert_resumes(edgewright: Edgewright, undisturbed: Path, out: Path, cache: Path) -> None:
    """One more build finishes, with the bytes of a build that nobody disturbed."""
    env = {"EDGEWRIGHT_CACHE": str(cache)}
    ran = edgewright("build", undisturbed, "--target", "cpu", "--out", out, env=env)
    assert ran.code == 0, ran.err
    for path in (undisturbed.parent / "out" / "cpu").iterdir():
        if path.suffix in (".onnx", ".tar"):
            assert (out / "cpu" / path.name).read_bytes() == path.read_bytes()
    assert not (out / "cpu" / ".work").exists()
    assert not (out / "cpu" / ".lock").exists()
    assert not list((cache / "tmp").iterdir())


def test_killed_at_any_moment(tmp_path, undisturbed, edgewright):
    out, cache = tmp_path / "out", tmp_path / "cache"
    dice = random.Random(0)
    delays = [dice.uniform(0.1, 6) for _ in range(4)]
    for stage in ["", *STAGES]:
        with started(undisturbed, out, cache) as build:
            if stage:
                wait_for(build, stage)
            time.sleep(delays.pop() if stage == "" and delays else dice.uniform(0, 0.3))
            build.kill()
        if cache.exists():
            assert_whole(out, cache)
    for delay in delays:
        shutil.rmtree(cache)
        with started(undisturbed, out, cache) as build:
            time.sleep(delay)
            build.kill()
        assert_whole(out, cache)
    assert_resumes(edgewright, undisturbed, out, cache)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_interrupted(tmp_path, undisturbed, edgewright, number, code, word):
    out, cache = tmp_path / "out", tmp_path / "cache"
    with started(undisturbed, out, cache) as build:
        wait_for(build, "validate")
        time.sleep(1)
        build.send_signal(number)
        _, said = build.communicate(timeout=30)
    assert build.returncode == code
    assert said.count("\n") == 1
    assert word in said
    assert_whole(out, cache)
    assert not (out / "cpu" / ".work").exists()
    assert not list((cache / "tmp").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("full", ["out", "cache"])
def test_disk_full(tmp_path, small_disk, undisturbed, edgewright, full):
    places = {"out": tmp_path / "out", "cache": tmp_path / "cache", full: small_disk / full}
    env = {"EDGEWRIGHT_CACHE": str(places["cache"])}
    words = ("build", undisturbed, "--target", "cpu", "--out", places["out"])
    ran = edgewright(*words, env=env)
    assert ran.code == 6, ran.err
    assert "no space left" in ran.err
    assert_whole(places["out"], places["cache"])
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert_resumes(edgewright, undisturbed, places["out"], places["cache"])


def test_file_size_limit(tmp_path, undisturbed, edgewright):
    out, cache = tmp_path / "out", tmp_path / "cache"
    env = {"EDGEWRIGHT_CACHE": str(cache)}
    words = ("build", undisturbed, "--target", "cpu", "--out", out)
    size = 40_000  # bytes; the model has more
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    ran = edgewright(*words, env=env, preexec_fn=limit)
    assert ran.code == 6, ran.err
    assert "no space left" in ran.err
    assert_whole(out, cache)
    assert_resumes(edgewright, undisturbed, out, cache)


def test_a_folder_that_cannot_be_written(tmp_path, undisturbed, edgewright):
    out = tmp_path / "file"
    out.write_text("")
    ran = edgewright("build", undisturbed, "--target", "cpu", "--out", out)
    assert ran.code in (3, 6)
    assert str(out) in ran.err
    assert ran.err.count("\n") == 1
