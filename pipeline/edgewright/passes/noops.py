"""Take out operators that change nothing, alone or in pairs.

Alone: Identity; Dropout without training; Cast to the own type; Transpose that keeps the order;
Reshape, Expand and Flatten to the own shape; Pad by nothing; Slice of everything; Concat and
Sum of one; Add or Sub of 0, Mul, Div or Pow by 1.

Pairs, where nothing else reads the value between: Transpose after Transpose (one with both
orders), Reshape after Reshape, Flatten, Squeeze or Unsqueeze (the last), Squeeze after
Unsqueeze of the same axes and the reverse, Cast after a Cast that loses nothing.

A node whose output is a graph output stays where its input cannot take the place (see
`edit.redirect`).
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgewright.passes.edit import (
    all_nodes,
    attribute,
    bypass,
    constant,
    dims,
    drop_unread,
    integers,
    is_alive,
    is_op,
    lone_user,
    operand,
    producer,
    rank,
    same_shape,
)


def remove_noops(model: ir.Model) -> int:
    """Apply the lists above until nothing is left; returns the number of nodes taken out."""
    total = 0
    while True:
        changes = 0
        for node in all_nodes(model):
            if not is_alive(node):
                continue
            if is_op(node, *ALONE) and ALONE[node.op_type](node):
                changes += int(bypass(node))
            elif is_op(node, *PAIRS):
                changes += PAIRS[node.op_type](node)
        total += changes
        if changes == 0:
            return total


def always(node: ir.Node) -> bool:
    return True


def not_training(node: ir.Node) -> bool:
    """Dropout of operator set 12 on; the mask must not be read (`bypass` looks at that)."""
    training = operand(node, 2)
    if training is None:
        return True
    value = constant(training)
    return value is not None and not value.any()


def own_type(node: ir.Node) -> bool:
    value = node.inputs[0]
    return value is not None and value.dtype == ir.DataType(attribute(node, "to"))


def own_order(node: ir.Node) -> bool:
    perm = attribute(node, "perm")
    return perm is not None and list(perm) == list(range(len(perm)))


def own_shape(node: ir.Node) -> bool:
    return same_shape(node.inputs[0], node.outputs[0])


def pads_nothing(node: ir.Node) -> bool:
    pads = integers(operand(node, 1))
    return pads is not None and not any(pads)


def takes_all(node: ir.Node) -> bool:
    """Slice from 0 to the end (or beyond what the axis holds) in steps of 1."""
    start, end = integers(node.inputs[1]), integers(node.inputs[2])
    steps, axes = operand(node, 4), operand(node, 3)
    shape = dims(node.inputs[0])
    if start is None or end is None or shape is None:
        return False
    if steps is not None and set(integers(steps) or [0]) != {1}:
        return False
    places = list(range(len(start))) if axes is None else integers(axes)
    if places is None or any(start):
        return False
    for stop, axis in zip(end, places, strict=True):
        size = shape[axis]
        if stop < np.iinfo(np.int32).max and not (isinstance(size, int) and stop >= size):
            return False
    return True


def only_one(node: ir.Node) -> bool:
    return len(node.inputs) == 1


def neutral(*numbers: float) -> Callable[[ir.Node], bool]:
    """Whether the second input is stored, made of this number only, and broadcasts nothing."""

    def test(node: ir.Node) -> bool:
        array = constant(operand(node, 1))
        if array is None or array.size == 0 or not np.isin(array, numbers).all():
            return False
        if array.size == 1 and array.ndim <= (rank(node.inputs[0]) or 0):
            return True
        return own_shape(node)

    return test


def commuted(*numbers: float) -> Callable[[ir.Node], bool]:
    """The same for either input of Add or Mul; the constant is put second first."""
    second = neutral(*numbers)

    def test(node: ir.Node) -> bool:
        if constant(node.inputs[0]) is not None and constant(node.inputs[1]) is None:
            left, right = node.inputs
            node.replace_input_with(0, right)
            node.replace_input_with(1, left)
        return second(node)

    return test


def join_transposes(node: ir.Node) -> int:
    """y = T(T(x, p), q): y's axis k is axis q[k] of T(x, p), which is axis p[q[k]] of x."""
    first = producer(node.inputs[0], "Transpose")
    if first is None or lone_user(first.outputs[0], node.graph) is not node:
        return 0
    inner, outer = attribute(first, "perm"), attribute(node, "perm")
    if inner is None or outer is None:
        return 0
    node.attributes.add(ir.AttrInt64s("perm", [inner[k] for k in outer]))
    node.replace_input_with(0, first.inputs[0])
    drop_unread([first])
    return 1


