"""The ONNX operators that can be run, and differentiated, in torch."""

from edgewright.recover.ops import elementwise, layout, linear, norms, recurrent, reduce, resize
from edgewright.recover.ops.node import Node, Op, Result, Tensor, Value, ints

OPS: dict[str, Op] = {
    **elementwise.OPS,
    **layout.OPS,
    **reduce.OPS,
    **norms.OPS,
    **linear.OPS,
    **resize.OPS,
    **recurrent.OPS,
}

__all__ = ["OPS", "Node", "Op", "Result", "Tensor", "Value", "ints"]
