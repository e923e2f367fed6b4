"""What every pass needs: questions to a node, and edits that keep scopes and outputs right.

Two rules. A value of an outer graph may be read in a nested graph but never be the output of
one, and a graph output keeps its name; `redirect` refuses what would break either. A rewrite
that joins two nodes asks for both in the same graph: a nested graph may run many times or never.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

DEFAULT_DOMAINS = ("", "ai.onnx")


def all_nodes(model: ir.Model) -> list[ir.Node]:
    """All nodes in the order they run, nested ones after the node around them.

    A list, so that a pass may add and remove nodes while it walks; see `is_alive`.
    """
    return list(ir.traversal.RecursiveGraphIterator(model.graph))


def is_alive(node: ir.Node) -> bool:
    """False for a node that a rewrite has taken out of its graph."""
    return node.graph is not None


def matching(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """The nodes of these operators, each still in the graph when it is yielded."""
    for node in all_nodes(model):
        if is_op(node, *op_types) and is_alive(node):
            yield node


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether the node is one of these operators of the default domain."""
    return node is not None and node.op_type in op_types and node.domain in DEFAULT_DOMAINS


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute (tuples for lists), or the default where it is not set."""
    found = node.attributes.get(name)
    if found is None or found.value is None:
        return default
    if isinstance(found.value, bytes):
        return found.value.decode()
    return found.value


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes the value, if it is one of these operators."""
    node = value.producer() if value is not None else None
    return node if is_op(node, *op_types) else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The values of a stored tensor, None for anything that is computed or fed.

    Strings and tensors without data count as not stored.
    """
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return None
    return tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number in a stored tensor of one value."""
    array = constant(value)
    return None if array is None or array.size != 1 else float(array.reshape(()))


def integers(value: ir.Value | None) -> list[int] | None:
    """The numbers in a stored integer tensor, flattened."""
    array = constant(value)
    return None if array is None or array.dtype.kind not in "iu" else [int(v) for v in array.flat]


def rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def dims(value: ir.Value | None) -> list[int | str | None] | None:
    """The shape: numbers, names of free dimensions, None for unknown; None without a rank."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def static_dims(value: ir.Value | None) -> list[int] | None:
    """The shape where all of it is known."""
    shape = dims(value)
    if shape is None or not all(isinstance(d, int) for d in shape):
        return None
    return [int(d) for d in shape]  # type: ignore[arg-type]


def same_shape(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether both shapes are provably equal: same numbers, same names of free dimensions."""
    left, right = dims(a), dims(b)
    return left is not None and left == right and None not in left


def lone_user(value: ir.Value, graph: ir.Graph | None) -> ir.Node | None:
    """The only node that reads the value, once, in this graph; None for graph outputs too."""
    uses = value.uses()
    if value.is_graph_output() or len(uses) != 1:
        return None
    (use,) = uses
    return use.node if use.node.graph is graph else None


def stored(model: ir.Model, array: np.ndarray, name: str) -> ir.Value:
    """A new stored tensor of the main graph, under this name or one derived from it."""
    graph = model.graph
    unique, count = name, 0
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    array = np.ascontiguousarray(array).reshape(array.shape)  # the former makes 0-D arrays 1-D
    tensor = ir.tensor(array, name=unique)
    value = ir.Value(
        name=unique,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def insert_before(
    anchor: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any] | None = None,
    like: ir.Value | None = None,
) -> ir.Value:
    """A new node in front of `anchor`; returns its output, typed and shaped as `like`."""
    assert anchor.graph is not None
    node = ir.node(op_type, inputs, attributes or {})
    value = node.outputs[0]
    if like is not None:
        value.type, value.shape = like.type, like.shape
    anchor.graph.insert_before(anchor, node)
    return value


def redirect(old: ir.Value, new: ir.Value) -> bool:
    """Let all readers of `old` read `new`. Returns False, with nothing done, where `old` is a
    graph output whose place `new` cannot take: it is fed, stored, of another graph, or an
    output already.
    """
    if old is new:
        return False
    if old.is_graph_output():
        maker = new.producer()
        if maker is None or new.is_graph_output() or maker.graph is not old.graph:
            return False
        name, shape, kind = old.name, old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None
        new.name = name
        new.type = kind or new.type
        new.shape = shape or new.shape
        return True
    old.replace_all_uses_with(new)
    return True


def remove(node: ir.Node) -> None:
    """Take a node out whose outputs nobody reads.

    Its nested graphs are emptied too: their nodes would go on counting as readers of outer
    values, which then could never die.
    """
    assert node.graph is not None
    for graph in nested(node):
        graph.outputs.clear()
        for inner in reversed(list(graph)):
            remove(inner)
    node.graph.remove(node, safe=True)


def forget_lost_readers(model: ir.Model) -> None:
    """Cut nodes off that are in no graph of the model but still count as readers of its values.

    A library that takes out an If leaves the branch that never runs in such a state.
    """
    nodes = all_nodes(model)
    alive = set(nodes)
    values = [v for graph in model.graphs() for v in [*graph.inputs, *graph.initializers.values()]]
    for value in [*values, *(output for node in nodes for output in node.outputs)]:
        for use in value.uses():
            if use.node not in alive:
                use.node.replace_input_with(use.idx, None)


def nested(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs inside a node's attributes."""
    for item in node.attributes.values():
        if item.type == ir.AttributeType.GRAPH:
            yield item.as_graph()
        elif item.type == ir.AttributeType.GRAPHS:
            yield from item.as_graphs()


def bypass(node: ir.Node, value: ir.Value | None = None) -> bool:
    """Take out a node whose only output equals `value` (its first input)."""
    source = value if value is not None else node.inputs[0]
    if source is None or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return False
    if not redirect(node.outputs[0], source):
        return False
    remove(node)
    return True


def replace(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any] | None = None,
) -> ir.Node:
    """Put another node with one output in the place, and under the name, of this one."""
    assert node.graph is not None
    old = node.outputs[0]
    new = ir.node(op_type, inputs, attributes or {}, name=node.name)
    value = new.outputs[0]
    value.name, value.type, value.shape = old.name, old.type, old.shape
    node.graph.insert_before(node, new)
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    remove(node)
    return new


def drop_unread(nodes: Iterable[ir.Node]) -> None:
    """Take out those of the nodes, later ones first, whose outputs nobody reads any more."""
    for node in reversed(list(nodes)):
        if is_alive(node) and not any(o.uses() or o.is_graph_output() for o in node.outputs):
            remove(node)
