"""Operators that work element by element, with broadcasting."""

import functools
import math
from collections.abc import Callable

import numpy as np
import onnx
import torch
from torch.nn import functional

from edgewright.errors import BadInput
from edgewright.recover.ops.node import Node, Op, Result, Tensor, Value, at, need


def torch_dtype(code: int) -> torch.dtype:
    """The torch dtype of an ONNX element type."""
    wanted = onnx.helper.tensor_dtype_to_np_dtype(code)
    try:
        return torch.from_numpy(np.zeros(1, wanted)).dtype
    except TypeError:
        raise BadInput("a Cast cannot be run in torch", found=f"the type {wanted}") from None


def unary(function: Callable[[Tensor], Tensor]) -> Op:
    return lambda node, inputs: function(need(inputs, 0))


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    return lambda node, inputs: function(need(inputs, 0), need(inputs, 1))


def variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    return lambda node, inputs: functools.reduce(function, [v for v in inputs if v is not None])


def divide(a: Tensor, b: Tensor) -> Tensor:
    whole = not (a.is_floating_point() or b.is_floating_point())
    return torch.div(a, b, rounding_mode="trunc" if whole else None)


def power(node: Node, inputs: list[Value]) -> Result:
    base, exponent = need(inputs, 0), need(inputs, 1)
    if exponent.numel() == 1 and float(exponent) in (0.5, 2.0) and exponent.dim() <= base.dim():
        # The exponent's own gradient, log(base), is not wanted and not finite everywhere.
        return base.square() if float(exponent) == 2.0 else base.sqrt()
    return torch.pow(base, exponent.to(base.dtype).detach())


def mean(node: Node, inputs: list[Value]) -> Result:
    values = [v for v in inputs if v is not None]
    return functools.reduce(torch.add, values) / len(values)


def clip(node: Node, inputs: list[Value]) -> Result:
    x, low, high = need(inputs, 0), at(inputs, 1), at(inputs, 2)
    bottom = node.get("min") if low is None else low.detach().item()
    top = node.get("max") if high is None else high.detach().item()
    return x if bottom is None and top is None else torch.clamp(x, bottom, top)


def modulo(node: Node, inputs: list[Value]) -> Result:
    function = torch.fmod if node.get("fmod", 0) else torch.remainder
    return function(need(inputs, 0), need(inputs, 1))


def cast(node: Node, inputs: list[Value]) -> Result:
    return need(inputs, 0).to(torch_dtype(node.get("to")))


def cast_like(node: Node, inputs: list[Value]) -> Result:
    return need(inputs, 0).to(need(inputs, 1).dtype)


def where(node: Node, inputs: list[Value]) -> Result:
    return torch.where(need(inputs, 0), need(inputs, 1), need(inputs, 2))


def hard_sigmoid(node: Node, inputs: list[Value]) -> Result:
    return torch.clamp(node.get("alpha", 0.2) * need(inputs, 0) + node.get("beta", 0.5), 0, 1)


def hard_swish(x: Tensor) -> Tensor:
    return x * torch.clamp(x / 6 + 0.5, 0, 1)


def gelu(node: Node, inputs: list[Value]) -> Result:
    return functional.gelu(need(inputs, 0), approximate=node.get("approximate", "none"))


def swish(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    return x * torch.sigmoid(node.get("alpha", 1.0) * x)


def leaky_relu(node: Node, inputs: list[Value]) -> Result:
    return functional.leaky_relu(need(inputs, 0), node.get("alpha", 0.01))


def elu(node: Node, inputs: list[Value]) -> Result:
    return functional.elu(need(inputs, 0), node.get("alpha", 1.0))


def celu(node: Node, inputs: list[Value]) -> Result:
    return functional.celu(need(inputs, 0), node.get("alpha", 1.0))


def selu(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    alpha, gamma = node.get("alpha", 1.67326319), node.get("gamma", 1.05070102)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0)))


def prelu(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    return torch.clamp(x, min=0) + need(inputs, 1) * torch.clamp(x, max=0)


def thresholded_relu(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    return torch.where(x > node.get("alpha", 1.0), x, torch.zeros_like(x))


def shrink(node: Node, inputs: list[Value]) -> Result:
    x, edge, bias = need(inputs, 0), node.get("lambd", 0.5), node.get("bias", 0.0)
    zero = torch.zeros_like(x)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, zero))


def is_inf(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    above = (x == math.inf) & bool(node.get("detect_positive", 1))
    return above | ((x == -math.inf) & bool(node.get("detect_negative", 1)))


def dropout(node: Node, inputs: list[Value]) -> Result:
    if (training := at(inputs, 2)) is not None and bool(training):
        raise node.refuse("training_mode")
    x = need(inputs, 0)  # as at inference: nothing is dropped
    return (x, torch.ones_like(x, dtype=torch.bool)) if len(node.outputs) > 1 else x


OPS: dict[str, Op] = {
    **{
        name: unary(getattr(torch, name.lower()))
        for name in (
            *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Cos", "Cosh"),
            *("Erf", "Exp", "Floor", "IsNaN", "Log", "Neg", "Reciprocal", "Relu", "Round"),
            *("Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Tan", "Tanh"),
        )
    },
    "Identity": unary(lambda x: x),
    "Not": unary(torch.logical_not),
    "BitwiseNot": unary(torch.bitwise_not),
    "Softplus": unary(lambda x: functional.softplus(x)),
    "Softsign": unary(functional.softsign),
    "Mish": unary(functional.mish),
    "HardSwish": unary(hard_swish),
    "Add": binary(torch.add),
    "Sub": binary(torch.sub),
    "Mul": binary(torch.mul),
    "Div": binary(divide),
    "And": binary(torch.logical_and),
    "Or": binary(torch.logical_or),
    "Xor": binary(torch.logical_xor),
    "BitwiseAnd": binary(torch.bitwise_and),
    "BitwiseOr": binary(torch.bitwise_or),
    "BitwiseXor": binary(torch.bitwise_xor),
    "Equal": binary(torch.eq),
    "Less": binary(torch.lt),
    "LessOrEqual": binary(torch.le),
    "Greater": binary(torch.gt),
    "GreaterOrEqual": binary(torch.ge),
    "Max": variadic(torch.maximum),
    "Min": variadic(torch.minimum),
    "Sum": variadic(torch.add),
    "Mean": mean,
    "Mod": modulo,
    "Pow": power,
    "Clip": clip,
    "Cast": cast,
    "CastLike": cast_like,
    "Where": where,
    "HardSigmoid": hard_sigmoid,
    "Gelu": gelu,
    "Swish": swish,
    "LeakyRelu": leaky_relu,
    "Elu": elu,
    "Celu": celu,
    "Selu": selu,
    "PRelu": prelu,
    "ThresholdedRelu": thresholded_relu,
    "Shrink": shrink,
    "IsInf": is_inf,
    "Dropout": dropout,
}
