"""Operators that move, repeat, select or make elements."""

import numpy as np
import torch

from edgewright.recover.ops.node import Node, Op, Result, Tensor, Value, at, int_list, ints, need


def reshape(node: Node, inputs: list[Value]) -> Result:
    x, wanted = need(inputs, 0), ints(need(inputs, 1))
    if not node.get("allowzero", 0):
        wanted = [x.shape[k] if size == 0 else size for k, size in enumerate(wanted)]
    return x.reshape(wanted)


def flatten(node: Node, inputs: list[Value]) -> Result:
    x, axis = need(inputs, 0), node.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(int(np.prod(x.shape[:axis], dtype=np.int64)), -1)


def squeeze(node: Node, inputs: list[Value]) -> Result:
    x, axes = need(inputs, 0), int_list(node, inputs, 1, "axes")
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def unsqueeze(node: Node, inputs: list[Value]) -> Result:
    x, axes = need(inputs, 0), int_list(node, inputs, 1, "axes") or []
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def transpose(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    return x.permute(node.get("perm") or list(range(x.dim()))[::-1])


def concat(node: Node, inputs: list[Value]) -> Result:
    return torch.cat([v for v in inputs if v is not None], node.get("axis"))


def split(node: Node, inputs: list[Value]) -> Result:
    x, axis = need(inputs, 0), node.get("axis", 0)
    sizes = int_list(node, inputs, 1, "split")
    if sizes is None:
        parts, whole = len(node.outputs), x.shape[axis]
        each = -(-whole // parts)  # the last part may be smaller
        sizes = [max(0, min(each, whole - k * each)) for k in range(parts)]
    return tuple(torch.split(x, sizes, axis))


def slice_(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    starts = int_list(node, inputs, 1, "starts") or []
    ends = int_list(node, inputs, 2, "ends") or []
    axes = int_list(node, inputs, 3, "axes") or list(range(len(starts)))
    steps = int_list(node, inputs, 4, "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        begin, stop, stride = slice(start, end, step).indices(x.shape[axis])
        if step < 0 and end < -x.shape[axis]:
            stop = -1  # beyond the front
        if stride == 1:
            x = x.narrow(axis, begin, max(0, stop - begin))
        else:
            x = x.index_select(axis, torch.arange(begin, stop, stride))
    return x


def gather(node: Node, inputs: list[Value]) -> Result:
    x, places, axis = need(inputs, 0), need(inputs, 1).long(), node.get("axis", 0)
    axis %= x.dim()
    places = torch.where(places < 0, places + x.shape[axis], places)
    shape = x.shape[:axis] + places.shape + x.shape[axis + 1 :]
    return x.index_select(axis, places.reshape(-1)).reshape(shape)


def positive(places: Tensor, size: int) -> Tensor:
    places = places.long()
    return torch.where(places < 0, places + size, places)


def gather_elements(node: Node, inputs: list[Value]) -> Result:
    x, axis = need(inputs, 0), node.get("axis", 0)
    return torch.gather(x, axis, positive(need(inputs, 1), x.shape[axis]))


def tuple_index(x: Tensor, places: Tensor) -> tuple[Tensor, ...]:
    """The last axis of `places` as index tensors for the first axes of x."""
    return tuple(positive(places[..., k], x.shape[k]) for k in range(places.shape[-1]))


def gather_nd(node: Node, inputs: list[Value]) -> Result:
    x, places, batch = need(inputs, 0), need(inputs, 1), node.get("batch_dims", 0)
    if batch == 0:
        return x[tuple_index(x, places)]
    shape = x.shape[:batch]
    flat = x.reshape(-1, *x.shape[batch:])
    rows = places.reshape(-1, *places.shape[batch:])
    found = [part[tuple_index(part, row)] for part, row in zip(flat, rows, strict=True)]
    return torch.stack(found).reshape(*shape, *found[0].shape)


def scatter_nd(node: Node, inputs: list[Value]) -> Result:
    if node.get("reduction", "none") not in ("none", b"none"):
        raise node.refuse("a reduction")
    x, places = need(inputs, 0), need(inputs, 1)
    return x.index_put(tuple_index(x, places), need(inputs, 2))


def scatter_elements(node: Node, inputs: list[Value]) -> Result:
    if node.get("reduction", "none") != "none":
        raise node.refuse("a reduction")
    x, axis = need(inputs, 0), node.get("axis", 0)
    return x.scatter(axis, positive(need(inputs, 1), x.shape[axis]), need(inputs, 2))


def expand(node: Node, inputs: list[Value]) -> Result:
    x, wanted = need(inputs, 0), ints(need(inputs, 1))
    return x.expand(torch.broadcast_shapes(x.shape, tuple(wanted)))


def tile(node: Node, inputs: list[Value]) -> Result:
    return need(inputs, 0).repeat(ints(need(inputs, 1)))


def pad(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    amounts = int_list(node, inputs, 1, "pads") or []
    axes = ints(need(inputs, 3)) if at(inputs, 3) is not None else list(range(x.dim()))
    mode = node.get("mode", "constant")
    value = at(inputs, 2)
    fill = node.get("value", 0.0) if value is None else value.detach().item()
    half = len(amounts) // 2
    for axis, before, after in zip(axes, amounts[:half], amounts[half:], strict=True):
        axis %= x.dim()
        if mode == "constant":
            flat = [0, 0] * (x.dim() - 1 - axis) + [before, after]
            if before or after:
                x = torch.nn.functional.pad(x, flat, "constant", fill)
            continue
        kept = np.arange(x.shape[axis])[max(0, -before) : x.shape[axis] - max(0, -after)]
        places = np.pad(kept, (max(0, before), max(0, after)), mode=mode)
        x = x.index_select(axis, torch.from_numpy(places))
    return x


def shape(node: Node, inputs: list[Value]) -> Result:
    sizes = list(need(inputs, 0).shape)[node.get("start", 0) : node.get("end")]
    return torch.tensor(sizes, dtype=torch.int64)


def size(node: Node, inputs: list[Value]) -> Result:
    return torch.tensor(need(inputs, 0).numel(), dtype=torch.int64)


def constant(node: Node, inputs: list[Value]) -> Result:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in node.attributes:
            stored = node.attributes[name]
            kind = torch.float32 if "float" in name else torch.int64
            return stored if name == "value" else torch.tensor(stored, dtype=kind)
    raise node.refuse("a constant that is no dense number")


def constant_of_shape(node: Node, inputs: list[Value]) -> Result:
    value = node.get("value", torch.zeros(1))
    return value.reshape(-1)[0].expand(ints(need(inputs, 0))).clone()


def range_(node: Node, inputs: list[Value]) -> Result:
    start, end, step = (need(inputs, k) for k in range(3))
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def depth_to_space(node: Node, inputs: list[Value]) -> Result:
    x, block = need(inputs, 0), node.get("blocksize")
    n, c, h, w = x.shape
    if node.get("mode", "DCR") == "DCR":
        x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // block**2, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // block**2, h * block, w * block)


def space_to_depth(node: Node, inputs: list[Value]) -> Result:
    x, block = need(inputs, 0), node.get("blocksize")
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // block, block, w // block, block)
    x = x.permute((0, 3, 5, 1, 2, 4) if node.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4))
    return x.reshape(n, c * block**2, h // block, w // block)


def trilu(node: Node, inputs: list[Value]) -> Result:
    x, k = need(inputs, 0), at(inputs, 1)
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if node.get("upper", 1) else torch.tril(x, diagonal)


def one_hot(node: Node, inputs: list[Value]) -> Result:
    places, depth, values = need(inputs, 0).long(), int(need(inputs, 1)), need(inputs, 2)
    axis = node.get("axis", -1)
    places = torch.where(places < 0, places + depth, places)
    inside = (places >= 0) & (places < depth)
    hot = torch.nn.functional.one_hot(places.clamp(0, depth - 1), depth).bool()
    result = torch.where(hot & inside[..., None], values[1], values[0])
    return result.movedim(-1, axis)


def non_zero(node: Node, inputs: list[Value]) -> Result:
    return torch.nonzero(need(inputs, 0)).T


OPS: dict[str, Op] = {
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "ScatterND": scatter_nd,
    "ScatterElements": scatter_elements,
    "Expand": expand,
    "Tile": tile,
    "Pad": pad,
    "Shape": shape,
    "Size": size,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "Range": range_,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Trilu": trilu,
    "OneHot": one_hot,
    "NonZero": non_zero,
}
