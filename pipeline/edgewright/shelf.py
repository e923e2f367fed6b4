"""Arrays of many samples in bounded memory: what does not fit lies in files until it is needed."""

import itertools
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import numpy as np


class Shelf:
    """Room for `room` bytes of arrays in memory; the rest goes into files in the folder."""

    def __init__(self, folder: Path, room: int) -> None:
        self.folder, self.room = folder, room
        self.spilled = 0  # bytes in files now
        self.peak_spilled = 0
        self.names = itertools.count()

    def sample(self) -> "Arrays":
        """A new, empty mapping that keeps its arrays here."""
        return Arrays(self)


class Arrays(MutableMapping[str, np.ndarray]):
    """The arrays of one sample by name, in memory or in files as the shelf has room."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.held: dict[str, np.ndarray | Path] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        value = self.held[name]
        return value if isinstance(value, np.ndarray) else np.load(value, allow_pickle=False)

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        if name in self.held:
            del self[name]
        if value.nbytes <= self.shelf.room:
            self.shelf.room -= value.nbytes
            self.held[name] = value
            return
        path = self.shelf.folder / f"{next(self.shelf.names)}.npy"
        np.save(path, value)
        self.shelf.spilled += path.stat().st_size
        self.shelf.peak_spilled = max(self.shelf.peak_spilled, self.shelf.spilled)
        self.held[name] = path

    def __delitem__(self, name: str) -> None:
        value = self.held.pop(name)
        if isinstance(value, np.ndarray):
            self.shelf.room += value.nbytes
        else:
            self.shelf.spilled -= value.stat().st_size
            value.unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)
