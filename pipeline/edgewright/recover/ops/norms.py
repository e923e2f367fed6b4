"""Normalisation layers, as at inference: batch normalisation uses its stored statistics."""

import torch
from torch.nn import functional

from edgewright.recover.ops.node import Node, Op, Result, Tensor, Value, at, need


def along_channels(x: Tensor, rank: int) -> Tensor:
    """(C,) -> (1, C, 1, ...) with `rank` axes."""
    return x.reshape(1, -1, *[1] * (rank - 2))


def batch_norm(node: Node, inputs: list[Value]) -> Result:
    if node.get("training_mode", 0):
        raise node.refuse("training_mode")
    x, scale, bias, mean, variance = (need(inputs, k) for k in range(5))
    return functional.batch_norm(
        x, mean, variance, scale, bias, training=False, eps=node.get("epsilon", 1e-5)
    )


def layer_norm(node: Node, inputs: list[Value]) -> Result:
    x, scale, bias = need(inputs, 0), need(inputs, 1), at(inputs, 2)
    axis = node.get("axis", -1) % x.dim()
    eps = node.get("epsilon", 1e-5)
    y = functional.layer_norm(x, x.shape[axis:], None, None, eps) * scale
    y = y if bias is None else y + bias
    if len(node.outputs) == 1:
        return y
    axes = tuple(range(axis, x.dim()))
    variance = x.var(axes, keepdim=True, unbiased=False)
    return (y, x.mean(axes, keepdim=True), torch.rsqrt(variance + eps))[: len(node.outputs)]


def rms_norm(node: Node, inputs: list[Value]) -> Result:
    x, scale = need(inputs, 0), need(inputs, 1)
    axes = tuple(range(node.get("axis", -1) % x.dim(), x.dim()))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + node.get("epsilon", 1e-5)) * scale


def standardise(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Mean 0 and variance 1 over the axes."""
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)


def instance_norm(node: Node, inputs: list[Value]) -> Result:
    x, scale, bias = (need(inputs, k) for k in range(3))
    y = standardise(x, tuple(range(2, x.dim())), node.get("epsilon", 1e-5))
    return y * along_channels(scale, x.dim()) + along_channels(bias, x.dim())


def group_norm(node: Node, inputs: list[Value]) -> Result:
    x, scale, bias = (need(inputs, k) for k in range(3))
    groups = node.get("num_groups")
    parts = x.reshape(x.shape[0], groups, -1)
    y = standardise(parts, (2,), node.get("epsilon", 1e-5)).reshape(x.shape)
    if scale.numel() != x.shape[1]:  # opset 18: one scale per group
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return y * along_channels(scale, x.dim()) + along_channels(bias, x.dim())


def mean_variance(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    return standardise(x, tuple(node.get("axes", [0, 2, 3])), 1e-9)


def local_response(node: Node, inputs: list[Value]) -> Result:
    return functional.local_response_norm(
        need(inputs, 0),
        node.get("size"),
        node.get("alpha", 1e-4),
        node.get("beta", 0.75),
        node.get("bias", 1.0),
    )


OPS: dict[str, Op] = {
    "BatchNormalization": batch_norm,
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "InstanceNormalization": instance_norm,
    "GroupNormalization": group_norm,
    "MeanVarianceNormalization": mean_variance,
    "LRN": local_response,
}
