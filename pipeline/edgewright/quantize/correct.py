"""Sequential bias correction: take back the mean shift that int8 leaves on each channel.

Quantized weights and activations shift the mean of a layer's output; the shift is constant, so
the bias can take it back exactly (Nagel et al., Data-Free Quantization, 1906.04721, section 4.2,
with measured instead of analytic means). A layer's shift is measured on the int8 model with all
earlier layers already corrected: corrected all at once, the layers would compensate each
other's shifts several times over (measured: the metric goes to zero).

One walk through the graph does it: the int8 model is cut behind every layer, each piece runs
on all samples, and its corrected output goes on to the next piece.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.data import Feed
from edgewright.model import consumers, initializers
from edgewright.runtime.local import open_local
from edgewright.taps import expose, fetch_groups, last_uses, run_piece


@dataclass(frozen=True)
class Bias:
    """The stored bias of a layer: node, its output, the output's channel axis, the tensor."""

    node: str
    output: str
    axis: int
    tensor: str


def find_biases(model: onnx.ModelProto, nodes: Iterable[str]) -> tuple[list[Bias], list[str]]:
    """The biases of the named layers, and the layers that have none to move.

    Convolutions without a bias get one of zeros (in place): int8 kernels add one anyway.
    """
    graph = model.graph
    stored, readers = initializers(graph), consumers(graph.node)
    found, without, wanted = [], [], set(nodes)
    for node in graph.node:
        if node.name not in wanted or node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        name = ""
        if node.op_type == "MatMul":
            after = readers.get(node.output[0], [])
            if len(after) == 1 and after[0].op_type == "Add":
                name = next((n for n in after[0].input if n != node.output[0]), "")
        elif len(node.input) > 2 and node.input[2]:
            name = node.input[2]
        elif node.op_type == "Conv" and node.input[1] in stored:
            name = unused_name(graph, f"{node.name}_bias")
            zeros = np.zeros(stored[node.input[1]].dims[0], np.float32)
            graph.initializer.append(numpy_helper.from_array(zeros, name))
            stored = initializers(graph)
            del node.input[2:]
            node.input.append(name)
        tensor = stored.get(name)
        shared = len(readers.get(name, [])) > 1
        if tensor is None or len(tensor.dims) != 1 or shared:
            without.append(node.name)
        else:
            axis = 1 if node.op_type == "Conv" else -1
            found.append(Bias(node.name, node.output[0], axis, name))
    return found, without


def unused_name(graph: onnx.GraphProto, wanted: str) -> str:
    """The name, with a number behind it where the graph has such a tensor already."""
    taken = {o for n in graph.node for o in n.output} | set(initializers(graph))
    taken |= {v.name for v in graph.input}
    number = 1
    name = wanted
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def channel_mean(value: np.ndarray, axis: int) -> np.ndarray:
    """Mean over all axes but one."""
    axis %= value.ndim
    mean: np.ndarray = value.mean(
        axis=tuple(i for i in range(value.ndim) if i != axis), dtype=np.float64
    )
    return mean


def reference_means(
    model: onnx.ModelProto, biases: list[Bias], feeds: Iterable[Feed]
) -> dict[str, np.ndarray]:
    """Mean of each channel of each layer's output in the float model, over the feeds."""
    names = [b.output for b in biases]
    session = open_local(expose(model, names).SerializeToString(), threads=2)
    sums: dict[str, np.ndarray] = {}
    groups: list[list[str]] = []
    axes = {b.output: b.axis for b in biases}
    count = 0
    for feed in feeds:
        groups = groups or fetch_groups(session, feed, names)
        count += 1
        for group in groups:
            for name, value in zip(group, session.run(feed, group), strict=True):
                sums[name] = sums.get(name, 0.0) + channel_mean(value, axes[name])
    return {name: total / count for name, total in sums.items()}


def correct_biases(
    model: onnx.ModelProto,
    quantized: onnx.ModelProto,
    biases: list[Bias],
    feeds: Callable[[], Iterable[Feed]],
    tell: Callable[[str, int, int], None],
) -> None:
    """Move the biases of the float model in place, so that its int8 form keeps the means.

    quantized: the int8 form of `model` (QDQ), as it is before correction. The feeds must fit
    into memory together with the activations that are alive at one place of the graph.
    """
    if not biases:
        return
    reference = reference_means(model, biases, feeds())
    by_node = {b.node: b for b in biases}
    live: list[dict[str, np.ndarray]] = [dict(f) for f in feeds()]
    stored = initializers(model.graph)
    nodes = list(quantized.graph.node)
    ends = [i for i, n in enumerate(nodes) if n.name in by_node]
    last_use = last_uses(nodes)
    start = 0
    for k, end in enumerate(ends):
        tell("correcting biases", k, len(ends))
        bias = by_node[nodes[end].name]
        run_piece(quantized, nodes[start : end + 1], end, last_use, live)
        output = nodes[end].output[0]
        values = [alive[output] for alive in live]
        mean = np.mean([channel_mean(v, bias.axis) for v in values], axis=0)
        shift = reference[bias.output] - mean
        tensor = stored[bias.tensor]
        if shift.shape == tuple(tensor.dims):
            moved = numpy_helper.to_array(tensor) + shift
            tensor.CopyFrom(numpy_helper.from_array(moved.astype(np.float32), bias.tensor))
            for alive in live:
                value = alive[output]
                shape = [1] * value.ndim
                shape[bias.axis % value.ndim] = -1
                alive[output] = value + shift.astype(value.dtype).reshape(shape)
        start = end + 1
