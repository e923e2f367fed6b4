"""What the runtime made of an int8 model: kernels in the optimised graph, on the target.

A node that was asked to be int8 and still stands there as a float operator did not fuse; Q/DQ
nodes left over are conversions that cost time. Counted from the graph that ONNX Runtime itself
writes after its optimisations, in the target's process (graphs differ per architecture).
"""

from pathlib import Path
from typing import Any

import onnx

from edgewright.model import all_nodes, load
from edgewright.quantize.placement import CORE
from edgewright.runtime.launch import launch_for, session_options
from edgewright.runtime.providers import COMPILING
from edgewright.runtime.session import Session
from edgewright.target import Target

FUSED = {
    "Conv": ("QLinearConv", "ConvInteger"),
    "MatMul": ("QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"),
    "Gemm": ("QGemm",),
}
FLOAT_LAYERS = (*CORE, "FusedConv", "NhwcFusedConv", "FusedGemm", "FusedMatMul")
INT8 = (
    *{op for ops in FUSED.values() for op in ops},
    "QLinearAdd",
    "QLinearMul",
    "QLinearConcat",
    "QLinearAveragePool",
    "QLinearGlobalAveragePool",
    "QLinearLeakyRelu",
    "QLinearSigmoid",
    "QLinearSoftmax",
    "QLinearWhere",
    "DynamicQuantizeLSTM",
    "MatMulInteger",
    "MatMulNBits",
)


def optimized_graph(path: Path, target: Target, folder: Path) -> onnx.ModelProto | None:
    """The graph after the target runtime's optimisations; None where it cannot write one.

    A compiling provider leaves nodes that no file can hold.
    """
    if target.runtime.provider in COMPILING:
        return None
    out = folder / "optimized.onnx"
    options = session_options(target)
    with Session(path, launch=launch_for(target), optimized=str(out), **options):
        pass
    if not out.exists():
        return None
    model = load(out)
    out.unlink()
    return model


def own_name(name: str) -> str:
    """A node's name before the runtime fused it with what follows."""
    return name.removeprefix("fused ").removesuffix("/MatMulAddFusion")


def audit(
    quantized: Path, planned: list[str], target: Target, folder: Path
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """(figures, nodes that did not fuse as {"node", "op", "reason"})."""
    graph = optimized_graph(quantized, target, folder)
    if graph is None:
        return {"available": False}, []
    counts: dict[str, int] = {}
    for node in all_nodes(graph.graph):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    left = {own_name(n.name) for n in all_nodes(graph.graph) if n.op_type in FLOAT_LAYERS}
    planned_ops = {n.name: n.op_type for n in load(quantized).graph.node}
    strays = [
        {
            "node": name,
            "op": planned_ops[name],
            "reason": "asked to be int8, but the runtime did not fuse it",
        }
        for name in planned
        if name in left and planned_ops.get(name) in CORE
    ]
    int8 = {op: n for op, n in sorted(counts.items()) if op in INT8}
    floats = {op: counts[op] for op in FLOAT_LAYERS if op in counts}
    return {
        "available": True,
        "int8_kernels": int8,
        "float_layers": floats,
        "quantize_linear": counts.get("QuantizeLinear", 0),
        "dequantize_linear": counts.get("DequantizeLinear", 0),
        "unfused": len(strays),
    }, strays
