"""Float operators without an int8 kernel, written as others that have one. Exact.

1. BatchNormalization in front of a layer (DenseNet, pre-activation nets): a depthwise
   convolution of one pixel.
2. ConvTranspose whose kernel is its stride: each input pixel makes its own k x k block, so it
   is a convolution of one pixel with k k O channels, and blocks put in their places. They are
   moved in channels-last order, where whole rows of channels are copied: DepthToSpace, which is
   the same, moves single values and takes four times as long (ONNX Runtime 1.31).

For float kernels the first changes nothing, and the second is slower; so this is no part of
`simplify`.
"""

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgewright.model import array, consumers, initializers
from edgewright.quantize.layers import attribute
from edgewright.quantize.placement import Placement, choose, matches
from edgewright.recipe import QuantizeSettings

FOLLOWS = ("Relu", "Clip")


def rewritten(
    model: onnx.ModelProto, settings: QuantizeSettings
) -> tuple[onnx.ModelProto, Placement, list[dict[str, Any]]]:
    """The model with operators replaced where int8 nodes feed them, and its placement.

    The last is what was replaced, as choices of the report; nodes keep their names.
    """
    names = None
    while True:
        changed, done = replaced(model, settings, names)
        plan = choose(changed, settings)
        makers = {o: n.name for n in changed.graph.node for o in n.output}
        chosen = set(plan.nodes)
        fed = {
            n.name
            for n in changed.graph.node
            if n.name in done and n.name in chosen and makers.get(n.input[0]) in chosen
        }
        if fed == set(done):
            return changed, plan, [{"step": "rewritten for int8", **d} for d in done.values()]
        names = fed


