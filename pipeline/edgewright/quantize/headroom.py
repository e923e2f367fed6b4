"""Head-room for sums of two products in a graph: scales, repaired codes, proof.

Where a target saturates (see `saturation`), scales leave room for the largest pair of a channel,
the few codes that rounding still takes past the bound are taken back in the written graph, and
the graph that ships is checked, whoever wrote its codes.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.errors import IntegrityError
from edgewright.model import all_graphs, array, initializers
from edgewright.quantize import saturation
from edgewright.quantize.layers import attribute
from edgewright.quantize.scales import WeightScales
from edgewright.target import Int8Scheme

OFF = "DequantizeLinear"
# Operators of the written graph with int8 weights, and where those stand.
WEIGHTS = {
    "Conv": (1,),
    "Gemm": (1,),
    "MatMul": (1,),
    "DynamicQuantizeLSTM": (1, 2),
    "MatMulInteger": (1,),
    "DynamicQuantizeMatMul": (1,),
    "MatMulIntegerToFloat": (1,),
}


def needed(scheme: Int8Scheme) -> bool:
    """Whether the target's kernels cut sums off; those for uint8 weights do not."""
    return scheme.saturates and scheme.weights == "int8"


def matrix(node: onnx.NodeProto, weight: np.ndarray) -> np.ndarray:
    """A node's weight as (outputs, columns), columns as `saturation.pairs` wants them."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return weight.reshape(len(weight), -1)
    return np.swapaxes(weight, -1, -2).reshape(-1, weight.shape[-2])


def stored(node: onnx.NodeProto, rows: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The inverse of `matrix`, in the layout of the weight `like`."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return rows.reshape(like.shape)
    turned = rows.reshape(*like.shape[:-2], like.shape[-1], like.shape[-2])
    return np.ascontiguousarray(np.swapaxes(turned, -1, -2))


def meeting(node: onnx.NodeProto, shape: tuple[int, ...]) -> np.ndarray:
    """The pairs of columns of a node's weight of this shape; none for a depthwise convolution."""
    if node.op_type != "Conv":
        return saturation.pairs(shape[-2] if not attribute(node, "transB", 0) else shape[-1])
    groups, places = int(attribute(node, "group", 1)), int(np.prod(shape[2:]))  # type: ignore[call-overload]
    if groups > 1 and shape[1] == 1 and shape[0] == groups:
        return saturation.pairs(0)
    return saturation.pairs(shape[1] * places, places)


def with_room(
    model: onnx.ModelProto,
    names: Iterable[str],
    scales: dict[str, WeightScales],
    scheme: Int8Scheme,
) -> dict[str, WeightScales]:
    """Scales of the named nodes' weights that leave room for each output's largest pair.

    Weights without scales get some, as the writer's own leave no room: a convolution per
    channel, a stack of matrices as a whole.
    """
    weights, wanted, roomy = initializers(model.graph), set(names), dict(scales)
    for node in model.graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        if node.name not in wanted or node.op_type not in WEIGHTS or name not in weights:
            continue
        weight = array(weights[name])
        if weight.ndim < 2 or weight.dtype != np.float32:
            continue
        rows = matrix(node, weight)
        least = saturation.least_scales(rows[None], meeting(node, weight.shape))[0]
        if name in roomy:
            axis, values = roomy[name].axis, roomy[name].values
        else:
            axis = 0 if node.op_type == "Conv" and scheme.per_channel else None
            peak = np.abs(rows).max(axis=1) / 127
            values = np.where(peak > 0, peak, 1.0)
        if axis is None:
            values, least = values.max(keepdims=True), least.max(keepdims=True)
        roomy[name] = WeightScales(axis, np.maximum(values, least).astype(np.float32))
    return roomy


