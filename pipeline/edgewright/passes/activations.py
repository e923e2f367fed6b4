"""Hard activations written out by an exporter, brought back to one operator each.

    k * clip(s * x + t, 0, h)           is  k h * HardSigmoid(x; alpha = s / h, beta = t / h)
    k * x * HardSigmoid(x; 1/6, 1/2)    is  k * HardSwish(x)

for one number each in s > 0, t, h > 0 and k, in whatever order Mul, Div, Add and Sub write
them: x * clip(x + 3, 0, 6) / 6 and x * (clip(x + 3, 0, 6) / 6) are both HardSwish. Numbers must
agree to 1e-6, as exporters write 1/6 in float32. A factor that is left over goes into the
weights behind it where it can. HardSwish needs operator set 14; models below stay as they are.

This is no part of the stage `simplify`: one operator is not always the faster form.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from edgewright.passes.affine import affine_of
from edgewright.passes.clips import bounds_of, unify_clips
from edgewright.passes.duplicates import remove_dead
from edgewright.passes.edit import (
    attribute,
    insert_before,
    is_op,
    lone_user,
    matching,
    replace,
    stored,
)
from edgewright.passes.linear import fold_affine
from edgewright.passes.names import assign_names, names_in
from edgewright.passes.opset import opset
from edgewright.passes.shapes import infer

TOLERANCE = 1e-6
HARD_SWISH_SINCE = 14


@dataclass(frozen=True)
class Gate:
    """factor * HardSigmoid(source; alpha, beta), and how many nodes write it."""

    source: ir.Value
    factor: float
    alpha: float
    beta: float
    nodes: int


def canonical_activations(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model with hard activations as HardSwish and HardSigmoid, equal up to float rounding.

    The argument stays as it is.
    """
    result = ir.from_proto(model)
    if opset(result) < HARD_SWISH_SINCE:
        return model
    names = names_in(result)
    infer(result)
    unify_clips(result)
    if find_hard_swish(result) + find_hard_sigmoid(result) == 0:
        return model
    remove_dead(result)
    fold_affine(result)
    remove_dead(result)
    assign_names(result, names)
    return ir.to_proto(result)


def find_hard_swish(model: ir.Model) -> int:
    """Returns the number of HardSwish written."""
    count = 0
    for node in matching(model, "Mul"):
        for value, gate_value in (node.inputs, node.inputs[::-1]):
            before = scale_of(value.producer()) if value is not None else None
            source, number = before if before is not None else (value, 1.0)
            gates = [g for g in gates_at(gate_value) if g.source in (source, value)]
            gate = next((g for g in gates if close(g.alpha, 1 / 6) and close(g.beta, 0.5)), None)
            if gate is None:
                continue
            if gate.source is value:
                number = 1.0
            last, factor = scaled(node, gate.factor * number)
            put(model, last, "HardSwish", gate.source, {}, factor)
            count += 1
            break
    return count


def find_hard_sigmoid(model: ir.Model) -> int:
    """Returns the number of HardSigmoid written: where they take fewer nodes than before."""
    count = 0
    for node in matching(model, "Clip"):
        gates = list(gates_at(node.outputs[0]))
        if not gates:
            continue
        gate = gates[lone_steps(node, len(gates) - 1)]
        last, factor = scaled(node, gate.factor)
        before = gate.nodes + steps(node, last)
        if before > (1 if close(factor, 1) else 2):
            attributes = {"alpha": gate.alpha, "beta": gate.beta}
            put(model, last, "HardSigmoid", gate.source, attributes, factor)
            count += 1
    return count


def lone_steps(clip: ir.Node, most: int) -> int:
    """How many of the nodes in front of the Clip are read by nothing else."""
    value, count = clip.inputs[0], 0
    while count < most and value is not None and lone_user(value, clip.graph) is not None:
        maker = value.producer()
        found = affine_of(maker) if maker is not None else None
        if found is None:
            break
        value, count = found[0], count + 1
    return count


def close(a: float, b: float) -> bool:
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def scale_of(node: ir.Node | None) -> tuple[ir.Value, float] | None:
    """The operand and the number of a node that multiplies by one number."""
    found = affine_of(node) if node is not None else None
    if found is None or found[1].axis is not None or not found[1].is_scale():
        return None
    return found[0], float(found[1].scale[0])


def gates_at(value: ir.Value | None) -> Iterator[Gate]:
    """The readings of the value as a gate: each takes one more node in front into account."""
    factor, nodes = 1.0, 0
    while value is not None and (found := scale_of(value.producer())) is not None:
        value, factor, nodes = found[0], factor * found[1], nodes + 1
    node = value.producer() if value is not None else None
    if node is None or node.inputs[0] is None:
        return
    if is_op(node, "HardSigmoid"):
        alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
        yield Gate(node.inputs[0], factor, alpha, beta, nodes + 1)
        return
    bounds = bounds_of(node) if is_op(node, "Clip") else None
    if bounds is None or bounds[0] != 0 or not 0 < bounds[1] < np.inf:
        return
    high, source, slope, shift = bounds[1], node.inputs[0], 1.0, 0.0
    nodes += 1
    while True:
        yield Gate(source, factor * high, slope / high, shift / high, nodes)
        maker = source.producer()
        found_affine = affine_of(maker) if maker is not None else None
        if found_affine is None or found_affine[1].axis is not None:
            return
        source, affine = found_affine
        shift += slope * float(affine.shift[0])
        slope *= float(affine.scale[0])
        nodes += 1
        if slope <= 0:
            return


def scaled(node: ir.Node, factor: float) -> tuple[ir.Node, float]:
    """Follow the value through nodes that only scale it, to the last one and the product."""
    while True:
        user = lone_user(node.outputs[0], node.graph)
        found = scale_of(user)
        if user is None or found is None:
            return node, factor
        node, factor = user, factor * found[1]


def steps(first: ir.Node, last: ir.Node) -> int:
    """How many nodes after `first` lead to `last`."""
    count = 0
    while first is not last:
        user = lone_user(first.outputs[0], first.graph)
        assert user is not None
        first, count = user, count + 1
    return count


def put(
    model: ir.Model,
    last: ir.Node,
    op_type: str,
    source: ir.Value,
    attributes: dict[str, float],
    factor: float,
) -> None:
    """Write factor * operator(source) in the place of `last`."""
    if close(factor, 1):
        replace(last, op_type, [source], attributes)
        return
    assert source.dtype is not None
    value = insert_before(last, op_type, [source], attributes, like=last.outputs[0])
    number = stored(model, np.array(factor, source.dtype.numpy()), f"{last.name}_factor")
    replace(last, "Mul", [value, number])
