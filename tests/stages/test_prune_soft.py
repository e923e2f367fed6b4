"""Soft pruning by the recipe: after the same hard cut, nearer to the original than without it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import RECIPE, write_tiny

from edgewright import pruning, recovery
from edgewright.prune.labels import analyse
from edgewright.prune.marks import removed_units
from edgewright.recipe import parse_recipe
from edgewright.runtime.local import open_local
from edgewright.stage import Job
from edgewright.target import load_target

pytest.importorskip("torch")
TRAIN = {"steps": 60, "threads": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny")).parent


def job(home: Path, folder: Path, prune: dict[str, Any], **tables: Any) -> Job:
    raw = {
        "model": {"name": "m", "version": "1", "source": "model.onnx"},
        "data": {"calibration": "calibration.npz"},
        "prune": {"budget": {"macs": 0.5}, "multiple": 1, "criterion": "l2", **prune},
        **tables,
    }
    folder.mkdir()
    model = home / "model.onnx"
    return Job(
        recipe=parse_recipe(raw, home), target=load_target("cpu"), folder=folder,
        model=model, models={"export": model},
    )  # fmt: skip


def error(home: Path, model: Path) -> float:
    """Squared error of the outputs over the original's variance, on inputs not trained on."""
    x = np.load(home / "evaluation.npz")["x"]
    want, found = (
        open_local(path.read_bytes()).run({"x": x})[0] for path in (home / "model.onnx", model)
    )
    return float(((found - want) ** 2).mean() / want.var())


def removed(home: Path, model: Path) -> frozenset[int]:
    return removed_units(onnx.load(model), analyse(onnx.load(home / "model.onnx")))


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = job(tiny, tmp_path_factory.mktemp("plain") / "out", {})
    pruning.run(work)
    return work.output_model()


def test_units_that_were_emptied_first_cost_less(tiny: Path, plain: Path, tmp_path: Path) -> None:
    work = job(tiny, tmp_path / "a", {"soft": "grow", "train": TRAIN})
    report = pruning.run(work)
    assert removed(tiny, work.output_model()) == removed(tiny, plain)
    assert error(tiny, work.output_model()) < 0.7 * error(tiny, plain)  # measured: 0.20 and 0.56
    assert report["soft"]["way"] == "grow" and report["soft"]["steps"] == 60
    again = job(tiny, tmp_path / "b", {"soft": "grow", "train": TRAIN})
    pruning.run(again)
    assert again.output_model().read_bytes() == work.output_model().read_bytes()

    # What was trained is not overwritten by least squares on the original's weights.
    after = job(tiny, tmp_path / "r", {}, recover={})
    after = Job(**{**vars(after), "model": work.output_model()})
    report = recovery.run(after)
    assert "trained before the cut" in report["notes"][0]["text"] and not report["layers"]
    kept = error(tiny, after.output_model())
    assert kept == pytest.approx(error(tiny, work.output_model()), rel=1e-6)


def test_units_chosen_again_and_again_cost_less(tiny: Path, plain: Path, tmp_path: Path) -> None:
    work = job(tiny, tmp_path / "a", {"soft": "regrow", "train": TRAIN | {"every": 5}})
    report = pruning.run(work)
    assert error(tiny, work.output_model()) < 0.7 * error(tiny, plain)  # measured: 0.19
    assert report["criterion"] == "energy" and report["budget"]["left"] <= 0.5


def test_group_lasso_leaves_less_to_lose(tiny: Path, plain: Path, tmp_path: Path) -> None:
    work = job(tiny, tmp_path / "a", {"soft": "lasso", "train": TRAIN})
    report = pruning.run(work)
    assert error(tiny, work.output_model()) < error(tiny, plain)
    assert report["soft"]["way"] == "lasso" and report["budget"]["left"] <= 0.5


@pytest.mark.parametrize("line", ['soft = "grow"', 'criterion = "fisher"'])
def test_without_torch_the_way_out_is_named(edgewright: Any, tmp_path: Path, line: str) -> None:
    recipe = write_tiny(tmp_path / "r", f"{RECIPE}[prune]\nbudget = {{ macs = 0.5 }}\n{line}\n")
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
    out = tmp_path / "out.onnx"
    words = ("prune", recipe.with_name("model.onnx"), "--recipe", recipe, "-o", out)
    ran = edgewright(*words, env={"PYTHONPATH": str(tmp_path)})
    assert ran.code == 6 and "edgewright[torch]" in ran.err, ran.err
    assert not out.exists()
