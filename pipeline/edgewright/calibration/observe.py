"""A session whose named tensors are watched, sample by sample."""

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgewright.calibration.statistics import Statistics
from edgewright.errors import BadInput
from edgewright.runtime.local import open_local

Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Sample:
    """A feed with its index among all, and the words that name it to the user."""

    index: int
    name: str
    feed: Feed


class Observer:
    """Statistics of some tensors of a model.

    model: a file, with the tensors among its outputs (inputs aside). The session has one
    thread: with more, kernels split their sums another way, and last bits would depend on it.
    groups: which of `made` are fetched together, so that memory is bounded; the model runs once
    for each group. Set it before the first sample.
    """

    groups: list[list[str]]

    def __init__(self, model: Path, tensors: list[str]) -> None:
        give_back()
        self.session = open_local(model, threads=1, name="the model")
        give_back()
        self.fed = [t for t in tensors if t in self.session.inputs]
        self.made = [t for t in tensors if t not in self.session.inputs]
        self.statistics = {name: Statistics() for name in tensors}

    def observe(self, sample: Sample) -> int:
        """Take one sample in; the bytes of the watched tensors.

        Raises BadInput with sample and tensor for NaN or Inf.
        """
        seen = 0
        for name in self.fed:
            seen += self.take(sample, name, sample.feed[name])
        for group in self.groups:
            for name, value in zip(group, self.session.run(sample.feed, group), strict=True):
                seen += self.take(sample, name, value)
        return seen

    def take(self, sample: Sample, name: str, value: np.ndarray) -> int:
        """Add one value, refusing what would poison the ranges."""
        try:
            self.statistics[name].add(value, sample.index)
        except FloatingPointError as kind:
            raise BadInput(
                f"calibration {sample.name} makes tensor '{name}' of the model {kind}",
                expected="finite values everywhere",
                hint="remove that sample, or mend the model where the value arises",
            ) from None
        return value.nbytes


def give_back() -> None:
    """Return freed memory to the system: the C library keeps what parsing a model took."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
