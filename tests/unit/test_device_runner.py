"""The C runner for one bundle: it checks what the bundle holds, and refuses what it cannot run.

Skipped where there is no C compiler.
"""

import json
import platform
import subprocess
from pathlib import Path

import bundles
import numpy as np
import pytest

from edgewright.device.verify import extract
from edgewright.errors import EnvironmentMissing
from edgewright.runtime import toolchain


@pytest.fixture
def unpacked(tmp_path: Path, edgewright) -> Path:
    """A bundle of a small model, unpacked, with the runner beside it."""
    try:
        toolchain.runner(platform.machine())
    except EnvironmentMissing as error:
        pytest.skip(str(error))
    bundle = bundles.make(tmp_path / "make")
    done = edgewright("device-runner", bundle, "-o", tmp_path / "bin")
    assert done.code == 0, done.err
    extract(bundle, tmp_path / "release")
    return tmp_path / "release"


def prove(release: Path) -> subprocess.CompletedProcess[str]:
    words = ["../bin/edge-run", "@../bin/edge-run.options", "--runs", "5", "--library"]
    words.append(str(toolchain.host_library()))
    return subprocess.run(words, cwd=release, capture_output=True, text=True, check=False)


def test_golden_vectors_are_proven_without_python(unpacked):
    ran = prove(unpacked)
    status = json.loads(ran.stdout)
    assert ran.returncode == 0, ran.stderr
    assert status["checked"]["outputs"] == 5 and status["checked"]["faults"] == 0
    assert len(status["wall_ns"]) == 5


def test_another_answer_is_a_failure(unpacked):
    """The tolerance of the manifest is 0.1 % of the largest value: twice that is too much."""
    golden = dict(np.load(unpacked / "model/golden/out.npz"))
    top = max(float(np.abs(a).max()) for a in golden.values())
    for share, code in ((0.0005, 0), (0.002, 1)):
        changed = {k: v + np.float32(share * top) for k, v in golden.items()}
        np.savez(unpacked / "model/golden/out.npz", **changed)
        ran = prove(unpacked)
        assert ran.returncode == code, ran.stderr


def test_a_bundle_for_another_provider_is_refused(tmp_path, edgewright):
    bundle = bundles.make(tmp_path / "make")

    def edit(manifest):
        manifest["runtime"]["provider"] = "CUDAExecutionProvider"

    (tmp_path / "gpu.tar").write_bytes(bundles.forged(bundle, edit))
    done = edgewright("device-runner", tmp_path / "gpu.tar", "-o", tmp_path / "bin")
    assert done.code == 3
    assert "all the C runner has" in done.err
    assert not (tmp_path / "bin").exists()
