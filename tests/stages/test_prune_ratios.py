"""[prune.ratios]: groups cut to a share of their units, with a budget for the others or alone."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from conftest import write_tiny
from onnx import numpy_helper

from edgewright import pruning
from edgewright.errors import BadInput
from edgewright.recipe import parse_recipe
from edgewright.stage import Job
from edgewright.target import load_target

DATA = {
    "calibration": "calibration.npz", "evaluation": "evaluation.npz", "metric": "score.py:score"
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny")).parent


def prune(
    home: Path, folder: Path, recover: dict[str, Any] | None = None, **table: Any
) -> tuple[dict[str, Any], dict[str, int]]:
    """The report, and how many channels each convolution (16, 32 and 32 before) makes."""
    raw = {
        "model": {"name": "m", "version": "1", "source": "model.onnx"},
        "data": DATA,
        "prune": {"criterion": "l2", "multiple": 1, **table},
        **({} if recover is None else {"recover": recover}),
    }
    model = home / "model.onnx"
    work = Job(
        recipe=parse_recipe(raw, home), target=load_target("cpu"), folder=folder,
        model=model, models={"export": model},
    )  # fmt: skip
    report = pruning.run(work)
    pruned = onnx.load(work.output_model())
    return report, {t.name: t.dims[0] for t in pruned.graph.initializer if t.name[0] == "w"}


def test_alone_they_leave_the_other_groups_whole(tiny: Path, tmp_path: Path) -> None:
    report, wide = prune(tiny, tmp_path, ratios={"w1": 0.4})
    assert wide == {"w0": 16, "w1": 13, "w2": 32}  # 12.8, rounded
    assert report["budget"]["asked"] is None and report["ratios"] == {"w1": 0.4}
    # Positions 12x12, 6x6, 3x3; weights 9 to a pair of channels; the classifier sees 9 positions.
    macs = [144 * 9 * 16 + 36 * 9 * 16 * w + 9 * 9 * w * 32 + 9 * 32 * 10 for w in (32, 13)]
    assert report["budget"]["left"] == pytest.approx(macs[1] / macs[0], abs=1e-4)


def test_the_longest_pattern_counts_and_widths_are_multiples(tiny: Path, tmp_path: Path) -> None:
    report, wide = prune(tiny, tmp_path, ratios={"w*": 0.5, "w[12]": 0.7, "w2": 0.99}, multiple=4)
    assert wide == {"w0": 8, "w1": 24, "w2": 32}  # 22.4 lies nearer to 24
    rows = {row["group"]: row["reason"] for row in report["groups"]}
    assert rows["w2"] == "the ratio of the recipe rounds to all of its 32 units"


def test_the_other_groups_meet_the_budget(tiny: Path, tmp_path: Path) -> None:
    for steps in (1, 2):
        table = {"ratios": {"w1": 0.75}, "budget": {"macs": 0.5}, "steps": steps}
        report, wide = prune(tiny, tmp_path, **table)
        assert wide["w1"] == 24 and wide["w0"] < 16
        assert 0.4 < report["budget"]["left"] <= 0.5


def test_what_costs_too_much_is_weakened(tiny: Path, tmp_path: Path) -> None:
    report, wide = prune(tiny, tmp_path, ratios={"w*": 0.1}, max_drop=0.2)
    assert report["tries"][0]["drop"] > 0.2 and "the cut by ratios" in report["notes"][0]["text"]
    assert 3 < wide["w1"] <= 32


def test_a_pattern_that_fits_nothing_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no group is called 'w9'"):
        prune(tiny, tmp_path, ratios={"w9": 0.5})
    with pytest.raises(BadInput, match=r"exclude: no group is called 'W1'.*known: w0, w1, w2"):
        prune(tiny, tmp_path, ratios={"w1": 0.5}, exclude=["w2", "W1"])


def test_a_graph_without_layers_is_refused_as_one(tmp_path: Path) -> None:
    """Not for its multiply-accumulates, of which there are none to share out."""
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[1, 4] x) => (float[1, 4] y)'
    onnx.save(onnx.parser.parse_model(text + " { y = Relu (x) }"), tmp_path / "model.onnx")
    with pytest.raises(BadInput, match="nothing in this model can be pruned"):
        prune(tmp_path, tmp_path, budget={"macs": 0.5})


def test_a_last_round_with_nothing_to_do_leaves_slices_of_the_original(
    tiny: Path, tmp_path: Path
) -> None:
    """Rounds are judged compensated; what goes to `recover` must not be, or it repairs nothing."""
    report, wide = prune(tiny, tmp_path, {}, budget={"macs": 0.6}, multiple=16, steps=4)
    assert report["budget"]["left"] <= 0.6 and wide["w1"] == 16
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        for path in (tiny / "model.onnx", tmp_path / "model.onnx")
    )
    assert all(np.isin(after[name], before[name]).all() for name in wide)
