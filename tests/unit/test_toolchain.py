"""Compiling our own C: which compilers, where the result goes, and what is told where they lack."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from edgewright.errors import EnvironmentMissing
from edgewright.runtime import doctor, emulator, toolchain
from edgewright.target import load_target

HERE = platform.machine()


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGEWRIGHT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_packages_are_those_of_debian(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert toolchain.packages("x86_64") == ("gcc", "libc6-dev")
    assert toolchain.packages("aarch64") == ("gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert toolchain.packages("x86_64") == ("gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_the_same_source_gives_the_same_bytes_and_is_compiled_once(home, monkeypatch, tmp_path):
    first = toolchain.runner(HERE)
    content = first.read_bytes()
    assert str(tmp_path).encode() not in content
    begun = first.stat().st_mtime_ns
    assert toolchain.runner(HERE) == first and first.stat().st_mtime_ns == begun
    first.unlink()
    assert toolchain.runner(HERE).read_bytes() == content
    assert [p.name for p in first.parent.iterdir()] == [first.name]  # nothing half-made beside it


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_a_compiler_that_cannot_is_told_and_leaves_nothing(home, monkeypatch, tmp_path):
    """As gcc without the C library's headers: what it said, and the packages it needs."""
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "gcc"
    broken.write_text("#!/bin/sh\necho 'fatal error: stdio.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:{os.environ['PATH']}")
    with pytest.raises(EnvironmentMissing, match=r"stdio\.h: No such file.*gcc libc6-dev"):
        toolchain.runner(HERE)
    assert not [p for p in home.rglob("*") if p.is_file()]


def test_doctor_says_where_instructions_cannot_be_counted(home, monkeypatch):
    """The rest of an emulated target works without a compiler."""
    target = load_target("arm")
    monkeypatch.setattr(emulator, "qemu_version", lambda arch: "7.2")
    for found, words in (({"aarch64", HERE}, ""), ({HERE}, "no compiler to count with")):
        monkeypatch.setattr(toolchain, "compiler", lambda arch, found=found: arch in found or None)
        assert doctor.how_it_runs(target).endswith(words or "cortex-a76")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_the_sources_compile_without_a_warning(tmp_path):
    words = ["gcc", "-Werror", *toolchain.FLAGS, "-fsyntax-only"]
    sources = [*toolchain.RUNNER_SOURCES, *toolchain.PLUGIN_SOURCES]
    subprocess.run([*words, *sources], cwd=toolchain.SOURCES, check=True)
