"""Look-ups: rows taken from a stored table instead of computed anew at every run.

  1. MatMul(Cast(Equal(i, [0 .. n-1])), W), a one-hot encoding times stored weights, is a row of
     W, or zeros for an index outside: Gather([W; 0], Clip(i, -1, n)). Row -1 is the last one.
     The sum has one term that is not zero, so the result is the same to the last bit.
  2. Element-wise operators of rows of a table, and of stored values that are the same for every
     row, f(Gather(T, i)), are rows of a new table: Gather(f(T), i). T' = f(T) is computed by
     the runtime itself, once, and takes the place of T where nothing else reads T.

Byte and character embeddings (JAX and Keras write them as one-hot encodings) thus lose their
first dense layer and its activation. Tables of more than ROWS rows stay: computing f for a
whole vocabulary is paid back by no run.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgewright.passes.edit import (
    attribute,
    constant,
    dims,
    insert_before,
    is_op,
    matching,
    producer,
    replace,
    stored,
)

ROWS = 4096
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
INDICES = (ir.DataType.INT32, ir.DataType.INT64)
UNARY = (
    *("Abs", "Neg", "Relu", "LeakyRelu", "Elu", "Selu", "Sigmoid", "HardSigmoid", "HardSwish"),
    *("Tanh", "Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Softplus", "Softsign", "Clip"),
)
BINARY = ("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max")
Evaluate = Callable[[ir.Model], np.ndarray]


def gather_one_hot(model: ir.Model) -> int:
    """Rule 1; returns the number of MatMul nodes replaced."""
    count = 0
    for node in matching(model, "MatMul"):
        cast = producer(node.inputs[0], "Cast")
        equal = producer(cast.inputs[0], "Equal") if cast is not None else None
        table = constant(node.inputs[1])
        if equal is None or table is None or table.ndim != 2:
            continue
        if node.outputs[0].dtype not in FLOATS:
            continue
        index = index_of(equal, len(table))
        if index is None:
            continue
        count += 1
        put_gather(model, node, index, table)
    return count


def index_of(equal: ir.Node, count: int) -> ir.Value | None:
    """The operand compared with 0 .. count-1 along a last axis it has one entry on."""
    for index, line in (equal.inputs, equal.inputs[::-1]):
        numbers, shape = constant(line), dims(index)
        if numbers is None or shape is None or index is None or index.dtype not in INDICES:
            continue
        if numbers.size != count or numbers.shape[-1:] != (count,) or not shape or shape[-1] != 1:
            continue
        if numbers.ndim <= len(shape) and (numbers.reshape(-1) == np.arange(count)).all():
            return index
    return None


def put_gather(model: ir.Model, node: ir.Node, index: ir.Value, table: np.ndarray) -> None:
    name, kind = node.name, index.dtype
    assert kind is not None
    last = stored(model, np.array([-1], np.int64), f"{name}_axis")
    limits = [stored(model, np.array(v, kind.numpy()), f"{name}_row") for v in (-1, len(table))]
    rows = np.concatenate([table, np.zeros_like(table[:1])])
    flat = insert_before(node, "Squeeze", [index, last])
    flat.type = index.type
    flat.shape = ir.Shape(list(index.shape)[:-1]) if index.shape is not None else None
    safe = insert_before(node, "Clip", [flat, *limits], like=flat)
    replace(node, "Gather", [stored(model, rows, f"{name}_table"), safe], {"axis": 0})


def tabulate(model: ir.Model, evaluate: Evaluate) -> int:
    """Rule 2; returns the number of nodes that moved into tables.

    `evaluate` runs a model without inputs and returns its output.
    """
    count = 0
    for node in matching(model, "Gather"):
        table = constant(node.inputs[0])
        if table is None or table.ndim != 2 or len(table) > ROWS or attribute(node, "axis", 0):
            continue
        if node.outputs[0].dtype in FLOATS and not node.outputs[0].is_graph_output():
            count += tabulate_rows(model, node, table, evaluate)
    return count


def tabulate_rows(model: ir.Model, gather: ir.Node, table: np.ndarray, evaluate: Evaluate) -> int:
    """Collect the operators that see nothing but rows and stored values; where they end in one
    value, compute it for every row of the table.
    """
    rows: dict[ir.Value, None] = {gather.outputs[0]: None}
    nodes: list[ir.Node] = []
    for node in gather.graph or ():
        if node is gather or not is_op(node, *UNARY, *BINARY):
            continue
        seen = [v in rows for v in used(node)]
        if any(seen) and all(v in rows or fits_all(v, table) for v in used(node)):
            nodes.append(node)
            rows[node.outputs[0]] = None
    ends = [
        value
        for value in rows
        if value.is_graph_output() or any(use.node not in nodes for use in value.uses())
    ]
    if len(ends) != 1 or ends[0] is gather.outputs[0]:
        return 0
    end = ends[0].producer()
    assert end is not None
    computed = evaluate(table_model(model, gather, nodes, ends[0], table))
    if computed.shape != table.shape:
        return 0
    fresh = stored(model, computed, f"{end.name}_table")
    replace(end, "Gather", [fresh, gather.inputs[1]], {"axis": 0})
    return len(nodes)


def used(node: ir.Node) -> list[ir.Value]:
    return [v for v in node.inputs if v is not None]


def fits_all(value: ir.Value, table: np.ndarray) -> bool:
    """A stored number, or a stored value per column of the table."""
    array = constant(value)
    if array is None:
        return False
    return array.size == 1 or array.shape[-1:] == (array.size,) == table.shape[1:]


def table_model(
    model: ir.Model, gather: ir.Node, nodes: list[ir.Node], end: ir.Value, table: np.ndarray
) -> ir.Model:
    """A model without inputs that applies the nodes to the whole table."""
    made: dict[ir.Value, ir.Value] = {}
    weights: list[ir.Value] = []

    def weight(array: np.ndarray) -> ir.Value:
        value = ir.val(f"w{len(weights)}", const_value=ir.tensor(array))
        weights.append(value)
        return value

    made[gather.outputs[0]] = weight(table)
    copies: list[ir.Node] = []
    for node in nodes:
        inputs: list[ir.Value | None] = []
        for value in node.inputs:
            array = constant(value)
            if value is None:
                inputs.append(None)
            elif array is not None:  # bounds of Clip must stay 0-D
                inputs.append(weight(array if array.ndim == 0 else array.reshape(-1)))
            else:
                inputs.append(made[value])
        copy = ir.Node("", node.op_type, inputs, node.attributes.values())
        copy.outputs[0].name = f"y{len(copies)}"
        made[node.outputs[0]] = copy.outputs[0]
        copies.append(copy)
    result = made[end]
    result.type = end.type
    graph = ir.Graph(
        [],
        [result],
        nodes=copies,
        initializers=weights,
        opset_imports=dict(model.opset_imports),
        name="table",
    )
    return ir.Model(graph, ir_version=model.ir_version)
