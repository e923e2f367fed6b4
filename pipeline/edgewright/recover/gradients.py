"""What a unit is worth by gradients: first order (taylor) and diagonal Fisher, per unit.

A unit is gone when what reads it is zero. The derivative of the loss by a common factor on its
reading weights is sum(w * g) over them, for one sample; `taylor` is the mean of its size
(Molchanov et al., 1906.10771, equation 8 with the absolute value), `fisher` half the mean of
its square, the second-order loss of removal (Theis et al., 1801.05787; Kwon et al., 2204.09656).

Without labels the gradient of the distance to the model's own outputs is zero, so the outputs are
sampled: a class drawn from the predicted distribution, normal noise of the output's own spread on
values, both where the graph does not tell which it is. That is the true Fisher, not the empirical
one, and needs no labels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import onnx
import torch

from edgewright.data import Feed
from edgewright.errors import BadInput
from edgewright.mixers import GATES, find_mixers
from edgewright.model import initializers
from edgewright.recover.batches import tensors
from edgewright.recover.executor import to_module
from edgewright.recover.lesson import float_outputs
from edgewright.recover.losses import TINY, Target, find_target
from edgewright.recover.ops import Tensor
from edgewright.recover.training import repeatable
from edgewright.stage import Tell


class Units(Protocol):
    """A group of prunable units."""

    @property
    def units(self) -> tuple[int, ...]: ...


class Labelled(Protocol):
    """The analysis of `prune`: labels of every tensor's axes, and the groups of units."""

    @property
    def labels(self) -> Mapping[str, tuple[np.ndarray, ...]]: ...

    @property
    def groups(self) -> Sequence[Units]: ...


def readers(model: onnx.ModelProto) -> list[tuple[str, int]]:
    """(stored weight, axis it is read along) of every layer that sums over channels."""
    stored = initializers(model.graph)
    found = [(m.weight, m.in_axis) for m in find_mixers(model)[0]]
    for node in model.graph.node:
        if node.op_type in GATES and node.input[2] in stored:
            found.append((node.input[2], 2))  # the hidden state of the step before
    return found


def sampled_loss(target: Target, value: Tensor, random: torch.Generator) -> Tensor:
    """Minus the log-likelihood of an output drawn from the model itself, up to a constant.

    Distributions and their classes: mean over positions. Values: noise of the output's own
    standard deviation, over the square root of their number. What may be either ("logits") is
    drawn as both, as distillation compares it: the classes alone say next to nothing where the
    model is sure of them. The two are independent, so the squares of their slopes add up.
    """
    if target.kind == "binary":
        drawn = torch.bernoulli(torch.sigmoid(value.detach()), generator=random)
        return torch.nn.functional.binary_cross_entropy_with_logits(value, drawn)
    classes = target.kind != "value" and value.shape[target.axis] > 1
    loss = torch.zeros(())
    if target.kind != "soft" or not classes:
        noise = torch.randn(value.shape, generator=random)
        spread = value.detach().std(unbiased=False) + TINY if value.numel() > 1 else 1.0
        loss = (noise * value).sum() / spread / value.numel() ** 0.5
    if classes:
        logits = value.movedim(target.axis, -1).flatten(0, -2)
        drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=random)[:, 0]
        loss = loss + torch.nn.functional.cross_entropy(logits, drawn)
    return loss


def true_loss(target: Target, value: Tensor, label: int) -> Tensor:
    """Cross entropy of the true class, for outputs (1, classes)."""
    if target.kind not in ("soft", "logits") or value.dim() != 2:
        raise BadInput(
            f"labels do not fit output '{target.output}'",
            expected="an output of shape (samples, classes)",
            found=str(list(value.shape)),
        )
    return torch.nn.functional.cross_entropy(value, torch.tensor([label]))


def scores(
    model: onnx.ModelProto,
    analysis: Labelled,
    criterion: Literal["taylor", "fisher"],
    feeds: Callable[[], Iterable[Feed]],
    tell: Tell,
    truth: Sequence[int] | None = None,
    seed: int = 0,
    threads: int = 2,
) -> dict[int, float]:
    """Unit -> score, the lower the sooner it goes; one gradient per sample, memory constant.

    truth: the class of each sample, for models whose first output is (1, classes); None draws
    the outputs. Units that no layer with stored weights reads are left out. Raises BadInput for
    operators without gradients, for no samples, for fewer labels than samples.
    """
    reading = [(n, a) for n, a in readers(model) if n in analysis.labels
               and (analysis.labels[n][a] > 0).any()]  # fmt: skip
    units = {u for g in analysis.groups for u in g.units}
    sums = np.zeros(max(units, default=0) + 1)
    outputs = float_outputs(model)
    if not outputs or not reading:
        raise BadInput(
            "no gradient can tell what the units are worth",
            found="no float output" if not outputs else "no stored weight that reads a unit",
        )
    targets = [find_target(model, name) for name in outputs]
    read_somewhere = np.zeros(len(sums), bool)
    for name, axis in reading:
        read_somewhere[analysis.labels[name][axis]] = True
    count = 0
    with repeatable(threads):
        module = to_module(model, train=list(dict.fromkeys(n for n, _ in reading)))
        random = torch.Generator().manual_seed(seed)
        for k, feed in enumerate(feeds()):
            tell(f"scoring by {criterion}", k)
            values = module(tensors(feed), [t.tensor for t in targets])
            if truth is None:
                parts = [sampled_loss(t, v, random) for t, v in zip(targets, values, strict=True)]
                loss = torch.stack(parts).sum()
            elif k < len(truth):
                loss = true_loss(targets[0], values[0], int(truth[k]))
            else:
                raise BadInput("labels", expected="one for each sample", found=str(len(truth)))
            module.zero_grad()
            loss.backward()
            one = np.zeros(len(sums))
            for name, axis in reading:
                weight = module.weights[name]
                if weight.grad is None:
                    continue
                product = (weight.detach() * weight.grad).movedim(axis, 0).flatten(1).sum(1)
                np.add.at(one, analysis.labels[name][axis], product.numpy().astype(np.float64))
            sums += np.abs(one) if criterion == "taylor" else one**2 / 2
            count += 1
    if count == 0:
        raise BadInput(f"criterion '{criterion}' needs calibration samples", found="none")
    return {u: float(sums[u] / count) for u in sorted(units) if read_somewhere[u]}
