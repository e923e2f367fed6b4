"""sweep: a ladder of budgets, killed and repeated; what it refuses before the first build."""

import json
import subprocess

import pytest
from conftest import RECIPE, command, write_tiny

# A ratio, and no budget of its own: the sweep's budgets are for the other groups.
TABLES = '\n[prune]\ncriterion = "l2"\nmultiple = 4\nratios = { w0 = 0.5 }\n[recover]\nvary = 0\n'


def test_a_ladder_goes_on_where_it_was_killed_and_tells_of_rungs_that_fail(edgewright, tmp_path):
    recipe = write_tiny(tmp_path / "r", RECIPE + TABLES)
    out = tmp_path / "out"
    words = ("sweep", recipe, "--target", "cpu", "--budgets", "0.001,0.6", "--out", out)
    with subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        for line in first.stderr:
            if "budget 0.6" in line:
                break
        first.kill()
    assert first.returncode == -9 and (out / "whole" / "cpu" / "model.onnx").exists()
    assert not list(out.glob("sweep-*"))

    ran = edgewright(*words, "--json")
    assert ran.code == 3 and ran.err.count("cannot be met") == 1, ran.err
    whole, mild, wild = ran.json["builds"]
    assert [row["budget"] for row in (whole, mild, wild)] == [None, 0.6, 0.001]
    assert whole["work"] == 1 and 0.3 < mild["work"] <= 0.6 and mild["size"] < whole["size"]
    assert wild["verdict"] == "ERROR" and "cannot be met" in wild["error"]
    assert wild["retained"] is None and not (out / "0.001" / "cpu" / "model.onnx").exists()
    written = {p.name: p.read_bytes() for p in out.glob("sweep-*")}
    assert json.loads(written["sweep-cpu.json"]) == ran.json
    assert b"cannot be met" in written["sweep-cpu.html"]

    assert edgewright(*words).code == 3  # from the cache: not one figure is taken again
    assert {p.name: p.read_bytes() for p in out.glob("sweep-*")} == written


@pytest.mark.parametrize(
    ("budgets", "out", "code", "said"),
    [
        ("0.5,much", "out", 2, "--budgets; expected numbers"),
        ("0.5,1.2", "out", 3, "above 0 and below 1"),
        ("nan", "out", 3, "a finite number"),
        ("0.5", "recipe.toml", 2, "expected a file that can be written"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_build(
    edgewright, tiny, budgets, out, code, said
):
    words = ("--target", "cpu", "--budgets", budgets, "--out", tiny.parent / out)
    before = sorted(tiny.parent.iterdir())
    ran = edgewright("sweep", tiny, *words)
    assert ran.code == code and ran.err.count("\n") == 1, ran.err
    assert said in ran.err
    assert sorted(tiny.parent.iterdir()) == before
