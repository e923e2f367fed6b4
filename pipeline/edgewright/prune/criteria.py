"""How much a unit matters: one number per prunable unit, comparable within and between groups.

Data-free (the weights alone): `l1`, `l2` (norm of what a unit owns), `bn_gamma` (network
slimming), `random`. Label-free (calibration inputs, no labels): `activation` (Wanda: weight times
the norm of its input, 2306.11695), `hessian` (Optimal Brain Surgeon on the layers that read the
unit, `obs`). `taylor` and `fisher` need gradients, with labels or without, and come from
`recover`.

Scores of `hessian` are parts of the model's output that are lost (`sensitivity`); those of the
other criteria are a unit's share of its group's total.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np
import onnx

from edgewright.data import Feed
from edgewright.errors import BadInput
from edgewright.mixers import GATES, Mixer, by_input, channels, find_mixers, give_biases
from edgewright.model import array, initializers
from edgewright.prune.groups import Group
from edgewright.prune.labels import Analysis
from edgewright.prune.obs import Reader, losses
from edgewright.prune.sensitivity import SAMPLES, held_out, weigh
from edgewright.runtime.local import open_local
from edgewright.stage import Tell
from edgewright.taps import expose, fetch_groups

Needs = Literal["data-free", "label-free", "labelled"]
CRITERIA: dict[str, Needs] = {
    "l1": "data-free",
    "l2": "data-free",
    "bn_gamma": "data-free",
    "random": "data-free",
    "activation": "label-free",
    "hessian": "label-free",
    "taylor": "label-free",
    "fisher": "label-free",
}
GRADIENT = ("taylor", "fisher")
GAMMA = 1  # index of the scale among a BatchNormalization's inputs


def scores(
    model: onnx.ModelProto,
    analysis: Analysis,
    criterion: str,
    feeds: Callable[[], Iterable[Feed]] | None,
    tell: Tell,
    seed: int = 0,
) -> dict[int, float]:
    """Unit -> score, the lower the sooner it goes. Units a criterion says nothing about are left
    out (no reading layer with weights, no BatchNormalization). `feeds`: for label-free ones.

    Raises BadInput for an unknown criterion, for one that needs gradients, for no samples, and
    for `bn_gamma` where no group has a BatchNormalization left.
    """
    if criterion not in CRITERIA or criterion in GRADIENT:
        known = ", ".join(CRITERIA)
        raise BadInput(f"unknown pruning criterion '{criterion}'", expected=f"one of {known}")
    if criterion == "random":
        generator = np.random.default_rng(seed)
        return {u: float(generator.random()) / len(g.units) for g in analysis.groups
                for u in g.units}  # fmt: skip
    if criterion == "bn_gamma":
        return gammas(model, analysis)
    if criterion in ("l1", "l2"):
        return norms(model, analysis, 1 if criterion == "l1" else 2)
    if feeds is None:
        raise BadInput(f"criterion '{criterion}' needs calibration samples", found="none")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    give_biases(copy, find_mixers(copy)[0])
    every = held_out(feeds) if criterion == "hessian" else 0

    def taught() -> Iterator[Feed]:
        return (f for k, f in enumerate(feeds()) if not every or k % every)

    readers = read_by(copy, analysis, taught, tell)
    found: dict[int, float] = {}
    for k, group in enumerate(analysis.groups):
        tell(f"scoring by {criterion}", k, len(analysis.groups))
        near = [r for r in readers if np.isin(r.labels, group.units).any()]
        if near:
            found |= losses(near, group.units) if criterion == "hessian" else wanda(near, group)
    if every:
        probe = list(itertools.islice(feeds(), 0, every * SAMPLES, every))
        weigh(copy, analysis.groups, readers, found, probe, tell)
    return found


def shares(group: Group, values: np.ndarray) -> dict[int, float]:
    """Each unit's share of the group's total."""
    total = float(values.sum()) or 1.0
    return dict(zip(group.units, (values / total).tolist(), strict=True))


def per_unit(group: Group, labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums of the values over the indices that carry each unit's label, in the group's order."""
    units = np.asarray(group.units)
    order = np.argsort(units)
    at = np.searchsorted(units, labels, sorter=order)
    at = order[np.minimum(at, len(units) - 1)]
    mine = units[at] == labels
    return np.bincount(at[mine], weights=values[mine], minlength=len(units))


def norms(model: onnx.ModelProto, analysis: Analysis, power: int) -> dict[int, float]:
    """Sum of |w|^power over all weights of two and more axes that a unit owns slices of, each
    stored tensor counted relative to its mean (DepGraph, 2301.12900, section 3.3)."""
    stored = initializers(model.graph)
    found: dict[int, float] = {}
    for group in analysis.groups:
        total = np.zeros(len(group.units))
        for name, axis in group.slices:
            weight = array(stored[name])
            if weight.ndim < 2 or weight.dtype.kind != "f":
                continue
            rest = tuple(a for a in range(weight.ndim) if a != axis)
            size = (np.abs(weight.astype(np.float64)) ** power).sum(axis=rest)
            mine = per_unit(group, analysis.labels[name][axis], size)
            total += mine / (mine.mean() or 1.0)
        found |= shares(group, total)
    return found


