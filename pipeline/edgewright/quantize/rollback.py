"""Back to float, region by region, until the metric holds.

Regions are runs of neighbouring int8 layers. Each is priced once, without labels: how much of
the noise in the outputs is gone when only that region is float, and which share of the work
that region is. The metric, which is dear, is asked only for a few prefixes of the regions in
the order of noise saved per work given up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx

from edgewright.quantize import build
from edgewright.quantize.build import Ingredients, Tell
from edgewright.quantize.layers import find_layers
from edgewright.quantize.placement import CORE, Placement

REGIONS = 32
SAMPLES = 6
REFINEMENTS = 2  # steps of bisection between the last failure and the first success
FLOOR = 0.02  # work share that any region counts for: its borders cost time, too


@dataclass(frozen=True)
class Region:
    """Neighbouring nodes that go back to float together.

    saved: share of the output's noise power that is gone with the region in float (below zero
    where it compensated noise of others). work: its share of the multiplications.
    """

    nodes: tuple[str, ...]
    saved: float
    work: float


def regions_of(model: onnx.ModelProto, placement: Placement) -> list[tuple[str, ...]]:
    """The int8 nodes cut into at most REGIONS runs, a new one starting at a weighted layer."""
    ops = {n.name: n.op_type for n in model.graph.node}
    cores = sum(ops[n] in CORE for n in placement.nodes)
    size = max(1, -(-cores // REGIONS))
    runs: list[list[str]] = [[]]
    seen = 0
    for name in placement.nodes:
        if ops[name] in CORE:
            if seen and seen % size == 0:
                runs.append([])
            seen += 1
        runs[-1].append(name)
    return [tuple(r) for r in runs if r]


def work_of(ingredients: Ingredients, placement: Placement) -> dict[str, float]:
    """Multiplications per layer on a calibration sample, as shares of all int8 layers'."""
    macs = {
        layer.node: ingredients.statistics[layer.output].size * layer.columns
        for layer in find_layers(ingredients.model, placement.nodes)
        if layer.output in ingredients.statistics
    }
    total = sum(macs.values()) or 1
    return {name: value / total for name, value in macs.items()}


def price(ingredients: Ingredients, placement: Placement, tell: Tell) -> list[Region]:
    """The regions, the one with the most noise saved per work given up first."""
    few = build.copy_of(ingredients)
    few.held, few.reference = few.held[:SAMPLES], few.reference[:SAMPLES]
    whole = 10 ** (-build.judge(few, build.write(few, placement)) / 10)
    work = work_of(ingredients, placement)
    found = []
    runs = regions_of(ingredients.model, placement)
    for k, nodes in enumerate(runs):
        tell("pricing regions", k, len(runs))
        rest = placement.without(nodes, "")
        noise = 10 ** (-build.judge(few, build.write(few, rest)) / 10)
        found.append(Region(nodes, 1 - noise / whole, sum(work.get(n, 0.0) for n in nodes)))
    return sorted(found, key=lambda r: -r.saved / (r.work + FLOOR) if r.saved > 0 else -r.saved)


def roll_back(
    ingredients: Ingredients,
    placement: Placement,
    corrections: list[str],
    retained: Callable[[onnx.ModelProto], float],
    wanted: float,
    tell: Tell,
) -> tuple[Placement, onnx.ModelProto | None, list[dict[str, Any]]]:
    """The placement with few regions in float at which the metric holds, and its int8 model.

    corrections: names of those that helped before; each trial is corrected anew, because a
    correction fits one placement only. retained: share of the metric an int8 model keeps. The
    model is None, and the placement empty, where no placement is good enough.
    """
    regions = price(ingredients, placement, tell)
    tried: list[dict[str, Any]] = []

    def attempt(count: int) -> tuple[Placement, onnx.ModelProto, bool]:
        trial = placement
        for region in regions[:count]:
            reason = f"rolled back: it makes {100 * region.saved:.0f} % of the output's noise"
            trial = trial.without(region.nodes, reason)
        trial = trial.tidied(ingredients.model)
        changed = build.corrected(ingredients, trial, corrections, tell)
        model = build.write(changed, trial)
        share = retained(model)
        tried.append({"regions_in_float": count, "retained": round(share, 5)})
        return trial, model, share >= wanted

    failed, count = 0, 1
    best: tuple[Placement, onnx.ModelProto] | None = None
    while best is None and failed + 1 < len(regions):
        count = min(count, len(regions) - 1)
        trial, model, holds = attempt(count)
        if holds:
            best = trial, model
        else:
            failed, count = count, count * 2
    if best is None:
        return placement.without(placement.nodes, "the metric does not hold"), None, tried
    for _ in range(REFINEMENTS):
        if count - failed <= 1:
            break
        middle = (count + failed) // 2
        trial, model, holds = attempt(middle)
        if holds:
            best, count = (trial, model), middle
        else:
            failed = middle
    return best[0], best[1], tried
