"""LayerNormalization written out by an exporter, as the one operator it is.

    d = x - mean(x);  y = d / sqrt(mean(d^2) + eps);  y * gamma + beta

over the last axes. d^2 is Pow(d, 2) or Mul(d, d); the division may be Div(d, Sqrt(v)),
Mul(d, Reciprocal(Sqrt(v))) or Mul(d, Pow(v, -0.5)). gamma and beta are stored and have one value
per entry of the axes, or are left out: gamma is needed by the operator and becomes ones.

Runtimes find this pattern themselves in float, but no longer once quantize nodes stand inside.
The operator exists since operator set 17.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewright.passes.edit import (
    attribute,
    constant,
    dims,
    drop_unread,
    integers,
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
from edgewright.passes.opset import opset

SINCE = 17


@dataclass(frozen=True)
class Normalized:
    """A value that is x normalised over the axes from `axis` (negative) on, without factors."""

    x: ir.Value
    axis: int
    epsilon: float
    nodes: tuple[ir.Node, ...]


def find_layer_norms(model: ir.Model) -> int:
    """Returns the number of LayerNormalization nodes written."""
    if opset(model) < SINCE:
        return 0
    return sum(write(model, node) for node in matching(model, "Div", "Mul"))


def write(model: ir.Model, node: ir.Node) -> int:
    found = normalized(node)
    if found is None:
        return 0
    size = [d for d in (dims(found.x) or [])[found.axis :] if isinstance(d, int)]
    if len(size) != -found.axis:
        return 0
    nodes, last, factors = list(found.nodes), node, []
    for op_type in ("Mul", "Add"):
        user = lone_user(last.outputs[0], node.graph)
        factor = stored_factor(user, op_type, last.outputs[0], size)
        factors.append(factor)
        if factor is not None and user is not None:
            nodes.append(last)
            last = user
    gamma, beta = factors
    kind = found.x.dtype
    if kind is None or not kind.is_floating_point():
        return 0
    if gamma is None:
        gamma = np.ones(size, kind.numpy())
    inputs: list[ir.Value | None] = [found.x, stored(model, gamma, f"{last.name}_scale")]
    if beta is not None:
        inputs.append(stored(model, beta, f"{last.name}_shift"))
    replace(last, "LayerNormalization", inputs, {"axis": found.axis, "epsilon": found.epsilon})
    drop_unread(nodes)
    return 1


def stored_factor(
    user: ir.Node | None, op_type: str, value: ir.Value, size: list[int]
) -> np.ndarray | None:
    """The stored operand of Mul or Add beside `value`, in the shape of the normalised axes."""
    if user is None or not is_op(user, op_type):
        return None
    for factor in user.inputs:
        array = constant(factor)
        if factor is value or array is None:
            continue
        while array.ndim > len(size) and array.shape[0] == 1:
            array = array[0]
        if list(array.shape) == size:
            return array
    return None


def normalized(node: ir.Node) -> Normalized | None:
    """Read `node` as d / sqrt(mean(d^2) + eps)."""
    for deviation, other in (node.inputs, node.inputs[::-1]):
        inverse = inverse_root(node, other)
        minus = producer(deviation, "Sub")
        if inverse is None or minus is None or deviation is None:
            continue
        variance, path = inverse
        added = producer(variance, "Add")
        epsilon = None
        if added is not None:
            for value, number in (added.inputs, added.inputs[::-1]):
                if scalar(number) is not None and scalar(value) is None:
                    variance, epsilon = value, scalar(number)
        squares = producer(variance, "ReduceMean")
        mean = producer(minus.inputs[1], "ReduceMean")
        if epsilon is None or squares is None or mean is None or added is None:
            continue
        power, x = producer(squares.inputs[0], "Pow", "Mul"), minus.inputs[0]
        if (
            power is None
            or x is None
            or mean.inputs[0] is not x
            or not squares_of(power, deviation)
        ):
            continue
        axis = last_axes(mean)
        if axis is None or axis != last_axes(squares):
            continue
        nodes = (mean, minus, power, squares, added, *path)
        return Normalized(x, axis, epsilon, nodes)
    return None


def inverse_root(
    node: ir.Node, value: ir.Value | None
) -> tuple[ir.Value | None, list[ir.Node]] | None:
    """What the square root is taken of, if `node` divides by it, and the nodes on the way."""
    if is_op(node, "Div"):
        root = producer(value, "Sqrt") if value is node.inputs[1] else None
        return None if root is None else (root.inputs[0], [root])
    reciprocal = producer(value, "Reciprocal")
    root = producer(reciprocal.inputs[0], "Sqrt") if reciprocal is not None else None
    if reciprocal is not None and root is not None:
        return root.inputs[0], [root, reciprocal]
    power = producer(value, "Pow")
    if power is not None and scalar(power.inputs[1]) == -0.5:
        return power.inputs[0], [power]
    return None


def squares_of(node: ir.Node, value: ir.Value) -> bool:
    if is_op(node, "Mul"):
        return node.inputs[0] is value and node.inputs[1] is value
    return node.inputs[0] is value and scalar(node.inputs[1]) == 2


def last_axes(node: ir.Node) -> int | None:
    """-k where the mean is taken over the last k axes and keeps them, else None."""
    size = rank(node.inputs[0])
    axes = attribute(node, "axes") or integers(operand(node, 1))
    if size is None or axes is None or not attribute(node, "keepdims", 1):
        return None
    places = sorted(a % size for a in axes)
    return -len(places) if places == list(range(size - len(places), size)) else None
