"""prune and recover in a build and as commands: budgets kept, the metric's say, bad input."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import RECIPE, command, write_tiny

from edgewright.prune.labels import analyse
from edgewright.prune.marks import removed_units


def prune(edgewright: Any, folder: Path, table: str, *, recover: bool = False) -> Any:
    """Run `edgewright prune` on the tiny model; what it printed, and where the model is."""
    text = RECIPE + f"\n[prune]\n{table}\n" + ("[recover]\n" if recover else "")
    recipe = write_tiny(folder / "r", text)
    out = folder / "pruned.onnx"
    model = recipe.parent / "model.onnx"
    return edgewright("prune", model, "--recipe", recipe, "-o", out, "--json"), out, recipe


def test_a_build_prunes_recovers_and_reports_each_step(edgewright, tmp_path: Path) -> None:
    table = "[prune]\nbudget = { macs = 0.6 }\nmultiple = 4\n[recover]\nsamples = 40\n"
    recipe = write_tiny(tmp_path / "r", RECIPE + "\n" + table)
    ran = edgewright("build", recipe, "--target", "cpu", "--out", tmp_path / "out", "--json")
    assert ran.code in (0, 1, 4), ran.err
    stages = {s["stage"]: s["report"] for s in ran.json["targets"][0]["report"]["stages"]}
    assert stages["prune"]["budget"]["left"] <= 0.6
    assert all(row["kept"] % 4 == 0 for row in stages["prune"]["groups"])
    steps = {row["stage"]: row for row in stages["validate"]["steps"]}
    assert steps["prune"]["macs"] <= 0.6 * steps["prune"]["original_macs"]
    assert steps["recover"]["macs"] == steps["prune"]["macs"]
    # What compensation is for: the same shape, much nearer to the original.
    assert steps["recover"]["sqnr_db"] > steps["prune"]["sqnr_db"] + 3
    assert stages["recover"]["layers"]
    told = [note["text"] for note in stages["recover"]["notes"]]
    assert told == ["compensated on 160 samples, made of 40 given ones"]
    shipped = onnx.load(tmp_path / "out" / "cpu" / "model.onnx")
    assert not shipped.metadata_props  # the note of what went is for `recover` alone


def test_rounds_of_pruning_are_noted_in_units_of_the_original(edgewright, tmp_path: Path) -> None:
    table = 'budget = { params = 0.5 }\ncriterion = "l2"\nmultiple = 1\nsteps = 3'
    ran, out, recipe = prune(edgewright, tmp_path, table)
    assert ran.code == 0, ran.err
    original, pruned = onnx.load(recipe.parent / "model.onnx"), onnx.load(out)
    analysis = analyse(original)
    gone = removed_units(pruned, analysis)
    kept = {t.name: list(t.dims) for t in pruned.graph.initializer}
    for group in analysis.groups:
        tensor, axis = group.slices[0]
        assert kept[tensor][axis] == len(group.units) - len(gone & set(group.units))
    # What is left of a weight is the original's, where nothing went: the note names true indices.
    before = onnx.numpy_helper.to_array(
        next(t for t in original.graph.initializer if t.name == "w0")
    )
    after = onnx.numpy_helper.to_array(next(t for t in pruned.graph.initializer if t.name == "w0"))
    stays = [i for i, unit in enumerate(analysis.labels["w0"][0].tolist()) if unit not in gone]
    assert np.array_equal(before[stays], after)


def test_a_budget_that_costs_too_much_is_weakened(edgewright, tmp_path: Path) -> None:
    table = "budget = { macs = 0.1 }\nmultiple = 1\nmax_drop = 0.2"
    ran, _, _ = prune(edgewright, tmp_path, table, recover=True)
    assert ran.code == 0, ran.err
    report = ran.json["prune"]
    assert not report["tries"][0]["kept"] and report["tries"][0]["drop"] > 0.2
    assert 0.1 < report["budget"]["left"] <= 1
    assert "costs more than 20.00% of the metric" in report["notes"][0]["text"]


def test_a_latency_budget_is_measured(edgewright, tmp_path: Path) -> None:
    # The tiny model's time is mostly the runtime's own: only a wide budget can be met.
    ran, _, _ = prune(edgewright, tmp_path, "budget = { latency = 0.95 }\nmultiple = 4")
    assert ran.code == 0, ran.err
    assert any(row["kept"] < row["units"] for row in ran.json["prune"]["groups"])


def test_what_cannot_be_met_is_said_and_nothing_written(edgewright, tmp_path: Path) -> None:
    for table, said in (
        ("budget = { macs = 0.001 }", "cannot be met"),
        ('budget = { macs = 0.5 }\nexclude = ["*"]', "nothing in this model can be pruned"),
    ):
        ran, out, _ = prune(edgewright, tmp_path, table)
        assert ran.code == 3 and said in ran.err, ran.err
        assert not out.exists()


def test_recover_refuses_another_original(edgewright, tmp_path: Path) -> None:
    ran, out, recipe = prune(edgewright, tmp_path, "budget = { macs = 0.5 }", recover=True)
    assert ran.code == 0, ran.err
    # As its own original: the note names indices that the small model does not have.
    words = ["recover", out, "--original", out, "--recipe", recipe, "-o", tmp_path / "x.onnx"]
    ran = edgewright(*words)
    assert ran.code == 3 and "was not cut from this original" in ran.err, ran.err
    other = onnx.load(recipe.parent / "model.onnx")
    other.graph.output[0].name = other.graph.node[-1].output[0] = "logits"
    words[3] = tmp_path / "other.onnx"
    onnx.save(other, words[3])
    ran = edgewright(*words)
    assert ran.code == 3 and "their outputs differ" in ran.err, ran.err
    assert "%scores[" in ran.err and "%logits[" in ran.err and not words[-1].exists()
    words[3] = recipe.parent / "model.onnx"
    ran = edgewright(*words, "--json")
    assert ran.code == 0 and ran.json["recover"]["layers"]


def test_one_sample_repairs_nothing_and_that_is_said(edgewright, tmp_path: Path) -> None:
    ran, out, recipe = prune(edgewright, tmp_path, "budget = { macs = 0.5 }", recover=True)
    np.savez(recipe.parent / "calibration.npz", x=np.ones((1, 1, 12, 12), np.float32))
    words = ("--original", recipe.parent / "model.onnx", "--recipe", recipe)
    ran = edgewright("recover", out, *words, "-o", tmp_path / "x.onnx", "--json")
    assert ran.code == 0, ran.err
    warnings = [n["text"] for n in ran.json["recover"]["notes"] if n["level"] == "warning"]
    said = "plain slice: too few samples: one half must judge"
    assert warnings == [f"no layer was repaired: {said}"]


def test_distillation_learns_from_the_original(edgewright, tmp_path: Path) -> None:
    table = """
