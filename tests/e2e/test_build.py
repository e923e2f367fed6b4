"""`edgewright build` from recipe to bundle: the run folder, the cache, the verdicts."""

import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import RECIPE, Ran, command, write_tiny

STAGES = ["export", "simplify", "quantize", "validate", "measure", "gate", "bundle"]
Edgewright = Callable[..., Ran]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, edgewright: Edgewright) -> tuple[Path, Ran]:
    """The tiny recipe, built for cpu into `out` beside it."""
    recipe = write_tiny(tmp_path_factory.mktemp("built") / "tiny")
    ran = edgewright("build", recipe, "--target", "cpu", "--out", recipe.parent / "out", "--json")
    assert ran.code == 0, ran.err
    return recipe, ran


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: what was written again has others."""
    return {
        str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


def cached(ran: Ran, target: int = 0) -> dict[str, bool]:
    stages = ran.json["targets"][target]["report"]["stages"]
    return {part["stage"]: part["cached"] for part in stages}


def redone(ran: Ran) -> list[str]:
    return [stage for stage, hit in cached(ran).items() if not hit]


def test_run_folder_holds_results_and_every_stage(built):
    recipe, ran = built
    folder = recipe.parent / "out" / "cpu"
    assert sorted(p.name for p in folder.iterdir()) == [
        "model.onnx",
        "report.html",
        "report.json",
        "stages",
        "tiny-1.0.0-cpu.bundle.tar",
    ]
    names = [f"{k:02}-{stage}" for k, stage in enumerate(STAGES, 1)]
    assert sorted(p.name for p in (folder / "stages").iterdir()) == names
    for name in names:
        assert "seconds" in json.loads((folder / "stages" / name / "report.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    assert report["schema"] == "edgewright-report/1"
    assert (report["name"], report["version"], report["target"]) == ("tiny", "1.0.0", "cpu")
    assert [part["stage"] for part in report["stages"]] == STAGES
    assert ran.json["targets"][0]["verdict"] == report["verdict"] == "PASS"
    assert (folder / "report.html").read_text().lstrip().lower().startswith("<!doctype html")


def test_second_build_does_no_work(built, edgewright):
    recipe, _ = built
    folder = recipe.parent / "out"
    before = snapshot(folder)
    begin = time.monotonic()
    again = edgewright("build", recipe, "--target", "cpu", "--out", folder, "--json")
    seconds = time.monotonic() - begin
    assert again.code == 0, again.err
    assert redone(again) == []
    assert snapshot(folder) == before
    assert seconds < 10  # about one on an idle machine


@pytest.mark.parametrize(
    ("old", "new", "follows"),
    [
        ('version = "1.0.0"', 'version = "1.0.1"', ["bundle"]),
        ("min_retained = 0.9", "min_retained = 0.9\nmax_size_ratio = 2.0", ["gate", "bundle"]),
    ],
)
def test_a_changed_setting_redoes_what_follows_from_it(built, edgewright, old, new, follows):
    recipe, _ = built
    changed = recipe.with_name("changed.toml")
    changed.write_text(RECIPE.replace(old, new))
    out = recipe.parent / "changed"
    ran = edgewright("build", changed, "--target", "cpu", "--out", out, "--json")
    assert ran.code == 0, ran.err
    assert redone(ran) == follows


def test_results_of_an_earlier_build_are_removed(built, edgewright):
    recipe, _ = built
    out = recipe.parent / "renamed"
    assert edgewright("build", recipe, "--target", "cpu", "--out", out).code == 0
    other = recipe.with_name("renamed.toml")
    other.write_text(RECIPE.replace("1.0.0", "2.0.0"))
    assert edgewright("build", other, "--target", "cpu", "--out", out).code == 0
    assert [p.name for p in out.rglob("*.bundle.tar") if p.parent.name == "cpu"] == [
        "tiny-2.0.0-cpu.bundle.tar"
    ]


def test_a_failed_gate_still_leaves_report_and_bundle(built, edgewright):
    recipe, _ = built
    strict = recipe.with_name("strict.toml")
    strict.write_text(RECIPE.replace("min_retained = 0.9", "max_size_bytes = 10"))
    out = recipe.parent / "strict"
    ran = edgewright("build", strict, "--target", "cpu", "--out", out)
    assert ran.code == 1
    assert "FAIL" in ran.out
    assert "NOT for release" in ran.out
    assert json.loads((out / "cpu" / "report.json").read_text())["verdict"] == "FAIL"
    bundle = next((out / "cpu").glob("*.bundle.tar"))
    verified = edgewright("verify", bundle, "--json")
    assert verified.json["gate"]["verdict"] == "FAIL"


def test_a_recipe_without_a_metric_is_inconclusive(built, edgewright):
    recipe, _ = built
    lines = RECIPE.splitlines()
    keep = [x for x in lines if not x.startswith(("evaluation", "metric", "per_sample", "min_"))]
    bare = recipe.with_name("bare.toml")
    bare.write_text("\n".join(keep))
    ran = edgewright("build", bare, "--target", "cpu", "--out", recipe.parent / "bare", "--json")
    assert ran.code == 4, ran.err
    assert ran.json["targets"][0]["verdict"] == "INCONCLUSIVE"


def test_a_damaged_cache_entry_is_built_again(tmp_path, built, edgewright, own_cache):
    recipe, _ = built
    entries = [json.loads(p.read_text()) for p in own_cache.glob("??/*/entry.json")]
    keys = [entry["key"] for entry in entries if entry["stage"] == "gate"]
    for key in keys:
        report = own_cache / key[:2] / key / "files" / "report.json"
        data = bytearray(report.read_bytes())
        data[len(data) // 2] ^= 1
        report.write_bytes(data)
    out = recipe.parent / "out"
    ran = edgewright("build", recipe, "--target", "cpu", "--out", out, "--json")
    assert ran.code == 0, ran.err
    assert redone(ran) == ["gate"]
    assert "damaged cache entry" in ran.err
    again = edgewright("build", recipe, "--target", "cpu", "--out", out, "--json")
    assert redone(again) == []


def test_a_failure_is_not_cached(tmp_path, edgewright):
    recipe = write_tiny(tmp_path / "tiny")
    score = recipe.with_name("score.py")
    good = score.read_text()
    score.write_text(good.replace("def score(run, data):", "def score(run, data):\n    1 / 0"))
    for _ in range(2):
        ran = edgewright("build", recipe, "--target", "cpu", "--out", tmp_path / "out")
        assert ran.code == 3
        assert "score.py:score raised" in ran.err
        assert "ZeroDivisionError" in ran.err
        assert not (tmp_path / "out" / "cpu" / "report.json").exists()


def test_no_cache_reads_and_keeps_nothing(tmp_path, built, edgewright):
    recipe, _ = built
    cache = tmp_path / "cache"
    words = ("build", recipe, "--target", "cpu", "--out", tmp_path / "out", "--no-cache", "--json")
    ran = edgewright(*words, env={"EDGEWRIGHT_CACHE": str(cache)})
    assert ran.code == 0, ran.err
    assert redone(ran) == STAGES
    assert not cache.exists()


def test_same_inputs_same_bytes_whatever_the_surroundings(tmp_path, built, edgewright):
    recipe, _ = built
    bundle = next((recipe.parent / "out" / "cpu").glob("*.bundle.tar"))
    surroundings = {
        "EDGEWRIGHT_CACHE": str(tmp_path / "cache"),
        "TZ": "Pacific/Apia",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "7",
        "OMP_NUM_THREADS": "2",
    }
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    other = write_tiny(tmp_path / "-ünder score & co" / "tiny")
    words = ("build", other, "--target", "cpu")
    ran = edgewright(*words, env=surroundings, cwd=elsewhere, umask=0o077)
    assert ran.code == 0, ran.err
    again = elsewhere / "build" / "tiny" / "cpu" / bundle.name
    assert again.read_bytes() == bundle.read_bytes()
    assert [p.name for p in elsewhere.iterdir()] == ["build"], "libraries left files behind"


def test_two_builds_in_one_folder(tmp_path, built, edgewright):
    recipe, _ = built
    folder = tmp_path / "out" / "cpu"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        ran = edgewright("build", recipe, "--target", "cpu", "--out", tmp_path / "out")
    assert ran.code == 6
    assert f"process {os.getpid()}" in ran.err
    assert ran.err.count("\n") == 1
    assert edgewright("build", recipe, "--target", "cpu", "--out", tmp_path / "out").code == 0


def test_two_builds_at_once_share_the_work(tmp_path, built):
    recipe, _ = built
    changed = recipe.with_name("shared.toml")
    changed.write_text(RECIPE.replace("1.0.0", "3.0.0"))
    env = {**os.environ, "EDGEWRIGHT_CACHE": str(tmp_path / "cache")}
    builds = []
    for k in range(2):
        words = ("build", changed, "--target", "cpu", "--out", tmp_path / str(k), "--json")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        builds.append(subprocess.Popen(command(*words), env=env, **pipes))
    found = [build.communicate(timeout=600) for build in builds]
    assert [build.returncode for build in builds] == [0, 0], found
    rans = [Ran(0, out, err) for out, err in found]
    hits = [cached(ran) for ran in rans]
    for stage in STAGES:
        assert [hit[stage] for hit in hits].count(False) == 1, "each stage is built exactly once"
    assert "waiting for process" in "".join(ran.err for ran in rans)
    bundles = [next((tmp_path / str(k) / "cpu").glob("*.bundle.tar")) for k in range(2)]
    assert bundles[0].read_bytes() == bundles[1].read_bytes()


def test_data_that_changes_during_a_build_is_noticed(tmp_path, edgewright):
    recipe = write_tiny(tmp_path / "tiny")
    score = recipe.with_name("score.py")
    meddle = (
        "def score(run, data):\n"
        "    from pathlib import Path\n"
        "    with Path(__file__).with_name('late.npy').open('ab') as file:\n"
        "        file.write(b'x')\n"
    )
    score.write_text(score.read_text().replace("def score(run, data):\n", meddle))
    ran = edgewright("build", recipe, "--target", "cpu", "--out", tmp_path / "out")
    assert ran.code == 3
    assert "changed while stage" in ran.err


def test_the_worst_target_decides(tmp_path, built, edgewright):
    recipe, _ = built
    profile = tmp_path / "strange.toml"
    text = 'name = "strange"\ndescription = "none"\n[device]\narch = "x86_64"\nisa = ["no_such"]\n'
    profile.write_text(text)
    out = recipe.parent / "out"
    words = ("build", recipe, "--target", "cpu", "--target", profile, "--out", out, "--json")
    junit, history = tmp_path / "gate.xml", tmp_path / "verdicts.jsonl"
    ran = edgewright(*words, "--junit", junit, "--history", history)
    assert ran.code == ran.json["exit_code"] == 6
    assert [t["exit_code"] for t in ran.json["targets"]] == [0, 6]
    assert "no_such" in ran.json["targets"][1]["error"]
    suites = ElementTree.parse(junit).getroot()
    assert [(s.get("name"), s.get("errors")) for s in suites] == [
        ("tiny 1.0.0 for cpu", "0"),
        (f"tiny 1.0.0 for {ran.json['targets'][1]['target']}", "1"),
    ]
    assert [json.loads(line)["target"] for line in history.read_text().splitlines()] == ["cpu"]
    assert "<h2>Trend</h2>" in (out / "cpu" / "report.html").read_text()


def test_a_baseline_is_run_beside_the_new_model(tmp_path, built, edgewright):
    recipe, _ = built
    bundle = next((recipe.parent / "out" / "cpu").glob("*.bundle.tar"))
    newer = recipe.with_name("newer.toml")
    newer.write_text(RECIPE.replace("1.0.0", "1.1.0"))
    words = ("build", newer, "--target", "cpu", "--out", tmp_path / "out", "--json")
    ran = edgewright(*words, "--baseline", bundle)
    assert ran.code in (0, 4), ran.err  # a busy machine may leave the latency open
    report = ran.json["targets"][0]["report"]
    assert report["baseline"]["version"] == "1.0.0"
    gate = next(part["report"] for part in report["stages"] if part["stage"] == "gate")
    checks = {check["name"]: check["verdict"] for check in gate["checks"]}
    assert checks["baseline_metric"] == checks["baseline_agreement"] == "PASS"  # one file
    assert "baseline_latency" in checks


def test_a_baseline_that_proves_nothing_never_passes(tmp_path, built, edgewright):
    recipe, _ = built
    bundle = next((recipe.parent / "out" / "cpu").glob("*.bundle.tar"))
    broken = tmp_path / "broken.bundle.tar"
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    warns = recipe.with_name("warns.toml")
    warns.write_text(RECIPE + '\n[gate.tolerance]\ninconclusive = "warn"\n')
    for baseline in (broken, tmp_path / "absent.bundle.tar"):
        for one in (recipe, warns):  # the policy is about evidence, not about a wrong path
            words = ("build", one, "--target", "cpu", "--out", tmp_path / "out")
            ran = edgewright(*words, "--baseline", baseline)
            assert ran.code == 4, ran.err


def test_a_baseline_of_another_model_is_refused(tmp_path, built, edgewright):
    recipe, _ = built
    bundle = next((recipe.parent / "out" / "cpu").glob("*.bundle.tar"))
    other = recipe.with_name("other.toml")
    other.write_text(RECIPE.replace('name = "tiny"', 'name = "other"'))
    words = ("build", other, "--target", "cpu", "--out", tmp_path / "out")
    ran = edgewright(*words, "--baseline", bundle)
    assert ran.code == 3
    assert "tiny" in ran.err
    assert "other" in ran.err


def test_the_model_that_ships_keeps_the_metric(built):
    stages = built[1].json["targets"][0]["report"]["stages"]
    validate = next(part["report"] for part in stages if part["stage"] == "validate")
    assert validate["metric"]["original"]["score"] == 1.0
    assert validate["metric"]["shipped"]["retained"] >= 0.9
    assert np.isfinite(list(validate["agreement"]["sqnr_db"].values())).all()
