"""Limits written in one way, so that runtimes and quantizers recognise them.

| written | becomes |
|---|---|
| Min, Max of x and a stored number | Clip with that bound |
| Clip(Clip(x, a, b), c, d), Relu before or after Clip | one Clip, where a bound is left |
| Clip(x, 0, none or all the type holds) | Relu |
| Clip without bounds | nothing |
| Relu(Relu(x)) | Relu |

Clip computes min(max(x, low), high); two of them make one with low = clip(low1, low2, high2)
and high = clip(high1, low2, high2). ReLU6 thus is Clip(x, 0, 6) with stored bounds.
"""

import numpy as np
import onnx_ir as ir

from edgewright.passes.edit import (
    bypass,
    constant,
    drop_unread,
    is_alive,
    is_op,
    lone_user,
    matching,
    operand,
    producer,
    rank,
    replace,
    scalar,
    stored,
)

FLOAT_MAX = float(np.finfo(np.float32).max)
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
Bounds = tuple[float, float]


def unify_clips(model: ir.Model) -> int:
    """Apply the table; returns the number of nodes changed or taken out."""
    count = 0
    for node in matching(model, "Min", "Max"):
        count += clip_of_extremum(model, node)
    for node in matching(model, "Clip", "Relu"):
        count += join_limits(model, node)
    for node in matching(model, "Clip"):
        bounds = bounds_of(node)
        if bounds is None:
            continue
        low, high = bounds
        if high >= FLOAT_MAX and low <= -FLOAT_MAX:
            count += int(bypass(node))
        elif high >= FLOAT_MAX and low == 0:
            replace(node, "Relu", node.inputs[:1])
            count += 1
    return count


def bounds_of(node: ir.Node) -> Bounds | None:
    """The limits of a float Clip or Relu; None where they are computed."""
    value = node.inputs[0]
    if value is None or value.dtype not in FLOATS:
        return None
    if is_op(node, "Relu"):
        return 0.0, np.inf
    if not is_op(node, "Clip"):
        return None
    low = -np.inf if operand(node, 1) is None else scalar(operand(node, 1))
    high = np.inf if operand(node, 2) is None else scalar(operand(node, 2))
    return None if low is None or high is None else (low, high)


def write_clip(model: ir.Model, node: ir.Node, value: ir.Value, bounds: Bounds) -> None:
    """Put Clip(value, bounds) in the place of the node."""
    assert value.dtype is not None
    kind, name = value.dtype.numpy(), node.name
    inputs: list[ir.Value | None] = [value]
    for number, what in zip(bounds, ("min", "max"), strict=True):
        known = abs(number) <= FLOAT_MAX
        inputs.append(stored(model, np.array(number, kind), f"{name}_{what}") if known else None)
    while inputs[-1] is None:
        inputs.pop()
    replace(node, "Clip", inputs)


def clip_of_extremum(model: ir.Model, node: ir.Node) -> int:
    """Min or Max of two, one of them a single stored number that adds no dimensions."""
    if len(node.inputs) != 2 or node.outputs[0].dtype not in FLOATS:
        return 0
    for value, limit in (node.inputs, node.inputs[::-1]):
        number, size = scalar(limit), rank(value)
        if value is None or number is None or size is None or constant(value) is not None:
            continue
        if (rank(limit) or 0) > size:
            continue
        bounds = (-np.inf, number) if node.op_type == "Min" else (number, np.inf)
        write_clip(model, node, value, bounds)
        return 1
    return 0


def join_limits(model: ir.Model, node: ir.Node) -> int:
    """A Clip or Relu and the one before it, where nothing else reads the value between."""
    first = producer(node.inputs[0], "Clip", "Relu")
    if first is None or not is_alive(node) or lone_user(first.outputs[0], node.graph) is not node:
        return 0
    inner, outer = bounds_of(first), bounds_of(node)
    source = first.inputs[0]
    if inner is None or outer is None or source is None:
        return 0
    if inner[0] > inner[1] or outer[0] > outer[1]:
        return 0
    low, high = (min(max(bound, outer[0]), outer[1]) for bound in inner)
    if is_op(first, "Relu") and is_op(node, "Relu"):
        node.replace_input_with(0, source)
    else:
        write_clip(model, node, source, (low, high))
    drop_unread([first])
    return 1
