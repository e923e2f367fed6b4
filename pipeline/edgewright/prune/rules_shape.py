"""Rules for what moves values without mixing them.

| operator | rule |
|---|---|
| Concat, Split, Slice (step 1), Gather (stored 1-D indices) | offset maps |
| Gather with computed indices (an embedding) | the axis looked up frozen, the others tied |
| Transpose, Squeeze, Unsqueeze | permuted axes |
| Expand, Tile, Pad, Resize | equal axes tie; what is made new is free or frozen |
| DepthToSpace, SpaceToDepth | the b*b sub-channels of one channel, in DCR or CRD order |
| Shape | the axes whose length is read are frozen |
"""

import numpy as np
import onnx

from edgewright.prune.axes import Axes, attribute, integer, numbers, operand, text


def concat(ax: Axes, node: onnx.NodeProto) -> None:
    ys = ax.axes(node.output[0])
    axis = integer(node, "axis", 0) % len(ys)
    parts = [ax.axes(name) for name in node.input]
    for xs in parts:
        for k, (a, b) in enumerate(zip(xs, ys, strict=True)):
            if k != axis:
                ax.same(a, b)
    ax.same(np.concatenate([xs[axis] for xs in parts]), ys[axis])
    # An operand of unknown length: offsets behind it are not known, though lengths may agree.
    if not all(isinstance(ax.shapes[n][axis], int) for n in (*node.input, node.output[0])):
        ax.freeze(ys[axis], *(xs[axis] for xs in parts))


def split(ax: Axes, node: onnx.NodeProto) -> None:
    xs = ax.axes(node.input[0])
    axis = integer(node, "axis", 0) % len(xs)
    parts = [ax.axes(name) for name in node.output]
    for ys in parts:
        for k, (a, b) in enumerate(zip(xs, ys, strict=True)):
            if k != axis:
                ax.same(a, b)
    if numbers(ax, node, "split", 1) is None:
        ax.freeze(xs[axis], *(ys[axis] for ys in parts))
        ax.note(node, "the sizes are computed")
    else:
        ax.same(xs[axis], np.concatenate([ys[axis] for ys in parts]))


def slice_bounds(ax: Axes, node: onnx.NodeProto) -> dict[int, slice | None] | None:
    """Axis -> slice, None for bounds that are computed; None where even the axes are."""
    rank = len(ax.axes(node.input[0]))
    starts, ends = numbers(ax, node, "starts", 1), numbers(ax, node, "ends", 2)
    places, steps = numbers(ax, node, "axes", 3), numbers(ax, node, "steps", 4)
    count = len(starts or ends or places or ())
    if places is None or not count:
        return None
    places = [k % rank for k in places] or list(range(count))
    if not starts or not ends or steps is None:
        return dict.fromkeys(places)
    found: dict[int, slice | None] = {}
    for start, end, place, step in zip(starts, ends, places, steps or [1] * count, strict=True):
        found[place] = slice(start, end, step)
    return found


def slice_(ax: Axes, node: onnx.NodeProto) -> None:
    """Steps other than 1 and computed bounds freeze their axis."""
    xs, ys = ax.axes(node.input[0]), ax.axes(node.output[0])
    bounds = slice_bounds(ax, node)
    if bounds is None:
        return ax.refuse(node, "the axes it cuts are computed")
    for k, (a, b) in enumerate(zip(xs, ys, strict=True)):
        where = bounds.get(k)
        if k not in bounds:
            ax.same(a, b)
        elif where is not None and where.step == 1 and len(a[where]) == len(b):
            ax.tie(a[where], b)
        else:
            ax.freeze(a, b)
    return None


def gather(ax: Axes, node: onnx.NodeProto) -> None:
    xs, ys = ax.axes(node.input[0]), ax.axes(node.output[0])
    axis = integer(node, "axis", 0) % len(xs)
    indices = ax.const(node.input[1])
    count = len(ax.axes(node.input[1]))
    for a, b in zip(xs[:axis], ys[:axis], strict=True):
        ax.same(a, b)
    for a, b in zip(xs[axis + 1 :], ys[axis + count :], strict=True):
        ax.same(a, b)
    if indices is not None and indices.ndim == 1 and len(indices) > 1 and len(xs[axis]) > 1:
        ax.same(xs[axis][indices], ys[axis])
    else:
        ax.freeze(xs[axis], *ys[axis : axis + count])
    ax.freeze_all(node.input[1])


def transpose(ax: Axes, node: onnx.NodeProto) -> None:
    xs, ys = ax.axes(node.input[0]), ax.axes(node.output[0])
    order = attribute(node, "perm") or range(len(xs) - 1, -1, -1)
    for out, k in zip(ys, order, strict=True):  # type: ignore[call-overload]
        ax.same(xs[k], out)


