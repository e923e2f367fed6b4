"""LSTM layers as ONNX Runtime's dynamic int8 operator, in the main graph and in nested ones.

DynamicQuantizeLSTM takes W as (directions, inputs, 4 * hidden) and R as (directions, hidden,
4 * hidden) in int8, symmetric, with scales per column or per direction; it quantizes x and h
itself at every step. The bias stays float32. There is no static int8 LSTM in ONNX Runtime. Its
own writer gives one scale per direction: 32 dB on the weights of Silero's VAD where columns
have 42, for a kernel that is 8 % faster; and it drops `layout`, which changes the result.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.model import all_graphs, array, reads, subgraphs
from edgewright.quantize import saturation
from edgewright.target import Int8Scheme

DOMAIN = "com.microsoft"
WEIGHTS = (1, 2)
INPUTS = 8  # of LSTM; scales and zero points follow
Stored = dict[str, onnx.TensorProto]


def write_dynamic_lstm(
    model: onnx.ModelProto, scheme: Int8Scheme, nodes: list[str]
) -> onnx.ModelProto:
    """The model with those of the named LSTMs as dynamic int8 that can be; see `why_float`.

    The model stays as it is. Weights of nested layers may be stored in any graph around them;
    the int8 ones are stored in the main graph.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    made: dict[tuple[str, int], list[str]] = {}
    for node, stored in lstms(copy.graph, {}):
        if node.name in nodes and not why_float(node, stored):
            rewrite(copy.graph, node, stored, scheme, made)
    if made:
        drop_unread(copy.graph)
        if all(o.domain != DOMAIN for o in copy.opset_import):
            copy.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return copy


def lstms(graph: onnx.GraphProto, outer: Stored) -> Iterator[tuple[onnx.NodeProto, Stored]]:
    """All LSTM nodes with the stored tensors that they can read."""
    stored = outer | {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "LSTM":
            yield node, stored
        for inner in subgraphs(node):
            yield from lstms(inner, stored)


def why_float(node: onnx.NodeProto, stored: Stored) -> str:
    """Why an LSTM has no dynamic int8 form, "" where it has one."""
    for k in WEIGHTS:
        tensor = stored.get(node.input[k])
        if tensor is None:
            return "its weights are computed, not stored"
        if tensor.data_type != onnx.TensorProto.FLOAT:
            return "its weights are not float32"
    if any(a.name == "layout" and a.i for a in node.attribute):
        return "the int8 operator has no layout with the batch first"
    return ""


def rewrite(
    main: onnx.GraphProto,
    node: onnx.NodeProto,
    stored: Stored,
    scheme: Int8Scheme,
    made: dict[tuple[str, int], list[str]],
) -> None:
    """Make the node a DynamicQuantizeLSTM, in place; `made` are weights that are int8 already."""
    scales: list[str] = []
    inputs = [*node.input, *[""] * (INPUTS - len(node.input))]
    for k in WEIGHTS:
        name = node.input[k]
        if (name, k) not in made:
            made[name, k] = store_int8(main, name, array(stored[name]), scheme)
        codes, scale, zero = made[name, k]
        inputs[k] = codes
        scales += [scale, zero]
    kept = [a for a in node.attribute if a.name != "layout"]
    node.op_type, node.domain = "DynamicQuantizeLSTM", DOMAIN
    del node.input[:], node.attribute[:]
    node.input.extend([*inputs, *scales])
    node.attribute.extend(kept)


def store_int8(
    main: onnx.GraphProto, name: str, weight: np.ndarray, scheme: Int8Scheme
) -> list[str]:
    """Store a weight (directions, 4 * hidden, n) as int8 columns; names: codes, scales, zeros.

    Where sums of two products are cut off at 16 bits, pairs of codes get room for that.
    """
    pairs = saturation.pairs(weight.shape[2] if scheme.saturates else 0)
    peaks = np.abs(weight).max(axis=2, initial=0.0) / 127
    least = np.maximum(peaks, saturation.least_scales(weight, pairs))
    if not scheme.per_channel:
        least = least.max(axis=1)
    scale = np.where(least > 0, least, 1.0).astype(np.float32)
    steps = scale.reshape(*scale.shape, *[1] * (weight.ndim - scale.ndim))
    codes = np.clip(np.rint(weight / steps), -127, 127).astype(np.int8)
    codes = saturation.repaired(codes, pairs)
    parts: dict[str, np.ndarray] = {
        "lstm_int8": np.ascontiguousarray(codes.transpose(0, 2, 1)),
        "lstm_scale": scale,
        "lstm_zero_point": np.zeros(scale.shape, np.int8),
    }
    names = [f"{name}_{what}" for what in parts]
    main.initializer.extend(
        numpy_helper.from_array(value, n) for n, value in zip(names, parts.values(), strict=True)
    )
    return names


def drop_unread(main: onnx.GraphProto) -> None:
    """Take stored tensors out that nothing reads any more, in every graph."""
    read = {name for node in main.node for name in reads(node)}
    for graph in all_graphs(main):
        read |= {o.name for o in graph.output}
    for graph in all_graphs(main):
        kept = [t for t in graph.initializer if t.name in read]
        if len(kept) < len(graph.initializer):
            del graph.initializer[:]
            graph.initializer.extend(kept)
