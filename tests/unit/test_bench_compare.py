"""bench/compare.py: two versions of the code in turns; what is slower is told, with its ratio."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
SPIN = "\nfor _ in range(8_000_000):\n    pass\n"

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits of this very package, and a working tree whose start takes longer.

    The first commit has no `measure` and no command line.
    """
    root = tmp_path_factory.mktemp("repository")
    git(root, "init", "-q")
    (root / "targets").mkdir()
    (root / "targets" / "none.toml").write_text("")
    package = root / "pipeline" / "edgewright"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(root, "add", ".")
    git(root, "commit", "-qm", "too old")
    for name in ("pipeline", "targets"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, root / name, dirs_exist_ok=True, ignore=ignored)
    git(root, "add", ".")
    git(root, "commit", "-qm", "as it is")
    errors = package / "errors.py"
    errors.write_text(errors.read_text() + SPIN)
    return root


def compare(root: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCH / "compare.py", *words, "--root", root]
    texts = [str(word) for word in command]
    return subprocess.run(texts, capture_output=True, text=True, check=False)


def test_a_start_that_takes_longer_is_found(repository, tmp_path):
    stored = tmp_path / "found.json"
    ran = compare(repository, "HEAD", "start", "--launches", 1, "--rounds", 6, "--json", stored)
    assert ran.returncode == 1, ran.stderr
    assert "slower" in ran.stdout
    found = json.loads(stored.read_text())
    assert found["old"] == git(repository, "rev-parse", "HEAD")
    (row,) = found["pieces"]
    # The loop takes more CPU time than the whole start did: whatever else the machine does.
    assert row["low"] > 1.02 and row["ratio"] > 1.3
    assert [len(launch) for launch in row["raw"]] == [6]
    assert not git(repository, "worktree", "list").splitlines()[1:]


def test_a_version_that_lacks_what_a_piece_needs_is_told(repository):
    ran = compare(repository, "HEAD~1", "runner", "start", "--launches", 1, "--rounds", 1)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[1].startswith("runner") and "not compared: old: ModuleNotFoundError" in lines[1]
    assert lines[2].startswith("start") and "not compared: old: " in lines[2]


def test_what_cannot_be_compared_is_a_usage_error(repository):
    assert "no commit no-such" in compare(repository, "no-such").stderr
    ran = compare(repository, "HEAD", "strat")
    assert (ran.returncode, "unknown piece strat" in ran.stderr) == (2, True)


@pytest.mark.parametrize("piece", ["bundle", "calibration", "runner"])
def test_a_piece_tells_its_times(piece):
    command = [sys.executable, str(BENCH / "pieces.py"), piece]
    ran = subprocess.run(command, input="go\n", capture_output=True, text=True, check=True)
    ready, line = ran.stdout.splitlines()
    assert ready == "ready"
    times = json.loads(line)
    assert min(times["cpu_s"], times["wall_s"]) > 0
