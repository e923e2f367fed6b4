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
from edgewright.recipe import Distillation
from edgewright.recover.batches import Student, Teacher, digest_of, take_samples
from edgewright.recover.executor import GraphModule, to_module
from edgewright.recover.lesson import Lesson, make_lesson
from edgewright.recover.rounding import rounding_of
from edgewright.recover.training import Outcome, Schedule, fit, repeatable
from edgewright.stage import Tell, say_nothing


def distill(
    teacher: onnx.ModelProto | Teacher,
    student: onnx.ModelProto | Student,
    feeds: Callable[[], Iterable[Feed]],
    settings: Distillation,
    *,
    kept: Mapping[tuple[str, int], np.ndarray] = {},
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

    The result is never farther from the teacher on held-out samples than the start. Raises
    BadInput for operators without gradients, outputs that differ, and too few samples.
    """

    def hooks(weights: Mapping[str, torch.nn.Parameter]) -> Hooks:
        return None, zeros_kept(weights) if settings.keep_zeros else None

    return train(teacher, student, feeds, settings, kept=kept, labels=labels, hooks=hooks,
                 keep="best", folder=folder, tell=tell)  # fmt: skip


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
    labels: np.ndarray | None = None,
    hooks: Callable[[Mapping[str, torch.nn.Parameter]], Hooks],
    keep: Literal["best", "last"] = "last",
    folder: Path | None = None,
    tell: Tell = say_nothing,
    more: bytes = b"",
) -> dict[str, Any]:
    """What `distill` and soft pruning share; see `distill`.

    hooks: what the weights give: a penalty and what follows a step. keep: which weights are the
    result. more: whatever else decides the result, for the checkpoint's digest.
    """
    samples, note = take_samples(feeds(), settings.samples)
    graph = student if isinstance(student, onnx.ModelProto) else None
    with repeatable(settings.threads):
        pupil: Student = to_module(student) if isinstance(student, onnx.ModelProto) else student
        lesson, notes = make_lesson(teacher, pupil, graph, samples, settings, kept, labels)
        models = [m for m in (teacher, graph) if isinstance(m, onnx.ModelProto)]
        parts = [m.SerializeToString(deterministic=True) for m in models]
        parts += [json.dumps(asdict(settings), sort_keys=True).encode(), more]
        parts += [] if labels is None else [np.ascontiguousarray(labels).tobytes()]
        if settings.quantized:
            if graph is None or not isinstance(pupil, GraphModule):
                raise BadInput("recover.distill.quantized", expected="an ONNX graph as student")
            pupil.rounding = rounding_of(graph, pupil, samples)
        lesson.penalty, after = hooks(pupil.weights)
        outcome = fit(
            pupil.weights,
            lesson.backward,
            lesson.measure,
            schedule_of(settings),
            digest=digest_of(samples, *parts),
            folder=folder,
            after=after,
            keep=keep,
            tell=tell,
        )
    if graph is not None:
        pupil.write_back(graph)  # type: ignore[attr-defined]
    return report(outcome, lesson, [n for n in (note, *notes) if n])


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
