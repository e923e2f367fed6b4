"""Which units go: a budget, shared out over the groups, rounded to what the kernels like.

`uniform` keeps the same share of every group. `global` takes, step by step, the block of units
that loses least per cost saved (the greedy solution of the knapsack), where a step removes from one
group as many units as the rounding asks for, and costs are those of the graph as it then is.
"""

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

from edgewright.errors import BadInput
from edgewright.prune.costs import Costs
from edgewright.prune.groups import Group
from edgewright.prune.labels import Analysis

Allocation = Literal["global", "uniform"]
STEPS = 12  # of a bisection
TOLERANCE = 0.01  # of the measured latency share


@dataclass(frozen=True)
class Selection:
    """remove: the units. share: of the cost that remains. rows: per group name, kind, units,
    kept and, where it was left whole, the reason."""

    remove: frozenset[int]
    share: float
    rows: tuple[dict[str, Any], ...]


@dataclass
class Plan:
    """One group on its way: its units, the least important first, and how many may remain."""

    group: Group
    order: list[int]
    widths: list[int]  # that may remain, falling; the first is all units
    reason: str = ""
    at: int = 0  # the width chosen
    fixed: bool = False  # the width is the recipe's, not the budget's

    def block(self, steps: int = 1) -> list[int]:
        """The units of the next steps; none where it ends before."""
        if self.at + steps >= len(self.widths):
            return []
        gone = [len(self.order) - self.widths[at] for at in (self.at, self.at + steps)]
        return self.order[gone[0] : gone[1]]

    def removed(self) -> list[int]:
        return self.order[: len(self.order) - self.widths[self.at]]


def check_share(share: float) -> None:
    """Refuse budgets that remove nothing or everything."""
    if not (math.isfinite(share) and 0 < share < 1):
        raise BadInput(
            "the pruning budget",
            expected="a share that may remain, above 0 and below 1 (0.65 keeps 65 %)",
            found=repr(share),
        )


def plans_for(analysis: Analysis, scores: Mapping[int, float], multiple: int) -> list[Plan]:
    """The groups in graph order, with the widths that rounding allows."""
    if multiple < 1:
        raise BadInput("the multiple that widths are rounded to", expected="1 or more",
                       found=str(multiple))  # fmt: skip
    plans = []
    for group in analysis.groups:
        step = 1 if group.kind == "heads" else multiple
        units = list(group.units)
        known = all(math.isfinite(scores.get(u, math.nan)) for u in units)
        widths = [w for w in range(len(units) - 1, 0, -1) if w % step == 0]
        reason = ""
        if not known:
            reason = "the criterion says nothing about it"
        elif not widths:
            reason = f"{len(units)} units: none can go when multiples of {step} remain"
        order = units if reason else sorted(units, key=lambda u: (scores[u], u))
        plans.append(Plan(group, order, [len(units), *([] if reason else widths)], reason))
    if all(plan.reason for plan in plans):
        raise nothing_to_prune(analysis, {p.reason for p in plans})
    return plans


def nothing_to_prune(analysis: Analysis, reasons: Set[str] = frozenset()) -> BadInput:
    """The refusal of a model without a unit that can go, with the reasons."""
    reasons = reasons | {f["reason"] for f in analysis.frozen}
    return BadInput(
        "nothing in this model can be pruned",
        found="; ".join(sorted(reasons)[:5]) or "no prunable units",
        hint="leave [prune] out of the recipe, or see the report of `inspect`",
    )


def select(
    analysis: Analysis,
    scores: Mapping[int, float],
    costs: Costs,
    share: float,
    multiple: int = 1,
    allocation: Allocation = "global",
    widths: Mapping[str, float] = {},
) -> Selection:
    """The units to remove so that at most `share` of the cost remains, missed by one step at most.

    costs: fresh, of the whole model; used up. multiple: of what remains in each group (heads are
    counted as heads); groups that cannot shrink to a multiple stay whole, with a reason. widths:
    by the name of a group, how many of its units remain, rounded to the nearest width it can
    have; the other groups meet the share, which may be 1 where there are any. Raises BadInput for
    a share outside (0, 1), where nothing is prunable, and for a budget below what is left when
    every group is at its least.
    """
    if not (widths and share == 1):
        check_share(share)
    every = plans_for(analysis, scores, multiple)
    for plan in every:
        if plan.group.name in widths:
            fix(plan, widths[plan.group.name])
            costs.remove(plan.removed())
    plans = [plan for plan in every if not plan.fixed]
    goal = share * costs.total
    least = costs_without(costs, [u for p in plans for u in p.order[: len(p.order) - p.widths[-1]]])
    if least > goal:
        raise BadInput(
            f"a budget of {share:g} cannot be met",
            expected=f"at least {least / costs.total:.3f}, which is what cannot be pruned",
            hint="raise the budget of [prune]",
        )
    if costs.now <= goal:
        pass  # the widths alone save enough
    elif allocation == "uniform":
        evenly(plans, costs, goal)
    else:
        cheapest_first(plans, scores, costs, goal)
    remove = [u for plan in every for u in plan.removed()]
    return Selection(frozenset(remove), costs.now / costs.total, tuple(row(p) for p in every))


