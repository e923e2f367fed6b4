"""Back to float, region by region, until the metric holds.

Regions are runs of neighbouring int8 layers. Each is priced once, without labels: its share of
the noise in the outputs and its share of what int8 gains: time where that was measured, else
multiplications. The metric, which is dear, is asked only for a few prefixes of the regions in
the order of noise saved per gain given up.
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

    noise: its share of the noise power in the outputs. work: its share of what int8 gains.
    """

    nodes: tuple[str, ...]
    noise: float
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
    """What a layer gains as int8, as a share of all layers: measured, else multiplications."""
    if ingredients.gains:
        return ingredients.gains
    macs = {
        layer.node: ingredients.statistics[layer.output].size * layer.columns
        for layer in find_layers(ingredients.model, placement.nodes)
        if layer.output in ingredients.statistics
    }
    total = sum(macs.values()) or 1
    return {name: value / total for name, value in macs.items()}


def price(ingredients: Ingredients, placement: Placement, tell: Tell) -> list[Region]:
    """The regions, the one with the most noise per work first.

    Each region is int8 alone, all others float: its noise is then its own, while in the whole
    int8 model the mean shifts of many layers mix and partly cancel.
    """
    few = build.copy_of(ingredients)
    few.held, few.reference = few.held[:SAMPLES], few.reference[:SAMPLES]
    work = work_of(ingredients, placement)
    found = []
    runs = regions_of(ingredients.model, placement)
    for k, nodes in enumerate(runs):
        tell("pricing regions", k, len(runs))
        others = [n for n in placement.nodes if n not in set(nodes)]
        alone = placement.without(others, "").tidied(ingredients.model)
        noise = 10 ** (-build.judge(few, build.write(few, alone)) / 10)
        found.append(Region(nodes, noise, sum(work.get(n, 0.0) for n in nodes)))
    total = sum(r.noise for r in found) or 1.0
    shares = [Region(r.nodes, r.noise / total, r.work) for r in found]
    return sorted(shares, key=lambda r: -r.noise / (r.work + FLOOR))


@dataclass(frozen=True)
class Trial:
    """One placement tried: regions in float, the share of the metric it keeps."""

    regions: int
    placement: Placement
    model: onnx.ModelProto
    retained: float


def roll_back(
    ingredients: Ingredients,
    placement: Placement,
    corrections: list[str],
    retained: Callable[[onnx.ModelProto], float],
    wanted: float,
    enough: float,
    tell: Tell,
) -> tuple[Placement, onnx.ModelProto | None, list[dict[str, Any]]]:
    """A placement with few regions in float that keeps `wanted` of the metric, and its model.

    corrections: names of those that helped before; each trial is corrected anew, because a
    correction fits one placement only. retained: share of the metric an int8 model keeps.
    Where no trial keeps `wanted`, the best that keeps `enough` is taken; where none does, the
    model is None and the placement empty.
    """
    regions = price(ingredients, placement, tell)
    trials: list[Trial] = []

    def attempt(count: int) -> Trial:
        changed = placement
        for region in regions[:count]:
            reason = f"rolled back: it makes {100 * region.noise:.0f} % of the output's noise"
            changed = changed.without(region.nodes, reason)
        changed = changed.tidied(ingredients.model)
        model = build.write(build.corrected(ingredients, changed, corrections, tell), changed)
        trials.append(Trial(count, changed, model, retained(model)))
        return trials[-1]

    failed, count = 0, 1
    best: Trial | None = None
    while best is None and failed + 1 < len(regions):
        trial = attempt(min(count, len(regions) - 1))
        if trial.retained >= wanted:
            best = trial
        else:
            failed, count = trial.regions, trial.regions * 2
    for _ in range(REFINEMENTS if best else 0):
        assert best is not None
        if best.regions - failed <= 1:
            break
        trial = attempt((best.regions + failed) // 2)
        if trial.retained >= wanted:
            best = trial
        else:
            failed = trial.regions
    if best is None:
        best = max(
            (t for t in trials if t.retained >= enough), key=lambda t: t.retained, default=None
        )
    tried = [{"regions_in_float": t.regions, "retained": round(t.retained, 5)} for t in trials]
    if best is None:
        nothing = placement.without(placement.nodes, "the metric does not hold")
        return nothing, None, tried
    return best.placement, best.model, tried