[prune]
budget = { macs = 0.3 }
multiple = 2
[recover]
method = "distill"
samples = 40
[recover.distill]
steps = 30
rate = 1e-3
"""
    recipe = write_tiny(tmp_path / "r", RECIPE + table)
    simple, pruned, out = (tmp_path / f"{name}.onnx" for name in ("simple", "pruned", "out"))
    shared = ("--recipe", recipe, "--json")
    assert edgewright("simplify", recipe.with_name("model.onnx"), *shared, "-o", simple).code == 0
    assert edgewright("prune", simple, *shared, "-o", pruned).code == 0
    ran = edgewright("recover", pruned, "--original", simple, *shared, "-o", out)
    assert ran.code == 0, ran.err
    found = ran.json["recover"]["distillation"]
    # Ended by patience or by the steps; never farther from the original than before.
    assert 0 < found["steps"] <= 30 and found["losses"]
    assert found["best"]["distance"] <= found["start"]["distance"]
    again = tmp_path / "again.onnx"
    assert edgewright("recover", pruned, "--original", simple, *shared, "-o", again).code == 0
    assert out.read_bytes() == again.read_bytes()
    recipe.write_text(recipe.read_text() + "hard = 0.2\n")
    ran = edgewright("recover", pruned, "--original", simple, *shared, "-o", again)
    assert ran.code == 3 and "recover.labels" in ran.err


def test_labels_change_what_gradients_say(edgewright, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    table = 'budget = { macs = 0.5 }\nmultiple = 1\nsamples = 20\ncriterion = "taylor"'
    ran, plain, recipe = prune(edgewright, tmp_path, table)
    assert ran.code == 0 and ran.json["prune"]["needs"] == "label-free", ran.err
    text = recipe.read_text() + '[recover]\nlabels = "labels.npy"\n'
    recipe.write_text(text)
    model, out = recipe.parent / "model.onnx", tmp_path / "labelled.onnx"
    words = ("prune", model, "--recipe", recipe, "-o", out, "--json")
    ran = edgewright(*words)
    assert ran.code == 3 and "check recover.labels" in ran.err, ran.err
    # Three classes only: other gradients than those of answers drawn from all ten.
    np.save(recipe.parent / "labels.npy", np.arange(20) % 3)
    ran = edgewright(*words)
    assert ran.code == 0 and ran.json["prune"]["needs"] == "labelled", ran.err
    assert out.read_bytes() != plain.read_bytes()
    np.save(recipe.parent / "labels.npy", np.zeros(19, int))
    ran = edgewright(*words)
    assert ran.code == 3 and "one for each sample" in ran.err, ran.err
    np.save(recipe.parent / "labels.npy", np.arange(20) + 1)
    ran = edgewright(*words)
    assert ran.code == 3 and "expected classes 0 to 9; found 10" in ran.err, ran.err


def test_a_round_that_rounding_overshot_is_no_error(edgewright, tmp_path: Path) -> None:
    """16 of 32 channels go at once: the first round of a mild budget meets all the others'."""
    table = 'budget = { macs = 0.95 }\ncriterion = "l2"\nmultiple = 16\nsteps = 4'
    ran, _, _ = prune(edgewright, tmp_path, table)
    assert ran.code == 0, ran.err
    assert ran.json["prune"]["budget"]["left"] < 0.95**0.75


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_command_goes_on_where_its_training_was(
    edgewright, tmp_path: Path, number: int
) -> None:
    pytest.importorskip("torch")
    more = """
[prune]
budget = { macs = 0.6 }
multiple = 4
[recover]
method = "distill"
vary = 0
distill = { steps = 400, batch = 8, rate = 0.003, solver = "adam", threads = 1 }
"""
    recipe = write_tiny(tmp_path / "r", RECIPE + more)
    model, small = recipe.parent / "model.onnx", tmp_path / "small.onnx"
    mine = tmp_path / "small.onnx.unfinished" / "mine"  # somebody's own
    mine.parent.mkdir()
    mine.touch()
    assert edgewright("prune", model, "--recipe", recipe, "-o", small).code == 0
    mine.unlink()
    mine.parent.rmdir()
    words = ["recover", small, "--original", model, "--recipe", recipe, "-o"]
    whole, killed = tmp_path / "whole.onnx", tmp_path / "killed.onnx"
    assert edgewright(*words, whole).code == 0
    left = tmp_path / "killed.onnx.unfinished"
    with subprocess.Popen(command(*words, killed), start_new_session=True) as run:
        deadline = time.monotonic() + 120
        while not (left / "checkpoint.npz").exists() and time.monotonic() < deadline:
            assert run.poll() is None
            time.sleep(0.01)
        os.killpg(run.pid, number)
    assert (left / "checkpoint.npz").exists() and not killed.exists()
    ran = edgewright(*words, killed, "--json")
    assert ran.code == 0
    assert ran.json["recover"]["distillation"]["resumed_at"] > 0
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "killed.onnx", "r", "small.onnx", "whole.onnx"
    ]  # fmt: skip
