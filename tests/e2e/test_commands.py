"""Every command on files, as a user types it: results on standard output, exit codes."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest
from conftest import Ran, write_tiny

Edgewright = Callable[..., Ran]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, edgewright: Edgewright) -> Path:
    """The tiny recipe; its results for cpu are in `out/cpu` beside it."""
    recipe = write_tiny(tmp_path_factory.mktemp("commands") / "tiny")
    ran = edgewright("build", recipe, "--target", "cpu", "--out", recipe.parent / "out")
    assert ran.code == 0, ran.err
    return recipe


@pytest.fixture(scope="module")
def bundle(built: Path) -> Path:
    return next((built.parent / "out" / "cpu").glob("*.bundle.tar"))


def test_stages_one_after_the_other(built, edgewright, tmp_path):
    model, simple, int8 = (tmp_path / f"{k}.onnx" for k in ("model", "simple", "int8"))
    common = ("--recipe", built, "--target", "cpu")
    for words in (
        ("export", *common, "-o", model),
        ("simplify", model, *common, "-o", simple),
        ("quantize", simple, *common, "-o", int8),
    ):
        ran = edgewright(*words)
        assert ran.code == 0, ran.err
        assert ran.out == ""
        onnx.checker.check_model(str(words[-1]))
    checked = edgewright("validate", int8, *common, "--json")
    assert checked.json["validate"]["metric"]["shipped"]["retained"] >= 0.9
    packed = tmp_path / "some.bundle.tar"
    ran = edgewright("bundle", int8, *common, "-o", packed)
    assert (ran.code, ran.out) == (0, f"{packed}\n"), ran.err
    assert "(NOT for release)" in edgewright("verify", packed).out  # no gate has judged it


def test_bench_and_gate_compare_two_files(built, edgewright, tmp_path):
    original = built.parent / "model.onnx"
    shipped = built.parent / "out" / "cpu" / "model.onnx"
    ran = edgewright("bench", shipped, original, "--recipe", built, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["measure"]["latency"]["ratio"] > 0
    summary, junit, history = (tmp_path / name for name in ("gate.md", "gate.xml", "h.jsonl"))
    files = ("--markdown", summary, "--junit", junit, "--history", history, "--label", "one")
    judged = edgewright(
        *("gate", "--candidate", shipped, "--baseline", original, "--recipe", built, "--json"),
        *files,
    )
    assert judged.code == 0, judged.err
    assert judged.json["gate"]["verdict"] == "PASS"
    assert summary.read_text().startswith("### PASS: tiny 1.0.0 for cpu\n")
    cases = [case.get("name") for case in ElementTree.parse(junit).iter("testcase")]
    assert cases == [check["name"] for check in judged.json["gate"]["checks"]]
    (line,) = map(json.loads, history.read_text().splitlines())
    measured = judged.json["measure"]["latency"]["ratio"]
    assert (line["verdict"], line["label"]) == ("PASS", "one")
    assert line["metrics"]["latency_ratio"] == measured
    report = tmp_path / "gate.json"
    report.write_text(judged.out)
    packed = tmp_path / "judged.bundle.tar"
    words = ("bundle", shipped, "--recipe", built, "--gate", report, "-o", packed)
    assert edgewright(*words).code == 0
    assert edgewright("verify", packed, "--json").json["gate"]["verdict"] == "PASS"


def test_verify_and_self_test(bundle, edgewright):
    verified = edgewright("verify", bundle)
    assert verified.code == 0
    assert "tiny 1.0.0 for cpu" in verified.out
    tested = edgewright("self-test", bundle)
    assert tested.code == 0, tested.err
    assert tested.out.startswith("ok: ")
    assert edgewright("self-test", bundle, "--target", "cpu", "--json").json["ok"] is True


def test_a_tampered_bundle_is_an_integrity_error(bundle, edgewright, tmp_path):
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    broken = tmp_path / "broken.tar"
    broken.write_bytes(data)
    for words in (("verify", broken), ("self-test", broken)):
        ran = edgewright(*words)
        assert ran.code == 5
        assert ran.out == ""
        assert ran.err.count("\n") == 1


def test_report_writes_the_page_again(built, edgewright):
    folder = built.parent / "out" / "cpu"
    page = folder / "report.html"
    before = page.read_text()
    page.unlink()
    ran = edgewright("report", folder)
    assert (ran.code, ran.out) == (0, f"{page}\n"), ran.err
    assert "PASS" in ran.err
    assert page.read_text() == before
    assert edgewright("report", folder, "--json").json["verdict"] == "PASS"


def test_init_writes_a_recipe_that_is_read(built, edgewright, tmp_path):
    recipe = tmp_path / "new" / "recipe.toml"
    ran = edgewright("init", built.parent / "model.onnx", "-o", recipe)
    assert (ran.code, ran.out) == (0, f"{recipe}\n"), ran.err
    found = tomllib.loads(recipe.read_text())
    assert found["model"]["inputs"]["x"]["shape"] == ["batch", 1, 12, 12]
    assert found["model"]["inputs"]["x"]["typical"] == [1, 1, 12, 12]
    (recipe.parent / "calibration.npz").write_bytes((built.parent / "calibration.npz").read_bytes())
    model = tmp_path / "out.onnx"
    assert edgewright("export", "--recipe", recipe, "-o", model).code == 0
    kept = recipe.read_text()
    again = edgewright("init", built.parent / "model.onnx", "-o", recipe)
    assert again.code == 2
    assert "--force" in again.err
    assert recipe.read_text() == kept
    assert edgewright("init", built.parent / "model.onnx", "-o", recipe, "--force").code == 0


def test_inspect_says_what_is_in_a_model(built, edgewright):
    model = built.parent / "model.onnx"
    facts = edgewright("inspect", model, "--json").json
    assert facts["operators"] == {"Conv": 3, "Flatten": 1, "MatMul": 1, "Relu": 3}
    assert facts["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 1, 12, 12]}]
    # 12x12, 6x6 and 3x3 places; 9 weights for each pair of channels; the classifier
    convolutions = 9 * (144 * 16 + 36 * 16 * 32 + 9 * 32 * 32)
    assert facts["macs_by_operator"] == {"Conv": convolutions, "MatMul": 288 * 10}
    ran = edgewright("inspect", model, "--target", "gpu")
    assert ran.code == 0
    assert "stays float" in ran.out


def test_doctor_lists_every_target(edgewright):
    ran = edgewright("doctor", "--json")
    assert ran.code == 0
    names = [check["target"] for check in ran.json["targets"]]
    assert {"cpu", "arm", "gpu"} <= set(names)
    listed = edgewright("targets")
    assert [line.split()[0] for line in listed.out.splitlines()] == names
    assert edgewright("doctor", "--target", "cpu").code == 0


def test_cache_is_shown_and_cleared(built, edgewright, tmp_path):
    env = {"EDGEWRIGHT_CACHE": str(tmp_path / "cache")}
    assert edgewright("cache", "show", "--json", env=env).json["entries"] == 0
    words = ("build", built, "--target", "cpu", "--out", tmp_path / "out")
    strange = {**env, "EDGEWRIGHT_STAGE_TIMEOUT_S": "5"}  # measuring takes longer: it is stopped
    assert edgewright(*words, env=strange).code == 3
    assert edgewright("cache", "show", "--json", env=env).json["entries"] >= 1
    assert edgewright("cache", "clear", env=env).code == 0
    assert edgewright("cache", "show", "--json", env=env).json["entries"] == 0


def test_help_of_every_command(edgewright):
    listed = edgewright("--help").out.partition("Commands:")[2].partition("Exit codes")[0]
    names = re.findall(r"^  ([a-z][a-z-]*)", listed, re.MULTILINE)
    assert "build" in names
    for name in names:
        ran = edgewright(name, "--help")
        assert ran.code == 0
        assert ran.out.lower().startswith(f"usage: edgewright {name}")  # argparse or click


@pytest.mark.parametrize("redirect", ["| true", "2>&1 >/dev/null | true"])
def test_a_reader_that_leaves_changes_no_exit_code(built, redirect):
    edgewright = Path(sys.executable).with_name("edgewright")
    shell = f'"{edgewright}" report "{built.parent}/out/cpu" {redirect}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_device_behind_standard_output_is_told(built, edgewright):
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        words = [sys.executable, "-m", "edgewright", "targets"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 6
    assert done.stderr.count("\n") == 1
    assert "no space left" in done.stderr


def test_json_on_standard_output_only(built, edgewright):
    ran = edgewright("build", built, "--target", "cpu", "--out", built.parent / "out", "--json")
    json.loads(ran.out)
    assert "{" not in ran.err
