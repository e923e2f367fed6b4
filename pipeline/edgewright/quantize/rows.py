"""Feeds with several rows of a model's batch, one row at a time.

Kernels round in another order for another batch size, and a sample's own extrema must not be
those of its neighbours. So each row is run alone: ranges are the same, to the last bit, whether
samples come one by one or eight in a batch. What is a batch is not guessed from names: a free
dimension that leads an input is one if two rows run alone give their parts of the whole
outputs. (Where they do not, say for a sequence, the feed is one sample.)
"""

import numpy as np
import onnx

from edgewright.data import Feed
from edgewright.errors import BadInput
from edgewright.model import real_inputs
from edgewright.runtime.local import Local, open_local

MOST_ROWS = 1024  # more are a sequence or a set, not a batch
CLOSE = 1e-3  # of the largest value: float kernels round to 1e-6, rows that mix differ by all


class Rows:
    """Splits feeds of one model; the proof is made once, on the first feed with several rows."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.candidates = leading_axes(model)
        self.proved: dict[int, bool] = {}

    def split(self, feed: Feed) -> list[Feed]:
        """The feed's rows as feeds, in order; the feed itself where it is one sample."""
        for k, axes in enumerate(self.candidates):
            sizes = {feed[name].shape[axis] for name, axis in axes.items()}
            if len(sizes) != 1 or not 1 < (size := sizes.pop()) <= MOST_ROWS:
                continue
            if k not in self.proved:
                session = open_local(self.model.SerializeToString(), threads=1)
                self.proved[k] = independent(session, feed, axes, size)
            if self.proved[k]:
                return [row(feed, axes, r) for r in range(size)]
        return [feed]


def leading_axes(model: onnx.ModelProto) -> list[dict[str, int]]:
    """For each free dimension that may be a batch: the inputs that have it, and at which axis.

    It leads an input of two or more dimensions. Free dimensions without a name are one.
    """
    places: dict[str, dict[str, int]] = {}
    leading = []
    for value in real_inputs(model):
        shape = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(shape):
            if dim.HasField("dim_value") or (axis and not dim.dim_param):
                continue
            places.setdefault(dim.dim_param, {}).setdefault(value.name, axis)
            if axis == 0 and len(shape) > 1 and dim.dim_param not in leading:
                leading.append(dim.dim_param)
    return [places[name] for name in leading]


def row(feed: Feed, axes: dict[str, int], k: int) -> Feed:
    """Row k of a feed, its axis kept; inputs without that axis as they are."""
    alone = {
        name: np.ascontiguousarray(feed[name].take([k], axis=axis)) for name, axis in axes.items()
    }
    return {name: alone.get(name, value) for name, value in feed.items()}


def independent(session: Local, feed: Feed, axes: dict[str, int], size: int) -> bool:
    """Whether the first and the last row, run alone, give their parts of every output."""
    try:
        whole = session.run(feed)
        return all(
            is_part(part, value, k)
            for k in (0, size - 1)
            for part, value in zip(session.run(row(feed, axes, k)), whole, strict=True)
        )
    except BadInput:
        return False


def is_part(part: np.ndarray, whole: np.ndarray, k: int) -> bool:
    """Whether `part` is the slice k of `whole` along the one axis where their shapes differ."""
    if part.ndim != whole.ndim:
        return False
    axes = [i for i in range(part.ndim) if part.shape[i] != whole.shape[i]]
    if len(axes) != 1 or part.shape[axes[0]] != 1:
        return False
    wanted = whole.take([k], axis=axes[0])
    if part.dtype.kind != "f":
        return np.array_equal(part, wanted)
    limit = CLOSE * float(np.abs(whole[np.isfinite(whole)]).max(initial=0.0))
    return bool(np.allclose(part, wanted, rtol=0, atol=limit, equal_nan=True))
