"""Knowledge distillation: the original teaches the pruned graph on unlabelled inputs."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch

from edgewright.data import Feed
from edgewright.errors import BadInput
from edgewright.recipe import FEW, Distillation
from edgewright.recover.batches import Student, Teacher, digest_of, take_samples
from edgewright.recover.coordinates import make_coordinates
from edgewright.recover.executor import GraphModule, to_module
from edgewright.recover.lesson import Lesson, make_lesson
from edgewright.recover.newton import descend, follow
from edgewright.recover.rounding import rounding_of
from edgewright.recover.training import CHECKPOINT, Outcome, Schedule, fit, repeatable
from edgewright.recover.variants import variable
from edgewright.stage import Tell, say_nothing

FEWEST_PASSES = 4  # of newton over the samples, however few `steps` are


def distill(
    teacher: onnx.ModelProto | Teacher,
    student: onnx.ModelProto | Student,
    feeds: Callable[[], Iterable[Feed]],
    settings: Distillation,
    *,
    kept: Mapping[tuple[str, int], np.ndarray] = {},
    start: Callable[[bool], onnx.ModelProto] | None = None,
    labels: np.ndarray | None = None,
    folder: Path | None = None,
    tell: Tell = say_nothing,
) -> dict[str, Any]:
    """Train the student in place to do what the teacher does; report.

    teacher: the original, or a function (feed, names) -> arrays. student: the pruned graph,
    whose stored tensors change, or any `Student` (see `batches.Wrapped`). kept: what `cut` kept
    of each tensor, so that inner features can be compared. labels: whole numbers, one for each
    sample in the order of `feeds`, read only where `settings.hard` is above 0. folder: for the
    checkpoint; a run that was killed goes on from there and ends with the same bytes.

    start: gives the student's graph with weights that were fitted on all samples (True), or on
    those that training does not hold out. Training that sees no varied sample twice goes from the
    former, and is judged by varied samples as well. All other begins at the latter. What held-out
    samples have shown to be good is then done again with all, from the former (newton), or this
    is the result where training gained nothing. With `minutes` that is left out where more than
    half of them are gone: it may take as long again.

    The result is never farther from the teacher on held-out samples than the start, but where it
    was done again with all: no sample is left to judge that by. Raises BadInput for operators
    without gradients, outputs that differ, and too few samples.
    """

    def hooks(weights: Mapping[str, torch.nn.Parameter]) -> Hooks:
        return None, zeros_kept(weights) if settings.keep_zeros else None

    return train(teacher, student, feeds, settings, kept=kept, start=start, labels=labels,
                 hooks=hooks, keep="best", folder=folder, tell=tell)  # fmt: skip


Penalty = Callable[[int], torch.Tensor] | None  # of a step, added to its loss
After = Callable[[int], None] | None  # called when a step is done
Hooks = tuple[Penalty, After]


def train(
    teacher: onnx.ModelProto | Teacher,
    student: onnx.ModelProto | Student,
    feeds: Callable[[], Iterable[Feed]],
    settings: Distillation,
    *,
    kept: Mapping[tuple[str, int], np.ndarray] = {},
    start: Callable[[bool], onnx.ModelProto] | None = None,
    labels: np.ndarray | None = None,
    hooks: Callable[[Mapping[str, torch.nn.Parameter]], Hooks],
    keep: Literal["best", "last"] = "last",
    memory: dict[str, list[float]] | None = None,
    folder: Path | None = None,
    tell: Tell = say_nothing,
    more: bytes = b"",
) -> dict[str, Any]:
    """What `distill` and soft pruning share; see `distill`.

    hooks: what the weights give: a penalty and what follows a step. keep: which weights are the
    result. memory: what the latter has to know from step to step, for the checkpoint. more:
    whatever else decides the result, for the checkpoint's digest.
    """
    samples, note = take_samples(feeds(), settings.samples)
    graph = student if isinstance(student, onnx.ModelProto) else None
    against = against_newton(settings, keep, graph, samples)
    if against and settings.solver == "newton":
        raise BadInput("recover.distill.solver newton", found=against, hint='use "adam"')
    from_all = bool(against) and variable(samples, settings.vary)
    if graph is not None and start is not None:
        graph.CopyFrom(start(from_all))
    with repeatable(settings.threads):
        pupil: Student = to_module(student) if isinstance(student, onnx.ModelProto) else student
        lesson, notes = make_lesson(
            teacher, pupil, graph, samples, settings, kept, labels, wild=from_all and settings.wild
        )
        models = [m for m in (teacher, graph) if isinstance(m, onnx.ModelProto)]
        parts = [m.SerializeToString(deterministic=True) for m in models]
        parts += [json.dumps(asdict(settings), sort_keys=True).encode(), more]
        parts += [] if labels is None else [np.ascontiguousarray(labels).tobytes()]
        if settings.quantized:
            if graph is None or not isinstance(pupil, GraphModule):
                raise BadInput("recover.distill.quantized", expected="an ONNX graph as student")
            pupil.rounding = rounding_of(graph, pupil, samples)
        lesson.penalty, after = hooks(pupil.weights)
        digest, schedule = digest_of(samples, *parts), schedule_of(settings)
        if graph is None or not isinstance(pupil, GraphModule) or against:
            solver = "adam"
            outcome = fit(pupil.weights, lesson.backward, lesson.measure, schedule, digest=digest,
                          folder=folder, after=after, keep=keep, memory=memory,
                          tell=tell)  # fmt: skip
        else:
            solver = "newton"
            passes = max(FEWEST_PASSES, settings.steps * settings.batch // len(lesson.train))
            coordinates = make_coordinates(graph, pupil, lesson, settings.seed)
            outcome = descend(coordinates, lesson.whole_gradient, lesson.measure, schedule, passes,
                              digest=digest, folder=folder, tell=tell)  # fmt: skip
        if graph is not None:
            pupil.write_back(graph)  # type: ignore[attr-defined]
        again = None
        if (
            graph is not None
            and start is not None
            and not from_all
            and (solver == "newton" or not outcome.best_step)
        ):
            if settings.minutes and outcome.best_step and outcome.seconds > 30 * settings.minutes:
                notes.append("no time was left to train with the held-out samples, too")
            else:
                graph.CopyFrom(start(True))
                again = repeat(teacher, graph, samples, settings, kept, labels, outcome, tell)
        if folder is not None:
            (folder / CHECKPOINT).unlink(missing_ok=True)
    found = report(outcome, lesson, [n for n in (note, *notes) if n])
    return {"solver": solver, **found, "with all samples": again}


def repeat(
    teacher: onnx.ModelProto | Teacher,
    graph: onnx.ModelProto,
    samples: list[Feed],
    settings: Distillation,
    kept: Mapping[tuple[str, int], np.ndarray],
    labels: np.ndarray | None,
    outcome: Outcome,
    tell: Tell,
) -> dict[str, Any]:
    """As many steps of newton as were best before, with all samples, in place; the losses."""
    if not outcome.best_step:
        return {"samples": len(samples), "steps": 0}
    pupil = to_module(graph)
    lesson, _ = make_lesson(teacher, pupil, graph, samples, settings, kept, labels)
    lesson.train = sorted([*lesson.train, *lesson.held])
    coordinates = make_coordinates(graph, pupil, lesson, settings.seed)
    share, steps = outcome.share, outcome.best_step
    found = follow(coordinates, lesson.whole_gradient, steps, share, tell)
    pupil.write_back(graph)
    return {"samples": len(samples), **found}


def against_newton(
    settings: Distillation, keep: str, graph: onnx.ModelProto | None, samples: list[Feed]
) -> str:
    """Why not all samples are seen at every step, "" where they are."""
    if settings.solver == "adam":
        return "adam is asked for"
    reasons = {
        "the student is no ONNX graph": graph is None,
        "a loss that changes from step to step": keep == "last",
        "weights that are rounded in training": settings.quantized,
        "weights that are to stay zero": settings.keep_zeros,
        "no loss of the outputs": not settings.soft,
    }
    if settings.solver == "auto":
        reasons |= {
            "a rate is given": settings.rate > 0,
            f"more than {FEW} samples": len(samples) > FEW,
            "samples that can be varied without end": variable(samples, settings.vary),
        }
    return next((reason for reason, holds in reasons.items() if holds), "")


def schedule_of(settings: Distillation) -> Schedule:
    return Schedule(
        steps=settings.steps,
        minutes=settings.minutes,
        rate=settings.rate,
        patience=settings.patience,
        seed=settings.seed,
    )


def zeros_kept(weights: Mapping[str, torch.nn.Parameter]) -> Callable[[int], None]:
    """Sets back to zero, after each step, what is zero now."""
    masks = [w.detach() != 0 for w in weights.values()]

    def after(step: int) -> None:
        with torch.no_grad():
            for weight, mask in zip(weights.values(), masks, strict=True):
                weight.mul_(mask)

    return after


def report(outcome: Outcome, lesson: Lesson, notes: list[str]) -> dict[str, Any]:
    """What was trained, on what, how it ended, and the held-out figures."""
    return {
        "outputs": [{"name": s.output, "compared as": s.kind} for s, _ in lesson.targets],
        "losses": [
            {"loss": m.loss, "tensor": m.student, "weight": round(m.weight, 4)}
            for m in lesson.matches
        ],
        "trained": sum(w.numel() for w in lesson.pair.student.weights.values()),
        "samples": {"training": len(lesson.train), "held out": len(lesson.held)},
        "notes": notes,
        **asdict(outcome),
    }
