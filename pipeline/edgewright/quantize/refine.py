"""Smoothing as a step of the stage: tried at a few strengths, kept where it helps.

The float model stays what it is; the int8 model is judged on held-out inputs, as the
corrections in `build.adjust` are.
"""

from collections.abc import Callable, Iterable
from typing import Any

from edgewright.data import Feed
from edgewright.quantize import build
from edgewright.quantize.calibrate import collect
from edgewright.quantize.equalize import channel_peaks
from edgewright.quantize.placement import Placement
from edgewright.quantize.response import responses
from edgewright.quantize.smooth import find_folds, smooth

Feeds = Callable[[], Iterable[Feed]]
ALPHAS = (0.5, 0.75, 0.25)  # of SmoothQuant; the first is its authors' choice for most models


def smoothed(
    ingredients: build.Ingredients, plan: Placement, feeds: Feeds, tell: build.Tell
) -> tuple[build.Ingredients, list[dict[str, Any]]]:
    """The ingredients with activations smoothed by the best alpha, where one helps."""
    if ingredients.settings.corrections is not True:
        return ingredients, []
    folds, refused = find_folds(ingredients.model, plan.nodes)
    if not folds and not refused:
        return ingredients, []
    choice: dict[str, Any] = {"step": "smoothing", "folded": len(folds), "not_folded": refused}
    if not folds:
        return ingredients, [choice | {"kept": False, "reason": "no exact place for a factor"}]
    before = best = build.judge(ingredients, build.write(ingredients, plan))
    peaks = channel_peaks(ingredients.model, [f.tensor for f in folds], feeds(), axis=-1)
    winner = ingredients
    changed = {t for f in folds for t in f.changed}
    for k, alpha in enumerate(ALPHAS):
        tell("smoothing", k, len(ALPHAS))
        candidate = build.copy_of(ingredients)
        smooth(candidate.model, folds, peaks, alpha)
        recalibrate(candidate, changed, plan, feeds, tell)
        after = build.judge(candidate, build.write(candidate, plan))
        if k == 0 or after > best:
            choice["alpha"], found = alpha, after
        if after > max(best, before + build.WORSE_DB):
            winner, best = candidate, after
    kept = winner is not ingredients
    choice |= {"sqnr_db_before": round(before, 2), "sqnr_db_after": round(found, 2), "kept": kept}
    return winner, [choice]


def recalibrate(
    ingredients: build.Ingredients,
    changed: set[str],
    plan: Placement,
    feeds: Feeds,
    tell: build.Tell,
) -> None:
    """Ranges of the changed tensors and scales of all weights anew, in place."""
    names = [t for t in ingredients.statistics if t in changed]
    fresh = collect(ingredients.model, names, feeds, tell, ingredients.settings.processes)
    table = responses(ingredients.model, names, fresh)
    ranges = build.activation_ranges(fresh, table, ingredients.scheme, ingredients.settings)
    ingredients.statistics = ingredients.statistics | fresh
    ingredients.ranges = ingredients.ranges | ranges
    ingredients.weights = build.scales_of(ingredients.model, plan, ingredients.scheme)
