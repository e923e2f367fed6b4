"""What int8 gains on this machine, measured region by region, and which regions do not pay.

The float and the int8 model are profiled by the runtime itself, and the times of their nodes
are brought back to units (`units.py`). A unit costs its nodes; two neighbours of which one is
int8 cost a border. The cheapest choice is a minimum cut. Of that, only what wins clearly, in
each of two sessions, goes back to float, and only if the whole model is faster then.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from edgewright.data import Feed
from edgewright.model import save
from edgewright.quantize import build
from edgewright.quantize.build import Ingredients, Tell
from edgewright.quantize.cut import cheapest
from edgewright.quantize.placement import Placement
from edgewright.quantize.profile import profile
from edgewright.quantize.units import Timed, Units, assign, crossings, units_of
from edgewright.runtime.timing import cpu_ratio
from edgewright.target import Target

SESSIONS = 2
MARGIN = 1.15  # a region goes where int8 takes more than this times what float and borders take
LEAST_SHARE = 0.01  # and where that is more than this share of the int8 model's time
LEAST_US = 5.0  # nor less than this: the profiler counts whole microseconds
FASTER = 0.985  # the whole without these regions must take less than this of the time with them
BORDERS = ("QuantizeLinear", "DequantizeLinear")
LAYOUT = ("Transpose", "ReorderInput", "ReorderOutput")
BORDER_US = 0.00015  # of a tensor's element, where the profile shows no border to learn it from
GAIN_STEP = 0.01  # gains are rounded to this share of all gain: noise must not order regions

FIELDS = ("float_us", "int8_us", "border_us")
Crossing = Mapping[tuple[int, int], int]
Group = tuple[int, ...]


@dataclass(frozen=True)
class Session:
    """Microseconds of a run: each unit in float and in int8, a border per element."""

    floats: list[float]
    int8s: list[float]
    rate: float


@dataclass(frozen=True)
class Price:
    """Microseconds of a region's run in float, in int8, and of the borders that float adds."""

    float_us: float
    int8_us: float
    border_us: float

    def lost_us(self) -> float:
        """What int8 costs here; negative where it pays."""
        return self.int8_us - self.float_us - self.border_us


def totals(timed: Sequence[Timed], owners: Sequence[int], count: int) -> list[float]:
    """Microseconds of each of `count` units."""
    sums = [0.0] * count
    for node, unit in zip(timed, owners, strict=True):
        sums[unit] += node.us
    return sums


def border_rate(profiles: Iterable[Sequence[Timed]]) -> float:
    """Microseconds per element of one border: a conversion and a change of layout."""
    every = [n for p in profiles for n in p]
    rate = 0.0
    for ops, default in ((BORDERS, BORDER_US), (LAYOUT, 0.0)):
        nodes = [n for n in every if n.op in ops and n.elements]
        size = sum(n.elements for n in nodes)
        rate += sum(n.us for n in nodes) / size if size else default
    return rate


def losers(session: Session, crossing: Crossing) -> set[int]:
    """The units of the cheapest choice that run in float; unit 0 is float, and no choice."""
    borders: dict[tuple[int, int], float] = {}
    for (a, b), size in crossing.items():
        for pair in ((a, b), (b, a)):
            borders[pair] = borders.get(pair, 0.0) + size * session.rate
    return cheapest(session.floats, session.int8s, borders) - {0}


def neighbourhoods(units: Iterable[int], crossing: Crossing) -> list[tuple[int, ...]]:
    """Units that int8 tensors connect, together; in order."""
    left, found = set(units), []
    while left:
        group: set[int] = set()
        fresh = {min(left)}
        while fresh:
            group |= fresh
            near = {b for pair in crossing for a, b in (pair, pair[::-1]) if a in fresh}
            fresh = near & left - group
        left -= group
        found.append(tuple(sorted(group)))
    return found


def price(group: Sequence[int], session: Session, crossing: Crossing) -> Price:
    """The price of a region: its units in float, all others int8."""
    inside = set(group)
    crossed = sum(n for (a, b), n in crossing.items() if (a in inside) != (b in inside))
    return Price(
        sum(session.floats[u] for u in group),
        sum(session.int8s[u] for u in group),
        crossed * session.rate,
    )


def clearly(priced: Price, total_us: float) -> bool:
    """Whether a region loses by so much that another measurement would find the same."""
    in_float = priced.float_us + priced.border_us
    least = max(LEAST_SHARE * total_us, LEAST_US)
    return priced.int8_us > MARGIN * in_float and priced.lost_us() > least


def clear_losers(
    prices: Mapping[Group, Sequence[Price]], sessions: Sequence[Session]
) -> tuple[list[Group], list[Group]]:
    """The regions that clearly lose in each session, the worst first; and the small ones.

    Small ones lose by the same factor and too little each, but clearly all together: the layers
    of squeeze-and-excite, say.
    """
    totals_us = [sum(s.int8s) for s in sessions]

    def clear(of: Sequence[Price]) -> bool:
        return all(clearly(p, us) for p, us in zip(of, totals_us, strict=True))

    large = [g for g in prices if clear(prices[g])]
    large.sort(key=lambda g: -sum(p.lost_us() for p in prices[g]))
    small = [
        g
        for g in prices
        if g not in large
        if all(p.int8_us > MARGIN * (p.float_us + p.border_us) for p in prices[g])
    ]
    sums = [
        Price(*(sum(getattr(prices[g][k], f) for g in small) for f in FIELDS))
        for k in range(len(sessions))
    ]
    return large, small if small and clear(sums) else []


