"""Resize: every axis is resampled on its own, as a weighted sum of selected elements."""

import numpy as np
import torch

from edgewright.recover.ops.node import Node, Op, Result, Tensor, Value, at, ints, need


def source_places(mode: str, old: int, new: int, scale: float) -> np.ndarray:
    """Where each new element lies on the old axis, float64 (operator text of Resize-19)."""
    x = np.arange(new, dtype=np.float64)
    if mode == "align_corners":
        last = scale * old - 1  # may lie between two elements
        return x * (old - 1) / last if last > 0 else x * 0
    if mode == "asymmetric":
        return x / scale
    if mode == "pytorch_half_pixel":
        return (x + 0.5) / scale - 0.5 if new > 1 else x * 0
    if mode == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    if mode == "half_pixel_symmetric":
        shift = old / 2 * (1 - new / (scale * old))
        return shift + (x + 0.5) / scale - 0.5
    return (x + 0.5) / scale - 0.5


def nearest(places: np.ndarray, mode: str) -> np.ndarray:
    if mode == "round_prefer_ceil":
        return np.floor(places + 0.5)
    if mode == "floor":
        return np.floor(places)
    if mode == "ceil":
        return np.ceil(places)
    return np.ceil(places - 0.5)  # round_prefer_floor


def taps(node: Node, places: np.ndarray, old: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Old index and weight of everything that adds to each new element."""
    mode = node.get("mode", "nearest")
    if mode == "nearest":
        found = nearest(places, node.get("nearest_mode", "round_prefer_floor"))
        return [(found, np.ones(len(places)))]
    base = np.floor(places)
    part = places - base
    if mode == "linear":
        return [(base, 1 - part), (base + 1, part)]
    a = node.get("cubic_coeff_a", -0.75)
    near = [part, 1 - part]
    far = [1 + part, 2 - part]
    weights = [
        a * far[0] ** 3 - 5 * a * far[0] ** 2 + 8 * a * far[0] - 4 * a,
        (a + 2) * near[0] ** 3 - (a + 3) * near[0] ** 2 + 1,
        (a + 2) * near[1] ** 3 - (a + 3) * near[1] ** 2 + 1,
        a * far[1] ** 3 - 5 * a * far[1] ** 2 + 8 * a * far[1] - 4 * a,
    ]
    found4 = [base + k for k in (-1, 0, 1, 2)]
    if node.get("exclude_outside", 0):
        weights = [
            np.where((i >= 0) & (i < old), w, 0) for i, w in zip(found4, weights, strict=True)
        ]
        total = sum(weights)
        weights = [w / total for w in weights]
    return list(zip(found4, weights, strict=True))


def resample(x: Tensor, axis: int, parts: list[tuple[np.ndarray, np.ndarray]]) -> Tensor:
    """Sum of selected elements along the axis, each with its weight; indices clamp to the ends."""
    shape = [1] * x.dim()
    shape[axis] = -1
    total: Tensor | None = None
    for places, weights in parts:
        index = np.clip(places, 0, x.shape[axis] - 1).astype(np.int64)
        picked = x.index_select(axis, torch.from_numpy(index))
        if len(parts) > 1:
            picked = picked * torch.from_numpy(weights).to(x.dtype).reshape(shape)
        total = picked if total is None else total + picked
    assert total is not None
    return total


def resize(node: Node, inputs: list[Value]) -> Result:
    x = need(inputs, 0)
    mode = node.get("coordinate_transformation_mode", "half_pixel")
    scales_at, sizes_at = (1, 3) if node.opset < 11 else (2, 3)
    if node.op == "Upsample" or node.opset < 11:
        mode, sizes_at = "asymmetric", 99
        node = Node(
            node.name, node.op, node.inputs, node.outputs,
            {"nearest_mode": "floor", **node.attributes}, node.opset,
        )  # fmt: skip
    if node.get("antialias", 0) or mode == "tf_crop_and_resize":
        raise node.refuse("antialias or tf_crop_and_resize")
    axes = [a % x.dim() for a in node.get("axes") or range(x.dim())]
    scales, sizes = at(inputs, scales_at), at(inputs, sizes_at)
    old = [x.shape[a] for a in axes]
    if sizes is not None and sizes.numel():
        new = ints(sizes)
        policy = node.get("keep_aspect_ratio_policy", "stretch")
        factor = [n / o for n, o in zip(new, old, strict=True)]
        if policy != "stretch":
            one = min(factor) if policy == "not_larger" else max(factor)
            factor = [one] * len(old)
            new = [int(np.floor(one * o + 0.5)) for o in old]
    else:
        stored = node.get("scales") if scales is None else scales.reshape(-1).tolist()
        factor = [float(v) for v in stored]
        new = [int(np.floor(o * f)) for o, f in zip(old, factor, strict=True)]
    for axis, o, n, f in zip(axes, old, new, factor, strict=True):
        if o != n or f != 1:
            places = source_places(mode, o, n, f)
            if node.get("mode", "nearest") == "linear":
                places = np.clip(places, 0, o - 1)
            x = resample(x, axis, taps(node, places, o))
    return x


OPS: dict[str, Op] = {"Resize": resize, "Upsample": resize}
