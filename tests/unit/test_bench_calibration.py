"""bench/calibration.py: every figure is there and of the right size, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench" / "calibration.py"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_figures_of_a_tiny_model(tiny: Path) -> None:
    ran = run(tiny.parent, "--samples", 4, "--memory", 3, "--rounds", 1, "--json")
    (row,) = json.loads(ran.stdout)
    assert len(row["speed"]) == 7
    assert len({run["tensors"] for runs in row["speed"].values() for run in runs}) == 1
    assert all(run["cpu_s"] > 0 for runs in row["speed"].values() for run in runs)
    bare = row["bare"]["onnxruntime"]["peak_bytes"]
    assert 20e6 < bare < row["memory"]["3"]["peak_bytes"] < 1e9
    assert row["memory"]["3"]["helper_peak_bytes"] == []  # nothing to share out


def test_a_folder_without_a_recipe_is_told(tmp_path: Path) -> None:
    assert "nothing to do" in run(tmp_path).stderr