def squeeze(ax: Axes, node: onnx.NodeProto) -> None:
    """Squeeze and Unsqueeze: the axes named have length 1 in the longer of both."""
    short, long = ax.axes(node.output[0]), ax.axes(node.input[0])
    if node.op_type == "Unsqueeze":
        short, long = long, short
    given = numbers(ax, node, "axes", 1)
    if given is None:
        return ax.refuse(node, "the axes are computed")
    if given:
        gone = {k % len(long) for k in given}
    else:
        gone = {k for k, d in enumerate(ax.shapes[node.input[0]]) if d == 1}
    left = [ids for k, ids in enumerate(long) if k not in gone]
    if len(left) != len(short):
        return ax.refuse(node, "its rank is not known")
    for a, b in zip(left, short, strict=True):
        ax.same(a, b)
    return None


def expand(ax: Axes, node: onnx.NodeProto) -> None:
    """What is repeated is free: its length in the target is rewritten."""
    xs, ys = ax.axes(node.input[0]), ax.axes(node.output[0])
    target = ax.entries(node.input[1])
    if target is None:
        return ax.refuse(node, "the target shape is computed")
    dims = ax.shapes[node.input[0]]
    for a, b, dim in zip(reversed(xs), reversed(ys), reversed(dims), strict=False):
        if dim != 1:
            ax.same(a, b)
    for entry, b in zip(reversed(target), reversed(ys), strict=False):
        if entry is None:
            ax.freeze(b)
    return None


def tile(ax: Axes, node: onnx.NodeProto) -> None:
    xs, ys = ax.axes(node.input[0]), ax.axes(node.output[0])
    repeats = ax.const(node.input[1])
    if repeats is None:
        return ax.refuse(node, "the repeats are computed")
    for a, b, times in zip(xs, ys, repeats.reshape(-1), strict=True):
        if times < 1 or len(b) != len(a) * times or len(a) < 2:
            ax.freeze(a, b)
        else:
            ax.tie(b.reshape(int(times), -1), a[None])
    return None


def pad(ax: Axes, node: onnx.NodeProto) -> None:
    xs, ys = ax.axes(node.input[0]), ax.axes(node.output[0])
    pads, places = numbers(ax, node, "pads", 1), numbers(ax, node, "axes", 3)
    if not pads or places is None:
        return ax.refuse(node, "the pads are computed")
    places = [k % len(xs) for k in places] or list(range(len(xs)))
    around = {k: (pads[i], pads[i + len(places)]) for i, k in enumerate(places)}
    mode = text(node, "mode", "constant")
    for k, (a, b) in enumerate(zip(xs, ys, strict=True)):
        before, after = around.get(k, (0, 0))
        if before == after == 0:
            ax.same(a, b)
        elif mode == "constant" and min(before, after) >= 0 and len(b) == before + len(a) + after:
            ax.tie(a, b[before : before + len(a)])
            ax.freeze(b[:before], b[before + len(a) :])
        else:
            ax.freeze(a, b)
    return None


def resize(ax: Axes, node: onnx.NodeProto) -> None:
    """Axes that keep their length tie where the sizes are stored; space is frozen."""
    xs, ys = ax.axes(node.input[0]), ax.axes(node.output[0])
    scales, sizes = operand(node, 2), operand(node, 3)
    ax.freeze_all(operand(node, 1), scales)
    fixed = ax.const(scales) if scales else ax.const(sizes)
    places = attribute(node, "axes") or range(len(xs))
    if fixed is None or attribute(node, "keep_aspect_ratio_policy", b"stretch") != b"stretch":
        return ax.refuse(node, "the sizes are computed")
    moved = [k % len(xs) for k, v in zip(places, fixed, strict=True) if scales and v != 1]  # type: ignore[call-overload]
    for k, (a, b) in enumerate(zip(xs, ys, strict=True)):
        if k < 2 and k not in moved:
            ax.same(a, b)
        else:
            ax.freeze(a, b)
    return None


def depth_to_space(ax: Axes, node: onnx.NodeProto) -> None:
    deep, wide = ax.axes(node.input[0]), ax.axes(node.output[0])
    if node.op_type == "SpaceToDepth":
        deep, wide = wide, deep
    block = integer(node, "blocksize", 1) ** 2
    ax.same(deep[0], wide[0])
    ax.freeze(*deep[2:], *wide[2:])
    if len(deep[1]) != block * len(wide[1]) or not len(wide[1]):
        ax.freeze(deep[1], wide[1])
    elif node.op_type == "DepthToSpace" and text(node, "mode", "DCR") == "CRD":
        ax.tie(deep[1].reshape(-1, block), wide[1][:, None])
    else:
        ax.tie(deep[1].reshape(block, -1), wide[1][None])


def shape(ax: Axes, node: onnx.NodeProto) -> None:
    """A length that is read must stay: those of all axes, or of the entries looked up."""
    xs = ax.axes(node.input[0])
    first = slice(integer(node, "start", 0), integer(node, "end", len(xs)))
    read = set(range(len(xs))[first])
    readers = ax.readers.get(node.output[0], [])
    if readers and all(n.op_type == "Gather" and n.input[0] == node.output[0] for n in readers):
        found = [ax.const(n.input[1]) for n in readers]
        if all(f is not None for f in found) and node.output[0] not in ax.outputs:
            every = list(range(len(xs))[first])
            read = {every[int(v)] for f in found if f is not None for v in f.reshape(-1)}
    ax.freeze(*(xs[k] for k in read))
