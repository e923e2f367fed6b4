"""Which rule an operator follows. What is not in here is frozen, with all it touches."""

from collections.abc import Callable

import onnx

from edgewright.prune import rules_linear as linear
from edgewright.prune import rules_shape as shape
from edgewright.prune.axes import Axes
from edgewright.prune.rules_elementwise import BROADCAST, UNARY, elementwise
from edgewright.prune.rules_recurrent import GATES, recurrent
from edgewright.prune.rules_reshape import reshape

Rule = Callable[[Axes, onnx.NodeProto], None]


def all_of(names: tuple[str, ...], rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


RULES: dict[str, Rule] = {
    **all_of((*UNARY, *BROADCAST), elementwise),
    **all_of(tuple(GATES), recurrent),
    "Conv": linear.conv,
    "ConvTranspose": linear.conv_transpose,
    "Gemm": linear.gemm,
    "MatMul": linear.matmul,
    "Einsum": linear.einsum,
    "BatchNormalization": linear.batch_norm,
    "InstanceNormalization": linear.instance_norm,
    "LayerNormalization": linear.layer_norm,
    "RMSNormalization": linear.layer_norm,
    "SimplifiedLayerNormalization": linear.layer_norm,
    "GroupNormalization": linear.group_norm,
    **all_of(("AveragePool", "MaxPool", "LpPool"), linear.pool),
    **all_of(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), linear.pool),
    **all_of(("Softmax", "LogSoftmax", "Hardmax", "CumSum"), linear.softmax),
    **all_of(("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1"), linear.reduce),
    **all_of(("ReduceL2", "ReduceMax", "ReduceMin", "ReduceProd"), linear.reduce),
    **all_of(("ReduceLogSum", "ReduceLogSumExp", "ArgMax", "ArgMin"), linear.reduce),
    "Concat": shape.concat,
    "Split": shape.split,
    "Slice": shape.slice_,
    "Gather": shape.gather,
    "Transpose": shape.transpose,
    **all_of(("Squeeze", "Unsqueeze"), shape.squeeze),
    "Expand": shape.expand,
    "Tile": shape.tile,
    "Pad": shape.pad,
    "Resize": shape.resize,
    **all_of(("DepthToSpace", "SpaceToDepth"), shape.depth_to_space),
    "Shape": shape.shape,
}
# These have several right ways to go and choose when all else is tied, in this order.
CHOOSING: tuple[dict[str, Rule], ...] = (
    {"Conv": linear.conv, "ConvTranspose": linear.conv_transpose},
    {"Reshape": reshape, "Flatten": reshape},
)
