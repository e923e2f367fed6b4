"""What a student learns from its teacher: the tensors compared, and the loss of a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
import torch

from edgewright.data import Feed
from edgewright.errors import BadInput
from edgewright.recipe import FEW, HOLD, Distillation
from edgewright.recover import losses
from edgewright.recover.batches import (
    Pair,
    Student,
    Teacher,
    rows_of_step,
    runtime_teacher,
)
from edgewright.recover.losses import Target
from edgewright.recover.ops import Tensor
from edgewright.recover.training import Score
from edgewright.recover.variants import Grown, make_pool, variable
from edgewright.settings import suggestion


@dataclass(frozen=True)
class Match:
    """One pair of tensors to bring together: what, how, and with which weight."""

    loss: Literal["output", "feature", "map", "spatial"]
    student: str
    teacher: str
    weight: float
    target: Target | None = None


def choose_targets(
    teacher: onnx.ModelProto | None, student: onnx.ModelProto | None, outputs: tuple[str, ...],
    settings: Distillation,
) -> list[tuple[Target, Target]]:  # fmt: skip
    """How each float output is compared: (in the student, in the teacher)."""
    found = []
    for name in outputs:
        sides = []
        for model in (student, teacher):
            if model is None:
                side = Target(name, "value", name)
            else:
                side = losses.find_target(model, name)
            sides.append(side)
        order = ("soft", "binary", "logits", "value")
        kind = min((s.kind for s in sides), key=order.index)
        for k, side in enumerate(sides):
            if settings.outputs == "soft" and kind in ("value", "logits"):
                sides[k] = Target(name, "soft", side.tensor)
            elif settings.outputs == "value":
                sides[k] = Target(name, "value", name)
            elif side.kind != kind and kind == "logits":
                sides[k] = Target(name, kind, name)
            elif side.kind != kind:  # its graph shows no logits where the other's does
                axis = next(s.axis for s in sides if s.kind == kind)
                sides[k] = Target(name, kind, name, axis, probability=True)
        found.append((sides[0], sides[1]))
    return found


def choose_matches(
    teacher: onnx.ModelProto | None, student: onnx.ModelProto | None,
    targets: list[tuple[Target, Target]], settings: Distillation,
) -> tuple[list[Match], list[str]]:  # fmt: skip
    """Everything that is compared, and what was asked for but cannot be, in words."""
    found = [
        Match("output", s.tensor, t.tensor, settings.soft / len(targets), s) for s, t in targets
    ]
    notes: list[str] = []
    inner: list[tuple[Literal["feature", "map", "spatial"], list[str], float]] = []
    if settings.feature:
        names = list(settings.features)
        if not names and student is not None:
            names = [n for s, _ in targets if (n := losses.last_feature(student, s))]
        inner.append(("feature", list(dict.fromkeys(names)), settings.feature))
    if settings.attention and student is not None:
        if maps := losses.attention_maps(student):
            inner.append(("map", maps, settings.attention))
        else:
            inner.append(("spatial", losses.spatial_features(student), settings.attention))
    for kind, names, weight in inner:
        sides = [{o for n in m.graph.node for o in n.output} for m in (student, teacher) if m]
        both = [n for n in names if len(sides) == 2 and n in sides[0] and n in sides[1]]
        if kind == "feature" and (lost := [n for n in settings.features if n not in both]):
            raise BadInput(
                f"recover.distill.features: no tensor '{lost[0]}' in both models",
                hint=suggestion(lost[0], set.intersection(*sides) if sides else ()),
            )
        if not both:
            notes.append(f"no tensor for the {kind} loss is in both models")
        found += [Match(kind, n, n, weight / len(both)) for n in both]
    if settings.attention and student is None:
        notes.append("no attention loss: the student's graph is not known")
    return found, notes


def pair_loss(match: Match, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    if match.loss == "output":
        assert match.target is not None
        dense = student.dim() > 2  # many answers for each sample
        heat = 1.0 if dense else temperature
        return losses.output_loss(match.target, student, teacher, heat, dense)
    function = {"feature": losses.feature_loss, "map": losses.map_loss}
    return function.get(match.loss, losses.spatial_loss)(student, teacher)


@dataclass
class Lesson:
    """Everything a step needs; `loss` is what `fit` minimises."""

    pair: Pair
    matches: list[Match]
    targets: list[tuple[Target, Target]]
    kept: Mapping[tuple[str, int], np.ndarray]
    settings: Distillation
    labels: np.ndarray | None
    train: list[int]
    held: list[int]
    real: int  # samples; those behind are varied ones
    made: int  # varied ones that are trained on in one pass; the next may take others
    penalty: Callable[[int], Tensor] | None = None
    behind: list[Tensor] = field(default_factory=list)  # weights that only outputs depend on

    def values(
        self, rows: list[int], mix: np.random.Generator | None, again: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The compared tensors: logits where outputs are compared, without what was pruned."""
        mine, theirs = self.pair.both(rows, mix, again)
        by_output = {s.output: (s, t) for s, t in self.targets}
        for k, match in enumerate(self.matches):
            if match.target is not None:
                s, t = by_output[match.target.output]
                mine[k], theirs[k] = s.logits(mine[k]), t.logits(theirs[k])
            else:
                theirs[k] = losses.keep_rows(match.teacher, theirs[k], self.kept)
            if not comparable(match, mine[k], theirs[k]):
                raise BadInput(
                    f"student and teacher differ in the shape of '{match.student}'",
                    expected=f"{list(theirs[k].shape)}, as the teacher has it",
                    found=str(list(mine[k].shape)),
                )
        return mine, theirs

    def backward(self, step: int, rng: np.random.Generator) -> float:
        """Add the gradient of one step; its loss. No varied sample comes twice."""
        drawn = rows_of_step(self.train, self.settings.batch, step, self.settings.seed)
        rows = [k + epoch * self.made if k >= self.real else k for k, epoch in drawn]
        total = self.gradient(rows, rng if self.settings.mix and step % 2 else None)
        if self.penalty is not None:
            more = self.penalty(step)
            more.backward()
            total += float(more.detach())
        return total

    def gradient(
        self,
        rows: list[int],
        mix: np.random.Generator | None = None,
        share: float = 1.0,
        again: bool = False,
    ) -> float:
        """Add the gradient of a share of the mean loss of some samples; that share of the loss."""
        total = 0.0
        for group in self.pair.groups(rows):
            mine, theirs = self.values(group, mix, again)
            pairs = zip(self.matches, mine, theirs, strict=True)
            terms = [m.weight * pair_loss(m, s, t, self.settings.temperature) for m, s, t in pairs]
            loss = torch.stack(terms).sum()
            real = [k for k in group if k < self.real]  # made-up samples have no label
            if self.labels is not None and self.settings.hard and mix is None and real:
                truth = torch.from_numpy(self.labels[real])
                answers = mine[0][[group.index(k) for k in real]]
                check_classes(truth, answers)
                hard = torch.nn.functional.cross_entropy(answers, truth)
                loss = (1 - self.settings.hard) * loss + self.settings.hard * hard
            part = share * len(group) / len(rows)
            (loss * part).backward(retain_graph=bool(self.behind))
            total += part * float(loss.detach())
            if self.behind:
                self.teach_behind(mine, theirs, part)
        return total

    def teach_behind(self, mine: list[Tensor], theirs: list[Tensor], part: float) -> None:
        """Add a part of the gradient of the outputs' mean loss to the weights behind the features,
        and to no others."""
        heat = self.settings.temperature
        pairs = zip(self.matches, mine, theirs, strict=True)
        terms = [pair_loss(m, s, t, heat) for m, s, t in pairs if m.target is not None]
        (torch.stack(terms).mean() * part).backward(inputs=self.behind)

    def whole_gradient(self) -> float:
        """Add the gradient of the mean loss of all training samples, in batches; the loss."""
        size, count = self.settings.batch, len(self.train)
        parts = [self.train[at : at + size] for at in range(0, count, size)]
        return sum(self.gradient(rows, share=len(rows) / count, again=True) for rows in parts)

    def measure(self) -> Score:
        """How far the outputs are from the teacher's on held-out samples, at temperature 1."""
        distance = equal = 0.0
        with torch.no_grad():
            for start in range(0, len(self.held), self.settings.batch):
                for group in self.pair.groups(self.held[start : start + self.settings.batch]):
                    mine, theirs = self.values(group, None, again=True)
                    for match, s, t in zip(self.matches, mine, theirs, strict=True):
                        if match.target is None:
                            continue
                        share = len(group) / len(self.held) / len(self.targets)
                        distance += share * float(pair_loss(match, s, t, 1.0))
                        equal += share * losses.agreement(match.target, s, t)
        return Score(distance if np.isfinite(distance) else float("inf"), equal)