def join_reshapes(node: ir.Node) -> int:
    """Only the last shape counts, unless it copies a dimension (0) of the one before."""
    first = producer(node.inputs[0], "Reshape", "Flatten", "Squeeze", "Unsqueeze")
    if first is None or lone_user(first.outputs[0], node.graph) is not node:
        return 0
    target = integers(node.inputs[1])
    if target is None or 0 in target or attribute(node, "allowzero", 0):
        return 0
    node.replace_input_with(0, first.inputs[0])
    drop_unread([first])
    return 1


def undo(other: str) -> Callable[[ir.Node], int]:
    """Squeeze of the axes an Unsqueeze just made, or the reverse; the first node may stay."""

    def join(node: ir.Node) -> int:
        first = producer(node.inputs[0], other)
        if first is None:
            return 0
        size = rank(first.inputs[0] if other == "Squeeze" else first.outputs[0])
        here, there = integers(operand(node, 1)), integers(operand(first, 1))
        if here is None or there is None:
            return 0
        if size is not None:
            here, there = [a % size for a in here], [a % size for a in there]
        elif any(a < 0 for a in here + there):
            return 0
        if sorted(here) != sorted(there) or not bypass(node, first.inputs[0]):
            return 0
        drop_unread([first])
        return 1

    return join


def join_casts(node: ir.Node) -> int:
    """Cast(Cast(x, wide), to) = Cast(x, to) where `wide` holds every value of x's type."""
    first = producer(node.inputs[0], "Cast")
    if first is None or first.inputs[0] is None or first.inputs[0].dtype is None:
        return 0
    wide = ir.DataType(attribute(first, "to"))
    if wide not in WIDER.get(first.inputs[0].dtype, ()):
        return 0
    node.replace_input_with(0, first.inputs[0])
    drop_unread([first])
    return 1


KINDS = ir.DataType
INTEGERS = (KINDS.INT32, KINDS.INT64)
WIDER: dict[ir.DataType, tuple[ir.DataType, ...]] = {
    KINDS.BOOL: (KINDS.UINT8, KINDS.INT8, *INTEGERS, KINDS.FLOAT16, KINDS.FLOAT, KINDS.DOUBLE),
    KINDS.UINT8: (*INTEGERS, KINDS.FLOAT, KINDS.DOUBLE),
    KINDS.INT8: (*INTEGERS, KINDS.FLOAT, KINDS.DOUBLE),
    KINDS.INT32: (KINDS.INT64, KINDS.DOUBLE),
    KINDS.FLOAT16: (KINDS.FLOAT, KINDS.DOUBLE),
    KINDS.FLOAT: (KINDS.DOUBLE,),
}
ALONE: dict[str, Callable[[ir.Node], bool]] = {
    "Identity": always,
    "Dropout": not_training,
    "Expand": own_shape,
    "Flatten": own_shape,
    "Pad": pads_nothing,
    "Slice": takes_all,
    "Concat": only_one,
    "Sum": only_one,
    "Add": commuted(0),
    "Sub": neutral(0),
    "Mul": commuted(1),
    "Div": neutral(1),
    "Pow": neutral(1),
}
PAIRS: dict[str, Callable[[ir.Node], int]] = {
    "Cast": lambda node: int(own_type(node) and bypass(node)) or join_casts(node),
    "Transpose": lambda node: int(own_order(node) and bypass(node)) or join_transposes(node),
    "Reshape": lambda node: int(own_shape(node) and bypass(node)) or join_reshapes(node),
    "Squeeze": undo("Unsqueeze"),
    "Unsqueeze": undo("Squeeze"),
}