def replaced(
    model: onnx.ModelProto, settings: QuantizeSettings, names: set[str] | None
) -> tuple[onnx.ModelProto, dict[str, dict[str, str]]]:
    """A copy with operators replaced, of these names or all: by name, {"node", "op", "as"}."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    ranks = {
        v.name: len(v.type.tensor_type.shape.dim)
        for v in [*graph.value_info, *graph.input, *graph.output]
        if v.type.tensor_type.HasField("shape")
    }
    stored, readers = initializers(graph), consumers(graph.node)
    outputs = {o.name for o in graph.output}
    done: dict[str, dict[str, str]] = {}
    nodes: list[onnx.NodeProto] = []
    moved: set[str] = set()
    for node in graph.node:
        if node.name in moved:
            continue
        if (names is not None and node.name not in names) or matches(node, settings.exclude):
            nodes.append(node)
        elif is_scale(node, stored, ranks) and leads_to_layer(node, readers):
            done[node.name] = {"node": node.name, "op": node.op_type, "as": "depthwise Conv"}
            nodes.append(depthwise(graph, node, stored, ranks[node.input[0]]))
        elif is_block(node, stored, ranks):
            done[node.name] = {"node": node.name, "op": node.op_type, "as": "Conv and Transpose"}
            after = readers.get(node.output[0], [])
            act = after[0] if len(after) == 1 and node.output[0] not in outputs else None
            if act is not None and (act.op_type not in FOLLOWS or act.input[0] != node.output[0]):
                act = None
            nodes += blocks(graph, node, act, stored)
            if act is not None:
                moved.add(act.name)
        else:
            nodes.append(node)
    if not done:
        return model, {}
    del graph.node[:]
    graph.node.extend(nodes)
    return onnx.shape_inference.infer_shapes(result), done


def is_scale(
    node: onnx.NodeProto, stored: dict[str, onnx.TensorProto], ranks: dict[str, int]
) -> bool:
    """Whether a node is a BatchNormalization of images with stored parameters."""
    return (
        node.op_type == "BatchNormalization"
        and ranks.get(node.input[0]) == 4
        and not attribute(node, "training_mode", 0)
        and all(
            i in stored and stored[i].data_type == onnx.TensorProto.FLOAT for i in node.input[1:5]
        )
    )


def leads_to_layer(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]]) -> bool:
    """Whether a layer reads the node, at once or behind its activation."""
    after = readers.get(node.output[0], [])
    if len(after) == 1 and after[0].op_type in FOLLOWS:
        after = readers.get(after[0].output[0], [])
    return any(n.op_type == "Conv" for n in after)


def depthwise(
    graph: onnx.GraphProto, node: onnx.NodeProto, stored: dict[str, onnx.TensorProto], rank: int
) -> onnx.NodeProto:
    """Case 1: y = x scale / sqrt(var + eps) + (bias - mean scale / sqrt(var + eps))."""
    scale, bias, mean, variance = (array(stored[i]).astype(np.float64) for i in node.input[1:5])
    factor = scale / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))  # type: ignore[arg-type]
    shape = (-1, *[1] * (rank - 1))
    weight = store(graph, f"{node.name}_weight", factor.reshape(shape).astype(np.float32))
    shift = store(graph, f"{node.name}_bias", (bias - mean * factor).astype(np.float32))
    return helper.make_node(
        "Conv",
        [node.input[0], weight, shift],
        list(node.output[:1]),
        name=node.name,
        kernel_shape=[1] * (rank - 2),
        group=len(factor),
    )


def is_block(
    node: onnx.NodeProto, stored: dict[str, onnx.TensorProto], ranks: dict[str, int]
) -> bool:
    """Whether a node is a ConvTranspose of images whose blocks neither overlap nor leave gaps."""
    if node.op_type != "ConvTranspose" or ranks.get(node.input[0]) != 4:
        return False
    weight = stored.get(node.input[1])
    if weight is None or weight.data_type != onnx.TensorProto.FLOAT:
        return False
    if len(node.input) > 2 and node.input[2] and node.input[2] not in stored:
        return False
    kernel = list(weight.dims[2:])
    strides = list(attribute(node, "strides", [1, 1]))  # type: ignore[call-overload]
    plain = {"dilations": {1}, "pads": {0}, "output_padding": {0}}
    return (
        kernel == strides
        and kernel[0] * kernel[1] > 1
        and attribute(node, "group", 1) == 1
        and attribute(node, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        and not attribute(node, "output_shape", [])
        and all(set(attribute(node, k, [])) <= v for k, v in plain.items())  # type: ignore[call-overload]
    )


def blocks(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    act: onnx.NodeProto | None,
    stored: dict[str, onnx.TensorProto],
) -> list[onnx.NodeProto]:
    """Case 2; an activation behind it comes before the blocks are moved, right at the layer."""
    weight = array(stored[node.input[1]])  # (I, O, kh, kw)
    _, wide, high, broad = weight.shape
    name, last = node.name, (act or node).output[0]
    rows = weight.transpose(2, 3, 1, 0).reshape(high * broad * wide, -1, 1, 1)
    inputs = [node.input[0], store(graph, f"{name}_weight", np.ascontiguousarray(rows))]
    if len(node.input) > 2 and node.input[2]:
        bias = np.tile(array(stored[node.input[2]]), high * broad)
        inputs.append(store(graph, f"{name}_bias", bias))
    value = f"{name}_pixels"
    made = [helper.make_node("Conv", inputs, [value], name=name, kernel_shape=[1, 1])]
    if act is not None:
        moved = onnx.NodeProto()
        moved.CopyFrom(act)
        moved.input[0], moved.output[0] = value, f"{name}_active"
        made.append(moved)
        value = moved.output[0]
    # Shapes with 0 keep the axis in that place, so height and width may be free.
    steps: list[tuple[str, list[int]]] = [
        ("Transpose", [0, 2, 3, 1]),  # N H W (kh kw O)
        ("Reshape", [0, 0, 0, high, broad * wide]),  # N H W kh (kw O)
        ("Transpose", [0, 1, 3, 2, 4]),  # N H kh W (kw O)
        ("Reshape", [0, 0, high, -1, wide]),  # N H kh (W kw) O
        ("Reshape", [0, -1, 1, 0, 0]),  # N (H kh) 1 (W kw) O
        ("Squeeze", [2]),  # N (H kh) (W kw) O
        ("Transpose", [0, 3, 1, 2]),
    ]
    for k, (op, numbers) in enumerate(steps):
        result = last if k == len(steps) - 1 else f"{name}_step_{k}"
        label = f"{name}_move_{k}"
        if op == "Transpose":
            made.append(helper.make_node(op, [value], [result], name=label, perm=numbers))
        else:
            shape = store(graph, f"{name}_shape_{k}", np.array(numbers, np.int64))
            made.append(helper.make_node(op, [value, shape], [result], name=label))
        value = result
    return made


def store(graph: onnx.GraphProto, name: str, values: np.ndarray) -> str:
    """Add a stored tensor under a name that is free; the name."""
    taken = {t.name for t in graph.initializer} | {o for n in graph.node for o in n.output}
    while name in taken:
        name += "_"
    graph.initializer.append(numpy_helper.from_array(values, name))
    return name
