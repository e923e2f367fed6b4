"""The committed words as log-mel energies: calibration inputs and the labelled evaluation set."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

DATA = Path(__file__).with_name("data.npz")


def features(part: str) -> np.ndarray:
    """(N, 49, 32) float32 in -1..1, of "train", "calibration" or "evaluation"."""
    with np.load(DATA, allow_pickle=False) as stored:
        return (stored[f"{part}_features"] / np.float32(31.5) - 1).astype(np.float32)


def labels(part: str) -> np.ndarray:
    """(N,) 0 to 10, of "train" or "evaluation"."""
    with np.load(DATA, allow_pickle=False) as stored:
        return stored[f"{part}_labels"].astype(np.int64)


def calibration() -> Iterator[dict[str, np.ndarray]]:
    """Feeds for calibration, without labels: voices that are in neither of the other parts."""
    for row in features("calibration"):
        yield {"features": row[None]}


def evaluation() -> dict[str, np.ndarray]:
    """Voices, and other words, that training never heard."""
    return {"features": features("evaluation"), "labels": labels("evaluation")}
