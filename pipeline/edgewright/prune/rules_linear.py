"""Rules for what mixes channels: convolutions, products, normalisations, pooling.

X input, Y output, W weight, X1 its axis 1; `~` ties index by index.

| operator | rule |
|---|---|
| Conv | X1~W1, W0~Y1~B, space frozen |
| Conv, depthwise, m outputs per channel | X1[i] ~ W0[i*m+j] ~ Y1[i*m+j]; `group` is rewritten |
| Conv, grouped | the same place in every group, on both sides (way 0), or whole groups (way 1) |
| ConvTranspose | X1~W0, W1~Y1~B; depthwise and grouped as Conv |
| Gemm | rows and columns as transA and transB say, C by broadcast |
| MatMul | A[-1]~B[-2], A[-2]~Y[-2], B[-1]~Y[-1], the other axes by broadcast |
| Einsum | equal letters |
| BatchNormalization | X1 ~ scale ~ B ~ mean ~ var ~ Y1 |
| Layer, RMS, Instance, GroupNormalization | X~Y~scale~bias; the statistics change, so not exact |
| pooling | axes 0 and 1, space frozen |
"""

import numpy as np
import onnx

from edgewright.prune.axes import Axes, Ids, attribute, integer, operand, text
from edgewright.prune.rules_elementwise import broadcast


def conv(ax: Axes, node: onnx.NodeProto) -> None:
    x, w, y = node.input[0], node.input[1], node.output[0]
    if w not in ax.stored:
        return ax.refuse(node, "the weight is computed")
    xs, ws, ys = ax.axes(x), ax.axes(w), ax.axes(y)
    group = integer(node, "group", 1)
    bias = [ax.axes(operand(node, 2))[0]] if operand(node, 2) else []
    inputs, outputs = ax.stored[w].dims[1] * group, ax.stored[w].dims[0]
    if len(xs[1]) != inputs or len(ys[1]) != outputs:
        return ax.refuse(node, "the number of channels is not known")
    ax.freeze(*xs[2:], *ws[2:], *ys[2:])
    ax.same(xs[0], ys[0])
    for side in (ws[0], *bias):
        ax.tie(side, ys[1])
    if group == 1:
        ax.tie(xs[1], ws[1])
        ax.mix(node, 0, 1, w, 1)
    elif ax.stored[w].dims[1] == 1:
        ax.tie(xs[1][:, None], ys[1].reshape(group, -1))
    else:
        grouped(ax, node, group, xs[1], ys[1], ws[1])
    return None


def grouped(ax: Axes, node: onnx.NodeProto, group: int, x: Ids, y: Ids, inner: Ids) -> None:
    """Way 0: the same place in each group, on both sides. Way 1: whole groups.

    `inner` is the weight's axis that all groups share: a group's inputs (Conv) or outputs
    (ConvTranspose). The weight's other axis is tied to x or y already.
    """
    x, y = x.reshape(group, -1), y.reshape(group, -1)
    transposed = node.op_type == "ConvTranspose"
    if ax.choose(("groups", group, x.shape[1], y.shape[1]), 2) == 0:
        ax.tie(x, x[:1])
        ax.tie(y, y[:1])
        ax.tie(inner, (y if transposed else x)[0])
    else:
        ax.freeze(inner)
        ax.tie(x, x[:, :1])
        ax.tie(y, x[:, :1])
    ax.mix(node, 0, 1, node.input[1], 0 if transposed else 1, 1 if transposed else group)


def conv_transpose(ax: Axes, node: onnx.NodeProto) -> None:
    x, w, y = node.input[0], node.input[1], node.output[0]
    if w not in ax.stored:
        return ax.refuse(node, "the weight is computed")
    xs, ws, ys = ax.axes(x), ax.axes(w), ax.axes(y)
    group = integer(node, "group", 1)
    if len(xs[1]) != ax.stored[w].dims[0] or len(ys[1]) != ax.stored[w].dims[1] * group:
        return ax.refuse(node, "the number of channels is not known")
    ax.freeze(*xs[2:], *ws[2:], *ys[2:])
    ax.same(xs[0], ys[0])
    ax.tie(xs[1], ws[0])
    if operand(node, 2):
        ax.tie(ax.axes(operand(node, 2))[0], ys[1])
    if group == 1:
        ax.tie(ws[1], ys[1])
        ax.mix(node, 0, 1, w, 0)
    elif group == len(xs[1]):
        ax.freeze(ws[1])
        ax.tie(xs[1][:, None], ys[1].reshape(group, -1))
    else:
        grouped(ax, node, group, xs[1], ys[1], ws[1])
    return None


