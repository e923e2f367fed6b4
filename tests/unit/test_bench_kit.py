"""bench/kit.py: it runs beside any kit, and does nothing where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RECIPE, write_tiny

ROOT = Path(__file__).resolve().parents[2]

KIT = """\
import json, sys
print(json.dumps({
    "retained_percent": 99.0, "score": 0.99, "fp32_score": 1.0, "cpu_ratio": 0.5,
    "cpu_ratio_95": [0.4, 0.6], "wall_ratio": 0.5, "sqnr_db": [20.0], "peak_rss_mib": {},
    "bytes": {"candidate": 1, "fp32": 4},
}))
"""


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "bench" / "kit.py", *words]
    texts = [str(word) for word in command]
    return subprocess.run(texts, cwd=cwd, capture_output=True, text=True, check=False)


def test_without_a_kit_it_does_nothing(tmp_path):
    ran = run("--kit", tmp_path / "absent", cwd=tmp_path)
    assert ran.returncode == 0
    assert "nothing to do" in ran.stderr


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A kit of one case, whose tool answers without measuring, and whose peer has no result."""
    folder = tmp_path / "kit"
    recipe = write_tiny(folder / "tiny")
    recipe.write_text(RECIPE)
    (folder / "kit.py").write_text(KIT)
    peers = {"cases": {"tiny": [{"peer": "a", "config": "b", "cpu_ratio": None}]}}
    (folder / "peers.json").write_text(json.dumps(peers))
    return folder


def test_a_case_is_built_scored_and_set_beside_its_peers(kit, tmp_path):
    ran = run("--kit", kit, "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    (row,) = json.loads(ran.stdout)
    assert row["case"] == "tiny"
    assert row["verdict"] == "PASS"
    assert row["size_ratio"] == 0.25
    assert row["peak_rss_mib"] > 10
    shown = run("--kit", kit, cwd=tmp_path)
    assert "99.00 % kept @ 0.500" in shown.stdout
    assert "no result" in shown.stdout


def test_an_unknown_case_is_an_error(kit, tmp_path):
    assert run("--kit", kit, "nothing", cwd=tmp_path).returncode == 2
