"""Ranges that follow from the operators alone: Sigmoid is in [0, 1], whatever goes in.

Interval arithmetic over the graph, without data. What a layer makes is unbounded; its `unit` is
what element-wise constants have multiplied it with since (boxes in pixels: 640), so that two
tensors can be known to be of different size although neither's bounds are known.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewright.passes.clips import bounds_of
from edgewright.passes.edit import all_nodes, attribute, constant, is_op, scalar

INF = math.inf


@dataclass(frozen=True)
class Range:
    """Values lie in [low, high]; where those are infinite, at about `unit` by construction."""

    low: float = -INF
    high: float = INF
    unit: float = 1.0

    @property
    def bounded(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def peak(self) -> float:
        """The largest size, or the unit where there are no bounds."""
        return max(abs(self.low), abs(self.high)) if self.bounded else self.unit

    def text(self) -> str:
        if self.bounded:
            return f"[{self.low:.3g}, {self.high:.3g}]"
        return "unbounded" if self.unit == 1 else f"unbounded times {self.unit:.3g}"


UNKNOWN = Range()
FIXED = {
    "Sigmoid": Range(0, 1),
    "HardSigmoid": Range(0, 1),
    "Softmax": Range(0, 1),
    "Tanh": Range(-1, 1),
    "Erf": Range(-1, 1),
    "Softsign": Range(-1, 1),
    "Sin": Range(-1, 1),
    "Cos": Range(-1, 1),
}
SAME = (
    *("Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather"),
    *("Split", "Expand", "Tile", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"),
    *("ReduceMean", "ReduceMax", "ReduceMin", "DepthToSpace", "SpaceToDepth", "Dropout"),
    *("GatherElements", "GatherND", "TopK"),
)


def ranges(model: ir.Model) -> Callable[[ir.Value | None], Range]:
    """A function: the range of a value of the model."""
    known: dict[ir.Value, Range] = {}

    def look(value: ir.Value | None) -> Range:
        if value is None:
            return UNKNOWN
        if value not in known:
            known[value] = of_constant(value)
        return known[value]

    for node in all_nodes(model):  # in the order they run
        found = of_node(node, look)
        for output in node.outputs[:1] if node.op_type in ("TopK", "MaxPool") else node.outputs:
            known[output] = found
    return look


def of_constant(value: ir.Value) -> Range:
    array = constant(value)
    if array is None or array.size == 0 or array.dtype.kind not in "fiu":
        return UNKNOWN
    low, high = float(array.min()), float(array.max())
    return Range(low, high, max(abs(low), abs(high)))


def of_node(node: ir.Node, look: Callable[[ir.Value | None], Range]) -> Range:
    """The range of what a node makes."""
    if node.op_type in FIXED and is_op(node, node.op_type):
        return FIXED[node.op_type]
    x = look(node.inputs[0]) if node.inputs else UNKNOWN
    if is_op(node, *SAME):
        return x
    if is_op(node, "Relu", "Clip"):
        return clipped(node, x)
    if is_op(node, "Concat", "Where", "Max", "Min", "Sum"):
        parts = [look(v) for v in node.inputs[node.op_type == "Where" :]]
        if node.op_type == "Sum":
            return Range(*(sum(v) for v in zip(*((p.low, p.high) for p in parts), strict=True)))
        unit = max(p.unit for p in parts)
        if node.op_type == "Max":
            return Range(max(p.low for p in parts), max(p.high for p in parts), unit)
        if node.op_type == "Min":
            return Range(min(p.low for p in parts), min(p.high for p in parts), unit)
        return Range(min(p.low for p in parts), max(p.high for p in parts), unit)
    if is_op(node, "Add", "Sub", "Mul", "Div") and len(node.inputs) == 2:
        return combined(node, x, look(node.inputs[1]))
    if is_op(node, "Neg"):
        return Range(-x.high, -x.low, x.unit)
    if is_op(node, "Abs"):
        return Range(0, max(abs(x.low), abs(x.high)), x.unit)
    if is_op(node, "Exp"):
        return Range(0, math.exp(x.high) if x.high < 80 else INF)
    if is_op(node, "Softplus"):
        return Range(0, INF, x.unit)
    if is_op(node, "Pow") and scalar(node.inputs[1]) == 2:
        return Range(0, max(x.low**2, x.high**2), x.unit**2)
    return UNKNOWN


def clipped(node: ir.Node, x: Range) -> Range:
    """A Relu or Clip, its bounds stored or in attributes (before operator set 11)."""
    bounds = bounds_of(node)
    if bounds is None:
        return x
    low, high = bounds
    low, high = attribute(node, "min", low), attribute(node, "max", high)
    return Range(min(max(x.low, low), high), max(min(x.high, high), low), x.unit)


def combined(node: ir.Node, a: Range, b: Range) -> Range:
    """Element-wise arithmetic of two tensors; 0 * inf is 0, as a factor of 0 leaves nothing."""
    fixed = [constant(v) is not None for v in node.inputs]
    if node.op_type == "Add":
        return Range(a.low + b.low, a.high + b.high, max(a.unit, b.unit))
    if node.op_type == "Sub":
        return Range(a.low - b.high, a.high - b.low, max(a.unit, b.unit))
    if node.op_type == "Div":
        if not fixed[1] or b.low <= 0 <= b.high:
            return UNKNOWN
        b = Range(1 / b.high, 1 / b.low, 1 / min(abs(b.low), abs(b.high)))
    corners = [0.0 if 0 in (p, q) else p * q for p in (a.low, a.high) for q in (b.low, b.high)]
    units = [r.peak if r.bounded else r.unit for r in (a, b)]
    return Range(min(corners), max(corners), float(np.prod(units)))
