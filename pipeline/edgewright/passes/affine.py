"""Per-channel affine maps, y = x * scale + shift, and the chains of nodes that compute them.

BatchNormalization is one (scale = gamma / sqrt(var + eps), shift = beta - mean * scale), so are
Mul, Add, Sub and Div by stored tensors that vary along at most one axis, and Neg. Nodes that
follow each other, with no other reader between, make one map:
(x * s1 + t1) * s2 + t2 = x * (s1 * s2) + (t1 * s2 + t2), computed in float64.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewright.passes.edit import attribute, constant, dims, is_op, lone_user, rank

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
AFFINE = ("BatchNormalization", "Mul", "Add", "Sub", "Div", "Neg")


@dataclass(frozen=True)
class Affine:
    """x * scale + shift along `axis` of x (counted from the front).

    scale, shift: float64, shape (1,) or (n,) with n the size of the axis. axis None: one number
    for all of x.
    """

    scale: np.ndarray
    shift: np.ndarray
    axis: int | None

    def then(self, other: "Affine") -> "Affine | None":
        """This map followed by another; None where they act along different axes."""
        if self.axis is not None and other.axis is not None and self.axis != other.axis:
            return None
        axis = self.axis if self.axis is not None else other.axis
        scale = self.scale * other.scale
        return Affine(scale, self.shift * other.scale + other.shift, axis)

    def is_scale(self) -> bool:
        return not self.shift.any()

    def is_shift(self) -> bool:
        return bool((self.scale == 1).all())

    def is_sound(self) -> bool:
        """Whether float32 holds all of it: nothing overflows, nothing but 0 becomes 0."""
        with np.errstate(over="ignore"):
            scale, shift = self.scale.astype(np.float32), self.shift.astype(np.float32)
        finite = np.isfinite(scale).all() and np.isfinite(shift).all()
        return bool(finite and ((scale == 0) == (self.scale == 0)).all())


@dataclass(frozen=True)
class Chain:
    """Nodes in order, each read by the next only, and the map they compute together."""

    nodes: tuple[ir.Node, ...]
    source: ir.Value
    affine: Affine

    @property
    def result(self) -> ir.Value:
        return self.nodes[-1].outputs[0]


def affine_of(node: ir.Node) -> tuple[ir.Value, Affine] | None:
    """What the node reads and the map it applies, None if it is not affine."""
    if not is_op(node, *AFFINE) or node.outputs[0].dtype not in FLOATS:
        return None
    if node.op_type == "BatchNormalization":
        return normalization(node)
    if node.op_type == "Neg":
        source = node.inputs[0]
        return None if source is None else (source, Affine(np.array([-1.0]), np.zeros(1), None))
    left, right = node.inputs
    if left is None or right is None:
        return None
    number, source, first = constant(right), left, False
    if number is None:
        number, source, first = constant(left), right, True
    if number is None or constant(source) is not None:
        return None
    line = along_axis(number, source)
    if line is None or (node.op_type == "Div" and (first or not line[0].all())):
        return None
    values, axis = line
    one, zero = np.ones(1), np.zeros(1)
    affine = {
        "Mul": lambda: Affine(values, zero, axis),
        "Div": lambda: Affine(1 / values, zero, axis),
        "Add": lambda: Affine(one, values, axis),
        "Sub": lambda: Affine(-one if first else one, values if first else -values, axis),
    }[node.op_type]()
    return (source, affine) if affine.is_sound() else None


def along_axis(number: np.ndarray, source: ir.Value) -> tuple[np.ndarray, int | None] | None:
    """A stored operand as (n,) values and their axis in `source`; None where it varies along
    more axes or would make `source` grow.
    """
    size = rank(source)
    if size is None or number.ndim > size:
        return None
    if number.size == 1:
        return number.reshape(1).astype(np.float64), None
    wide = [k for k, n in enumerate(number.shape) if n != 1]
    if len(wide) != 1:
        return None
    axis = size - number.ndim + wide[0]
    shape = dims(source)
    if shape is None or shape[axis] != number.size:
        return None
    return number.reshape(-1).astype(np.float64), axis


def normalization(node: ir.Node) -> tuple[ir.Value, Affine] | None:
    """BatchNormalization with stored statistics, not training."""
    source = node.inputs[0]
    values = [constant(v) for v in node.inputs[1:5]]
    if source is None or any(v is None for v in values) or attribute(node, "training_mode", 0):
        return None
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return None
    gamma, beta, mean, var = (v.astype(np.float64) for v in values if v is not None)
    deviation = np.sqrt(var + attribute(node, "epsilon", 1e-5))
    if not (deviation > 0).all():
        return None
    scale = gamma / deviation
    affine = Affine(scale, beta - mean * scale, 1)
    return (source, affine) if affine.is_sound() else None


def chain_at(node: ir.Node) -> Chain | None:
    """The longest chain that starts at this node; None if it is affine only as part of one."""
    first = affine_of(node)
    if first is None:
        return None
    source, affine = first
    before = source.producer()
    if before is not None and lone_user(source, node.graph) is node:
        above = affine_of(before)
        if above is not None and above[1].then(affine) is not None:
            return None
    nodes = [node]
    while (follower := lone_user(nodes[-1].outputs[0], node.graph)) is not None:
        found = affine_of(follower)
        joined = affine.then(found[1]) if found is not None else None
        if joined is None or not joined.is_sound():
            break
        affine = joined
        nodes.append(follower)
    return Chain(tuple(nodes), source, affine)
