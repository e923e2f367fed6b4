"""The rule for Reshape and Flatten: which axis of a merged or split block may lose indices.

Both shapes are cut into the smallest blocks of equal product. In a block of one axis against
one, indices tie. Otherwise one axis on each side is live, all others are frozen: element e of
the block has place x(e) on the live axis in front and y(e) behind, and x(e) ties with y(e) for
every e. So a removed index takes a whole hyperplane with it, on both sides.

Which axis lives is decided when everything but reshapes has been tied: of those that are not
frozen entirely, the first (heads of [heads, size], whole groups), or the one the policy names
(the last: size of a head, places inside groups).
"""

import numpy as np
import onnx

from edgewright.prune.axes import Axes, Dim

Places = list[int]
MAX_ELEMENTS = 1 << 26  # of a block; ids take 8 bytes


def blocks(x: list[Dim], y: list[Dim]) -> list[tuple[Places, Places]]:
    """Axes of x against axes of y with equal products, from the end and then from the start.

    Axes of length 1 are left out. Two free dimensions are equal where they have one name.
    What cannot be matched is in no block.
    """
    left = [k for k, d in enumerate(x) if d != 1]
    right = [k for k, d in enumerate(y) if d != 1]
    found = consume(x, y, left[::-1], right[::-1])
    used_x = {k for block in found for k in block[0]}
    used_y = {k for block in found for k in block[1]}
    left = [k for k in left if k not in used_x]
    right = [k for k in right if k not in used_y]
    found = [(a[::-1], b[::-1]) for a, b in found]
    return found + consume(x, y, left, right)


def consume(x: list[Dim], y: list[Dim], left: Places, right: Places) -> list[tuple[Places, Places]]:
    """Blocks from the front of both lists, up to the first that does not close."""
    found: list[tuple[Places, Places]] = []
    left, right = list(left), list(right)
    while left and right:
        a, b = x[left[0]], y[right[0]]
        if not known(a) or not known(b):
            if a is None or a != b:
                break
            found.append(([left.pop(0)], [right.pop(0)]))
            continue
        ours, theirs = [left.pop(0)], [right.pop(0)]
        size, other = int(a), int(b)  # type: ignore[arg-type]
        while size != other:
            source, queue, dims = (ours, left, x) if size < other else (theirs, right, y)
            if not queue or not known(dims[queue[0]]):
                return found
            place = queue.pop(0)
            source.append(place)
            if source is ours:
                size *= int(dims[place])  # type: ignore[arg-type]
            else:
                other *= int(dims[place])  # type: ignore[arg-type]
        found.append((ours, theirs))
    return found


def known(dim: Dim) -> bool:
    return isinstance(dim, int) and dim > 0


def reshape(ax: Axes, node: onnx.NodeProto) -> None:
    x, y = node.input[0], node.output[0]
    xs, ys = ax.axes(x), ax.axes(y)
    if node.op_type == "Reshape":
        target = ax.entries(node.input[1])
        if target is None or len(target) != len(ys):
            return ax.refuse(node, "the target shape is computed")
        ax.freeze(*(b for b, entry in zip(ys, target, strict=True) if entry is None))
    matched = blocks(ax.shapes[x], ax.shapes[y])
    for side, ids in ((0, xs), (1, ys)):
        inside = {k for block in matched for k in block[side]}
        ax.freeze(*(a for k, a in enumerate(ids) if k not in inside))
    for ours, theirs in matched:
        if len(ours) == len(theirs) == 1:
            ax.same(xs[ours[0]], ys[theirs[0]])
            continue
        sizes = [len(xs[k]) for k in ours], [len(ys[k]) for k in theirs]
        key = ("reshape", *map(tuple, sizes))
        if int(np.prod(sizes[0])) > MAX_ELEMENTS:
            ax.freeze(*(xs[k] for k in ours), *(ys[k] for k in theirs))
            ax.note(node, "the axes it joins are too long to follow")
            continue
        p = pick(ax, key, [xs[k] for k in ours])
        q = pick(ax, key, [ys[k] for k in theirs])
        if p is None or q is None:
            p = q = None
        ax.freeze(*(xs[k] for i, k in enumerate(ours) if i != p))
        ax.freeze(*(ys[k] for i, k in enumerate(theirs) if i != q))
        if p is None or q is None:
            continue
        e = np.arange(int(np.prod(sizes[0])))
        a = xs[ours[p]][np.unravel_index(e, sizes[0])[p]]
        b = ys[theirs[q]][np.unravel_index(e, sizes[1])[q]]
        pairs = np.unique(np.stack([a, b]), axis=1) if len(e) > 4096 else np.stack([a, b])
        ax.tie(pairs[0], pairs[1])
    return None


def pick(ax: Axes, key: tuple, sides: list[np.ndarray]) -> int | None:
    """The place of the axis that lives; None where all are frozen."""
    alive = [k for k, ids in enumerate(sides) if ax.live(ids)]
    if len(sides) == 1 or not alive:
        return alive[0] if alive else None
    if len(alive) == 1:
        return alive[0]
    return alive[ax.choose(key, len(alive))]
