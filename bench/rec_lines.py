"""More text lines to learn from, made of the kit's own: calibration = "bench/rec_lines.py:lines".

The 64 unlabelled calibration lines of ppocrv4-rec, then lines put together from pieces of them,
stretched and of other shade. Every fifth line, which distillation holds out, is made of held-out
lines only. How docs/distil.md took its figures.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).parents[2] / "shared/kit/ppocrv4-rec/calibration.npz"
MORE = 176


def lines() -> Iterator[dict[str, np.ndarray]]:
    """Feeds x, float32 (1, 3, 48, 480) in -1..1."""
    with np.load(SOURCE) as data:
        whole = data["x"]
    for line in whole:
        yield {"x": line[None]}
    width = whole.shape[-1]
    for k in range(len(whole), len(whole) + MORE):
        rng = np.random.RandomState(k)
        own = [i for i in range(len(whole)) if (i % 5 == 4) == (k % 5 == 4)]
        pieces, room = [], int(rng.choice([width, rng.randint(240, width + 1)]))
        while room > 24:
            source = whole[rng.choice(own)]
            used = int(np.flatnonzero(source.std(axis=(0, 1)) > 0).max(initial=47)) + 1
            size = min(used, room, int(rng.randint(96, 320)))
            begin = int(rng.randint(0, used - size + 1))
            piece = source[0, :, begin : begin + size]
            new = max(24, min(room, round(size * rng.uniform(0.85, 1.2))))
            at = np.linspace(0, size - 1, new)
            low = np.floor(at).astype(int)
            part = (at - low).astype(np.float32)
            piece = piece[:, low] * (1 - part) + piece[:, np.minimum(low + 1, size - 1)] * part
            if rng.rand() < 0.5:
                piece = piece * rng.uniform(0.6, 1.0) + rng.uniform(-0.15, 0.15)
            if rng.rand() < 0.2:
                piece = -piece
            pieces.append(np.clip(piece, -1, 1))
            room -= new
        row = np.concatenate(pieces, axis=1)
        row = np.pad(row, ((0, 0), (0, width - row.shape[1])))
        yield {"x": np.repeat(row[None, None], 3, axis=1).astype(np.float32)}
