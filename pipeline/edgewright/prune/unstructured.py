"""Zeros in the weights: by magnitude, N of every M, or whole blocks. Nothing gets smaller or
faster by itself: a file gains what a compressor finds, kernels of most CPUs gain nothing.
"""

import zlib
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.errors import BadInput
from edgewright.mixers import GATES
from edgewright.model import array, initializers
from edgewright.zeros import parse_pattern

LEVEL = 9  # of zlib, which stands for what a transport does


def prunable(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Stored float weights of two dimensions and more: the axes of outputs and of what is summed.

    Of Conv, ConvTranspose, Gemm, MatMul and the recurrent layers; weights that nodes of
    different axes share are left out.
    """
    stored = initializers(model.graph)
    found: dict[str, set[tuple[int, int]]] = {}
    for node in model.graph.node:
        places: list[tuple[int, int, int]] = []
        if node.op_type == "Conv":
            places = [(1, 0, 1)]
        elif node.op_type == "ConvTranspose":
            places = [(1, 1, 0)]
        elif node.op_type == "MatMul":
            places = [(1, -1, -2), (0, -2, -1)]
        elif node.op_type == "Gemm":
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            places = [(1, 0, 1) if turned else (1, 1, 0)]
        elif node.op_type in GATES:
            places = [(1, 1, 2), (2, 1, 2)]
        for k, out, summed in places:
            tensor = stored.get(node.input[k]) if k < len(node.input) else None
            if tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT:
                rank = len(tensor.dims)
                if rank >= 2:
                    found.setdefault(tensor.name, set()).add((out % rank, summed % rank))
    return {name: axes.pop() for name, axes in found.items() if len(axes) == 1}


def smallest(size: np.ndarray, share: float) -> np.ndarray:
    """Mask of what stays when a share of the entries goes, the smallest first, ties in order."""
    gone = round(share * size.size)
    order = np.argsort(size.reshape(-1), kind="stable")
    mask = np.ones(size.size, bool)
    mask[order[:gone]] = False
    return mask.reshape(size.shape)


def n_of_m(weight: np.ndarray, axis: int, n: int, m: int) -> np.ndarray:
    """Mask that keeps the n largest of every m neighbours along the axis; a rest stays whole."""
    moved = np.moveaxis(np.abs(weight), axis, -1)
    whole = moved.shape[-1] // m * m
    parts = moved[..., :whole].reshape(*moved.shape[:-1], -1, m)
    rank = np.argsort(np.argsort(-parts, axis=-1, kind="stable"), axis=-1, kind="stable")
    mask = np.ones(moved.shape, bool)
    mask[..., :whole] = (rank < n).reshape(*moved.shape[:-1], whole)
    return np.moveaxis(mask, -1, axis)


def block_mask(
    weight: np.ndarray, axes: tuple[int, int], block: tuple[int, int], share: float
) -> np.ndarray:
    """Mask without the blocks of least mean square; a share of the blocks goes.

    block: how many neighbours along each of the axes; those at the end may be smaller.
    """
    energy, count = weight.astype(np.float64) ** 2, np.ones(weight.shape)
    lengths = {}
    for axis, size in zip(axes, block, strict=True):
        starts = np.arange(0, weight.shape[axis], size)
        lengths[axis] = np.diff([*starts, weight.shape[axis]])
        energy = np.add.reduceat(energy, starts, axis)
        count = np.add.reduceat(count, starts, axis)
    kept = smallest(energy / count, share)
    for axis, length in lengths.items():
        kept = np.repeat(kept, length, axis)
    return kept


def sparse(
    model: onnx.ModelProto, pattern: str, share: float = 0.5
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A copy of the model with zeros in its weights, and what that is worth.

    pattern: "magnitude" (the smallest of the whole model, each weight measured by its tensor's
    root mean square), "tensor" (the smallest of each tensor), "RxC" (blocks of R outputs by C
    summed inputs, of each tensor), or "N:M" ("2:4" keeps 2 of every 4; `share` is not read).
    share: of the weights that become zero. Raises BadInput for a share outside (0, 1), an
    unknown pattern, and a model without weights.
    """
    kind, numbers = parse_pattern(pattern)
    if kind != "N:M" and not 0 < share < 1:
        raise BadInput(
            "the share of weights to zero", expected="above 0 and below 1", found=repr(share)
        )
    result = onnx.ModelProto()
    result.CopyFrom(model)
    stored, axes = initializers(result.graph), prunable(model)
    if not axes:
        raise BadInput("the model stores no weights that can become zero")
    weights = {name: array(stored[name]) for name in axes}
    masks: dict[str, np.ndarray] = {}
    if kind == "magnitude":
        sizes = {k: np.abs(w) / (np.sqrt((w**2).mean()) or 1.0) for k, w in weights.items()}
        flat = smallest(np.concatenate([s.reshape(-1) for s in sizes.values()]), share)
        ends = np.cumsum([w.size for w in weights.values()])[:-1]
        for name, part in zip(weights, np.split(flat, ends), strict=True):
            masks[name] = part.reshape(weights[name].shape)
    for name, weight in weights.items():
        if kind == "tensor":
            masks[name] = smallest(np.abs(weight), share)
        elif kind == "block":
            masks[name] = block_mask(weight, axes[name], numbers, share)
        elif kind == "N:M":
            masks[name] = n_of_m(weight, axes[name][1], *numbers)
        values = weight * masks[name]
        stored[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
    return result, worth(model, result, masks, pattern)


def worth(
    before: onnx.ModelProto, after: onnx.ModelProto, masks: dict[str, np.ndarray], pattern: str
) -> dict[str, Any]:
    """Zeros per tensor, and bytes of the file as it is and compressed, before and after."""
    files = [m.SerializeToString(deterministic=True) for m in (before, after)]
    packed = [len(zlib.compress(f, LEVEL)) for f in files]
    total = sum(m.size for m in masks.values())
    return {
        "pattern": pattern,
        "weights": total,
        "zeros": sum(int((~m).sum()) for m in masks.values()),
        "tensors": [
            {"tensor": n, "weights": m.size, "zeros": int((~m).sum())} for n, m in masks.items()
        ],
        "bytes": [len(f) for f in files],
        "compressed_bytes": packed,
        "notes": [
            f"the file stays as large ({len(files[1])} bytes); compressed (zlib) it is "
            f"{packed[1] / packed[0]:.2f} of what it was",
            "the CPU kernels of ONNX Runtime multiply zeros like any number: no gain in latency",
        ],
    }
