"""Soft, trained sharing: each weight a mixture of its codebook, until it is one entry of it.

A weight lies between two entries and is their softmax mixture by distance (farther entries have
next to no share; Cho et al., DKM, 2108.12659, attend to all of them). The temperature falls, the
mixture becomes the nearer entry, and in the end only the entries themselves still move. Weights
and entries are trained by the losses of distillation on unlabelled inputs. What is judged on
held-out samples is always the hard assignment, so the result is never farther from the teacher
than the codebook it started from.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from edgewright.data import Feed
from edgewright.model import initializers
from edgewright.recipe import Distillation
from edgewright.recover.batches import digest_of, take_samples
from edgewright.recover.distill import report, schedule_of
from edgewright.recover.executor import to_module
from edgewright.recover.lesson import make_lesson
from edgewright.recover.ops import Tensor
from edgewright.recover.training import Score, fit, repeatable
from edgewright.stage import Tell, say_nothing

HOT, COLD = 0.5, 0.05  # temperature relative to the gap between two entries, first and last
SETTLED = 0.7  # share of the steps after which every weight is one entry and only entries move


@dataclass(frozen=True)
class Shared:
    """One weight to share: shares * scale, its shares to be entries of the codebook.

    shares: in the weight's shape, -1 to 1. scale: broadcasts to it. book: index of the codebook.
    """

    shares: np.ndarray
    scale: np.ndarray
    book: int


class Mixture:
    """The weights as mixtures of their codebooks at the temperature of the moment.

    Entries -1, 0 and 1 stay what they are, and so does every weight that lies on them: each
    channel keeps its peak, pruned weights stay zero.
    """

    def __init__(self, weights: Mapping[str, Shared], books: list[np.ndarray]) -> None:
        self.heat = 0.0
        self.firm = [torch.from_numpy(np.isin(b, (-1, 0, 1))) for b in books]
        self.first = [torch.from_numpy(b.astype(np.float32)) for b in books]
        self.entries = [torch.nn.Parameter(b.clone()) for b in self.first]
        self.rounding = {
            name: self.function(torch.from_numpy(one.shares), torch.from_numpy(one.scale), one.book)
            for name, one in weights.items()
        }

    def book(self, k: int) -> Tensor:
        """The entries of a codebook, in order."""
        moved = torch.where(self.firm[k], self.first[k], self.entries[k].clamp(-1, 1))
        return moved.sort().values

    def function(self, shares: Tensor, scale: Tensor, k: int) -> Callable[[Tensor], Tensor]:
        fixed = torch.isin(shares, self.first[k][self.firm[k]])

        def mixed(latent: Tensor) -> Tensor:
            value = torch.where(fixed, shares, latent.clamp(-1, 1))
            return mixture(value, self.book(k), self.heat) * scale

        return mixed

    def cool(self, step: int, steps: int) -> None:
        """Set the temperature of a step."""
        done = step / max(1, SETTLED * steps)
        self.heat = HOT * (COLD / HOT) ** done if done < 1 else 0.0


def mixture(value: Tensor, book: Tensor, heat: float) -> Tensor:
    """Each value as the softmax mixture of the two entries around it; the nearer one at heat 0.

    With squared distances over heat * gap ** 2 the share of the upper entry is
    sigmoid((2u - 1) / heat), u the place between the two from 0 to 1.
    """
    if len(book) == 1:
        return book.expand(value.shape)
    above = torch.searchsorted(book.detach(), value.detach()).clamp(1, len(book) - 1)
    low, high = book[above - 1], book[above]
    place = (value - low.detach()) / (high - low).detach().clamp_min(1e-9)
    share = torch.sigmoid((2 * place - 1) / heat) if heat else (place > 0.5).to(value.dtype)
    return low + (high - low) * share


def assign(
    model: onnx.ModelProto,
    weights: Mapping[str, Shared],
    books: list[np.ndarray],
    feeds: Callable[[], Iterable[Feed]],
    settings: Distillation,
    folder: Path | None = None,
    tell: Tell = say_nothing,
) -> tuple[dict[str, np.ndarray], list[np.ndarray], dict[str, Any]]:
    """Trained shares by weight, codebooks (sorted float32), and how training went.

    model: the teacher, and the graph whose stored weights `weights` names. Every share belongs
    to the nearest entry of its codebook. folder: for the checkpoint, see `training.fit`.
    Raises BadInput for operators without gradients and for too few samples.
    """
    samples, note = take_samples(feeds(), settings.samples)
    student = onnx.ModelProto()
    student.CopyFrom(model)
    stored = initializers(student.graph)
    for name, one in weights.items():
        stored[name].CopyFrom(numpy_helper.from_array(one.shares, name))
    with repeatable(settings.threads):
        pupil, mix = to_module(student, train=list(weights)), Mixture(weights, books)
        pupil.rounding = mix.rounding
        lesson, notes = make_lesson(model, pupil, student, samples, settings, {}, None)

        def backward(step: int, rng: np.random.Generator) -> float:
            mix.cool(step, settings.steps)
            return lesson.backward(step, rng)

        def measure() -> Score:
            mix.heat = 0.0
            return lesson.measure()

        entries = {f"codebook {k}": entry for k, entry in enumerate(mix.entries)}
        parts = [student.SerializeToString(deterministic=True), *[b.tobytes() for b in books]]
        parts.append(json.dumps(asdict(settings), sort_keys=True).encode())
        outcome = fit(
            {**pupil.weights, **entries}, backward, measure, schedule_of(settings),
            digest=digest_of(samples, *parts), folder=folder, tell=tell,
        )  # fmt: skip
        with torch.no_grad():
            made = [mix.book(k).numpy() for k in range(len(books))]
            trained = {}
            for name, one in weights.items():
                fixed = np.isin(one.shares, (-1, 0, 1)) & np.isin(one.shares, books[one.book])
                latent = pupil.weights[name].detach().clamp(-1, 1).numpy()
                trained[name] = np.where(fixed, one.shares, latent)
    return trained, made, report(outcome, lesson, [n for n in (note, *notes) if n])