def int8_weights(
    graphs: Iterable[onnx.GraphProto],
) -> Iterator[tuple[onnx.NodeProto, onnx.TensorProto]]:
    """The nodes with int8 weights, with each of those: read directly, or dequantized."""
    parts = list(graphs)
    found = {t.name: t for g in parts for t in g.initializer if t.data_type == t.INT8}
    codes = {
        n.output[0]: found[n.input[0]]
        for g in parts
        for n in g.node
        if n.op_type == OFF and n.input[0] in found
    }
    for node in (n for g in parts for n in g.node):
        for place in WEIGHTS.get(node.op_type, ()):
            name = node.input[place] if len(node.input) > place else ""
            tensor = codes.get(name) or found.get(name)
            if tensor is not None and len(tensor.dims) > 1:
                yield node, tensor


def repair(written: onnx.ModelProto) -> None:
    """Take back what passes the bound in the int8 weights of the main graph, in place."""
    for node, tensor in int8_weights([written.graph]):
        codes = array(tensor)
        rows = matrix(node, codes)
        fixed = saturation.repaired(rows, meeting(node, codes.shape))
        if fixed is not rows:
            kept = stored(node, fixed, codes)
            tensor.CopyFrom(numpy_helper.from_array(kept, tensor.name))


def prove(written: onnx.ModelProto) -> int:
    """The number of pairs in the model's int8 weights, all of them safe, subgraphs included.

    Raises IntegrityError where one is not: such a model computes something else on the target
    than here.
    """
    count = 0
    for node, tensor in int8_weights(all_graphs(written.graph)):
        codes = array(tensor)
        bad = saturation.unsafe(matrix(node, codes), meeting(node, codes.shape))
        count += bad.size
        if bad.any():
            raise IntegrityError(
                f"{node.op_type} '{node.name}' would be cut off at 16 bits",
                expected=f"pairs of weights that sum to at most {saturation.MOST}",
                found=f"{int(bad.sum())} of {bad.size} pairs above",
                hint="this is a fault of Edgewright, please report it",
            )
    return count


def figures(model: onnx.ModelProto, written: onnx.ModelProto) -> dict[str, object]:
    """What head-room cost: layers of the float model against their int8 form.

    outputs, pairs: of kernels that cut off; *_over: those that would be, with 127 codes to each
    peak. range_gain: mean over those outputs of the step that 63 codes to the peak would need,
    to the step used; 1 is what halving all leaves, 2.02 all there is. range_gain_all: the same
    with the outputs of depthwise convolutions.
    """
    weights, scales = initializers(model.graph), initializers(written.graph)
    plain = {n.name: n for n in model.graph.node}
    steps = {n.output[0]: n.input[1] for n in written.graph.node if n.op_type == OFF}
    outputs_over = pairs = pairs_over = 0
    gains: list[np.ndarray] = []
    others: list[np.ndarray] = []
    for node in written.graph.node:
        twin = plain.get(node.name)
        if twin is None or node.op_type not in WEIGHTS or node.input[1] not in steps:
            continue
        weight = array(weights[twin.input[1]])
        rows, found = matrix(node, weight), meeting(node, weight.shape)
        peak = np.abs(rows).max(axis=1).astype(np.float64)
        step = array(scales[steps[node.input[1]]]).reshape(-1)
        used = peak > 0
        gain = (np.maximum(peak, 1e-38) / 63 / step)[used]
        if not len(found):
            others.append(gain)
            continue
        whole = np.where(used, peak, 1.0)[:, None] / 127
        over = saturation.unsafe(np.round(rows / whole).astype(np.int8), found)
        gains.append(gain)
        pairs, pairs_over = pairs + over.size, pairs_over + int(over.sum())
        outputs_over += int(over.any(axis=1).sum())
    return {
        "outputs": sum(len(g) for g in gains),
        "outputs_over": outputs_over,
        "pairs": pairs,
        "pairs_over": pairs_over,
        "range_gain": mean(gains),
        "range_gain_all": mean(gains + others),
    }


def mean(parts: list[np.ndarray]) -> float | None:
    """The mean over all parts, None where there is nothing."""
    return round(float(np.concatenate(parts).mean()), 3) if parts else None
