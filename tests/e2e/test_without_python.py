"""A recipe that wants the C runner in its bundle: built, signed, installed, rebuilt, refused."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RECIPE, write_tiny

from edgewright.runtime import toolchain

HERE = platform.machine()
GCC = toolchain.compiler(HERE)
# No clock decides what becomes int8: builds of this recipe are alike.
WANTED = RECIPE + '\n[quantize]\nmeasure = false\n\n[release]\nlicense = "MIT"\nrunner = true\n'
pytestmark = pytest.mark.skipif(GCC is None, reason="no C compiler")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("runner") / "tiny", WANTED)


@pytest.fixture(scope="module")
def bundle(recipe, edgewright) -> Path:
    pytest.importorskip("cryptography")
    key, out = recipe.parent / "key", recipe.parent / "out"
    assert edgewright("keygen", "-o", key).code == 0
    ran = edgewright("build", recipe, "--target", "cpu", "--out", out, "--sign", key)
    assert ran.code == 0, ran.err
    return next((out / "cpu").glob("*.bundle.tar"))


def test_signed_installed_by_the_device_program_and_proven(bundle, recipe, edgewright, tmp_path):
    public, device = recipe.parent / "key.pub", tmp_path / "edgewright-device.pyz"
    assert edgewright("device-program", "-o", device).code == 0
    root = tmp_path / "root"
    words = ["install", bundle, "--root", root, "--trust", public]
    subprocess.run([sys.executable, "-I", device, *words, "--no-self-test"], check=True)
    words = ["bin/edge-run", "@bin/edge-run.options", "--library", toolchain.host_library()]
    subprocess.run(words, cwd=root / "current", check=True)
    data = bytearray(bundle.read_bytes())
    data[data.index(b"\x7fELF") + 5000] ^= 1
    (tmp_path / "bad.tar").write_bytes(data)
    ran = edgewright("verify", tmp_path / "bad.tar", "--trust", public)
    assert ran.code == 5 and "bin/edge-run in the bundle is not what" in ran.err


def test_a_delta_keeps_the_program_a_program(bundle, recipe, edgewright, tmp_path):
    """From the release without it, and to it."""
    old = write_tiny(tmp_path / "tiny", WANTED.replace("runner = true\n", ""))
    ran = edgewright("build", old, "--target", "cpu", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    before = next((tmp_path / "out" / "cpu").glob("*.bundle.tar"))
    root, step = tmp_path / "root", tmp_path / "step.delta"
    install = ("install", "--root", root, "--allow-unsigned", "--no-self-test")
    assert edgewright(*install, before).code == 0
    assert not (root / "current/bin").exists()
    assert edgewright("delta", before, bundle, "-o", step).code == 0
    ran = edgewright(*install, "--delta", step)
    assert ran.code == 0, ran.err
    assert os.access(root / "current/bin/edge-run", os.X_OK)


def test_rebuilt_bit_for_bit_or_the_compiler_is_named(bundle, recipe, edgewright, tmp_path):
    shutil.copytree(recipe.parent, tmp_path / "copied", ignore=shutil.ignore_patterns("out"))
    words = ("verify", bundle, "--rebuild", tmp_path / "copied" / "recipe.toml")
    ran = edgewright(*words)
    assert (ran.code, ran.out[:10]) == (0, "identical:"), ran.out + ran.err
    (tmp_path / "bin").mkdir()
    other = tmp_path / "bin" / "gcc"
    other.write_text(f'#!/bin/sh\nexec {GCC} "$@" -O1\n')
    other.chmod(0o755)
    path = {"PATH": f"{other.parent}:{os.environ['PATH']}"}
    ran = edgewright(*words, "--json", env=path)
    assert ran.code == 5, ran.err
    differs = {row["name"] for row in ran.json["files"]}
    assert differs == {"bin/edge-run", "provenance.intoto.json", "sbom.cdx.json"}
    assert [row["name"] for row in ran.json["inputs"]] == ["compiler"]
    assert not ran.json["stages"] and not ran.json["settings"]


def test_no_compiler_is_told_before_any_work(recipe, edgewright, tmp_path):
    words = ("build", recipe, "--target", "cpu", "--out", tmp_path / "out")
    ran = edgewright(*words, env={"PATH": str(tmp_path)})
    assert ran.code == 6 and ran.err.count("\n") == 1
    assert "no C compiler" in ran.err and "apt-get install gcc libc6-dev" in ran.err
    assert not list(tmp_path.rglob("model.onnx"))
