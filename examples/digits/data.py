"""The digits as 1x32x32 pictures: calibration inputs and the labelled evaluation set.

scikit-learn's `load_digits`: 1797 scans of 8x8 pixels. The first half trains, the second half
tests; their writers differ, so the test is honest.
"""

from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_digits

SPLIT = 898
SIDE = 32
CALIBRATION = 96


def enlarge(images: np.ndarray) -> np.ndarray:
    """(N, 8, 8) with values 0..16 -> (N, 1, 32, 32) float32 in 0..1, bilinear."""
    small = images.shape[-1]
    places = np.clip((np.arange(SIDE) + 0.5) * small / SIDE - 0.5, 0, small - 1)
    weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(small)[None]))  # (32, 8)
    large = weights @ (images / 16) @ weights.T
    return large[:, None].astype(np.float32)


def split(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and labels of "train" or "test"."""
    digits = load_digits()
    rows = slice(None, SPLIT) if part == "train" else slice(SPLIT, None)
    return enlarge(digits.images[rows]), digits.target[rows]


def calibration() -> Iterator[dict[str, np.ndarray]]:
    """Feeds for calibration: training pictures spread evenly over the split, no labels."""
    images, _ = split("train")
    for k in np.linspace(0, len(images) - 1, CALIBRATION).astype(int):
        yield {"image": images[k : k + 1]}


def unlabelled() -> Iterator[dict[str, np.ndarray]]:
    """Feeds to learn from: all training pictures in random order (seed 0), no labels."""
    images, _ = split("train")
    for k in np.random.RandomState(0).permutation(len(images)):
        yield {"image": images[k : k + 1]}


def evaluation() -> dict[str, np.ndarray]:
    """The test split."""
    images, labels = split("test")
    return {"images": images, "labels": labels}
