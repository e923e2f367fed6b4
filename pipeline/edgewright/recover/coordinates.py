"""Coordinates in which the weights of a graph matter alike, and on their own.

What a weight does depends on what it reads and on what reads it. With the covariance C = L L' of
a layer's input, its mean m, and the size g of the loss' gradient at each of its outputs (square
root of the diagonal of the Fisher information), the coordinates of W and b are

    V = g (W L),   c = g (b + W m)

A change of V by some length then changes the loss by about as much whatever layer, row or column
it is in: the Kronecker factors of the loss' curvature (K-FAC, Martens and Grosse, 1503.05671),
with a diagonal one on the side of the outputs. Only differences to the start are kept, so a
coordinate of 0 is the start. Weights that are in no such layer are scaled by their own size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx
import torch

from edgewright.mixers import GATES, Mixer, channels, find_mixers
from edgewright.model import consumers
from edgewright.recover.batches import tensors
from edgewright.recover.executor import GraphModule
from edgewright.recover.lesson import Lesson, Match
from edgewright.recover.losses import TINY
from edgewright.recover.ops import Tensor

PROBED = 16  # samples that the covariances and gradients are taken from
DAMPING = 0.03  # of the mean, added to covariances and gradients: what few samples do not show
SMALLEST = 1e-3  # root mean square below which a tensor counts as this large


class Block(Protocol):
    """Some weights: `move` turns coordinates into their change, `turn` is its transpose."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def move(self, change: list[Tensor]) -> list[Tensor]: ...

    def turn(self, gradient: list[Tensor]) -> list[Tensor]: ...


def along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """A vector in the shape that broadcasts along one axis of `like`."""
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.reshape(shape)


@dataclass(frozen=True)
class Mixing:
    """A layer that sums over channels. inverse: of L, (in, in). mean: (in). gain: (out)."""

    mixer: Mixer
    names: tuple[str, ...]
    inverse: Tensor
    mean: Tensor
    gain: Tensor

    def mapped(self, weight: Tensor, matrix: Tensor) -> Tensor:
        moved = torch.tensordot(weight, matrix, dims=([self.mixer.in_axis], [0]))
        return moved.movedim(-1, self.mixer.in_axis).contiguous()

    def move(self, change: list[Tensor]) -> list[Tensor]:
        gain = along(self.gain, change[0], self.mixer.out_axis)
        weight = self.mapped(change[0] / gain, self.inverse)
        if len(change) == 1:
            return [weight]
        rest = [a for a in range(weight.dim()) if a != self.mixer.out_axis]
        shift = (weight * along(self.mean, weight, self.mixer.in_axis)).sum(rest)
        bias = change[1].flatten() / self.gain - shift * self.mixer.share
        return [weight, bias.reshape(change[1].shape)]

    def turn(self, gradient: list[Tensor]) -> list[Tensor]:
        weight = gradient[0]
        found = []
        if len(gradient) > 1:
            bias = gradient[1].flatten()
            shift = along(bias, weight, self.mixer.out_axis) * self.mixer.share
            weight = weight - shift * along(self.mean, weight, self.mixer.in_axis)
            found = [(bias / self.gain).reshape(gradient[1].shape)]
        weight = self.mapped(weight, self.inverse.T)
        return [weight / along(self.gain, weight, self.mixer.out_axis), *found]


@dataclass(frozen=True)
class Apart:
    """A depthwise convolution: (channels) each. spread: of what a channel reads."""

    names: tuple[str, ...]
    spread: Tensor
    mean: Tensor
    gain: Tensor

    def move(self, change: list[Tensor]) -> list[Tensor]:
        weight = change[0] / along(self.gain * self.spread, change[0], 0)
        return [weight, change[1] / self.gain - weight.flatten(1).sum(1) * self.mean]

    def turn(self, gradient: list[Tensor]) -> list[Tensor]:
        weight, bias = gradient
        weight = weight - along(bias * self.mean, weight, 0)
        return [weight / along(self.gain * self.spread, weight, 0), bias / self.gain]


@dataclass(frozen=True)
class Scaled:
    """Any other weight."""

    names: tuple[str, ...]
    size: float

    def move(self, change: list[Tensor]) -> list[Tensor]:
        return [change[0] * self.size]

    def turn(self, gradient: list[Tensor]) -> list[Tensor]:
        return [gradient[0] * self.size]


