"""Soft pruning in the stage `prune`: a model trained to do without units before they are cut.

The losses are those of distillation, the teacher is the model itself as it was: no labels. See
`recover.soft` for the three ways; this file gives them what the recipe says.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnx

from edgewright.cuts import SoftTraining
from edgewright.data import Feed
from edgewright.prune.labels import Analysis
from edgewright.prune.select import Selection
from edgewright.recipe import Distillation
from edgewright.recover import needs_torch
from edgewright.stage import Tell

Feeds = Callable[[], Iterable[Feed]]
Told = dict[str, Any]
HOWEVER = "no prune.soft"


def lesson_of(training: SoftTraining) -> Distillation:
    """The settings of the training, as distillation has them."""
    return Distillation(
        steps=training.steps,
        rate=training.rate,
        batch=training.batch,
        samples=training.samples,
        seed=training.seed,
        threads=training.threads,
        vary=0,
    )


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def grown(
    model: onnx.ModelProto, analysis: Analysis, remove: frozenset[int], feeds: Feeds,
    training: SoftTraining, folder: Path | None, tell: Tell,
) -> tuple[onnx.ModelProto, Told]:  # fmt: skip
    """A copy in which a growing decay has emptied the units to remove, and how that went."""
    with needs_torch("prune.soft", HOWEVER):
        from edgewright.recover.soft import grow

    trained = copied(model)
    settings = lesson_of(training)
    told = grow(model, trained, analysis, remove, feeds, settings, folder=folder, tell=tell)
    return trained, told


def thinned(
    model: onnx.ModelProto, analysis: Analysis, feeds: Feeds,
    training: SoftTraining, folder: Path | None, tell: Tell,
) -> tuple[onnx.ModelProto, Told]:  # fmt: skip
    """A copy trained under group lasso on all units, and how that went."""
    with needs_torch("prune.soft", HOWEVER):
        from edgewright.recover.soft import lasso

    trained = copied(model)
    told = lasso(
        model, trained, analysis, feeds, lesson_of(training),
        strength=training.strength, folder=folder, tell=tell,
    )  # fmt: skip
    return trained, told


def regrown(
    model: onnx.ModelProto, analysis: Analysis,
    choose: Callable[[dict[int, float]], Selection], feeds: Feeds,
    training: SoftTraining, folder: Path | None, tell: Tell,
) -> tuple[onnx.ModelProto, Selection, Told]:  # fmt: skip
    """A copy whose weakest units were zeroed again and again, what went in the end, how it went.

    choose: from every unit's share of its group's energy at the start.
    """
    with needs_torch("prune.soft", HOWEVER):
        from edgewright.recover.soft import regrow

    trained = copied(model)
    last: list[Selection] = []

    def pick(energy: dict[int, float]) -> Iterable[int]:
        last[:] = [choose(energy)]
        return last[0].remove

    told, _ = regrow(
        model, trained, analysis, pick, feeds, lesson_of(training),
        every=training.every, folder=folder, tell=tell,
    )  # fmt: skip
    return trained, last[0], told