def gemm(ax: Axes, node: onnx.NodeProto) -> None:
    a, b, y = ax.axes(node.input[0]), ax.axes(node.input[1]), ax.axes(node.output[0])
    ka = 0 if integer(node, "transA", 0) else 1
    kb = 1 if integer(node, "transB", 0) else 0
    ax.same(a[ka], b[kb])
    ax.same(a[1 - ka], y[0])
    ax.same(b[1 - kb], y[1])
    if operand(node, 2):
        broadcast(ax, [operand(node, 2)], node.output[0])
    product(ax, node, ka, kb)


def product(ax: Axes, node: onnx.NodeProto, ka: int, kb: int) -> None:
    """Note the sum over axis `ka` of A and `kb` of B: where masks and compensation go."""
    a, b = node.input[0], node.input[1]
    if b in ax.stored:
        ax.mix(node, 0, ka, b, kb)
    elif a in ax.stored:
        ax.mix(node, 1, kb, a, ka)
    else:
        # Neither side has weights of its own: what a unit adds goes with its two producers.
        ax.mix(node, 0, ka, None)
        ax.inexact.append(ax.axes(a)[ka])
        ax.mark("head_dim", ax.axes(a)[ka])


def matmul(ax: Axes, node: onnx.NodeProto) -> None:
    a, b, y = (list(ax.axes(n)) for n in (*node.input[:2], node.output[0]))
    ka, kb = len(a) - 1, max(len(b) - 2, 0)
    ax.same(a[-1], b[kb])
    columns = y[-1:] if len(b) > 1 else []
    rows = y[len(y) - len(columns) - 1 : len(y) - len(columns)] if len(a) > 1 else []
    if columns:
        ax.same(b[-1], columns[0])
    if rows:
        ax.same(a[-2], rows[0])
    batch = y[: len(y) - len(columns) - len(rows)]
    for side in (a[:-2], b[:-2]):
        for ids, out in zip(reversed(side), reversed(batch), strict=False):
            stretch(ax, ids, out)
    if node.input[0] not in ax.stored and node.input[1] not in ax.stored:
        ax.mark("heads", *batch)
    product(ax, node, ka, kb)


def stretch(ax: Axes, ids: Ids, out: Ids) -> None:
    """One axis of an operand against the output's: equal, or 1 and broadcast."""
    if len(ids) != 1:
        ax.same(ids, out)


