"""The user's own metric: `score(run, data) -> float`, and per-sample values for paired tests."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgewright.data import call_user, load_function
from edgewright.errors import BadInput
from edgewright.recipe import Recipe
from edgewright.runtime.local import open_local

Run = Callable[[dict[str, Any]], list[np.ndarray]]


@dataclass(frozen=True)
class Metric:
    """The metric of a recipe, ready to be applied to a way of running a model."""

    recipe: Recipe

    def evaluation(self) -> Any:
        """The evaluation set: an opened .npz, an array, a function's result, else the path."""
        source = self.recipe.data.evaluation
        if ".py:" in source:
            function = load_function(self.recipe.path(source), "data.evaluation")
            return call_user(function, source)
        path = self.recipe.path(source)
        if not path.exists():
            raise BadInput(f"evaluation data not found: {path}", hint="check data.evaluation")
        if path.suffix in (".npz", ".npy"):
            try:
                return np.load(path, allow_pickle=False)
            except (ValueError, OSError) as error:
                raise BadInput(f"{path} cannot be read", found=str(error)) from None
        return path

    def function(self, key: str) -> tuple[Callable[..., Any], str]:
        source = getattr(self.recipe.data, key)
        return load_function(self.recipe.path(source), f"data.{key}"), source

    def score(self, run: Run) -> float:
        """The metric's value; BadInput where it raises or returns no finite number."""
        function, source = self.function("metric")
        value = call_user(function, source, run, self.evaluation())
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise BadInput(f"metric {source}", expected="a number", found=repr(value)) from None
        if not math.isfinite(number):
            raise BadInput(
                f"metric {source}",
                expected="a finite number",
                found=str(number),
                hint="check the metric with the original model; NaN often means empty data",
            )
        return number

    def per_sample(self, run: Run) -> np.ndarray | None:
        """One number per independent sample, None where the recipe names no such function."""
        if not self.recipe.data.per_sample:
            return None
        function, source = self.function("per_sample")
        values = np.asarray(call_user(function, source, run, self.evaluation()), dtype=float)
        if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
            raise BadInput(
                f"per-sample metric {source}",
                expected="a list of finite numbers, one per sample",
                found=f"shape {list(values.shape)}",
            )
        return values

    def retained(self, score: float, original: float) -> float:
        """Share of the original's metric that is left: 1.0 = all of it.

        score / original where higher is better, original / score for errors (as kit.py has
        it). An original of 0 has no share: 1.0 if the score is no worse, else 0.0.
        """
        rises = self.recipe.data.higher_is_better
        top, bottom = (score, original) if rises else (original, score)
        if bottom == 0:
            no_worse = score >= original if rises else score <= original
            return 1.0 if no_worse else 0.0
        return top / bottom


def has_metric(recipe: Recipe) -> bool:
    """Whether the recipe names a metric at all."""
    return bool(recipe.data.metric)


def retention(
    recipe: Recipe, original: Path, tell: Callable[[str, int, int], None]
) -> Callable[[onnx.ModelProto], float] | None:
    """A function: the share of the original's metric that a model keeps; None without a metric.

    The original is scored when the first model is.
    """
    if not has_metric(recipe):
        return None
    metric = Metric(recipe)
    first: list[float] = []

    def retained(model: onnx.ModelProto) -> float:
        if not first:
            tell("metric of the original", 0, 0)
            first.append(metric.score(open_local(original, threads=2).run))
        tell("metric of the changed model", 0, 0)
        score = metric.score(open_local(model.SerializeToString(), threads=2).run)
        return metric.retained(score, first[0])

    return retained


def paired_difference(
    original: np.ndarray, candidate: np.ndarray, rises: bool, seed: int = 0
) -> dict[str, float | int]:
    """Paired comparison per sample: mean loss, its 95 % bootstrap bounds, sign-test p value.

    Loss > 0 means the candidate is worse. The sign test is exact and two-sided over the
    samples that differ (Conover, Practical Nonparametric Statistics, 3rd ed., 3.4).
    """
    loss = (original - candidate) * (1 if rises else -1)
    worse, better = int((loss > 0).sum()), int((loss < 0).sum())
    n = worse + better
    tail = sum(math.comb(n, k) for k in range(min(worse, better) + 1)) / 2**n if n else 1.0
    rng = np.random.default_rng(seed)
    means = np.array([loss[rng.integers(0, loss.size, loss.size)].mean() for _ in range(2000)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "samples": int(loss.size),
        "worse": worse,
        "better": better,
        "mean_loss": float(loss.mean()),
        "mean_loss_low": float(low),
        "mean_loss_high": float(high),
        "sign_test_p": float(min(1.0, 2 * tail)),
    }
