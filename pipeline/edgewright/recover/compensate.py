"""Label-free compensation: the weights behind a cut make up for the channels that are gone.

A mixing layer y = W x + b lost some of its input channels, and the others changed, because what
stands before was cut, too. With the affine map x ~ M z + c from the channels z it has now (least
squares over calibration samples, `moments`), W M and b + W c compute what the layer computed
before, as far as z tells (Optimal Brain Surgeon's update, for all removed channels at once; for
convolutions M acts at every kernel position, which leaves the padded borders approximate).

The layers are repaired one after the other in graph order: z comes from the pruned model as it is
repaired so far, x from the original, so a layer also takes back what earlier ones could not.
Both models run piece by piece, every node once per sample; activations that do not fit into
LIVE_BYTES wait in files.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.data import Feed
from edgewright.errors import BadInput
from edgewright.mixers import GATES, Mixer, by_input, channels, find_mixers, give_biases
from edgewright.model import array, initializers, reads
from edgewright.prune.outputs import closed
from edgewright.recover.channelwise import Channelwise, Spread, apply, find_channelwise, refit
from edgewright.recover.moments import Fit, Moments, fit
from edgewright.shelf import Arrays, Shelf
from edgewright.stage import Tell
from edgewright.taps import last_uses, run_piece

LIVE_BYTES = 256 << 20  # activations of all samples held in memory between two pieces
Row = dict[str, Any]
Kept = dict[tuple[str, int], np.ndarray]


@dataclass
class Walk:
    """A model run piece by piece on all samples: `start` is the first node not yet run."""

    model: onnx.ModelProto
    live: list[Arrays]
    start: int = 0

    def __post_init__(self) -> None:
        self.nodes = list(self.model.graph.node)
        self.last = last_uses(self.nodes)
        self.place = {node.name: k for k, node in enumerate(self.nodes)}

    def until(self, node: str) -> None:
        """Run everything that stands before a node."""
        self.run(self.place[node])

    def through(self, node: str) -> None:
        """Run everything up to a node, that one too."""
        self.run(self.place[node] + 1)

    def run(self, end: int) -> None:
        if end > self.start:
            run_piece(self.model, self.nodes[self.start : end], end - 1, self.last, self.live)
            self.start = end


def compensate(
    original: onnx.ModelProto,
    pruned: onnx.ModelProto,
    kept: Kept,
    feeds: Callable[[], Iterable[Feed]],
    tell: Tell,
    scratch: Path | None = None,
) -> list[Row]:
    """Repair the weights and biases of the pruned model in place; a row for each layer touched.

    original, pruned: the same nodes under the same names. kept: for every (tensor, axis) that
    lost something the indices kept, activations included (what `cut` returns). Needs no labels.
    scratch: where activations wait that do not fit into memory (default: the system's place).
    Rows: node, op, channels (before), lost, error and plain (relative squared error of what the
    layer reads, on samples held out, with and without repair), strength of the ridge, reason
    where a layer stays a plain slice. Raises BadInput where there are no samples.
    """
    rows: list[Row] = []
    original = closed(original, initializers(pruned.graph))  # as `cut` did
    changed = touched(pruned, kept)
    give_biases(pruned, [m for m in find_mixers(pruned)[0] if m.input in changed])
    mixers, left = find_mixers(pruned)
    before = {m.node: m for m in find_mixers(original)[0]}
    reached = [m for m in mixers if m.input in changed and m.node in before]
    stations: list[list[Any]] = [*by_input(reached).values()]
    stations += [[c] for c in find_channelwise(pruned) if c.output in changed]
    apart = {station[0].node for station in stations}
    reading = {n.name: n.input[0] for n in pruned.graph.node if n.input}
    rows += [
        {**entry, "reason": f"not repaired: {entry['reason']}"}
        for entry in left
        if reading.get(entry["node"]) in changed and entry["node"] not in apart
    ]
    with tempfile.TemporaryDirectory(prefix="edgewright-", dir=scratch) as folder:
        shelf = Shelf(Path(folder), LIVE_BYTES)
        walks = Walk(original, []), Walk(pruned, [])
        for feed in feeds():
            for walk in walks:
                walk.live.append(shelf.sample())
                walk.live[-1].update(feed)
        if not walks[0].live:
            raise BadInput("compensation got no samples", expected="at least 2, better 64")
        order = {n.name: k for k, n in enumerate(pruned.graph.node)}
        stations.sort(key=lambda s: order[s[0].node])
        for k, group in enumerate(stations):
            tell("compensating", k, len(stations))
            for walk in walks:
                walk.until(group[0].node)
            if isinstance(group[0], Channelwise):
                rows += rescale(pruned, group[0], kept, walks)
            else:
                rows += repair(original, pruned, group, kept, walks)
    return rows


def touched(pruned: onnx.ModelProto, kept: Kept) -> set[str]:
    """The tensors whose shape or values can differ from the original's."""
    found = {tensor for tensor, _ in kept}
    for node in pruned.graph.node:
        if any(name in found for name in reads(node)):
            found.update(o for o in node.output if o)
    return found


def repair(
    original: onnx.ModelProto,
    pruned: onnx.ModelProto,
    group: list[Mixer],
    kept: Kept,
    walks: tuple[Walk, Walk],
) -> list[Row]:
    """Fit the map of one activation and put it into all layers that read it."""
    moments = Moments()
    tensor, axis = group[0].input, group[0].axis
    for k, (mine, yours) in enumerate(zip(walks[1].live, walks[0].live, strict=True)):
        z, x = mine[tensor], yours[tensor]
        x = aligned(x, tensor, axis % x.ndim, kept)
        moments.add(channels(x, axis, k), channels(z, axis, k))
    old = len(moments.origin_x)
    indices = kept.get((tensor, axis % z.ndim), np.arange(old))
    stored = initializers(original.graph)
    weights = {m.node: sliced(array(stored[m.weight]), m, kept) for m in group}
    rows = []
    fits: dict[bool, Fit] = {}
    for mixer in group:
        intercept = mixer.bias is not None
        if intercept not in fits:
            importance = sum((m.matrix(weights[m.node]) ** 2).sum(axis=1) for m in group)
            fits[intercept] = fit(moments, indices, np.asarray(importance, np.float64), intercept)
        found = fits[intercept]
        if not found.reason:
            rewrite(pruned, mixer, weights[mixer.node], found)
        rows.append(
            {
                "node": mixer.node,
                "op": mixer.op,
                "channels": old,
                "lost": old - len(indices),
                "plain": found.plain,
                "error": found.error,
                "strength": found.strength if np.isfinite(found.strength) else None,
                "reason": f"plain slice: {found.reason}" if found.reason else "",
                "bias": f"not moved: {mixer.no_bias}" if mixer.no_bias else "",
            }
        )
    return rows


def rescale(
    pruned: onnx.ModelProto, layer: Channelwise, kept: Kept, walks: tuple[Walk, Walk]
) -> list[Row]:
    """Fit scale and shift of a layer that keeps channels apart."""
    for walk in walks:
        walk.through(layer.node)
    halves = Spread(), Spread()
    for k, (mine, yours) in enumerate(zip(walks[1].live, walks[0].live, strict=True)):
        x = yours[layer.output]
        for axis in range(x.ndim):
            if (layer.output, axis) in kept:
                x = np.take(x, kept[layer.output, axis], axis=axis)
        halves[k % 2].add(channels(x, 1, k), channels(mine[layer.output], 1, k))
    found = refit(halves)
    row = {"node": layer.node, "op": layer.op}
    if found is None:
        return [{**row, "reason": "as it is: no scale and shift do better on samples held out"}]
    scale, shift, before, after = found
    apply(pruned, layer, scale, shift)
    for alive in walks[1].live:
        value = alive[layer.output]
        shape = [1, -1] + [1] * (value.ndim - 2)
        alive[layer.output] = value * scale.reshape(shape).astype(np.float32) + shift.reshape(
            shape
        ).astype(np.float32)
    return [{**row, "plain": before, "error": after, "reason": ""}]


def aligned(value: np.ndarray, tensor: str, channel_axis: int, kept: Kept) -> np.ndarray:
    """The original's activation without what was cut along other axes than the channels."""
    for axis in range(value.ndim):
        if axis != channel_axis and (tensor, axis) in kept:
            value = np.take(value, kept[tensor, axis], axis=axis)
    return value


def sliced(weight: np.ndarray, mixer: Mixer, kept: Kept) -> np.ndarray:
    """The original weight with all its input channels, and the outputs that are left."""
    for axis in range(weight.ndim):
        if axis != mixer.in_axis and (mixer.weight, axis) in kept:
            weight = np.take(weight, kept[mixer.weight, axis], axis=axis)
    return weight


def rewrite(pruned: onnx.ModelProto, mixer: Mixer, weight: np.ndarray, found: Fit) -> None:
    """Give a layer the weight W M and the bias b + W c."""
    stored = initializers(pruned.graph)
    new = mixer.mapped(weight.astype(np.float64), found.matrix).astype(np.float32)
    stored[mixer.weight].CopyFrom(numpy_helper.from_array(new, mixer.weight))
    if mixer.bias is None:
        return
    added = mixer.constant(weight.astype(np.float64), found.offset)
    bias = array(stored[mixer.bias]).astype(np.float64)
    if mixer.op in GATES:
        bias[:, : added.shape[1]] += added  # the first half of B belongs to the input
    else:
        bias += added.reshape(bias.shape)
    stored[mixer.bias].CopyFrom(numpy_helper.from_array(bias.astype(np.float32), mixer.bias))
