"""Embedding tables as int8 with a scale per row: a quarter of the bytes, a fifth of a percent off.

A table is only looked up, so no kernel has to multiply it: Gather takes the int8 rows and the
rows' scales, and one Cast and Mul on the few rows taken give float again. ONNX Runtime's writer
would give the whole table one scale and one zero point, which a few large rows spoil.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgewright.model import consumers, initializers, topological
from edgewright.quantize.rounding import QMAX

NARROWEST = 8  # columns; a row also stores a scale of 4 bytes
SMALLEST = 1 << 16  # bytes of a table below which nothing is gained


def find_tables(model: onnx.ModelProto) -> list[str]:
    """Stored float32 matrices that only Gather reads, row by row."""
    graph = model.graph
    readers, outputs = consumers(graph.node), {o.name for o in graph.output}
    found = []
    for name, tensor in initializers(graph).items():
        uses = readers.get(name, [])
        rows = tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
        rows = rows and tensor.dims[1] >= NARROWEST
        if not rows or 4 * int(np.prod(tensor.dims)) < SMALLEST or name in outputs or not uses:
            continue
        if all(takes_rows(n, name) for n in uses):
            found.append(name)
    return found


def takes_rows(node: onnx.NodeProto, table: str) -> bool:
    """Whether a node is a Gather along the table's first axis."""
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    return node.op_type == "Gather" and node.input[0] == table and axis in (0, -2)


def shrink(model: onnx.ModelProto, tables: tuple[str, ...]) -> None:
    """Replace the tables by int8 rows and scales, in place; symmetric, nearest rounding."""
    if not tables:
        return
    graph = model.graph
    nodes = list(graph.node)
    for name in tables:
        tensor = initializers(graph)[name]
        values = numpy_helper.to_array(tensor)
        peak = np.abs(values).max(axis=1, keepdims=True)
        scale = np.where(peak > 0, peak / QMAX, 1.0).astype(np.float32)
        codes = np.clip(np.round(values / scale), -QMAX, QMAX).astype(np.int8)
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(codes, f"{name}_rows"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scales"))
        for gather in [n for n in nodes if n.op_type == "Gather" and n.input[0] == name]:
            base, ids, out = gather.name or gather.output[0], gather.input[1], gather.output[0]
            replacement = [
                helper.make_node(
                    "Gather", [f"{name}_rows", ids], [f"{out}_rows"], f"{base}_rows", axis=0
                ),
                helper.make_node(
                    "Gather", [f"{name}_scales", ids], [f"{out}_scales"], f"{base}_scales", axis=0
                ),
                helper.make_node(
                    "Cast",
                    [f"{out}_rows"],
                    [f"{out}_float"],
                    f"{base}_float",
                    to=onnx.TensorProto.FLOAT,
                ),
                helper.make_node("Mul", [f"{out}_float", f"{out}_scales"], [out], base),
            ]
            at = nodes.index(gather)
            nodes[at : at + 1] = replacement
    del graph.node[:]
    graph.node.extend(topological(nodes))
