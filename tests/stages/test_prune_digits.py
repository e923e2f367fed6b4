"""A trained net pruned without labels: what criterion and compensation are worth on real digits."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgewright.prune.costs import Costs
from edgewright.prune.criteria import scores
from edgewright.prune.cut import cut
from edgewright.prune.labels import analyse
from edgewright.prune.select import select
from edgewright.recipe import load_recipe
from edgewright.recover.compensate import compensate
from edgewright.runtime.local import open_local
from edgewright.stage import Job, say_nothing
from edgewright.target import load_target

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnx.ModelProto, list, tuple]:
    """The simplified model, calibration feeds, test pictures with labels."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from edgewright import export, simplify

    recipe, model = load_recipe(DIGITS / "recipe.toml"), None
    for name, stage in (("export", export), ("simplify", simplify)):
        folder = tmp_path_factory.mktemp(name)
        work = Job(recipe=recipe, target=load_target("cpu"), folder=folder, model=model)
        stage.run(work)
        model = work.output_model()
    assert model is not None
    sys.path.insert(0, str(DIGITS))
    try:
        import data  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(DIGITS))
    return onnx.load(str(model)), list(data.calibration()), data.split("test")


def accuracy(model: onnx.ModelProto, test: tuple[np.ndarray, np.ndarray]) -> float:
    session = open_local(model.SerializeToString())
    found = [int(session.run({"image": x[None]})[0].argmax()) for x in test[0]]
    return float((np.array(found) == test[1]).mean())


def test_pruning_without_labels_beats_slicing_and_chance(digits: tuple) -> None:
    model, calibration, test = digits
    whole = accuracy(model, test)
    analysis = analyse(model)

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        return iter(calibration[:64])

    plain, repaired = {}, {}
    for criterion in ("hessian", "random"):
        ranking = scores(model, analysis, criterion, feeds, say_nothing)
        chosen = select(analysis, ranking, Costs(model, analysis, "macs"), 0.15)
        assert 0.13 < chosen.share <= 0.15
        smaller, kept = cut(model, analysis, chosen.remove)
        plain[criterion] = accuracy(smaller, test)
        rows = compensate(model, smaller, kept, feeds, say_nothing)
        repaired[criterion] = accuracy(smaller, test)
        assert any(row["op"] == "Gemm" and not row["reason"] for row in rows)
    # Of 899 pictures, 0.986 right before; at 0.4 of the work even random units leave 0.982.
    assert repaired["hessian"] > whole - 0.1
    assert repaired["hessian"] > plain["hessian"] + 0.1
    assert repaired["hessian"] > repaired["random"] + 0.02
