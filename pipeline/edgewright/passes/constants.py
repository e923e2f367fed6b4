"""Compute what needs no input: constant folding, and constants stored as initializers.

The folding itself is onnxscript's (partial evaluation of shapes, branches of an If whose
condition is known, everything whose inputs are stored); this file adds a limit in bytes. A
result may be at most GROWTH bytes larger than the stored inputs that nothing else reads, and
all folds together may add at most TOTAL_GROWTH, so that folding never blows a file up: the
transposed copy of a tied embedding stays a Transpose, a table stored as float16 stays a Cast.
Quantize and dequantize nodes and random numbers are never folded.
"""

import math
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnxscript import optimizer

from edgewright.passes.edit import all_nodes, forget_lost_readers, is_op, static_dims

GROWTH = 1 << 20
TOTAL_GROWTH = 4 << 20
KEPT = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
NO_LIMIT = 1 << 62


@dataclass
class Budget:
    """Decides which nodes may be folded, and adds up what the folds cost."""

    growth: int = GROWTH
    total: int = TOTAL_GROWTH
    spent: int = 0
    refused: list[str] = field(default_factory=list)

    def allows(self, node: ir.Node) -> bool:
        """Whether to fold this node, all of whose inputs are stored."""
        if is_op(node, *KEPT) or len(node.outputs) != 1:
            return False
        output = node.outputs[0]
        shape, kind = static_dims(output), output.dtype
        if shape is None or kind is None:
            return False
        freed = sum(
            value.const_value.nbytes
            for value in {v for v in node.inputs if v is not None}
            if value.const_value is not None and value.consumers() == (node,)
        )
        growth = int(math.prod(shape) * kind.itemsize) - freed
        if growth > self.growth or self.spent + growth > self.total:
            self.refused.append(node.name or node.op_type)
            return False
        self.spent += growth
        return True


def fold_constants(model: ir.Model, growth: int = GROWTH, total: int = TOTAL_GROWTH) -> int:
    """Fold constants within the limits in bytes; returns by how many nodes the model shrank,
    at least 1 where anything changed.
    """
    before = len(all_nodes(model))
    budget = Budget(growth, total)
    changed = optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=NO_LIMIT,
        output_size_limit=NO_LIMIT,
        should_fold=budget.allows,
    )
    forget_lost_readers(model)
    store_constants(model)
    return max(before - len(all_nodes(model)), int(bool(changed)))


def store_constants(model: ir.Model) -> int:
    """Turn Constant nodes, nested ones too, into initializers of the main graph."""
    before = len(all_nodes(model))
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for graph in list(model.graphs()):
        if graph is not model.graph:
            for name in list(graph.initializers):
                value = graph.initializers[name]
                if not value.is_graph_output():
                    lift(model, graph, value)
    return before - len(all_nodes(model))


def lift(model: ir.Model, graph: ir.Graph, value: ir.Value) -> None:
    """Move a stored tensor of a nested graph to the main graph, under a free name."""
    assert value.name is not None and value.const_value is not None
    outer = model.graph.initializers
    name, count = value.name, 0
    while name in outer:
        count += 1
        name = f"{value.name}_{count}"
    graph.initializers.pop(value.name)
    value.name = name
    model.graph.register_initializer(value)
