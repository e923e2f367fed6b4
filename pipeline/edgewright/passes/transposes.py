"""Transposes of the last two axes that exporters wrap in reshapes.

torch transposes the keys of an attention as (batch, heads, tokens, size) -> (batch * heads,
tokens, size) -> (batch * heads, size, tokens) -> (batch, heads, size, tokens). One Transpose does
the same, without two copies, and leaves the heads an axis of their own.
"""

import onnx_ir as ir

from edgewright.passes.edit import (
    attribute,
    constant,
    dims,
    drop_unread,
    integers,
    lone_user,
    matching,
    operand,
    producer,
    replace,
)


def unwrap_transposes(model: ir.Model) -> int:
    """Returns the number of transposes freed of their reshapes."""
    return sum(unwrap(node) for node in matching(model, "Transpose"))


def unwrap(node: ir.Node) -> int:
    """Transpose(0, 2, 1) between a Reshape that joins all leading axes and one that parts them."""
    joined = producer(node.inputs[0], "Reshape")
    parted = lone_user(node.outputs[0], node.graph)
    if joined is None or parted is None or parted.op_type != "Reshape":
        return 0
    if tuple(attribute(node, "perm", ())) != (0, 2, 1):
        return 0
    x = joined.inputs[0]
    shape, middle, after = dims(x), dims(node.inputs[0]), dims(parted.outputs[0])
    target = integers(operand(parted, 1))
    if shape is None or middle is None or after is None or target is None:
        return 0
    rank = len(shape)
    if rank < 4 or len(middle) != 3 or len(after) != rank or constant(x) is not None:
        return 0
    rows, columns = shape[-2:]
    # All but the first length known on both sides: what is left for the first is equal, too.
    if middle[1:] != [rows, columns] or after[-2:] != [columns, rows]:
        return 0
    known = [d for d in (*shape[1:], *after[1:]) if isinstance(d, int) and d > 0]
    if len(known) < 2 * (rank - 1) or shape[1:-2] != after[1:-2]:
        return 0
    order = [*range(rank - 2), rank - 1, rank - 2]
    new = replace(parted, "Transpose", [x], {"perm": order})
    output = new.outputs[0]
    output.shape = ir.Shape([shape[0], *after[1:]])
    drop_unread([joined, node])
    return 1
