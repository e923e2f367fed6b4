"""Shapes: inferred, and the graphs that compute them replaced by what they come to.

With the entries of `entries.py`:

  1. a value whose entries are all numbers becomes a stored tensor,
  2. the target of a Reshape becomes a stored tensor where each entry is a number, or is named
     like the input's dimension at its place (0: copied), but for at most one (-1: what is left),
  3. an Expand whose target adds nothing goes.

Rule 2 holds for tensors that are not empty; an empty one leaves -1 without an answer.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from edgewright.passes.edit import (
    all_nodes,
    attribute,
    bypass,
    constant,
    dims,
    is_alive,
    is_op,
    static_dims,
    stored,
)
from edgewright.passes.entries import Entries, Known, follow, look_up
from edgewright.passes.symbols import unify_dims


def infer(model: ir.Model) -> None:
    """Infer types and shapes: as far as onnx can, and then as far as equal names go.

    Never fails: what cannot be inferred stays unknown. Needs unique names.
    """
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    unify_dims(model)


def resolve_shapes(model: ir.Model) -> int:
    """Apply the three rules; returns the number of changes."""
    known = follow(model)
    changes = 0
    for node in all_nodes(model):
        if not is_alive(node):
            continue
        if is_op(node, "Reshape"):
            changes += store_target(model, node, known)
        elif is_op(node, "Expand"):
            changes += drop_expand(node, known)
        if is_alive(node) and not is_op(node, "Constant") and node.outputs[0] in known:
            changes += store_numbers(model, node, known[node.outputs[0]])
    return changes


def store_numbers(model: ir.Model, node: ir.Node, entries: Entries) -> int:
    """Rule 1."""
    output = node.outputs[0]
    shape, kind = static_dims(output), output.dtype
    if shape is None or kind is None or output.is_graph_output():
        return 0
    if not all(isinstance(e, int) and abs(e) < 1 << 63 for e in entries):
        return 0
    array = np.array(entries).astype(kind.numpy()).reshape(shape)
    return int(bypass(node, stored(model, array, f"{output.name}_known")))


def store_target(model: ir.Model, node: ir.Node, known: Known) -> int:
    """Rule 2. With `allowzero`, 0 means an empty dimension; without such, it means nothing."""
    target = node.inputs[1]
    entries = look_up(target, known)
    shape = dims(node.inputs[0])
    if target is None or entries is None or constant(target) is not None or shape is None:
        return 0
    if attribute(node, "allowzero", 0) and 0 in entries:
        return 0
    new: list[int] = []
    for k, entry in enumerate(entries):
        if isinstance(entry, int):
            new.append(entry)
        elif entry is not None and k < len(shape) and shape[k] == entry:
            new.append(0)
        else:
            new.append(-1)
    if new.count(-1) > 1:
        return 0
    node.attributes.pop("allowzero", None)
    name = f"{node.outputs[0].name}_shape"
    node.replace_input_with(1, stored(model, np.array(new, np.int64), name))
    return 1


def drop_expand(node: ir.Node, known: Known) -> int:
    """Rule 3: each entry is 1 or the input's own dimension, aligned at the end."""
    entries, shape = look_up(node.inputs[1], known), dims(node.inputs[0])
    if entries is None or shape is None or len(entries) > len(shape):
        return 0
    own = shape[len(shape) - len(entries) :]
    if all(e == 1 or (e is not None and e == d) for e, d in zip(entries, own, strict=True)):
        return int(bypass(node))
    return 0
