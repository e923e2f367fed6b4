"""Names: one per node and value in the whole model, the same at every run.

Later stages address nodes and tensors by name, across nested graphs, and shape inference tools
keep one table for all graphs; so a name that two nested graphs share is made unique. Names of
the source are kept wherever they can be, those of graph inputs and outputs always. A node that
had none is called after its operator and its place in the order of execution: Conv_12.
"""

from collections.abc import Set

import onnx_ir as ir

from edgewright.passes.edit import all_nodes


def names_in(model: ir.Model) -> frozenset[str]:
    """All names of nodes and values of the model, as a source to keep names from."""
    names: set[str | None] = {v.name for g in model.graphs() for v in [*g.inputs, *g.outputs]}
    names |= {name for graph in model.graphs() for name in graph.initializers}
    for node in all_nodes(model):
        names.add(node.name)
        names |= {output.name for output in node.outputs}
    return frozenset(n for n in names if n)


def assign_names(model: ir.Model, keep: Set[str]) -> int:
    """Make all names unique; those not in `keep` (given by a library on the way) anew.

    Returns how many names changed.
    """
    changes = 0
    nodes = all_nodes(model)
    taken: set[str] = set()
    for k, node in enumerate(nodes):
        name = node.name if node.name in keep and node.name not in taken else None
        unique = name or free_name(f"{node.op_type}_{k}", taken, keep)
        taken.add(unique)
        changes += node.name != unique
        node.name = unique

    fixed = {v.name for v in [*model.graph.inputs, *model.graph.outputs] if v.name}
    used: dict[str, ir.Value] = {
        v.name: v for v in [*model.graph.inputs, *model.graph.outputs] if v.name
    }

    def settle(value: ir.Value, fallback: str) -> int:
        old = value.name
        if used.get(old or "") is value:
            return 0
        unique = old if old and (old in keep or value.is_initializer()) else fallback
        if unique in used:
            unique = free_name(unique, used.keys() | fixed, keep)
        used[unique] = value
        if unique == old:
            return 0
        value.name = unique
        return 1

    for graph in model.graphs():
        for value in [*graph.inputs, *graph.initializers.values()]:
            changes += settle(value, "value")
    for node in nodes:
        for k, value in enumerate(node.outputs):
            if value.name != "":  # an output that is left out
                changes += settle(value, f"{node.name}_output_{k}")
    return changes


def free_name(stem: str, taken: Set[str], keep: Set[str]) -> str:
    """The stem, or the first of stem_1, stem_2, ... that no other thing has or may want."""
    name, count = stem, 0
    while name in taken or name in keep:
        count += 1
        name = f"{stem}_{count}"
    return name
