"""Values of different size that would share one int8 scale."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from edgewright.lint.finding import Hit
from edgewright.lint.intervals import Range, ranges
from edgewright.passes.edit import attribute, constant, is_op, matching, operand
from edgewright.target import Target

APART = 16.0  # times: of 8 bits, 4 are left for the smaller values
SPREAD = 64.0  # times: a channel that much smaller has two codes on each side of zero
DEAD = 1e-6  # of the largest peak: such a channel carries nothing
INT8_MAKERS = (
    *("Conv", "Add", "Mul", "Concat", "Relu", "Clip", "MaxPool", "AveragePool"),
    *("GlobalAveragePool", "Resize"),
)
MOVED = (
    *("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split"),
    *("DepthToSpace", "SpaceToDepth"),
)
FEW_BITS = "one int8 scale for all: the smaller values keep few or none of its 256 codes"


def mixed_ranges(model: ir.Model) -> Iterator[Hit]:
    """Concat of tensors whose ranges differ by construction (box coordinates and scores)."""
    look = ranges(model)
    for node in matching(model, "Concat"):
        value = node.outputs[0]
        if value.dtype is None or not value.dtype.is_floating_point():
            continue
        inputs = [v for v in node.inputs if v is not None]
        if any(v is not None and constant(v) is not None for v in inputs):
            inputs = [v for v in inputs if constant(v) is None]
        found = [r for r in map(look, inputs) if r.peak > 0]
        bounded = [r for r in found if r.bounded]
        if not bounded or len(found) < 2:
            continue
        small, large = min(bounded, key=peak), max(found, key=peak)
        known = large.peak > APART * small.peak
        if not known:
            large = next((r for r in found if not r.bounded), small)
            if large.bounded or not squashed(small):
                continue
        float_there = not all(comes_as_int8(v) for v in inputs)
        yield Hit(
            "mixed-ranges",
            f"Concat of {small.text()} and {large.text()}",
            str(value.name),
            "warning" if known and not float_there else "info",
            FEW_BITS + ("" if known else ", if the unbounded part is as large as it may be"),
            "stays float, as what goes into it does"
            if float_there
            else "leave it out with quantize.exclude, or concatenate outside the model",
            "quantize: placement" if float_there else "",
        )


def peak(r: Range) -> float:
    return r.peak


def squashed(r: Range) -> bool:
    """Whether a range is that of a probability or the like."""
    return r.bounded and r.peak <= 1


def comes_as_int8(value: ir.Value) -> bool:
    """Whether the quantizer may have the value as int8; a Concat needs that of all its inputs."""
    node = value.producer()
    while node is not None and is_op(node, *MOVED) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and is_op(node, *INT8_MAKERS)


def spread_weights(model: ir.Model, target: Target) -> Iterator[Hit]:
    """Weights whose channels differ much in size, where they get one scale."""
    for node in matching(model, "Conv", "Gemm", "MatMul"):
        weight = constant(operand(node, 1))
        if weight is None or weight.ndim < 2 or weight.dtype != np.float32:
            continue
        stacked = node.op_type == "MatMul" and weight.ndim > 2
        if target.int8.per_channel and not stacked:
            continue
        axis = channel_axis(node)
        peaks = np.abs(weight).max(axis=tuple(a for a in range(weight.ndim) if a != axis))
        top = float(peaks.max(initial=0.0))
        small = int(((peaks < top / SPREAD) & (peaks > top * DEAD)).sum())
        if small:
            why = (
                "kernels take one scale for a stack of matrices"
                if stacked
                else f"{target.name} has one scale per weight"
            )
            yield Hit(
                "spread-weights",
                f"{node.op_type} with channels more than {SPREAD:.0f} times apart",
                str(node.outputs[0].name),
                "warning",
                f"{why}: small channels get two codes on each side of zero",
                "equalized between convolutions (quantize); elsewhere use quantize.exclude",
                "quantize: equalization" if feeds_conv(node) else "",
            )


def channel_axis(node: ir.Node) -> int:
    """Axis of the output channels in a stored weight."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 0
    return -1 % (constant(node.inputs[1]).ndim)  # type: ignore[union-attr]


def feeds_conv(node: ir.Node) -> bool:
    """Whether equalization looks at the pair: Conv, perhaps Relu or Clip, then only Conv."""
    if not is_op(node, "Conv"):
        return False
    value = node.outputs[0]
    uses = list(value.uses())
    if len(uses) == 1 and is_op(uses[0].node, "Relu", "Clip"):
        value = uses[0].node.outputs[0]
        uses = list(value.uses())
    return bool(uses) and all(is_op(u.node, "Conv") for u in uses)


def shared_weights(model: ir.Model) -> Iterator[Hit]:
    """Weights that layers read along different axes: one scale for all of their channels."""
    axes: dict[ir.Value, set[int]] = {}
    nodes: dict[ir.Value, list[ir.Node]] = {}
    for node in matching(model, "Conv", "Gemm", "MatMul"):
        value = operand(node, 1)
        weight = constant(value)
        if value is not None and weight is not None and weight.ndim >= 2:
            axes.setdefault(value, set()).add(channel_axis(node))
            nodes.setdefault(value, []).append(node)
    for value, found in axes.items():
        if len(found) > 1:
            for node in nodes[value]:
                yield Hit(
                    "shared-weights",
                    f"layers that read '{value.name}' along different axes",
                    str(node.outputs[0].name),
                    "info",
                    "a scale per channel would be one of rows here and of columns there",
                    "one scale for the whole weight; or store a copy for each layer",
                    "quantize: weight scales",
                )
