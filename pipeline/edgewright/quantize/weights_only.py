"""Weights only: int8 weights in the file, float arithmetic, no calibration.

A weight becomes int8 codes and a scale per output channel (symmetric, nearest), turned back
into float32 by nodes in front of its readers. Which nodes is a measured fact of ONNX Runtime
(1.31, x86 with VNNI):

- Cast and Mul are folded when the model is loaded: the speed and memory of the float model for
  every operator. DequantizeLinear is not folded but runs each time: 1.5 times a convolution's
  time.
- DequantizeLinear before a MatMul becomes one MatMulNBits kernel: 0.4 to 0.8 of the float time
  and a quarter of the memory. That kernel rounds the activations to int8 in blocks of 32 as it
  goes; without fast int8 products it falls back to dequantizing all weights in each run (5 to 20
  times the float time for few rows). So it is written only for targets with VNNI.
"""

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgewright.model import array, consumers, initializers, topological
from edgewright.quantize import write
from edgewright.quantize.layers import attribute
from edgewright.quantize.rounding import QMAX
from edgewright.target import Target

SMALLEST = 1024  # weights of a tensor below which scales and nodes outweigh what is saved
BLOCKS = "DequantizeLinear"
PLACES = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (0, 1)}
PLACES |= dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2))


def blocks_are_fast(target: Target) -> bool:
    """Whether MatMulNBits has an int8 kernel there that was measured to be fast."""
    cpu = target.runtime.provider == "CPUExecutionProvider"
    return cpu and "avx512_vnni" in target.device.isa


def shared_axes(node: onnx.NodeProto, dims: list[int]) -> tuple[int, ...]:
    """The axes of a node's weight over which one scale serves."""
    if node.op_type in ("Conv", "ConvTranspose"):
        own = 0 if node.op_type == "Conv" else 1
        return tuple(k for k in range(len(dims)) if k != own)
    if node.op_type == "Gemm":
        return (1,) if attribute(node, "transB", 0) else (0,)
    return (len(dims) - 2,) if node.op_type == "MatMul" else (len(dims) - 1,)


def find_weights(model: onnx.ModelProto, nodes: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """(stored weights that only the named nodes read, named node -> why its weights stay)."""
    graph = model.graph
    stored, readers, wanted = initializers(graph), consumers(graph.node), set(nodes)
    kept = {o.name for o in graph.output} | {v.name for v in graph.input}
    found: list[str] = []
    reasons: dict[str, str] = {}
    for node in graph.node:
        if node.name not in wanted or node.op_type not in PLACES:
            continue
        names = [node.input[k] for k in PLACES[node.op_type] if k < len(node.input)]
        for name in [n for n in names if n in stored] or [""]:
            tensor = stored.get(name)
            others = [r for r in readers.get(name, []) if not takes(r, name, wanted)]
            if tensor is None:
                reasons[node.name] = "it has no stored weight"
            elif tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
                reasons[node.name] = "its weight is no float32 matrix"
            elif int(np.prod(tensor.dims)) < SMALLEST:
                reasons[node.name] = f"fewer than {SMALLEST} weights: nothing to gain"
            elif others or name in kept:
                reasons[node.name] = f"'{others[0].name if others else name}' reads its weight, too"
            elif name not in found:
                found.append(name)
    return found, reasons


def takes(node: onnx.NodeProto, name: str, wanted: set[str]) -> bool:
    """Whether a node is named and reads a tensor as its weight only."""
    places = [k for k, n in enumerate(node.input) if n == name]
    return node.name in wanted and set(places) <= set(PLACES.get(node.op_type, ())) and bool(places)


def store_as_int8(model: onnx.ModelProto, weights: list[str], *, blocks: bool) -> dict[str, str]:
    """Make the weights int8, in place; weight -> the form it got.

    blocks: whether matrices that only MatMul reads on its right get DequantizeLinear.
    """
    graph = model.graph
    stored, readers = initializers(graph), consumers(graph.node)
    forms: dict[str, str] = {}
    fresh = []
    for name in weights:
        values, uses = array(stored[name]).astype(np.float64), readers[name]
        axes = shared_axes(uses[0], list(values.shape))
        peak = np.abs(values).max(axis=axes, keepdims=True)
        scale = np.where(peak > 1e-30, peak / QMAX, 1.0).astype(np.float32)
        codes = np.clip(np.round(values / scale), -QMAX, QMAX).astype(np.int8)
        right = all(n.op_type == "MatMul" and n.input[0] != name for n in uses)
        one = blocks and right and values.ndim == 2
        forms[name] = BLOCKS if one else "Cast and Mul"
        graph.initializer.remove(stored[name])
        code, step = f"{name}_int8", f"{name}_scale"
        graph.initializer.append(numpy_helper.from_array(codes, code))
        graph.initializer.append(numpy_helper.from_array(scale[0] if one else scale, step))
        if one:
            fresh.append(
                helper.make_node("DequantizeLinear", [code, step], [name], f"{name}_float", axis=1)
            )
        else:
            cast = helper.make_node(
                "Cast", [code], [f"{name}_cast"], f"{name}_cast", to=onnx.TensorProto.FLOAT
            )
            fresh += [cast, helper.make_node("Mul", [f"{name}_cast", step], [name], f"{name}_mul")]
    ordered = topological([*fresh, *graph.node])
    del graph.node[:]
    graph.node.extend(ordered)
    # A float Gemm made of MatMul and bias has no such kernel.
    write.keep_apart(model, {n.name for k, f in forms.items() if f == BLOCKS for n in readers[k]})
    return forms
