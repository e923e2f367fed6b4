"""The wheel: everything that is read at run time is in it and loads from it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import edgewright

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(edgewright.__file__).resolve().parent

LOADS = """
import json, pathlib
import edgewright
from edgewright.bundle import manifest
from edgewright.report import html
from edgewright.target import load_target, profiles_folder, target_names
print(json.dumps({
    "package": edgewright.__file__,
    "profiles": str(profiles_folder()),
    "targets": [load_target(name).name for name in target_names()],
    "schema": manifest.SCHEMA["title"],
    "page": html.render({"name": "n", "version": "1", "target": "t", "stages": []})[:15].lower(),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT]
    subprocess.run([str(w) for w in words], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"edgewright/{path.relative_to(SOURCE).as_posix()}"
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted |= {f"edgewright/targets/{p.name}" for p in (ROOT / "targets").glob("*.toml")}
    assert wanted <= inside
    assert not [name for name in inside if name.startswith(("tests/", "bench/", "examples/"))]


def test_profiles_schema_and_template_load_from_the_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(site)}
    words = [sys.executable, "-c", LOADS]
    ran = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["package"].startswith(str(site))
    assert found["profiles"] == str(site / "edgewright" / "targets")
    assert found["targets"] == sorted(p.stem for p in (ROOT / "targets").glob("*.toml"))
    assert "bundle" in found["schema"].lower()
    assert found["page"] == "<!doctype html>"
