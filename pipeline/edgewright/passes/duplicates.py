"""Take out what nobody reads and what is there twice."""

import hashlib

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from edgewright.passes.edit import all_nodes, nested, remove


def remove_dead(model: ir.Model) -> int:
    """Remove nodes and stored tensors whose values are never read, optional outputs too.

    Returns the number of nodes and tensors removed.
    """
    count = sweep(model.graph)
    for graph in list(model.graphs()):
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del graph.initializers[name]
                count += 1
    return count


def sweep(graph: ir.Graph) -> int:
    """Remove unread nodes, last ones first so that what they read can go as well."""
    count = 0
    for node in reversed(list(graph)):
        if not any(o.uses() or o.is_graph_output() for o in node.outputs):
            remove(node)
            count += 1
            continue
        for inner in nested(node):
            count += sweep(inner)
    return count


def merge_duplicates(model: ir.Model) -> int:
    """Keep one of equal stored tensors and of equal nodes of the main graph.

    Nodes of nested graphs stay apart: a branch that does not run makes nothing to share.
    Returns the number of nodes and tensors that went.
    """
    before = len(all_nodes(model)) + len(model.graph.initializers)
    merge_tensors(model.graph)
    CommonSubexpressionEliminationPass()(model)
    return before - len(all_nodes(model)) - len(model.graph.initializers)


def merge_tensors(graph: ir.Graph) -> None:
    """Let readers of equal tensors (type, shape, bytes) read the first of them."""
    first: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        if value.is_graph_output() or value.is_graph_input():
            continue
        shape = tuple(int(d) for d in tensor.shape.numpy())
        key = (tensor.dtype, shape, hashlib.sha256(tensor.tobytes()).digest())
        kept = first.setdefault(key, value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[name]
