"""What a kernel computes with, and how much work it is."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import onnx

from edgewright import model as graph

INT8_KERNELS = (
    "QLinear*",
    "*Integer*",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
    "QGemm",
    "QAttention",
    "QEmbedLayerNormalization",
    "QOrdered*",
)
BORDERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
CONTAINERS = ("If", "Loop", "Scan")  # their time is that of the nodes inside, listed apart
FLOATS = ("float", "float16", "bfloat16", "double")
CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv", "NhwcConv", "QLinearConv", "ConvInteger")
PRODUCTS = (
    "MatMul",
    "FusedMatMul",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulNBits",
)
GEMMS = ("Gemm", "FusedGemm", "QGemm")
RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
WEIGHT_AT = {"QLinearConv": 3, "QGemm": 3}  # the input that holds the weight; 1 elsewhere
Dims = Sequence[int]


def kind(op: str, types: Iterable[str], known: bool = True) -> str:
    """How a kernel computes: int8, border, float, other (indices, shapes, control flow), compiled.

    Operators such as Transpose or MaxPool have one name for all types, so the types of the
    inputs decide; scales make most int8 kernels have float inputs too, so int8 comes first.
    """
    if not known:
        return "compiled"
    if op in BORDERS:
        return "border"
    if any(fnmatchcase(op, pattern) for pattern in INT8_KERNELS):
        return "int8"
    types = set(types)
    if op in CONTAINERS:
        return "other"
    if op != "Cast" and types & {"int8", "uint8"}:
        return "int8"
    return "float" if types & set(FLOATS) else "other"


def kernel_macs(node: Mapping[str, Any], weights: Sequence[Dims | None]) -> int | None:
    """Multiply-accumulates of one run of an executed node; 0 for what multiplies nothing.

    `weights`: the sizes of its inputs that are stored in the optimised graph, by position: the
    profiler leaves out those that the runtime has packed. None: a size is not known.
    """
    op = node["op"]
    if op in PRODUCTS:
        return int(node["elements"] * node["shapes"][0][-1])
    if op not in (*CONVOLUTIONS, *GEMMS, *RECURRENT, "ConvTranspose"):
        return 0
    at = WEIGHT_AT.get(op, 1)
    weight = weights[at] if at < len(weights) else None
    if weight is None:
        return None
    first = node["shapes"][0]
    if op in CONVOLUTIONS:  # weight: (out, in / groups, *kernel)
        return int(node["elements"] * math.prod(weight[1:]))
    if op == "ConvTranspose":  # weight: (in, out / groups, *kernel)
        return math.prod(first) * math.prod(weight[1:])
    if op in GEMMS:  # (m k)(k n) -> m n, whichever operand is transposed
        return math.isqrt(math.prod(first) * math.prod(weight) * node["elements"])
    again = weights[2] if len(weights) > 2 else None
    if again is None:
        return None
    return first[0] * first[1] * (math.prod(weight) + math.prod(again))


def stored_sizes(model: onnx.ModelProto) -> dict[str, list[Dims | None]]:
    """Node name -> the sizes of its inputs that are stored in the model, None for the others."""
    found: dict[str, list[Dims | None]] = {}
    for part in graph.all_graphs(model.graph):
        stored = {t.name: tuple(t.dims) for t in part.initializer}
        for node in part.node:
            found[node.name] = [stored.get(name) for name in node.input]
    return found


def int8_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes whose two operands both come out of DequantizeLinear.

    That is the form in which a compiling provider finds int8 layers; it does not tell which of
    its kernels took them.
    """
    found = []
    for part in graph.all_graphs(model.graph):
        dequantized = {n.output[0] for n in part.node if n.op_type == "DequantizeLinear"}
        found += [n for n in part.node if len(n.input) > 1 and set(n.input[:2]) <= dequantized]
    return found
