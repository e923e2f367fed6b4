"""Writing QDQ with ONNX Runtime's writer: ranges, weight scales and node lists injected.

The writer knows which operators its kernels fuse and how Q/DQ pairs must stand around them;
ours are the decisions: which nodes, which ranges, which weight scales.
"""

import logging
from collections.abc import MutableSequence

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from edgewright.model import array, consumers, initializers, topological
from edgewright.quantize.scales import ActivationRange, WeightScales
from edgewright.target import Int8Scheme

TYPES = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
TYPES |= {"uint16": QuantType.QUInt16, "int16": QuantType.QInt16}
# Code of the weight 0.
MIDDLE = {"uint8": np.array(128, np.uint8), "int8": np.array(0, np.int8)}
LARGEST_BIAS = 1 << 30  # code of a bias; the other half of int32 is for the sum of products
SMALLEST_STEP = 1e-36  # of an accumulator: input scale times weight scale must not become 0


def write_qdq(
    model: onnx.ModelProto,
    scheme: Int8Scheme,
    nodes: list[str],
    ranges: dict[str, ActivationRange],
    weights: dict[str, WeightScales],
    keep_float_outputs: tuple[str, ...],
) -> onnx.ModelProto:
    """The int8 form of the model: Q/DQ pairs around the named nodes. The model stays as it is.

    ranges: tensor -> (low, high). weights: stored weight -> scales along one axis, symmetric.
    keep_float_outputs: operators whose results are not quantized (MatMul: the kernel then
    gives float at no cost). The nodes come out in topological order.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = TensorsData(
        CalibrationMethod.MinMax,
        {
            name: TensorData(lowest=np.float32(low), highest=np.float32(high))
            for name, (low, high) in ranges.items()
        },
    )
    chosen = [n for n in copy.graph.node if n.name in set(nodes)]
    roomy = with_room_for_biases(chosen, initializers(copy.graph), ranges, weights, scheme.steps)
    overrides = {name: weight_override(s, scheme.weights) for name, s in roomy.items()}
    for name in stacked_weights(chosen, initializers(copy.graph)):
        if name in overrides:
            continue
        overrides[name] = [{"quant_type": TYPES[scheme.weights], "symmetric": True}]
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the writer warns of every tensor it leaves alone
    try:
        writer = QDQQuantizer(
            copy,
            scheme.per_channel,
            False,
            TYPES[scheme.weights],
            TYPES[scheme.activations],
            tensors,
            nodes,
            [],
            sorted({n.op_type for n in chosen}),
            {
                "ActivationSymmetric": scheme.symmetric_activations,
                "OpTypesToExcludeOutputQuantization": list(keep_float_outputs),
                "QDQDisableWeightAdjustForInt32Bias": True,
                "TensorQuantOverrides": overrides,
            },
        )
        written = writer.quantize_model()
    finally:
        root.setLevel(level)
    result = written if isinstance(written, onnx.ModelProto) else writer.model.model
    spare_float_readers(result, set(nodes))
    keep_apart(result, set(nodes))
    ordered = topological(list(result.graph.node))
    del result.graph.node[:]
    result.graph.node.extend(ordered)
    return result


def with_room_for_biases(
    chosen: list[onnx.NodeProto],
    stored: dict[str, onnx.TensorProto],
    ranges: dict[str, ActivationRange],
    weights: dict[str, WeightScales],
    steps: int = 255,
) -> dict[str, WeightScales]:
    """The weight scales, made larger where a layer's bias would not fit into its int32.

    A bias is stored in steps of input scale times weight scale. In a channel of almost no
    weight, or behind an input of almost zero, those steps are so small that the bias would be
    cut off; there the bias is all that counts, and the weights may be coarser.
    """
    roomy = dict(weights)
    for node in chosen:
        if node.op_type not in ("Conv", "Gemm") or node.input[1] not in weights:
            continue
        if node.input[0] not in ranges:
            continue
        low, high = ranges[node.input[0]]
        step = max((high - low) / steps, 1e-38)
        least = np.array(SMALLEST_STEP)
        bias = stored.get(node.input[2]) if len(node.input) > 2 else None
        scales = roomy[node.input[1]]
        if bias is not None:
            need = np.abs(array(bias).astype(np.float64)).reshape(-1)
            fits = scales.axis is not None and need.size == scales.values.size
            least = np.maximum((need if fits else need.max()) / LARGEST_BIAS, least)
        values = np.maximum(scales.values, least / step).astype(np.float32)
        roomy[node.input[1]] = WeightScales(scales.axis, values)
    return roomy


def stacked_weights(chosen: list[onnx.NodeProto], stored: dict[str, onnx.TensorProto]) -> list[str]:
    """Stored weights of MatMuls that are not matrices: the kernels take one scale for all."""
    names = [n.input[1] for n in chosen if n.op_type == "MatMul"]
    return [n for n in dict.fromkeys(names) if n in stored and len(stored[n].dims) != 2]


def keep_apart(model: onnx.ModelProto, chosen: set[str]) -> None:
    """Keep ONNX Runtime from making a float Gemm of an int8 MatMul and its bias, in place.

    It does so (1.31) for two dimensions, and with Reshape around it for more of fixed size,
    before it looks for int8, and finds no int8 kernel then, but for two dimensions whose result
    is quantized at once. It leaves a Sub alone, which adds the negated bias as exactly.
    """
    graph = model.graph
    stored, readers = initializers(graph), consumers(graph.node)
    shapes = {v.name: v.type.tensor_type.shape.dim for v in [*graph.value_info, *graph.output]}
    for node in graph.node:
        after = readers.get(node.output[0], []) if node.output else []
        if node.op_type != "MatMul" or node.name not in chosen or len(after) != 1:
            continue
        shape, add = shapes.get(node.output[0], []), after[0]
        if len(shape) == 2:
            fused = not quantized_at_once(add, readers)
        else:
            fused = len(shape) > 2 and all(d.dim_value > 0 for d in shape)
        bias = next((i for i in add.input if i != node.output[0]), "")
        if add.op_type != "Add" or not fused or bias not in stored or len(readers[bias]) > 1:
            continue
        add.op_type = "Sub"
        del add.input[:]
        add.input.extend([node.output[0], bias])
        stored[bias].CopyFrom(numpy_helper.from_array(-array(stored[bias]), bias))


def quantized_at_once(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]]) -> bool:
    """Whether all that reads a node, but for a ReLU, is a QuantizeLinear."""
    after = readers.get(node.output[0], [])
    if len(after) == 1 and after[0].op_type == "Relu":
        after = readers.get(after[0].output[0], [])
    return len(after) == 1 and after[0].op_type == "QuantizeLinear"


def spare_float_readers(model: onnx.ModelProto, chosen: set[str]) -> None:
    """Let float nodes and outputs have what float nodes make, in place.

    The writer puts all readers of a tensor behind its Q/DQ pair; only int8 readers belong there,
    the residual path of a transformer, say, does not. (What an int8 layer makes goes through
    one Q/DQ pair as a whole, or the runtime does not fuse the layer.)
    """
    graph = model.graph
    makers = {o: n for n in graph.node for o in n.output}
    heads = {n.output[0]: n for n in graph.node if n.op_type == "QuantizeLinear"}
    outputs = {o.name for o in graph.output}
    for tail in [n for n in graph.node if n.op_type == "DequantizeLinear"]:
        head = heads.get(tail.input[0])
        maker = makers.get(head.input[0]) if head is not None else None
        if head is None:
            continue
        if maker is not None and (maker.name in chosen or maker.op_type == "DequantizeLinear"):
            continue
        before, behind = head.input[0], tail.output[0]
        if behind in outputs and maker is not None:
            # The writer gave the output's name to what comes out of the pair.
            tail.output[0] = f"{behind}_DequantizeLinear_Output"
            rename(maker.output, before, behind)
            for node in graph.node:
                rename(node.input, before, behind)
                if node.name in chosen:
                    rename(node.input, behind, tail.output[0])
            continue
        for node in graph.node:
            if node.name not in chosen:
                rename(node.input, behind, before)


def rename(names: MutableSequence[str], old: str, new: str) -> None:
    """Replace a name in place."""
    for k, name in enumerate(names):
        if name == old:
            names[k] = new


def weight_override(scales: WeightScales, kind: str) -> list[dict[str, object]]:
    """Scales as the writer's per-tensor or per-channel overrides."""
    entries: list[dict[str, object]] = [
        {
            "quant_type": TYPES[kind],
            "scale": np.array(s, np.float32),
            "zero_point": MIDDLE[kind],
        }
        for s in scales.values
    ]
    if scales.axis is not None:
        entries[0]["axis"] = scales.axis
    return entries
