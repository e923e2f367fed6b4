"""The same int8 model with unsigned activations: what this machine can run as the target will.

A code q of int8 with zero point z and a code q + 128 of uint8 with zero point z + 128 are one
value, so every integer product and sum is the same. On x86 ONNX Runtime has kernels for unsigned
activations only and leaves much of a signed model in float, between Q/DQ pairs: its answers are
then not those of ARM's int8 kernels (measured: MobileNetV2 42 dB apart, where the unsigned form
agrees to the bit). So a signed model is judged by its twin.
"""

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.model import array, consumers, initializers
from edgewright.passes.names import free_name

SHIFT = 128
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def unsigned_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose int8 activations are uint8; the model itself where it has none."""
    stored = initializers(model.graph)
    heads = [
        node
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
        and len(node.input) > 2
        and node.input[2] in stored
        and stored[node.input[2]].data_type == onnx.TensorProto.INT8
    ]
    if not heads:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    stored, readers = initializers(graph), consumers(graph.node)
    signed = {n.output[0] for n in heads}
    taken = set(stored)
    shifted: dict[str, str] = {}

    def moved(name: str) -> str:
        """The name of the shifted copy of a stored int8 tensor."""
        if name not in shifted:
            shifted[name] = free_name(f"{name}_unsigned", taken, frozenset())
            taken.add(shifted[name])
            values = (array(stored[name]).astype(np.int16) + SHIFT).astype(np.uint8)
            graph.initializer.append(numpy_helper.from_array(values, shifted[name]))
        return shifted[name]

    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.output[0] in signed:
            node.input[2] = moved(node.input[2])
        elif node.op_type == "DequantizeLinear" and len(node.input) > 2:
            constant = node.input[0] in stored and not is_weight(node, readers)
            constant = constant and stored[node.input[0]].data_type == onnx.TensorProto.INT8
            if node.input[0] in signed or constant:
                if constant:
                    node.input[0] = moved(node.input[0])
                node.input[2] = moved(node.input[2])
    for value in graph.value_info:
        if value.name in signed:
            value.type.tensor_type.elem_type = onnx.TensorProto.UINT8
    return copy


def is_weight(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]]) -> bool:
    """Whether what a DequantizeLinear makes is some layer's weight: those stay signed."""
    name = node.output[0]
    return any(
        reader.op_type in WEIGHTED and list(reader.input).index(name) == 1
        for reader in readers.get(name, [])
    )