def fix(plan: Plan, width: float) -> None:
    """Move a plan to the width nearest to the one asked for, the larger of two; it stays there."""
    plan.fixed = True
    plan.at = min(range(len(plan.widths)), key=lambda i: (abs(plan.widths[i] - width), i))
    if plan.at == 0 and not plan.reason:
        plan.reason = f"the ratio of the recipe rounds to all of its {len(plan.order)} units"


def costs_without(costs: Costs, units: list[int]) -> float:
    return costs.now - costs.saving(units)


def evenly(plans: list[Plan], costs: Costs, goal: float) -> None:
    """Move all groups to the largest common share of units that meets the goal."""

    def at(keep: float) -> list[int]:
        """Of each plan, the first width that is at most the share (the last one otherwise)."""
        places = []
        for plan in plans:
            fitting = (i for i, w in enumerate(plan.widths) if w <= keep * len(plan.order) + 1e-9)
            places.append(next(fitting, len(plan.widths) - 1))
        return places

    def removed(places: list[int]) -> list[int]:
        return [u for p, i in zip(plans, places, strict=True)
                for u in p.order[: len(p.order) - p.widths[i]]]  # fmt: skip

    shares = sorted({w / len(p.order) for p in plans for w in p.widths})
    low, high = 0, len(shares) - 1  # the cost rises with the share: shares[low] meets the goal
    while high - low > 1:
        middle = (low + high) // 2
        if costs_without(costs, removed(at(shares[middle]))) <= goal:
            low = middle
        else:
            high = middle
    for plan, place in zip(plans, at(shares[low]), strict=True):
        plan.at = place
    costs.remove([u for p in plans for u in p.removed()])


def cheapest_first(
    plans: list[Plan], scores: Mapping[int, float], costs: Costs, goal: float
) -> None:
    """Remove block after block, each time the one with the least loss per cost saved.

    Where the next step alone saves nothing, because the first unit to go has a price of its own
    (`outputs.opened`), several steps at once are a block, if that is not more than is asked for.
    """
    neighbours = [costs.touched(p.order) for p in plans]
    offers: dict[int, tuple[float, int]] = {}  # of each plan: loss per cost saved, steps

    def offer(k: int) -> tuple[float, int]:
        found, steps = (math.inf, 1), 1
        while block := plans[k].block(steps):
            saving = costs.saving(block)
            if saving > 0 and (steps == 1 or saving <= costs.now - goal):
                found = min(found, (sum(scores[u] for u in block) / saving, steps))
            if steps == 1 and saving > 0:
                break
            steps *= 2
        return found

    for k in range(len(plans)):
        offers[k] = offer(k)
    while costs.now > goal:
        best = min(offers, key=lambda k: (offers[k], k))
        loss, steps = offers[best]
        if loss == math.inf:
            return  # what is left saves nothing of this cost
        costs.remove(plans[best].block(steps))
        plans[best].at += steps
        for k in range(len(plans)):
            several = offers[k][1] > 1 or offers[k][0] == math.inf
            if k == best or several or neighbours[k] & neighbours[best]:
                offers[k] = offer(k)


def row(plan: Plan) -> dict[str, Any]:
    """A group's line in the report."""
    return {
        "group": plan.group.name,
        "kind": plan.group.kind,
        "units": len(plan.order),
        "kept": plan.widths[plan.at],
        "reason": plan.reason,
    }


def for_latency(
    choose: Callable[[float], Selection], measure: Callable[[Selection], float], share: float
) -> Selection:
    """The selection whose measured latency is at most `share` of the original's.

    choose: a selection for a share of multiply-accumulates. measure: cuts the model and measures
    its latency on the target, as a share. Bisects the first until the second holds. Raises
    BadInput where even the smallest model is slower than asked.
    """
    check_share(share)
    low, high = 0.0, 1.0  # shares of work: fast enough or impossible, too slow
    best: Selection | None = None
    work = share
    for _ in range(STEPS):
        found = chosen(choose, work)
        latency = measure(found) if found else 0.0
        if found and latency <= share:
            best = found
        if latency <= share:
            low = work
        else:
            high = work
        if high - low < TOLERANCE or (best and share - TOLERANCE < latency <= share):
            break
        work = (low + high) / 2
    if best is None:
        raise BadInput(
            f"a latency of {share:g} of the original's cannot be reached by pruning",
            hint="raise the budget of [prune]",
        )
    return best


def chosen(choose: Callable[[float], Selection], work: float) -> Selection | None:
    """The selection for a share of work, None where so little cannot remain."""
    try:
        return choose(work)
    except BadInput:
        return None
