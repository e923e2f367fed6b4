"""Weight clipping: scales with the least output error, where the peak's are not that.

A symmetric scale of peak / 127 represents the largest weight exactly and all others in steps
made for it. A smaller scale cuts the peak and rounds the rest finer; for few weights (a
depthwise kernel) it may also simply suit them better. What counts is the error of the layer's
output, here with inputs taken as uncorrelated around their mean (Nagel et al., A White Paper on
Neural Network Quantization, 2106.08295, 3.1, with the inputs' moments as weights):

    sum_j (w_j - q_j)^2 var(x_j) + (sum_j (w_j - q_j) mean(x_j))^2

Pure numbers but for `input_statistics`, which runs the model once over some samples.
"""

from collections.abc import Iterable

import numpy as np
import onnx

from edgewright.data import Feed
from edgewright.quantize.layers import Layer
from edgewright.quantize.rounding import QMAX
from edgewright.runtime.local import open_local
from edgewright.taps import expose, fetch_groups

RATIOS = np.geomspace(1.0, 0.1, 20)  # of the peak; the first is the one to beat


def clipped_peaks(
    weight: np.ndarray, mean: np.ndarray, variance: np.ndarray, *, joint: bool, limit: int = QMAX
) -> np.ndarray:
    """The largest weights to represent, (groups, channels), each at most the channel's peak.

    weight: (groups, channels, n). mean, variance of the inputs: (groups, n). joint: one
    scale serves all channels, so all get the same. limit: the code of the peak.
    """
    axes = (0, 1, 2) if joint else (2,)
    weight = weight.astype(np.float32)
    peak = np.abs(weight).max(axis=axes, keepdims=True)
    safe = np.where(peak > 0, peak, np.float32(1))
    moments = np.stack([variance, mean], axis=2).astype(np.float32)  # (groups, n, 2)
    errors = []
    for ratio in RATIOS:
        step = safe * np.float32(ratio / limit)
        lost = weight - np.clip(np.round(weight / step), -limit, limit) * step
        error = ((lost * lost) @ moments[:, :, :1] + (lost @ moments[:, :, 1:]) ** 2)[..., 0]
        errors.append(error.sum(keepdims=True) if joint else error)
    best = RATIOS[np.argmin(errors, axis=0)]
    found: np.ndarray = np.broadcast_to(peak[..., 0] * best, weight.shape[:2])
    return found


def input_statistics(
    model: onnx.ModelProto, layers: list[Layer], feeds: Iterable[Feed]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of each layer's inputs, (groups, n) each: node name -> both.

    Per input channel; the positions of a kernel share their channel's. Padding is left out.
    """
    inputs = {v.name for v in model.graph.input}
    axes = {la.input: 1 if la.op == "Conv" else -1 for la in layers}
    names = list(axes)
    session = open_local(expose(model, names).SerializeToString(), threads=2)
    sums = {n: [0.0, 0.0, 0.0] for n in names}
    groups: list[list[str]] = []
    for feed in feeds:
        groups = groups or fetch_groups(session, feed, [n for n in names if n not in inputs])
        for group in [*groups, [n for n in names if n in inputs]]:
            made = group and group[0] not in inputs
            values = session.run(feed, group) if made else [feed[n] for n in group]
            for name, value in zip(group, values, strict=True):
                axis = axes[name]
                rows = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
                total, square, count = sums[name]
                sums[name] = [
                    total + rows.sum(axis=1, dtype=np.float64),
                    square + np.einsum("cp,cp->c", rows, rows).astype(np.float64),
                    count + rows.shape[1],
                ]
    found = {}
    for la in layers:
        total, square, count = sums[la.input]
        mean = np.asarray(total) / max(count, 1)
        variance = np.maximum(np.asarray(square) / max(count, 1) - mean**2, 0.0)
        kernel = int(np.prod(la.kernel))
        found[la.node] = tuple(
            np.repeat(v.reshape(la.groups, -1), kernel, axis=1) for v in (mean, variance)
        )
    return found  # type: ignore[return-value]
