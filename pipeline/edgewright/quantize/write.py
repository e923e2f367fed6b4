"""Writing QDQ with ONNX Runtime's writer: ranges, weight scales and node lists injected.

The writer knows which operators its kernels fuse and how Q/DQ pairs must stand around them;
ours are the decisions: which nodes, which ranges, which weight scales.
"""

import logging

import numpy as np
import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from edgewright.model import topological
from edgewright.quantize.scales import ActivationRange, WeightScales
from edgewright.target import Int8Scheme

TYPES = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}


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
    overrides = {name: weight_override(scales) for name, scales in weights.items()}
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
            sorted({n.op_type for n in model.graph.node if n.name in set(nodes)}),
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
    ordered = topological(list(result.graph.node))
    del result.graph.node[:]
    result.graph.node.extend(ordered)
    return result


def weight_override(scales: WeightScales) -> list[dict[str, object]]:
    """Scales as the writer's per-tensor or per-channel overrides."""
    entries: list[dict[str, object]] = [
        {
            "quant_type": QuantType.QInt8,
            "scale": np.array(s, np.float32),
            "zero_point": np.array(0, np.int8),
        }
        for s in scales.values
    ]
    if scales.axis is not None:
        entries[0]["axis"] = scales.axis
    return entries
