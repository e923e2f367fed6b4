"""Convolutions, matrix products and pooling."""

from math import inf

import torch
from torch.nn import functional

from edgewright.recover.ops.node import Node, Op, Result, Tensor, Value, at, need

CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
MAX_POOL = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
AVERAGE_POOL = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def pads_of(
    node: Node, sizes: list[int], kernel: list[int], strides: list[int], dilations: list[int]
) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis, `auto_pad` resolved for the input's sizes."""
    mode, rank = node.get("auto_pad", "NOTSET"), len(sizes)
    if mode in ("NOTSET", ""):
        flat = node.get("pads") or [0] * (2 * rank)
        return list(zip(flat[:rank], flat[rank:], strict=True))
    if mode == "VALID":
        return [(0, 0)] * rank
    found = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size)
        half = total // 2
        found.append((half, total - half) if mode == "SAME_UPPER" else (total - half, half))
    return found


def padded(x: Tensor, pads: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    """x with its last axes padded; negative amounts crop."""
    if not any(a or b for a, b in pads):
        return x
    flat = [amount for pair in reversed(pads) for amount in pair]
    return functional.pad(x, flat, "constant", value)


def spatial(node: Node, name: str, rank: int) -> list[int]:
    return [int(v) for v in node.get(name) or [1] * rank]


def check_rank(node: Node, rank: int) -> None:
    if rank not in CONV:
        raise node.refuse(f"{rank} spatial axes")


def conv(node: Node, inputs: list[Value]) -> Result:
    x, weight, bias = need(inputs, 0), need(inputs, 1), at(inputs, 2)
    rank = x.dim() - 2
    check_rank(node, rank)
    strides, dilations = spatial(node, "strides", rank), spatial(node, "dilations", rank)
    pads = pads_of(node, list(x.shape[2:]), list(weight.shape[2:]), strides, dilations)
    padding: int | list[int] = 0
    if all(a == b for a, b in pads):
        padding = [a for a, _ in pads]
    else:
        x = padded(x, pads)
    return CONV[rank](x, weight, bias, strides, padding, dilations, node.get("group", 1))


def conv_transpose(node: Node, inputs: list[Value]) -> Result:
    x, weight, bias = need(inputs, 0), need(inputs, 1), at(inputs, 2)
    rank = x.dim() - 2
    check_rank(node, rank)
    strides, dilations = spatial(node, "strides", rank), spatial(node, "dilations", rank)
    extra = node.get("output_padding") or [0] * rank
    kernel, sizes = list(weight.shape[2:]), list(x.shape[2:])
    full = [
        s * (n - 1) + (k - 1) * d + 1 + e
        for n, k, s, d, e in zip(sizes, kernel, strides, dilations, extra, strict=True)
    ]
    mode = node.get("auto_pad", "NOTSET")
    wanted = node.get("output_shape")
    if wanted or mode.startswith("SAME"):
        target = wanted[-rank:] if wanted else [n * s for n, s in zip(sizes, strides, strict=True)]
        totals = [f - t for f, t in zip(full, target, strict=True)]
        # The odd one goes to the end with SAME_UPPER only (operator text of opset 11).
        small = [t // 2 for t in totals]
        large = [t - t // 2 for t in totals]
        before, after = (small, large) if mode == "SAME_UPPER" else (large, small)
    else:
        flat = node.get("pads") or [0] * (2 * rank)
        before, after = flat[:rank], flat[rank:]
    y = TRANSPOSED[rank](x, weight, bias, strides, 0, extra, node.get("group", 1), dilations)
    return padded(y, [(-a, -b) for a, b in zip(before, after, strict=True)])


def gemm(node: Node, inputs: list[Value]) -> Result:
    a, b, c = need(inputs, 0), need(inputs, 1), at(inputs, 2)
    a = a.T if node.get("transA", 0) else a
    b = b.T if node.get("transB", 0) else b
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    y = a @ b
    y = y if alpha == 1 else alpha * y
    return y if c is None else y + (c if beta == 1 else beta * c)


def matmul(node: Node, inputs: list[Value]) -> Result:
    return torch.matmul(need(inputs, 0), need(inputs, 1))


def einsum(node: Node, inputs: list[Value]) -> Result:
    return torch.einsum(node.get("equation"), *[v for v in inputs if v is not None])


def windows(node: Node, x: Tensor) -> tuple[list[int], list[int], list[int], list, list]:
    """Kernel, strides, dilations, explicit pads and the pads `ceil_mode` adds at the end."""
    kernel = [int(v) for v in node.get("kernel_shape")]
    rank = len(kernel)
    strides, dilations = spatial(node, "strides", rank), spatial(node, "dilations", rank)
    sizes = list(x.shape[2:])
    pads = pads_of(node, sizes, kernel, strides, dilations)
    extra = []
    for n, k, s, d, (a, b) in zip(sizes, kernel, strides, dilations, pads, strict=True):
        reach = (k - 1) * d + 1
        room = n + a + b - reach
        count = (-(-room // s) if node.get("ceil_mode", 0) else room // s) + 1
        if (count - 1) * s >= n + a:
            count -= 1  # a window must start inside the input or its front padding
        extra.append(max(0, (count - 1) * s + reach - (n + a + b)))
    return kernel, strides, dilations, pads, extra


def max_pool(node: Node, inputs: list[Value]) -> Result:
    if len(node.outputs) > 1:
        raise node.refuse("an output of indices")
    x = need(inputs, 0)
    check_rank(node, x.dim() - 2)
    kernel, strides, dilations, pads, extra = windows(node, x)
    x = padded(x, [(a, b + e) for (a, b), e in zip(pads, extra, strict=True)], -inf)
    return MAX_POOL[x.dim() - 2](x, kernel, strides, 0, dilations)


def average_pool(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    check_rank(node, x.dim() - 2)
    kernel, strides, dilations, pads, extra = windows(node, x)
    if any(d != 1 for d in dilations):
        raise node.refuse("dilations")
    pool, tail = AVERAGE_POOL[x.dim() - 2], [(0, e) for e in extra]
    y = pool(padded(padded(x, pads), tail), kernel, strides)
    if not any(a or b for a, b in pads) and not any(extra):
        return y
    inside = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
    counted = padded(inside, pads, float(node.get("count_include_pad", 0)))
    return y / pool(padded(counted, tail), kernel, strides)


def global_average(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def global_max(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


OPS: dict[str, Op] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    "Einsum": einsum,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average,
    "GlobalMaxPool": global_max,
}
