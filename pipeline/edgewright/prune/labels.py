"""Which dimensions of a graph must go together: a label for each index of each tensor's axes.

The rules tie ids of indices (`axes.py`); a class of tied ids that is not frozen and owns slices
of stored weights is a unit. First everything is tied that has one right answer, then what may
go several ways (`rules.CHOOSING`): grouped convolutions and reshapes. Which way is searched:
all the first, all the last, then each kind of place for itself; that counts which leaves fewest
parameters if half the units of every group went. The method is the dependency analysis of
DepGraph (arXiv 2301.12900) and SPA (arXiv 2403.18955), by index instead of by layer.
"""

import copy
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from edgewright.model import reads, subgraphs
from edgewright.passes.inputs import forget_shapes
from edgewright.passes.shapes import infer
from edgewright.prune.axes import Axes, Dim, Mix, integer
from edgewright.prune.groups import Group, find_groups, left_at_half, unit_labels
from edgewright.prune.rules import CHOOSING, RULES

FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
)
DOMAINS = ("", "ai.onnx")
BETTER = 0.99  # another way must leave this share of the parameters or less
TRIES = 24


@dataclass(frozen=True)
class Analysis:
    """What `analyse` found.

    labels: for every tensor of the main graph with known rank one int array per axis: the unit
    each index belongs to, 0 where it is frozen; of length 0 where the length is not known.
    groups: units that look the same to every tensor, in graph order. frozen: what no rule
    covers, as {"node", "op", "reason"}. mixes: where consumers sum over an axis. policy: the way
    chosen at places that may go several ways, in words.
    """

    labels: dict[str, tuple[np.ndarray, ...]]
    groups: tuple[Group, ...]
    frozen: tuple[dict[str, str], ...]
    mixes: tuple[Mix, ...]
    policy: str = ""


def analyse(model: onnx.ModelProto) -> Analysis:
    """Find the units of a model as `simplify` leaves it: constants stored, names unique.

    The model is not changed. Free dimensions are frozen.
    """
    base = tied(model, known_shapes(model))
    best = decided(base, {}, 0)
    least = left_at_half(best)
    policy: dict[tuple, int] = {}
    default = 0
    if best.choices:
        last = decided(base, {}, -1)
        if left_at_half(last) < BETTER * least:
            best, least, default = last, left_at_half(last), -1
        tries = 0
        for key, count in sorted(best.choices.items(), key=repr):
            for way in range(count):
                if tries >= TRIES or (len(best.choices) == 1 and count == 2):
                    break
                tries += 1
                found = decided(base, policy | {key: way}, default)
                left = left_at_half(found)
                if left < BETTER * least:
                    best, least, policy = found, left, policy | {key: way}
    labels = unit_labels(best)
    groups = find_groups(best, labels)
    chosen = in_words(default, policy) if best.choices else ""
    return Analysis(labels, groups, tuple(best.frozen), tuple(best.mixes), chosen)


def in_words(default: int, policy: dict[tuple, int]) -> str:
    """The ways chosen: `outer` lets the first of several axes live, `inner` the last."""
    words = ["outer" if default == 0 else "inner"]
    for key, way in policy.items():
        words.append(f"{key[0]} {' '.join(map(str, key[1:]))}: way {way}")
    return "; ".join(words)


def known_shapes(model: onnx.ModelProto) -> dict[str, list[Dim]]:
    """Shapes of all values whose rank is known; the file's own claims are not believed."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    del light.graph.value_info[:]
    work = ir.from_proto(light)
    forget_shapes(work)
    infer(work)
    shapes: dict[str, list[Dim]] = {}
    for value in [*work.graph.inputs, *(o for n in work.graph for o in n.outputs)]:
        if value.name and value.shape is not None:
            shapes[value.name] = [
                (d if d > 0 else None) if isinstance(d, int) else d.value for d in value.shape
            ]
    return shapes


def tied(model: onnx.ModelProto, shapes: dict[str, list[Dim]]) -> Axes:
    """Everything tied and frozen that has one right answer."""
    ax = Axes(model, shapes)
    graph = model.graph
    for value in graph.input:
        ax.freeze_all(value.name)
    for value in graph.output:
        ax.freeze_all(value.name)
    for name, tensor in ax.stored.items():
        if tensor.data_type not in FLOATS or name not in ax.readers:
            ax.freeze_all(name)
    for node in graph.node:
        if any(True for _ in subgraphs(node)):
            ax.freeze_all(*reads(node))
            ax.refuse(node, "what its nested graphs read and make is left alone")
        elif node.domain not in DOMAINS or not (
            node.op_type in RULES or node.op_type in CHOOSING[-1]
        ):
            ax.refuse(node, "no rule for this operator")
        elif not chooses(ax, node):
            apply(ax, node, RULES[node.op_type])
    return ax


def chooses(ax: Axes, node: onnx.NodeProto) -> bool:
    """Whether the node may go several ways: reshapes, and convolutions that are grouped."""
    if node.op_type in CHOOSING[-1]:
        return True
    return node.op_type in CHOOSING[0] and integer(node, "group", 1) > 1


def apply(ax: Axes, node: onnx.NodeProto, rule: object) -> None:
    """Follow a rule; a node whose tensors do not fit it is frozen."""
    if not ax.known(*node.input, *node.output):
        ax.refuse(node, "the rank of a tensor is not known")
        return
    try:
        rule(ax, node)  # type: ignore[operator]
    except (ValueError, IndexError, KeyError, TypeError) as error:
        ax.refuse(node, f"its tensors do not fit the rule: {error}")


def decided(base: Axes, policy: dict[tuple, int], default: int) -> Axes:
    """A copy of what is tied, with the open places decided."""
    ax = copy.copy(base)
    ax.parent = base.parent.copy()
    ax.choices, ax.policy, ax.default = {}, policy, default
    ax.frozen, ax.mixes, ax.inexact = list(base.frozen), list(base.mixes), list(base.inexact)
    ax.kinds = {kind: list(ids) for kind, ids in base.kinds.items()}
    for rules in CHOOSING:
        for node in ax.model.graph.node:
            if node.op_type in rules and node.domain in DOMAINS and chooses(ax, node):
                apply(ax, node, rules[node.op_type])
    return ax