class Coordinates:
    """All trained weights as one vector, 0 at the start."""

    def __init__(self, weights: Mapping[str, torch.nn.Parameter], blocks: Sequence[Block]) -> None:
        self.weights, self.blocks = weights, blocks
        self.start = {name: w.detach().clone() for name, w in weights.items()}
        self.size = sum(w.numel() for w in weights.values())

    def put(self, place: Tensor) -> None:
        """Give the weights the values of a place (size)."""
        at = 0
        with torch.no_grad():
            for block in self.blocks:
                change = []
                for name in block.names:
                    like = self.start[name]
                    change.append(place[at : at + like.numel()].reshape(like.shape))
                    at += like.numel()
                for name, moved in zip(block.names, block.move(change), strict=True):
                    self.weights[name].copy_(self.start[name] + moved)

    def gradient(self) -> Tensor:
        """The gradients of the weights as one of the coordinates (size); none is zero."""
        parts = []
        for block in self.blocks:
            slopes = [self.weights[n].grad for n in block.names]
            known = [
                torch.zeros_like(self.start[n]) if g is None else g
                for n, g in zip(block.names, slopes, strict=True)
            ]
            parts += [g.flatten() for g in block.turn(known)]
        return torch.cat(parts)


def make_coordinates(
    graph: onnx.ModelProto, module: GraphModule, lesson: Lesson, seed: int
) -> Coordinates:
    """Coordinates from some of the training samples."""
    weights = module.weights
    makes = {n.input[1]: n.output[0] for n in graph.graph.node if len(n.input) > 1}
    mixers = [m for m in find_mixers(graph)[0] if m.weight in weights and m.op not in GATES]
    readers = consumers(graph.graph.node)
    alone = [
        n
        for n in graph.graph.node
        if depthwise(n, weights) and all(len(readers[w]) == 1 for w in n.input[1:3])
    ]
    reads = {m.input: m.axis for m in mixers} | {n.input[0]: 1 for n in alone}
    gives = {makes[m.weight]: 1 if "Conv" in m.op else -1 for m in mixers}
    gives |= {n.output[0]: 1 for n in alone}
    inputs, slopes = statistics(module, lesson, reads, gives, seed)
    blocks: list[Block] = []
    gains: list[float] = []
    for mixer in mixers:
        bias = mixer.bias if mixer.bias and mixer.bias in weights else None
        names = (mixer.weight, bias) if bias else (mixer.weight,)
        mean, covariance = inputs[mixer.input]
        if not bias:  # nothing takes the mean's part
            mean, covariance = np.zeros_like(mean), covariance + np.outer(mean, mean)
        root = np.linalg.cholesky(damped(covariance))
        gain = gain_of(slopes[makes[mixer.weight]], weights[mixer.weight].shape[mixer.out_axis])
        gains.append(float(gain.mean()))
        inverse = torch.from_numpy(np.linalg.inv(root)).float()
        blocks.append(Mixing(mixer, names, inverse, torch.from_numpy(mean).float(), gain))
    for node in alone:
        mean, covariance = inputs[node.input[0]]
        variance = np.maximum(np.diag(covariance), 0)
        spread = torch.from_numpy(np.sqrt(variance + DAMPING * variance.mean() + TINY)).float()
        gain = gain_of(slopes[node.output[0]], len(mean))
        gains.append(float(gain.mean()))
        names = (node.input[1], node.input[2])
        blocks.append(Apart(names, spread, torch.from_numpy(mean).float(), gain))
    known = {n for b in blocks for n in b.names}
    usual = float(np.median(gains)) if gains else 1.0
    for name, weight in weights.items():
        if name not in known:
            size = max(float(weight.detach().square().mean().sqrt()), SMALLEST)
            blocks.append(Scaled((name,), size / usual))
    return Coordinates(weights, blocks)


