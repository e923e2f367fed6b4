"""Rules for operators that work value by value: axes aligned at the end, equal ones tied.

A dimension of 1 that is broadcast has nothing to lose. Squeeze-and-excite, residuals, gates and
scales need nothing else.
"""

import onnx

from edgewright.prune.axes import Axes

UNARY = (
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil"),
    *("Celu", "Cos", "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
    *("HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not"),
    *("Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh"),
    *("Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu"),
)
BROADCAST = (
    *("Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Clip", "Div", "Equal"),
    *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul"),
    *("Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor"),
)


def elementwise(ax: Axes, node: onnx.NodeProto) -> None:
    """Any number of operands, any number of outputs of the first one's shape."""
    inputs = [n for n in node.input if n] if node.op_type in BROADCAST else list(node.input[:1])
    for name in node.output:
        if name:
            broadcast(ax, inputs, name)


def broadcast(ax: Axes, inputs: list[str], output: str) -> None:
    """Tie the operands' axes to the output's; freeze where a length is not known."""
    outs = ax.axes(output)
    for name in inputs:
        for ids, out, dim in zip(
            reversed(ax.axes(name)), reversed(outs), reversed(ax.shapes[name]), strict=False
        ):
            if dim != 1:
                ax.same(ids, out)
