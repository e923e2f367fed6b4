"""Data that crosses the borders inside the quantizer: activation ranges and weight scales."""

from dataclasses import dataclass

import numpy as np

ActivationRange = tuple[float, float]


@dataclass(frozen=True)
class WeightScales:
    """Symmetric int8 scales of a stored weight: one per channel along `axis`, or one (None)."""

    axis: int | None
    values: np.ndarray