def check_classes(truth: Tensor, answers: Tensor) -> None:
    """BadInput for labels that are no class of answers (samples, classes)."""
    if int(truth.max()) >= answers.shape[1]:
        raise BadInput(
            "labels to learn from",
            expected=f"classes 0 to {answers.shape[1] - 1}, which the first output tells apart",
            found=str(int(truth.max())),
        )


def comparable(match: Match, student: Tensor, teacher: Tensor) -> bool:
    """Whether the shapes fit; where energy lies is compared whatever the number of channels."""
    if match.loss == "spatial" and student.dim() == teacher.dim() > 2:
        return student.shape[2:] == teacher.shape[2:]
    return student.shape == teacher.shape


def drop_unlike(lesson: Lesson) -> list[str]:
    """Leave out inner tensors of another shape that nobody asked for by name; say which."""
    first = lesson.held[0]
    with torch.no_grad():
        mine, theirs = lesson.pair.both([first])
    found, notes, axes = [], [], []
    for match, axis, s, t in zip(lesson.matches, lesson.pair.axes, mine, theirs, strict=True):
        t = losses.keep_rows(match.teacher, t, lesson.kept) if match.target is None else t
        named = match.target is not None or match.student in lesson.settings.features
        if named or comparable(match, s, t):
            found.append(match)
            axes.append(axis)
        else:
            notes.append(
                f"no {match.loss} loss on '{match.student}': {list(s.shape)} in the student, "
                f"{list(t.shape)} in the teacher"
            )
    lesson.matches = found
    lesson.pair.mine = [m.student for m in found]
    lesson.pair.theirs = [m.teacher for m in found]
    lesson.pair.axes = axes
    return notes