def gains(sessions: Sequence[Session], units: Units) -> dict[str, float]:
    """Share of the time that int8 saves, for each int8 layer, rounded to GAIN_STEP."""
    saved = {
        core: sum(max(0.0, s.floats[k] - s.int8s[k]) for s in sessions)
        for k, core in enumerate(units.cores)
        if k
    }
    total = sum(saved.values()) or 1.0
    return {core: round(us / total / GAIN_STEP) * GAIN_STEP for core, us in saved.items()}


def drop_losers(
    ingredients: Ingredients, plan: Placement, target: Target, feeds: list[Feed], tell: Tell
) -> tuple[Placement, Ingredients, dict[str, Any]]:
    """The placement without the regions that clearly do not pay on this machine.

    Returns it, the ingredients with measured gains, and what the report says: the margins,
    `regions` with a line each, `cpu_ratio` of the model without what was dropped against the
    model with it. An empty placement: nothing pays.
    """
    model = ingredients.model
    units = units_of(model, plan)
    sizes = {name: int(s.size) for name, s in ingredients.statistics.items()}
    crossing = crossings(model, plan, units, sizes)
    with tempfile.TemporaryDirectory(prefix="edgewright-prices-") as place:
        folder = Path(place)
        float_file, int8_file = folder / "float.onnx", folder / "int8.onnx"
        save(model, float_file)
        save(build.write(ingredients, plan), int8_file)
        sessions = []
        for k in range(SESSIONS):
            tell("measuring float and int8 kernels", k, SESSIONS)
            sessions.append(measure(model, units, (float_file, int8_file), target, folder, feeds))
        regions = neighbourhoods(
            set.intersection(*(losers(s, crossing) for s in sessions)), crossing
        )
        prices = {g: [price(g, s, crossing) for s in sessions] for g in regions}
        large, small = clear_losers(prices, sessions)
        dropped, ratio, changed = settle(
            ingredients, plan, units, large, small, prices, int8_file, feeds, tell
        )
    clear = [*large, *small]
    rest = [(u,) for u in range(1, len(units.cores)) if not any(u in g for g in regions)]
    lines: list[dict[str, Any]] = []
    for g in sorted([*regions, *rest]):
        found = prices.get(g) or [price(g, s, crossing) for s in sessions]
        nodes = nodes_in(g, plan, units)
        lines.append(line(len(lines) + 1, nodes, found, g in dropped, g in clear))
    facts = {
        "clock": True,
        "reason": "",
        "sessions": SESSIONS,
        "margin": MARGIN,
        "least_share": LEAST_SHARE,
        "cpu_ratio": ratio,
        "regions": lines,
    }
    return changed, replace(ingredients, gains=gains(sessions, units)), facts


def measure(
    model: onnx.ModelProto,
    units: Units,
    files: tuple[Path, Path],
    target: Target,
    folder: Path,
    feeds: list[Feed],
) -> Session:
    """One session: profiles of the float and of the int8 file, in processes of their own."""
    both = [profile(file, target, folder, feeds) for file in files]
    count = len(units.cores)
    floats, int8s = (totals(p, assign(p, model, units), count) for p in both)
    return Session(floats, int8s, border_rate(both))


def settle(
    ingredients: Ingredients,
    plan: Placement,
    units: Units,
    large: list[Group],
    small: list[Group],
    prices: Mapping[Group, list[Price]],
    int8_file: Path,
    feeds: list[Feed],
    tell: Tell,
) -> tuple[list[Group], float | None, Placement]:
    """Drop all that clearly loses, else less of it, if the whole gains.

    Less: without the small ones, the worse half of the large ones, the worst.

    Returns the regions dropped, the CPU time left, and the placement.
    """
    ratio: float | None = None
    shorter = [large[:n] for n in (len(large), -(-len(large) // 2), 1)]
    candidates: list[list[Group]] = []
    for tried in ([*large, *small], *shorter):
        if tried and tried not in candidates:
            candidates.append(tried)
    for tried in candidates:
        changed = plan
        for g in tried:
            us = [(p.float_us + p.border_us, p.int8_us) for p in prices[g]]
            in_float, in_int8 = (sum(column) / len(us) for column in zip(*us, strict=True))
            reason = f"measured: {in_float:.0f} us a run in float, {in_int8:.0f} us in int8"
            changed = changed.without(nodes_in(g, plan, units), reason)
        changed = changed.tidied(ingredients.model)
        if not changed.nodes:
            return tried, None, changed
        written = build.write(ingredients, changed)
        tell("measuring the whole model", 0, 0)
        ratio = max(cpu_ratio(written, int8_file, feeds) for _ in range(SESSIONS))
        if ratio < FASTER:
            return tried, round(ratio, 3), changed
    return [], round(ratio, 3) if ratio else None, plan


def nodes_in(group: Sequence[int], plan: Placement, units: Units) -> tuple[str, ...]:
    """The int8 nodes of a region."""
    return tuple(n for n in plan.nodes if units.of[n] in group)


def line(
    number: int, nodes: Sequence[str], prices: Sequence[Price], dropped: bool, clear: bool
) -> dict[str, Any]:
    """A line of the report: a region, its means over the sessions, the decision."""
    means = {k: round(sum(getattr(p, k) for p in prices) / len(prices), 1) for k in FIELDS}
    lost = sum(p.lost_us() for p in prices)
    if dropped:
        decision = "float: int8 clearly loses"
    elif clear:
        decision = "int8: it loses here, but the whole was not faster without"
    else:
        decision = "int8: it does not clearly lose" if lost > 0 else "int8: it pays"
    return {"region": number, "nodes": list(nodes), **means, "decision": decision}
