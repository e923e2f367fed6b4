"""Padding moved from a Pad node into the Conv or AveragePool behind it.

Pad(x, p, 0) then Conv with pads q is Conv with pads p + q: both pad with zeros. The same holds
for AveragePool where padding counts in the mean, which it does as soon as q is zero or
`count_include_pad` is set. Not with negative pads, pads of batch or channel axes, another fill
value, `auto_pad`, or a reader of another kind.
"""

import numpy as np
import onnx_ir as ir

from edgewright.passes.edit import (
    attribute,
    constant,
    drop_unread,
    integers,
    is_op,
    matching,
    operand,
    rank,
)


def fold_pads(model: ir.Model) -> int:
    """Returns the number of Pad nodes that went."""
    count = 0
    for node in matching(model, "Pad"):
        count += fold_pad(node)
    return count


def fold_pad(node: ir.Node) -> int:
    pads = spatial_pads(node)
    output = node.outputs[0]
    uses = output.uses()
    if pads is None or not uses or output.is_graph_output():
        return 0
    if not all(use.idx == 0 and accepts(use.node, len(pads)) for use in uses):
        return 0
    for use in uses:
        own = attribute(use.node, "pads") or [0] * len(pads)
        total = [int(a) + int(b) for a, b in zip(own, pads, strict=True)]
        use.node.attributes.add(ir.AttrInt64s("pads", total))
        use.node.attributes.pop("auto_pad", None)
        if use.node.op_type == "AveragePool":
            use.node.attributes.add(ir.AttrInt64("count_include_pad", 1))
        use.node.replace_input_with(0, node.inputs[0])
    drop_unread([node])
    return 1


def spatial_pads(node: ir.Node) -> list[int] | None:
    """Begins, then ends, of the axes behind batch and channels; None for any other padding."""
    size, pads = rank(node.inputs[0]), integers(operand(node, 1))
    if size is None or size < 3 or pads is None or min(pads, default=0) < 0:
        return None
    if attribute(node, "mode", "constant") != "constant":
        return None
    fill = constant(operand(node, 2)) if operand(node, 2) is not None else np.zeros(1)
    if fill is None or fill.any():
        return None
    axes = integers(operand(node, 3)) if operand(node, 3) is not None else list(range(size))
    if axes is None or len(pads) != 2 * len(axes):
        return None
    before, after = [0] * size, [0] * size
    for k, axis in enumerate(axes):
        before[axis], after[axis] = pads[k], pads[k + len(axes)]
    if any(before[:2]) or any(after[:2]):
        return None
    return before[2:] + after[2:]


def accepts(node: ir.Node, count: int) -> bool:
    """Whether this reader can take over zeros around its input."""
    own = attribute(node, "pads") or [0] * count
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID") or len(own) != count:
        return False
    if is_op(node, "AveragePool"):
        counts = bool(attribute(node, "count_include_pad", 0)) or not any(own)
        return counts and not attribute(node, "ceil_mode", 0)
    return is_op(node, "Conv")
