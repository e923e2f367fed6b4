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

LEVEL = 9  # of zlib, which stands for what a transport does


def prunable(model: onnx.ModelProto) -> dict[str, int]:
    """Stored float weights of two dimensions and more, and the axis along which a layer sums.

    Of Conv, ConvTranspose, Gemm, MatMul and the recurrent layers; weights that nodes of
    different axes share are left out.
    """
    stored = initializers(model.graph)
    found: dict[str, set[int]] = {}
    for node in model.graph.node:
        places: list[tuple[int, int]] = []
        if node.op_type == "Conv":
            places = [(1, 1)]
        elif node.op_type == "ConvTranspose":
            places = [(1, 0)]
        elif node.op_type == "MatMul":
            places = [(1, -2), (0, -1)]
        elif node.op_type == "Gemm":
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            places = [(1, 1 if turned else 0)]
        elif node.op_type in GATES:
            places = [(1, 2), (2, 2)]
        for k, axis in places:
            tensor = stored.get(node.input[k]) if k < len(node.input) else None
            if tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT:
                rank = len(tensor.dims)
                if rank >= 2:
                    found.setdefault(tensor.name, set()).add(axis % rank)
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


def block_energy(weight: np.ndarray, axis: int, block: int) -> np.ndarray:
    """Mean square of every run of `block` neighbours along the axis, repeated over the run."""
    moved = np.moveaxis(weight.astype(np.float64) ** 2, axis, -1)
    ends = np.arange(0, moved.shape[-1], block)
    sums = np.add.reduceat(moved, ends, axis=-1)
    lengths = np.diff([*ends, moved.shape[-1]])
    return np.moveaxis(np.repeat(sums / lengths, lengths, axis=-1), -1, axis)


def block_mask(weight: np.ndarray, axis: int, block: int, share: float) -> np.ndarray:
    """Mask without the runs of least energy along the axis; a share of the runs goes."""
    moved = np.moveaxis(block_energy(weight, axis, block), axis, -1)
    ends = np.arange(0, moved.shape[-1], block)
    lengths = np.diff([*ends, moved.shape[-1]])
    kept = np.repeat(smallest(moved[..., ends], share), lengths, axis=-1)
    return np.moveaxis(kept, -1, axis)


def sparse(
    model: onnx.ModelProto, pattern: str, share: float = 0.5, block: int = 4
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A copy of the model with zeros in its weights, and what that is worth.

    pattern: "magnitude" (the smallest of the whole model, each weight measured by its tensor's
    root mean square), "tensor" (the smallest of each tensor), "block" (runs of `block` along
    the summed axis, of each tensor), or "N:M" ("2:4" keeps 2 of every 4; `share` is not read).
    share: of the weights that become zero. Raises BadInput for a share outside (0, 1), an
    unknown pattern, and a model without weights.
    """
    n, m = parse_pattern(pattern, share, block)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    stored, axes = initializers(result.graph), prunable(model)
    if not axes:
        raise BadInput("the model stores no weights that can become zero")
    weights = {name: array(stored[name]) for name in axes}
    masks: dict[str, np.ndarray] = {}
    if pattern == "magnitude":
        sizes = {k: np.abs(w) / (np.sqrt((w**2).mean()) or 1.0) for k, w in weights.items()}
        flat = smallest(np.concatenate([s.reshape(-1) for s in sizes.values()]), share)
        ends = np.cumsum([w.size for w in weights.values()])[:-1]
        for name, part in zip(weights, np.split(flat, ends), strict=True):
            masks[name] = part.reshape(weights[name].shape)
    for name, weight in weights.items():
        if pattern == "tensor":
            masks[name] = smallest(np.abs(weight), share)
        elif pattern == "block":
            masks[name] = block_mask(weight, axes[name], block, share)
        elif m:
            masks[name] = n_of_m(weight, axes[name], n, m)
        values = weight * masks[name]
        stored[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
    return result, worth(model, result, masks, pattern)


def parse_pattern(pattern: str, share: float, block: int) -> tuple[int, int]:
    """N and M of an N:M pattern, zeros for the others."""
    if pattern in ("magnitude", "tensor", "block"):
        if not 0 < share < 1:
            raise BadInput(
                "the share of weights to zero", expected="above 0 and below 1", found=repr(share)
            )
        if block < 2 and pattern == "block":
            raise BadInput("the block of weights", expected="2 or more", found=str(block))
        return 0, 0
    words = pattern.split(":")
    if len(words) == 2 and all(w.isdecimal() for w in words) and 0 < int(words[0]) < int(words[1]):
        return int(words[0]), int(words[1])
    raise BadInput(
        "the pattern of zeros",
        expected='"magnitude", "tensor", "block", or N:M with 0 < N < M such as "2:4"',
        found=repr(pattern),
    )


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