def gammas(model: onnx.ModelProto, analysis: Analysis) -> dict[int, float]:
    """Sum of |gamma| of the BatchNormalizations of a unit (Liu et al., 1708.06519)."""
    stored = initializers(model.graph)
    scales = {n.input[GAMMA] for n in model.graph.node if n.op_type == "BatchNormalization"}
    found: dict[int, float] = {}
    for group in analysis.groups:
        mine = [name for name, axis in group.slices if name in scales and axis == 0]
        if mine:
            total = sum(
                per_unit(group, analysis.labels[n][0], np.abs(array(stored[n])).astype(np.float64))
                for n in mine
            )
            found |= shares(group, np.asarray(total))
    if not found:
        raise BadInput(
            "criterion 'bn_gamma'",
            expected="BatchNormalization behind prunable layers",
            found="none: they are folded into the layers",
            hint="use 'l2', or 'hessian' with calibration data",
        )
    return found


def wanda(readers: list[Reader], group: Group) -> dict[int, float]:
    """||W_j|| ||x_j|| per channel of each reading layer, relative to the layer's mean."""
    total = np.zeros(len(group.units))
    for reader in readers:
        size = np.sqrt(np.maximum(np.diag(reader.outer), 0) * reader.power)
        mine = per_unit(group, reader.labels, size)
        total += mine / (mine.mean() or 1.0)
    return shares(group, total)


def read_by(
    model: onnx.ModelProto,
    analysis: Analysis,
    feeds: Callable[[], Iterable[Feed]],
    tell: Tell,
) -> list[Reader]:
    """Every activation with prunable channels that layers with weights read: its second moments
    over all samples (streamed), and what its readers make of it."""
    tensors: dict[str, tuple[int, list[Mixer]]] = {}
    labels: dict[str, np.ndarray] = {}
    mixers = [*find_mixers(model)[0], *recurrences(model)]
    for name, group in by_input(mixers).items():
        axes = analysis.labels.get(name)
        if axes and len(axes) > 1 and (axes[group[0].axis] > 0).any():
            tensors[name] = (group[0].axis, group)
            labels[name] = axes[group[0].axis]
    moments = second_moments(model, {n: axis for n, (axis, _) in tensors.items()}, feeds, tell)
    stored = initializers(model.graph)
    readers = []
    for name, (_, group) in tensors.items():
        n, first, square = moments[name]
        mean, raw = first / n, square / n
        central = raw - np.outer(mean, mean)
        biased = all(m.bias is not None for m in group)
        gram = central if biased else raw
        outer = np.zeros_like(gram)
        for mixer in group:
            weight = mixer.matrix(array(stored[mixer.weight])).astype(np.float64)
            mine = weight @ weight.T
            outer += mine / (float(np.sum(mine * gram)) or 1.0)
        readers.append(
            Reader(labels[name], gram, outer, np.diag(raw), n, mean * biased, tuple(group))
        )
    return readers


def recurrences(model: onnx.ModelProto) -> list[Mixer]:
    """Recurrent weights as readers of the hidden states, where those are an output."""
    return [
        Mixer(n.name, n.op_type, n.output[0], -1, n.input[2], 2, 1, None)
        for n in model.graph.node
        if n.op_type in GATES and n.output and n.output[0]
        and n.input[2] in initializers(model.graph)
    ]  # fmt: skip


def second_moments(
    model: onnx.ModelProto,
    axes: dict[str, int],
    feeds: Callable[[], Iterable[Feed]],
    tell: Tell,
) -> dict[str, tuple[int, np.ndarray, np.ndarray]]:
    """Per tensor: places, sum and sum of outer products of its channel vectors (raw moments)."""
    inputs = {v.name for v in model.graph.input}
    inner = [n for n in axes if n not in inputs]
    found: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}
    session = open_local(expose(model, inner).SerializeToString(), threads=2) if inner else None
    groups: list[list[str]] = []
    count = 0
    for k, feed in enumerate(feeds()):
        count += 1
        tell("input moments", k, 0)
        if session and not groups:
            groups = fetch_groups(session, feed, inner)
        for part in [[n for n in axes if n in inputs], *groups]:
            values = (
                session.run(feed, part) if session and part in groups else [feed[n] for n in part]
            )
            for name, value in zip(part, values, strict=True):
                x = channels(value, axes[name], k)
                n, first, square = found.get(name, (0, np.zeros(1), np.zeros((1, 1))))
                found[name] = (
                    n + x.shape[1],
                    first + x.sum(axis=1, dtype=np.float64),
                    square + (x @ x.T).astype(np.float64),
                )
    if count == 0:
        raise BadInput("this pruning criterion got no calibration samples", expected="some")
    return found
