"""Operators that sum, order or normalise over axes without parameters."""

from collections.abc import Callable

import torch

from edgewright.recover.ops.node import Node, Op, Result, Tensor, Value, at, int_list, need


def reduction(function: Callable[[Tensor, list[int]], Tensor]) -> Op:
    """An operator Reduce*: axes as attribute or input, kept as size 1 unless told otherwise."""

    def run(node: Node, inputs: list[Value]) -> Result:
        x = need(inputs, 0)
        axes = int_list(node, inputs, 1, "axes")
        if not axes:
            if node.get("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.dim()))
        axes = sorted(a % max(1, x.dim()) for a in axes)
        y = function(x, axes) if x.dim() else function(x.reshape(1), [0]).reshape(1)
        if not node.get("keepdims", 1):
            y = y.squeeze(tuple(axes)) if x.dim() else y.reshape(())
        return y

    return run


def product(x: Tensor, axes: list[int]) -> Tensor:
    for axis in axes:
        x = x.prod(axis, keepdim=True)
    return x


def softmax_axes(node: Node, x: Tensor) -> tuple[Tensor, int]:
    """x as it is normalised, and the axis: before opset 13 all later axes counted as one."""
    if node.opset >= 13:
        return x, node.get("axis", -1)
    axis = node.get("axis", 1) % x.dim()
    return x.flatten(axis), axis


def softmax(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    flat, axis = softmax_axes(node, x)
    return torch.softmax(flat, axis).reshape(x.shape)


def log_softmax(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    flat, axis = softmax_axes(node, x)
    return torch.log_softmax(flat, axis).reshape(x.shape)


def cumsum(node: Node, inputs: list[Value]) -> Result:
    x, axis = need(inputs, 0), int(need(inputs, 1))
    turned = torch.flip(x, [axis]) if node.get("reverse", 0) else x
    y = torch.cumsum(turned, axis, dtype=x.dtype)
    if node.get("exclusive", 0):
        y = y - turned
    return torch.flip(y, [axis]) if node.get("reverse", 0) else y


def extreme(largest: bool) -> Op:
    def run(node: Node, inputs: list[Value]) -> Result:
        x, axis = need(inputs, 0), node.get("axis", 0)
        if node.get("select_last_index", 0):
            raise node.refuse("select_last_index")
        find = torch.argmax if largest else torch.argmin
        return find(x, axis, keepdim=bool(node.get("keepdims", 1)))

    return run


def top_k(node: Node, inputs: list[Value]) -> Result:
    k = at(inputs, 1)
    count = int(node.get("k") if k is None else k)
    x, axis = need(inputs, 0), node.get("axis", -1)
    # Stable: of equal values the first counts, as in ONNX.
    values, places = torch.sort(x, stable=True, dim=axis, descending=bool(node.get("largest", 1)))
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def lp_normalization(node: Node, inputs: list[Value]) -> Result:
    x, axis, p = need(inputs, 0), node.get("axis", -1), node.get("p", 2)
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


OPS: dict[str, Op] = {
    "ReduceSum": reduction(lambda x, axes: x.sum(axes, keepdim=True)),
    "ReduceMean": reduction(lambda x, axes: x.mean(axes, keepdim=True)),
    "ReduceMax": reduction(lambda x, axes: x.amax(axes, keepdim=True)),
    "ReduceMin": reduction(lambda x, axes: x.amin(axes, keepdim=True)),
    "ReduceProd": reduction(product),
    "ReduceL1": reduction(lambda x, axes: x.abs().sum(axes, keepdim=True)),
    "ReduceL2": reduction(lambda x, axes: torch.linalg.vector_norm(x, 2, axes, keepdim=True)),
    "ReduceSumSquare": reduction(lambda x, axes: x.square().sum(axes, keepdim=True)),
    "ReduceLogSum": reduction(lambda x, axes: x.sum(axes, keepdim=True).log()),
    "ReduceLogSumExp": reduction(lambda x, axes: torch.logsumexp(x, axes, keepdim=True)),
    "Softmax": softmax,
    "LogSoftmax": log_softmax,
    "CumSum": cumsum,
    "ArgMax": extreme(True),
    "ArgMin": extreme(False),
    "TopK": top_k,
    "LpNormalization": lp_normalization,
}
