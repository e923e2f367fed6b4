"""Means over all pixels written as GlobalAveragePool, which runtimes keep in their own layout
and for which they have int8 kernels; ReduceMean has neither.

ReduceMean over all axes behind batch and channels of a tensor of 4 or 5 dimensions; without
`keepdims` a Flatten follows. Three dimensions stay: there the last axis is as often a feature
axis (LayerNormalization written out) as a spatial one.
"""

import onnx_ir as ir

from edgewright.passes.edit import (
    attribute,
    insert_before,
    integers,
    matching,
    operand,
    rank,
    replace,
)


def pool_means(model: ir.Model) -> int:
    """Returns the number of ReduceMean nodes replaced."""
    count = 0
    for node in matching(model, "ReduceMean"):
        source, size = node.inputs[0], rank(node.inputs[0])
        axes = attribute(node, "axes") or integers(operand(node, 1))
        if source is None or source.dtype is None or not source.dtype.is_floating_point():
            continue
        if size not in (4, 5) or axes is None:
            continue
        if sorted(a % size for a in axes) != list(range(2, size)):
            continue
        if attribute(node, "keepdims", 1):
            replace(node, "GlobalAveragePool", [source])
        else:
            pooled = insert_before(node, "GlobalAveragePool", [source])
            pooled.type = source.type
            channels = [*source.shape[:2], *[1] * (size - 2)] if source.shape is not None else None
            pooled.shape = ir.Shape(channels) if channels is not None else None
            replace(node, "Flatten", [pooled], {"axis": 1})
        count += 1
    return count