def statistics(
    module: GraphModule,
    lesson: Lesson,
    reads: Mapping[str, int],
    gives: Mapping[str, int],
    seed: int,
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, np.ndarray | None]]:
    """Mean and covariance of the channels of some tensors, float64, and the mean square of the
    gradient by each channel of others, summed over places (None where there is none).

    reads, gives: the channel axis of each tensor. The gradient is that of `probe`.
    """
    sums: dict[str, list[np.ndarray]] = {}
    origins: dict[str, np.ndarray] = {}
    count: dict[str, int] = dict.fromkeys(reads, 0)
    squares: dict[str, np.ndarray | None] = dict.fromkeys(gives)
    random = torch.Generator().manual_seed(seed)
    rows = lesson.train[:: max(1, len(lesson.train) // PROBED)][:PROBED]
    for k in rows:
        feed = tensors(lesson.pair.feeds[k])
        inner = [n for n in reads if n not in feed]
        values = module(feed, [*inner, *gives, *lesson.pair.mine])
        found = feed | dict(zip(inner, values, strict=False))
        for name, axis in reads.items():
            part = channels(found[name].detach().numpy(), axis, k)
            origin = origins.setdefault(name, part.mean(axis=1))
            part = part - origin[:, None]  # around zero, float32 would lose a small variance
            new = [part.sum(axis=1, dtype=np.float64), (part @ part.T).astype(np.float64)]
            sums[name] = (
                [a + b for a, b in zip(sums[name], new, strict=True)] if name in sums else new
            )
            count[name] += part.shape[1]
        outer, values = values[len(inner) : len(inner) + len(gives)], values[-len(lesson.matches) :]
        terms = []
        for match, value in zip(lesson.matches, values, strict=True):
            compared = match.target.logits(value) if match.target else value
            terms += probe(match, compared, random)
        total = torch.stack(terms).sum()
        slopes = torch.autograd.grad(total, outer, allow_unused=True) if outer else ()
        for (name, axis), slope in zip(gives.items(), slopes, strict=True):
            if slope is not None:
                flat = slope.movedim(axis, 0).flatten(1).double()
                square = flat.square().sum(1).numpy() / len(rows)
                before = squares[name]
                squares[name] = square if before is None else before + square
    moments = {}
    for name, (first, second) in sums.items():
        mean = first / count[name]
        covariance = second / count[name] - np.outer(mean, mean)
        moments[name] = (mean + origins[name], covariance)
    return moments, squares


def probe(match: Match, value: Tensor, random: torch.Generator) -> list[Tensor]:
    """Numbers whose gradients by `value` are random, with the loss' curvature as covariance.

    Drawn from the model's own distribution, as the true Fisher information is; for squared
    errors noise of the size of one over the spread. None for losses on attention.
    """
    target = match.target
    found = []
    kind = "value" if match.loss == "feature" else target.kind if target else ""
    if kind in ("soft", "logits") and target is not None:
        logits = value.movedim(target.axis, -1).flatten(0, -2)
        drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=random)[:, 0]
        found.append(torch.nn.functional.cross_entropy(logits, drawn) * len(logits) ** 0.5)
    if kind == "binary":
        drawn = torch.bernoulli(torch.sigmoid(value.detach()), generator=random)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(value, drawn)
        found.append(loss * value.numel() ** 0.5)
    if kind in ("value", "logits"):
        spread = (value.detach() - value.detach().mean()).square().mean() + TINY
        noise = torch.randn(value.shape, generator=random)
        found.append((noise * value).sum() * (2 / spread / value.numel()) ** 0.5)
    return [one * match.weight**0.5 for one in found]


def depthwise(node: onnx.NodeProto, weights: Mapping[str, Tensor]) -> bool:
    """Whether a node is a convolution channel by channel, weight and bias of which are trained."""
    if node.op_type != "Conv" or len(node.input) < 3:
        return False
    if node.input[1] not in weights or node.input[2] not in weights:
        return False
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    return groups > 1 and weights[node.input[1]].shape[:2] == (groups, 1)


def damped(covariance: np.ndarray) -> np.ndarray:
    """With DAMPING of its mean variance added."""
    mean = max(float(np.trace(covariance)) / len(covariance), TINY)
    found: np.ndarray = covariance + DAMPING * mean * np.eye(len(covariance))
    return found


def gain_of(squares: np.ndarray | None, width: int) -> Tensor:
    """Root of the mean squared gradient at each output; 1 where no gradient gets there."""
    if squares is None or not squares.any():
        return torch.ones(width)
    return torch.from_numpy(np.sqrt(squares + DAMPING * squares.mean())).float()