def einsum(ax: Axes, node: onnx.NodeProto) -> None:
    equation = text(node, "equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if "." in equation or not arrow or any(len(set(t)) < len(t) for t in [*terms, right]):
        return ax.refuse(node, f"einsum '{equation}' is outside what the rule covers")
    places: dict[str, list[tuple[int, int]]] = {}
    for k, term in enumerate(terms):
        for axis, letter in enumerate(term):
            places.setdefault(letter, []).append((k, axis))
    for letter, found in places.items():
        sides = [ax.axes(node.input[k])[axis] for k, axis in found]
        if letter in right:
            sides.append(ax.axes(node.output[0])[right.index(letter)])
        wide = [s for s in sides if len(s) != 1]
        for side in wide[1:]:
            ax.same(wide[0], side)
        if letter in right:
            continue
        stored = [(k, axis) for k, axis in found if node.input[k] in ax.stored]
        fed = [(k, axis) for k, axis in found if node.input[k] not in ax.stored]
        if len(found) != 2 or not fed:
            ax.freeze(*sides)
            continue
        weight = node.input[stored[0][0]] if stored else None
        ax.mix(node, *fed[0], weight, stored[0][1] if stored else 0)
        if not stored:
            ax.inexact.append(sides[0])
            ax.mark("head_dim", sides[0])
    return None


def batch_norm(ax: Axes, node: onnx.NodeProto) -> None:
    if sum(map(bool, node.output)) > 1:
        return ax.refuse(node, "in training mode")
    xs, ys = ax.axes(node.input[0]), ax.axes(node.output[0])
    for a, b in zip(xs, ys, strict=True):
        ax.same(a, b)
    for name in node.input[1:]:
        ax.same(ax.axes(name)[0], ys[1])
    return None


def instance_norm(ax: Axes, node: onnx.NodeProto) -> None:
    batch_norm(ax, node)
    # Behind a Reshape, the "space" of a group normalisation written out holds channels.
    ax.inexact += ax.axes(node.output[0])[2:]


def layer_norm(ax: Axes, node: onnx.NodeProto) -> None:
    ys = ax.axes(node.output[0])
    first = integer(node, "axis", -1) % len(ys)
    for a, b in zip(ax.axes(node.input[0]), ys, strict=True):
        ax.same(a, b)
    for name in node.input[1:]:
        if name:
            broadcast(ax, [name], node.output[0])
    for name in node.output[1:]:
        if name:  # mean and inverse deviation: axes from `first` on have length 1
            for a, b in zip(ax.axes(name)[:first], ys[:first], strict=True):
                ax.same(a, b)
    ax.inexact += ys[first:]


def group_norm(ax: Axes, node: onnx.NodeProto) -> None:
    """The same place in each group; the statistics change."""
    xs, ys = ax.axes(node.input[0]), ax.axes(node.output[0])
    group = integer(node, "num_groups", 1)
    for a, b in zip(xs, ys, strict=True):
        ax.same(a, b)
    ax.freeze(*ys[2:])
    scale = [ax.axes(name)[0] for name in node.input[1:3]]
    if len(ys[1]) < 2 or len(ys[1]) % group:
        return ax.refuse(node, "the number of channels is not known")
    blocks = ys[1].reshape(group, -1)
    per_group = any(len(s) == group and group != len(ys[1]) for s in scale)
    if per_group:  # operator set 18: one factor per group
        ax.freeze(*scale)
    else:
        for s in scale:
            ax.same(s, ys[1])
    if group == len(ys[1]):
        ax.freeze(ys[1])  # num_groups would have to follow; exporters write InstanceNorm
    ax.tie(blocks, blocks[:1])
    ax.inexact.append(ys[1])
    return None


def pool(ax: Axes, node: onnx.NodeProto) -> None:
    if sum(map(bool, node.output)) > 1:
        return ax.refuse(node, "its second output counts positions")
    xs, ys = ax.axes(node.input[0]), ax.axes(node.output[0])
    for a, b in zip(xs[:2], ys[:2], strict=True):
        ax.same(a, b)
    ax.freeze(*xs[2:], *ys[2:])
    return None


def softmax(ax: Axes, node: onnx.NodeProto) -> None:
    xs, ys = ax.axes(node.input[0]), ax.axes(node.output[0])
    for a, b in zip(xs, ys, strict=True):
        ax.same(a, b)
    if ax.opset < 13 and node.op_type != "CumSum":  # flattens to two dimensions at its axis
        ax.freeze(*ys[integer(node, "axis", 1) % len(ys) :])
        return None
    if node.op_type == "CumSum":
        where = ax.const(operand(node, 1))
        if where is None:
            return ax.refuse(node, "its axis is computed")
        axis = int(where.reshape(-1)[0])
    else:
        axis = integer(node, "axis", -1)
    ax.freeze(ys[axis % len(ys)])
    return None


def reduce(ax: Axes, node: onnx.NodeProto) -> None:
    """Kept axes tie. Mean and sums over channels stay right with fewer, but are not exact."""
    xs, ys = ax.axes(node.input[0]), ax.axes(node.output[0])
    given = reduced_axes(ax, node, len(xs))
    if given is None:
        return ax.refuse(node, "the axes it reduces are computed")
    keep = integer(node, "keepdims", 1)
    left = [k for k in range(len(xs)) if k not in given]
    for place, k in enumerate(left):
        ax.same(xs[k], ys[k if keep else place])
    for k in given:
        if node.op_type in ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceL1"):
            ax.inexact.append(xs[k])
        else:
            ax.freeze(xs[k])
    return None


def reduced_axes(ax: Axes, node: onnx.NodeProto, rank: int) -> list[int] | None:
    if node.op_type in ("ArgMax", "ArgMin"):
        return [integer(node, "axis", 0) % rank]
    value = attribute(node, "axes")
    if value is None and operand(node, 1):
        value = ax.const(operand(node, 1))
        if value is None:
            return None
    found = [] if value is None else [int(v) % rank for v in np.asarray(value).reshape(-1)]
    if not found and not integer(node, "noop_with_empty_axes", 0):
        return list(range(rank))
    return found
