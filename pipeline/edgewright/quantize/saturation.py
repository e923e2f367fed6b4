"""Sums of two products in 16 bits: which weights meet in one, and codes for which it is exact.

x86 without VNNI multiplies by VPMADDUBSW: unsigned by signed bytes, each two neighbours added in
signed 16 bits, cut off there. An activation's code reaches 255 (the kernels take the raw code,
and shift int8 to uint8), so a pair is exact whatever comes in just if its positive codes sum to
at most 128 and its negative ones to at least -128: 255 * 128 = 32640 <= 32767, 255 * 129 is not.

Measured on ONNX Runtime 1.31.1 under an emulated Haswell, by all pairs of weights at once
(`tests/stages/test_avx2.py`): convolutions, grouped too, Gemm and MatMul with int8
weights cut off; depthwise convolutions and kernels with uint8 weights do not. A row of weights
is read kernel place by kernel place, the input channels of its group innermost; neighbours 2k
and 2k + 1 are a pair, also across places, and the last of an odd number is alone. Pure numbers,
no graph.
"""

import numpy as np

MOST = 128  # of the codes of one sign in a pair


def pairs(columns: int, places: int = 1) -> np.ndarray:
    """The columns of a weight that meet: (columns // 2, 2), each column in at most one row.

    columns: weights of one output, ordered (input channel, kernel place). places: kernel size.
    """
    order = np.arange(columns).reshape(-1, places).T.reshape(-1)
    return order[: columns // 2 * 2].reshape(-1, 2)


def sums(values: np.ndarray, meeting: np.ndarray) -> np.ndarray:
    """The larger of a pair's sum of positive values and minus its sum of negative ones.

    values: (..., columns) codes or weights. Returns (..., pairs), never negative.
    """
    wide = values.astype(np.int16) if values.dtype == np.int8 else values
    a, b = wide[..., meeting[:, 0]], wide[..., meeting[:, 1]]
    above = np.maximum(a, 0) + np.maximum(b, 0)
    below = np.minimum(a, 0) + np.minimum(b, 0)
    larger: np.ndarray = np.maximum(above, -below)
    return larger


def unsafe(codes: np.ndarray, meeting: np.ndarray) -> np.ndarray:
    """Which pairs can be cut off: codes (..., columns) int8 -> (..., pairs) bool."""
    found: np.ndarray = sums(codes, meeting) > MOST
    return found


def least_scales(weight: np.ndarray, meeting: np.ndarray) -> np.ndarray:
    """The smallest scales at which no pair passes the bound before rounding.

    weight: (groups, channels, columns). Returns (groups, channels); 0 where nothing limits.
    """
    if not len(meeting):
        return np.zeros(weight.shape[:2])
    scales: np.ndarray = sums(weight, meeting).max(axis=2) / MOST
    return scales


def repaired(codes: np.ndarray, meeting: np.ndarray) -> np.ndarray:
    """The codes with what is too much taken from both of a pair alike: (..., columns) int8.

    That is the nearest pair that is safe. No code grows or changes its sign, so weights that
    several layers read can be repaired for one after the other.
    """
    over = np.maximum(sums(codes, meeting) - MOST, 0)
    if not over.any():
        return codes
    fixed = codes.astype(np.int16)
    a, b = fixed[..., meeting[:, 0]], fixed[..., meeting[:, 1]]
    # An odd one is taken from the larger.
    first = (over + (np.abs(a) > np.abs(b))) // 2
    fixed[..., meeting[:, 0]] = a - np.sign(a) * first
    fixed[..., meeting[:, 1]] = b - np.sign(b) * (over - first)
    return fixed.astype(np.int8)