def float_outputs(model: onnx.ModelProto) -> tuple[str, ...]:
    """Outputs that a gradient can reach: a float type, or whole numbers made by an ArgMax."""
    arg = {o for n in model.graph.node if n.op_type == "ArgMax" for o in n.output}
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.UNDEFINED)
    return tuple(
        v.name for v in model.graph.output if v.type.tensor_type.elem_type in kinds or v.name in arg
    )


def check_names(teacher: onnx.ModelProto, outputs: tuple[str, ...]) -> None:
    """BadInput where the teacher has no output of a name the student has."""
    names = [o.name for o in teacher.graph.output]
    if missing := [n for n in outputs if n not in names]:
        raise BadInput(
            f"the teacher has no output '{missing[0]}'", expected=f"one of {names}",
            hint="student and teacher must name their outputs alike",
        )  # fmt: skip


def make_lesson(
    teacher: onnx.ModelProto | Teacher,
    student: Student,
    graph: onnx.ModelProto | None,
    feeds: list[Feed],
    settings: Distillation,
    kept: Mapping[tuple[str, int], np.ndarray],
    labels: np.ndarray | None,
    wild: bool = False,
) -> tuple[Lesson, list[str]]:
    """Student and teacher, ready to train, and notes on what cannot be compared.

    wild: varied samples to train on may be far from any sample, for none of them comes twice.
    """
    known = teacher if isinstance(teacher, onnx.ModelProto) else None
    outputs = float_outputs(graph) if graph else student.outputs
    if not outputs:
        raise BadInput("the model has no float output", hint="there is nothing to learn from")
    if known is not None:
        check_names(known, outputs)
    targets = choose_targets(known, graph, outputs, settings)
    matches, notes = choose_matches(known, graph, targets, settings)
    run: Teacher
    if isinstance(teacher, onnx.ModelProto):
        run = runtime_teacher(
            teacher, list(dict.fromkeys(m.teacher for m in matches)), settings.threads
        )
    else:
        run = teacher
    held = list(range(HOLD - 1, len(feeds), HOLD))
    train = [k for k in range(len(feeds)) if k % HOLD != HOLD - 1]
    pools = [  # what it is judged by stays near to the samples
        make_pool([feeds[k] for k in held], settings.seed),
        make_pool([feeds[k] for k in train], settings.seed, wild),
    ]
    vary = settings.vary if variable(feeds, settings.vary) else 0
    if settings.vary and not vary and len(feeds) <= FEW:
        notes.append("no varied samples: no input is a sample with places, or whole numbers")
    made = [vary * len(pool.bases) for pool in pools]
    grown = Grown(feeds, pools[0], made[0], pools[1])
    pair = Pair(student, run, [(m.student, m.teacher) for m in matches], grown, feeds)
    held += range(len(feeds), len(feeds) + made[0])
    train += range(len(feeds) + made[0], len(feeds) + sum(made))
    if not pair.stacked:
        notes.append("the graph takes one sample at a time: gradients of a batch are added up")
    if labels is not None and len(labels) < len(feeds):
        raise BadInput("labels", expected=f"one for each of {len(feeds)} samples",
                       found=str(len(labels)))  # fmt: skip
    lesson = Lesson(
        pair, matches, targets, kept, settings, labels, train, held, len(feeds), made[1]
    )
    notes += drop_unlike(lesson)
    if graph is not None and not settings.soft:
        lesson.behind = only_outputs(graph, lesson)
    return lesson, notes


def only_outputs(graph: onnx.ModelProto, lesson: Lesson) -> list[Tensor]:
    """The weights that none of the inner tensors depends on.

    Without a loss of the outputs nothing would move them: they would go on reading features that
    are about to change (compensation fitted them to those of the start).
    """
    reached = {
        read
        for match in lesson.matches
        if match.target is None
        for node in losses.upstream(graph, match.student)
        for read in (*node.input, *node.output)
    }
    return [w for name, w in lesson.pair.student.weights.items() if name not in reached]
