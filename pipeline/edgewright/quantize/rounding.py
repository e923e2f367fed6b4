"""Weights to int8: rounding that keeps the layer's output, not its weights.

Rounding each weight to the nearest code minimises the error of the weights. What matters is the
error of the output, |(W - Q) x|^2 = (W - Q) H (W - Q)^T with H the second moments of the
layer's inputs. `round_by_output` rounds one column after the other and moves the error of each
onto the columns that are still free, the optimal-brain-surgeon step (Frantar et al., GPTQ,
2210.17323, eq. 2-3, Cholesky form). Pure numbers, no graph.
"""

import numpy as np

from edgewright.quantize import saturation
from edgewright.quantize.saturation import MOST

QMAX = 127  # symmetric codes -127..127
BLOCK = 128
NO_PAIRS = saturation.pairs(0)


def round_by_output(
    weight: np.ndarray,
    scales: np.ndarray,
    moments: np.ndarray,
    damping: float = 0.01,
    pairs: np.ndarray = NO_PAIRS,
) -> np.ndarray:
    """Codes that keep the output; weight (groups, channels, n), scales (groups, channels).

    moments: (groups, n, n). damping: share of the mean diagonal added to the diagonal, so that
    inputs that are always zero or always alike do not let errors run away. pairs: columns that
    must be safe together, (m, 2), see `saturation`; what the bound takes from one is an error
    like any other, and moves on. Columns go in the order of falling diagonal: the ones that
    matter most are rounded while the most freedom is left. Pairs stay together and go before
    columns that have no partner.
    """
    groups, _, n = weight.shape
    h = moments.astype(np.float64).copy()
    diagonal = np.einsum("gii->gi", h)
    floor = np.maximum(diagonal.mean(axis=1, keepdims=True), 1e-12)
    index = np.arange(n)
    h[:, index, index] += damping * floor
    order = order_of(diagonal, pairs)
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
            code = np.clip(np.round(block[:, :, k] / step), -QMAX, QMAX)
            if column < 2 * len(pairs):
                # BLOCK is even, so both of a pair are in one block.
                if column % 2 == 0:
                    other = np.clip(np.round(block[:, :, k + 1] / step), -QMAX, QMAX)
                    over = np.abs(code + other) - MOST
                    share = np.where(code * other > 0, np.maximum(over, 0) // 2, 0)
                    code = np.sign(code) * np.maximum(np.abs(code) - share, 0)
                else:
                    before = codes[:, :, column - 1].astype(np.float64)
                    room = np.where(code * before > 0, MOST - np.abs(before), MOST)
                    code = np.clip(code, -room, room)
            codes[:, :, column] = code
            error = (block[:, :, k] - code * step) / upper[:, column, column][:, None]
            block[:, :, k:] -= error[:, :, None] * upper[:, None, column, column:end]
            errors[:, :, k] = error
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    restored = np.empty_like(codes)
    np.put_along_axis(restored, np.broadcast_to(order[:, None, :], codes.shape), codes, axis=2)
    return restored


def order_of(diagonal: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Columns in the order of rounding: diagonal (groups, n) -> (groups, n) indices."""
    if not len(pairs):
        return np.argsort(-diagonal, axis=1, kind="stable")
    weight = diagonal[:, pairs]  # (groups, m, 2)
    inside = np.take_along_axis(
        np.broadcast_to(pairs, weight.shape), np.argsort(-weight, axis=2, kind="stable"), axis=2
    )
    outside = np.argsort(-weight.sum(axis=2), axis=1, kind="stable")
    paired = np.take_along_axis(inside, outside[:, :, None], axis=1)
    groups, n = diagonal.shape
    alone = np.setdiff1d(np.arange(n), pairs)
    alone = np.broadcast_to(alone, (groups, len(alone)))
    return np.concatenate([paired.reshape(groups, -1), alone], axis=1)
