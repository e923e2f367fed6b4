"""Multiply-accumulates of a model, per operator and per node.

Sizes are those with every free dimension at 1, after shape arithmetic is computed.
"""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from edgewright import model as graph
from edgewright.passes.branches import decide_branches
from edgewright.passes.constants import fold_constants
from edgewright.passes.shapes import infer, resolve_shapes

RECURRENT = ("LSTM", "GRU", "RNN")
WORK = ("Conv", "ConvTranspose", "MatMul", "Gemm", "MatMulNBits", *RECURRENT)
ROUNDS = 4  # what is computed in one may settle more in the next
Shape = tuple[int, ...]
Item = tuple[str, str, int | None]  # operator, first named output, multiply-accumulates


def work(model: onnx.ModelProto) -> tuple[dict[str, int], str]:
    """Multiply-accumulates per operator with every free dimension at 1, and what is not known."""
    try:
        items, _ = node_work(model)
    except Exception as error:  # a description is no reason to refuse a model that runs
        return {}, f"sizes inside cannot be inferred: {type(error).__name__}"
    totals: dict[str, int] = {}
    unknown = 0
    for op, _, count in items:
        if count is None:
            unknown += 1
        else:
            totals[op] = totals.get(op, 0) + count
    return totals, f"the work of {unknown} nodes is not known" if unknown else ""


def node_work(model: onnx.ModelProto) -> tuple[list[Item], int]:
    """The nodes that multiply, and the number of all nodes, with every free dimension at 1.

    Both branches of an undecided If count, the body of a Loop counts once. Raises whatever
    shape inference raises where it fails.
    """
    sized = sized_copy(model, {})
    items: list[Item] = []
    for part in graph.all_graphs(sized.graph):
        shapes = known_shapes(part)
        found = [n for n in part.node if n.op_type in WORK]
        items += [
            (n.op_type, next(filter(None, n.output), ""), node_macs(n, shapes.get)) for n in found
        ]
    return items, graph.count_nodes(sized)


def macs_by_name(model: onnx.ModelProto, sizes: Mapping[str, Shape]) -> dict[str, int]:
    """Multiply-accumulates of the named nodes for inputs of these sizes, as far as known.

    Empty where the sizes inside cannot be inferred.
    """
    try:
        sized = sized_copy(model, sizes)
    except Exception:  # a description is no reason to refuse a model that runs
        return {}
    found: dict[str, int] = {}
    for part in graph.all_graphs(sized.graph):
        shapes = known_shapes(part)
        for node in part.node:
            count = node_macs(node, shapes.get) if node.op_type in WORK and node.name else None
            if count is not None:
                found[node.name] = found.get(node.name, 0) + count
    return found


def shapes_of(model: onnx.ModelProto, sizes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of the main graph's tensors for inputs of these sizes (free dimensions: 1), as far
    as they follow from them."""
    return known_shapes(sized_copy(model, sizes).graph)


def sized_copy(model: onnx.ModelProto, sizes: Mapping[str, Shape]) -> onnx.ModelProto:
    """A copy with every size that follows from those of the inputs (free dimensions: 1)."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in graph.real_inputs(fixed):
        for k, dim in enumerate(value.type.tensor_type.shape.dim):
            if value.name in sizes:
                dim.dim_value = sizes[value.name][k]
            elif not (dim.HasField("dim_value") and dim.dim_value > 0):
                dim.dim_value = 1
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    del fixed.graph.value_info[:]
    return with_sizes(fixed)


def with_sizes(fixed: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every size that follows from its inputs: shape arithmetic computed."""
    inside = ir.from_proto(fixed)
    for _ in range(ROUNDS):
        infer(inside)
        if not resolve_shapes(inside) + fold_constants(inside) + decide_branches(inside):
            break
    return ir.to_proto(inside)


def known_shapes(part: onnx.GraphProto) -> dict[str, Shape]:
    """The shapes of a graph's tensors, as far as all their sizes are known."""
    shapes = {t.name: tuple(t.dims) for t in part.initializer}
    for value in [*part.input, *part.output, *part.value_info]:
        kind = value.type.tensor_type
        sizes = tuple(d.dim_value for d in kind.shape.dim)
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shapes[value.name] = sizes
    return shapes


def node_macs(node: onnx.NodeProto, shape: Callable[[str], Shape | None]) -> int | None:
    """Multiply-accumulates of one node, None where a shape is unknown."""
    if node.op_type in RECURRENT:
        x, w, r = (shape(name) for name in node.input[:3])
        if not (x and w and r):
            return None
        return x[0] * x[1] * (size(w) + size(r))
    first, second, out = shape(node.input[0]), shape(node.input[1]), shape(node.output[0])
    if first is None or second is None or out is None:
        return None
    if node.op_type == "Conv":  # weight: (out, in / groups, *kernel)
        return size(out) * size(second[1:])
    if node.op_type == "ConvTranspose":  # weight: (in, out / groups, *kernel)
        return size(first) * size(second[1:])
    inner = first[0] if transposed(node) else first[-1]
    return size(out) * inner


def transposed(node: onnx.NodeProto) -> bool:
    """Whether a Gemm takes its first operand transposed."""
    return any(a.name == "transA" and a.i for a in node.attribute)


def size(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))
