"""Weights to int8: rounding that keeps the layer's output, not its weights.

Rounding each weight to the nearest code minimises the error of the weights. What matters is the
error of the output, |(W - Q) x|^2 = (W - Q) H (W - Q)^T with H the second moments of the
layer's inputs. `round_by_output` rounds one column after the other and moves the error of each
onto the columns that are still free, the optimal-brain-surgeon step (Frantar et al., GPTQ,
2210.17323, eq. 2-3, Cholesky form). Pure numbers, no graph.
"""

import numpy as np

QMAX = 127  # symmetric codes -127..127
BLOCK = 128


def nearest(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes by rounding to nearest; weight (groups, channels, n), scales (groups, channels)."""
    codes: np.ndarray = np.clip(np.round(weight / scales[..., None]), -QMAX, QMAX)
    return codes.astype(np.int8)


def round_by_output(
    weight: np.ndarray,
    scales: np.ndarray,
    moments: np.ndarray,
    damping: float = 0.01,
    limit: int = QMAX,
) -> np.ndarray:
    """Codes of at most `limit` that keep the output; shapes as in `nearest`.

    moments: (groups, n, n). limit: the largest code that the scales are made for; passing an
    error on must not push others beyond it. damping: share of the mean diagonal added to the
    diagonal, so that inputs that are always zero or always alike do not let errors run away.
    Columns go in the order of falling diagonal: the ones that matter most are rounded while the
    most freedom is left.
    """
    groups, _, n = weight.shape
    h = moments.astype(np.float64).copy()
    diagonal = np.einsum("gii->gi", h)
    floor = np.maximum(diagonal.mean(axis=1, keepdims=True), 1e-12)
    index = np.arange(n)
    h[:, index, index] += damping * floor
    order = np.argsort(-diagonal, axis=1, kind="stable")
    rows = np.arange(groups)[:, None]
    h = h[rows[:, :, None], order[:, :, None], order[:, None, :]]
    left = np.take_along_axis(weight.astype(np.float64), order[:, None, :], axis=2)
    # Upper factor U with inv(H) = U^T U.
    inverse = np.linalg.inv(h)
    inverse = (inverse + np.swapaxes(inverse, 1, 2)) / 2
    upper = np.swapaxes(np.linalg.cholesky(inverse), 1, 2)
    codes = np.zeros(weight.shape, np.int8)
    step = scales.astype(np.float64)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        block = left[:, :, start:end]
        errors = np.zeros_like(block)
        for k in range(end - start):
            column = start + k
            code = np.clip(np.round(block[:, :, k] / step), -limit, limit)
            codes[:, :, column] = code
            error = (block[:, :, k] - code * step) / upper[:, column, column][:, None]
            block[:, :, k:] -= error[:, :, None] * upper[:, None, column, column:end]
            errors[:, :, k] = error
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    restored = np.empty_like(codes)
    np.put_along_axis(restored, np.broadcast_to(order[:, None, :], codes.shape), codes, axis=2)
    return restored


def output_error(
    weight: np.ndarray, codes: np.ndarray, scales: np.ndarray, moments: np.ndarray
) -> float:
    """Sum of (W - Q) H (W - Q)^T over all channels: the layer's squared output error."""
    difference = weight - codes * scales[..., None]
    return float(np.einsum("gci,gij,gcj->", difference, moments, difference, optimize=True))
