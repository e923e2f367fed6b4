"""A stream of channels that is an output goes through prune and recover like any other."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from edgewright import pruning, recovery
from edgewright.prune.outputs import MATRIX
from edgewright.recipe import parse_recipe
from edgewright.runtime.local import open_local
from edgewright.stage import Job
from edgewright.target import load_target

WIDE, RANK = 32, 6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two residual layers whose stream of 32 channels lies close to 6 dimensions."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(RANK, WIDE)).astype(np.float32)
    weights = {"in": rng.normal(size=(5, RANK)) @ mix, "up": rng.normal(size=(WIDE, 16)) / 20,
               "down": rng.normal(size=(16, RANK)) @ mix / 4}  # fmt: skip
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[1,T,5] x) => (float[1,T,32] y) {
          a = MatMul(x, in) b = MatMul(a, up) c = Tanh(b) d = MatMul(c, down) y = Add(a, d)
        }"""
    )
    for name, value in weights.items():
        small = value + rng.normal(0, 0.01, value.shape)
        model.graph.initializer.append(numpy_helper.from_array(small.astype(np.float32), name))
    folder = tmp_path_factory.mktemp("stream")
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "calibration.npz", x=rng.normal(size=(48, 1, 20, 5)).astype(np.float32))
    return folder


def test_pruned_and_recovered(home: Path, tmp_path: Path) -> None:
    raw = {
        "model": {"name": "m", "version": "1", "source": "model.onnx",
                  "inputs": {"x": {"shape": [1, "T", 5], "typical": [1, 20, 5]}}},
        "data": {"calibration": "calibration.npz"},
        "prune": {"multiple": 1, "budget": {"macs": 0.6}},
        "recover": {},
    }  # fmt: skip
    recipe, models = parse_recipe(raw, home), {"export": home / "model.onnx"}
    found = {}
    for stage in (pruning, recovery):
        folder = tmp_path / stage.__name__
        folder.mkdir()
        model = list(models.values())[-1]
        work = Job(recipe=recipe, target=load_target("cpu"), folder=folder, model=model,
                   models={"export": models["export"]})  # fmt: skip
        found[stage] = stage.run(work)
        models[stage.__name__] = work.output_model()
    rows = {row["group"]: row["kept"] for row in found[pruning]["groups"]}
    sizes = {t.name: list(t.dims) for t in onnx.load(list(models.values())[-1]).graph.initializer}
    left = sizes["in"][1]
    assert left in rows.values() and left <= 20
    assert sizes["y" + MATRIX] == [left, WIDE]
    # Work by hand: 5 and twice 16 weights per channel, then the product.
    work_left = (5 * left + 2 * sizes["up"][1] * left + left * WIDE) / (37 * WIDE)
    assert work_left == pytest.approx(found[pruning]["budget"]["left"], abs=1e-4)
    assert work_left <= 0.6
    x = np.random.default_rng(1).normal(size=(1, 20, 5)).astype(np.float32)
    whole, cut, repaired = (
        open_local(path.read_bytes()).run({"x": x})[0] for path in models.values()
    )
    assert cut.shape == repaired.shape == whole.shape
    spread = whole.var()
    assert ((cut - whole) ** 2).mean() > 0.1 * spread  # channels that went are zero
    assert ((repaired - whole) ** 2).mean() < 0.005 * spread  # measured: see the noise above


def test_labels_that_nothing_reads_are_told(home: Path, tmp_path: Path) -> None:
    np.save(home / "labels.npy", np.zeros(48, np.int64))
    raw = {
        "model": {"name": "m", "version": "1", "source": "model.onnx",
                  "inputs": {"x": {"shape": [1, "T", 5], "typical": [1, 20, 5]}}},
        "data": {"calibration": "calibration.npz"},
        "recover": {"labels": "labels.npy"},
    }  # fmt: skip
    work = Job(recipe=parse_recipe(raw, home), target=load_target("cpu"), folder=tmp_path,
               model=home / "model.onnx", models={"export": home / "model.onnx"})  # fmt: skip
    notes = recovery.run(work)["notes"]
    assert any("labels are not read" in note["text"] for note in notes)
