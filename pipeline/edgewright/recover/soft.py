"""Soft pruning: training that empties units before the hard cut takes them.

`grow`: the units are chosen; weight decay on all they own grows until they are nothing, while
the rest learns to do without them (Wang et al., Neural Pruning via Growing Regularization,
2012.09243). `lasso`: group sparsity on all units, nobody chosen yet (Wen et al., 1608.03665).
Both shrink the weights after the optimiser's step instead of adding to the loss: Adam would scale
the penalty's gradient away (Deleu and Bengio, 2102.03869).
`regrow`: the weakest units are set to zero again and again, but go on learning and may come
back (He et al., Soft Filter Pruning, 1808.06866). All train on the losses of distillation, so
that labels are not needed. What goes in the end is `prune.cut`'s matter.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from edgewright.data import Feed
from edgewright.recipe import Distillation
from edgewright.recover.distill import train
from edgewright.recover.gradients import Labelled
from edgewright.recover.ops import Tensor
from edgewright.stage import Tell, say_nothing

RISE = 0.5  # share of the steps in which units shrink; in the rest the others learn alone


class Owned:
    """What units own among the trained weights: squared norms, and setting them to zero.

    Norms are divided by the mean square of their tensor, so that large tensors do not outvote
    small ones.
    """

    def __init__(self, weights: Mapping[str, Tensor], analysis: Labelled) -> None:
        self.weights = weights
        self.count = 1 + max((u for g in analysis.groups for u in g.units), default=0)
        self.places: list[tuple[str, int, Tensor]] = []
        self.size: dict[str, float] = {}
        for name, weight in weights.items():
            self.size[name] = float(weight.detach().square().mean()) + 1e-12
            for axis, labels in enumerate(analysis.labels.get(name, ())):
                if (labels > 0).any():
                    self.places.append((name, axis, torch.from_numpy(np.asarray(labels)).long()))

    def energy(self) -> Tensor:
        """Per unit, the squared norm of its slices over the tensors' mean squares: (labels,)."""
        total = torch.zeros(self.count)
        for name, axis, labels in self.places:
            weight = self.weights[name]
            rows = weight.movedim(axis, 0).reshape(weight.shape[axis], -1)
            total = total.index_add(0, labels, rows.square().sum(1) / self.size[name])
        return total

    def scale(self, factors: Tensor) -> None:
        """Multiply all that each unit owns by its factor: (labels,); label 0 is no unit."""
        with torch.no_grad():
            for name, axis, labels in self.places:
                shape = [1] * self.weights[name].dim()
                shape[axis] = -1
                self.weights[name].mul_(factors[labels].reshape(shape))

    def clear(self, units: Iterable[int]) -> None:
        """Set all that the units own to zero."""
        factors = torch.ones(self.count)
        factors[list(units)] = 0
        self.scale(factors)


def left(step: int, steps: int) -> float:
    """What is left, after a step, of something that falls in a straight line to 0 at RISE."""
    return max(0.0, 1 - (step + 1) / (RISE * steps))


def grow(
    teacher: onnx.ModelProto,
    model: onnx.ModelProto,
    analysis: Labelled,
    remove: Iterable[int],
    feeds: Callable[[], Iterable[Feed]],
    settings: Distillation,
    *,
    folder: Path | None = None,
    tell: Tell = say_nothing,
) -> dict[str, Any]:
    """Train the model in place until the units to remove are nothing; report.

    Their weights fall in a straight line to zero, which is a weight decay that grows without
    limit. The weights are those of the last step: the best on held-out samples would be the
    ones before the fall.
    """
    units = sorted(int(u) for u in remove)

    def hooks(weights: Mapping[str, Tensor]) -> tuple[Any, Any]:
        owned = Owned(weights, analysis)
        factors = torch.ones(owned.count)

        def after(step: int) -> None:
            now, was = left(step, settings.steps), left(step - 1, settings.steps)
            factors[units] = now / was if was else 0.0
            owned.scale(factors)

        return None, after

    return train(teacher, model, feeds, settings, hooks=hooks, folder=folder, tell=tell,
                 more=np.array(units).tobytes())  # fmt: skip


def lasso(
    teacher: onnx.ModelProto,
    model: onnx.ModelProto,
    analysis: Labelled,
    feeds: Callable[[], Iterable[Feed]],
    settings: Distillation,
    *,
    strength: float = 0.3,
    folder: Path | None = None,
    tell: Tell = say_nothing,
) -> dict[str, Any]:
    """Train the model in place under a growing group lasso on all its units; report.

    After each step the norm of every unit gets smaller by a part of its group's mean at the
    start, and ends at zero (the proximal operator of group lasso; Yuan and Lin, 2006). The parts
    add up to `strength`: units that the outputs do not need go or stay weak, the others grow
    back. Too strong, and all go. The units to cut are for a criterion to choose afterwards.
    """

    def hooks(weights: Mapping[str, Tensor]) -> tuple[Any, Any]:
        owned = Owned(weights, analysis)
        first = owned.energy().detach().sqrt()
        mean = torch.zeros(owned.count)
        for group in analysis.groups:
            units = list(group.units)
            mean[units] = first[units].mean()
        last = max(1, int(RISE * settings.steps))

        def after(step: int) -> None:
            if step >= last:
                return
            part = 2 * (step + 1) / (last * (last + 1))
            root = owned.energy().detach().sqrt().clamp_min(1e-12)
            owned.scale((1 - part * strength * mean / root).clamp_min(0))

        return None, after

    return train(teacher, model, feeds, settings, hooks=hooks, folder=folder, tell=tell,
                 more=f"lasso {strength}".encode())  # fmt: skip


def regrow(
    teacher: onnx.ModelProto,
    model: onnx.ModelProto,
    analysis: Labelled,
    choose: Callable[[dict[int, float]], Iterable[int]],
    feeds: Callable[[], Iterable[Feed]],
    settings: Distillation,
    *,
    every: int = 20,
    folder: Path | None = None,
    tell: Tell = say_nothing,
) -> tuple[dict[str, Any], frozenset[int]]:
    """Train the model in place, zeroing the weakest units every few steps; report, final units.

    choose: the energy of every unit, as a share of what its group had at the start -> the units to
    remove (such as `prune.select` with a budget). Zeroed units keep learning and can come back
    until the last fifth of the steps, in which the choice stands. The returned units are zero in
    the model.
    """
    units = sorted({u for g in analysis.groups for u in g.units})
    memory: dict[str, list[float]] = {"energy": []}  # when units were chosen last
    gone: list[int] = []

    def hooks(weights: Mapping[str, Tensor]) -> tuple[Any, Any]:
        owned = Owned(weights, analysis)
        first = owned.energy().detach()
        whole = torch.ones(owned.count)
        for group in analysis.groups:
            whole[list(group.units)] = first[list(group.units)].sum() or 1.0

        def after(step: int) -> None:
            final = step >= 0.8 * settings.steps
            if not memory["energy"] or (step % every == 0 and not final):
                memory["energy"] = (owned.energy().detach() / whole)[units].tolist()
                gone.clear()
            if final or step % every == 0:
                owned.clear(chosen())

        return None, after

    def chosen() -> list[int]:
        """Known by heart, or, in a run that goes on, chosen again by what its checkpoint holds."""
        if not gone:
            energy = dict(zip(units, memory["energy"], strict=True))
            gone[:] = sorted(int(u) for u in choose(energy))
        return gone

    report = train(teacher, model, feeds, settings, hooks=hooks, memory=memory, folder=folder,
                   tell=tell, more=f"regrow {every}".encode())  # fmt: skip
    return report, frozenset(chosen())
