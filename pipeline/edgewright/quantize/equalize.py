"""Channel equalization: let every channel of an activation use the whole int8 range.

One scale serves all channels of an activation, so a channel that stays small is rounded
coarsely. Between two convolutions, with nothing or a ReLU or Clip(0, m) in between, channel c
can be made s_c times larger: the first layer's weights and bias times s_c, the second's columns
divided by s_c (Nagel et al., Data-Free Quantization, 1906.04721, section 4.1; there to suit
per-tensor weights, here to suit activations, with per-channel weights paying nothing for it).
ReLU passes a positive factor through; Clip does as long as the channel stays below m, which is
why the factor is bounded by what calibration saw there, with room to spare.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.data import Feed
from edgewright.model import consumers, initializers
from edgewright.quantize.layers import Layer, attribute, layer_of
from edgewright.runtime.local import open_local
from edgewright.taps import expose, fetch_groups

ROOM = 1.25  # a channel may exceed its calibration peak by this before Clip cuts it
SHARE = 0.25  # of the factor, in log, for a dense second layer: best of 0.25, 0.5 and 0.75
LARGEST = 64.0  # largest factor: beyond, a channel is as good as dead


@dataclass(frozen=True)
class Pair:
    """Two layers with one activation between: `tensor` is what the second ones read."""

    first: Layer
    bias: str
    tensor: str
    seconds: tuple[Layer, ...]
    clipped: bool


def find_pairs(model: onnx.ModelProto, nodes: Iterable[str]) -> list[Pair]:
    """Pairs among the named layers whose weights and biases are read by one node only."""
    graph = model.graph
    stored, readers = initializers(graph), consumers(graph.node)
    wanted, outputs = set(nodes), {o.name for o in graph.output}
    by_name = {n.name: n for n in graph.node}
    pairs = []
    for node in graph.node:
        if node.name not in wanted or node.op_type != "Conv":
            continue
        first = layer_of(node, stored)
        bias = node.input[2] if len(node.input) > 2 else ""
        if first is None or not all(
            len(readers.get(n, [])) == 1 for n in (first.weight, bias) if n
        ):
            continue
        if bias and bias not in stored:
            continue
        tensor, clipped = node.output[0], False
        after = readers.get(tensor, [])
        if len(after) == 1 and tensor not in outputs and after[0].op_type in ("Relu", "Clip"):
            clipped = after[0].op_type == "Clip"
            if clipped and not clip_from_zero(after[0], stored):
                continue
            tensor = after[0].output[0]
        after = readers.get(tensor, [])
        if not after or tensor in outputs:
            continue
        seconds = [layer_of(n, stored) if n.op_type == "Conv" else None for n in after]
        fits = all(
            s is not None
            and s.input == tensor
            and s.node in wanted
            and len(readers.get(s.weight, [])) == 1
            and list(by_name[s.node].input).count(tensor) == 1
            for s in seconds
        )
        if fits:
            pairs.append(Pair(first, bias, tensor, tuple(s for s in seconds if s), clipped))
    return pairs


def clip_from_zero(node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> bool:
    """Whether a Clip cuts at zero below, so that it passes positive factors through."""
    name = node.input[1] if len(node.input) > 1 else ""
    if name:
        return name in stored and float(numpy_helper.to_array(stored[name])) == 0.0
    return attribute(node, "min", None) == 0.0


def channel_peaks(
    model: onnx.ModelProto, tensors: list[str], feeds: Iterable[Feed], axis: int = 1
) -> dict[str, np.ndarray]:
    """Largest |value| of each channel of the tensors over the feeds."""
    session = open_local(expose(model, tensors).SerializeToString(), threads=2)
    peaks: dict[str, np.ndarray] = {}
    groups: list[list[str]] = []
    for feed in feeds:
        groups = groups or fetch_groups(session, feed, tensors)
        for group in groups:
            for name, value in zip(group, session.run(feed, group), strict=True):
                rest = tuple(i for i in range(value.ndim) if i != axis % value.ndim)
                peak = np.maximum(value.max(axis=rest), -value.min(axis=rest))
                peaks[name] = np.maximum(peaks.get(name, 0.0), peak)
    return peaks


def equalize(
    model: onnx.ModelProto, nodes: Iterable[str], feeds: Callable[[], Iterable[Feed]]
) -> int:
    """Equalize the model in place; the number of pairs found. Its function stays the same but
    for float32 rounding.

    A depthwise second layer has a weight scale per channel and takes the whole factor; a dense
    one mixes channels in each row, so activation and weight share it (as in SmoothQuant, Xiao
    et al., 2211.10438).
    """
    pairs = find_pairs(model, nodes)
    if not pairs:
        return 0
    peaks = channel_peaks(model, [p.tensor for p in pairs], feeds())
    stored = initializers(model.graph)
    for pair in pairs:
        peak = peaks[pair.tensor].astype(np.float64)
        top = float(peak.max())
        if top <= 0 or not np.isfinite(top):
            continue
        factor = np.where(peak > 0, top / np.maximum(peak * ROOM, 1e-30), 1.0)
        depthwise = all(s.groups == peak.size for s in pair.seconds)
        if not depthwise:
            factor = factor**SHARE
        factor = np.clip(factor, 1.0, LARGEST)
        scale(stored[pair.first.weight], factor, 0)
        if pair.bias:
            scale(stored[pair.bias], factor, 0)
        for second in pair.seconds:
            divide_columns(stored[second.weight], factor, second.groups)
    return len(pairs)


def scale(tensor: onnx.TensorProto, factor: np.ndarray, axis: int) -> None:
    """Multiply along an axis, in place."""
    value = numpy_helper.to_array(tensor)
    shape = [1] * value.ndim
    shape[axis] = -1
    changed = (value * factor.reshape(shape)).astype(value.dtype)
    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))


def divide_columns(tensor: onnx.TensorProto, factor: np.ndarray, groups: int) -> None:
    """Divide the input channels of a convolution's weight (out, in / groups, *kernel)."""
    value = numpy_helper.to_array(tensor)
    per_group = factor.reshape(groups, -1)  # input channels of each group
    rows = np.repeat(per_group, value.shape[0] // groups, axis=0)  # (out, in / groups)
    rows = rows.reshape(rows.shape + (1,) * (value.ndim - 2))
    tensor.CopyFrom(numpy_helper.from_array((value / rows).astype(value.dtype), tensor.name))
