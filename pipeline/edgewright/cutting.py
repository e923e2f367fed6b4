"""One cut of a model: its units are scored, chosen for the budget and taken out.

What the stage `prune` tries again with weaker demands where the metric asks for it.
"""

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from edgewright import model as graph
from edgewright.cuts import PruneSettings
from edgewright.data import Feed, samples
from edgewright.errors import BadInput
from edgewright.prune.costs import Costs, Kind
from edgewright.prune.criteria import CRITERIA, GRADIENT, Needs, scores
from edgewright.prune.cut import cut
from edgewright.prune.labels import Analysis, analyse
from edgewright.prune.outputs import opened
from edgewright.prune.select import Selection, for_latency, select
from edgewright.recover import fitting, needs_torch
from edgewright.recover.compensate import compensate
from edgewright.recover.truth import truth_of
from edgewright.runtime.timing import cpu_ratio
from edgewright.settings import suggestion
from edgewright.softening import grown, regrown, thinned
from edgewright.stage import Job

COSTS: dict[str, Kind] = {"macs": "macs", "params": "params", "size": "size_bytes"}
TIMED = 4  # samples to time a latency budget on


@dataclass
class Work:
    """What is cut, and what all tries share.

    model: the original, its analysis without the groups that the recipe leaves whole. known:
    scores of its units, once they have been computed. thin: what soft = "lasso" has made of it,
    and how that went.
    """

    job: Job
    settings: PruneSettings
    model: onnx.ModelProto
    analysis: Analysis
    known: dict[int, float] | None = None
    thin: tuple[onnx.ModelProto, dict[str, Any]] | None = None

    @property
    def multiple(self) -> int:
        return self.settings.multiple or self.job.target.prune.multiple

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The typical sizes of the inputs that have free dimensions."""
        inputs = self.job.recipe.model.inputs
        return {name: one.typical for name, one in inputs.items() if one.typical}

    def feeds(self, limit: int) -> Callable[[], Iterable[Feed]]:
        specs = graph.input_specs(self.model)
        return lambda: samples(self.job.recipe, specs, limit)

    def unfinished(self) -> Path | None:
        """Where a training leaves its checkpoint."""
        if self.job.unfinished is not None:
            self.job.unfinished.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self.job.unfinished


@dataclass(frozen=True)
class Pruned:
    """A cut model: what is left of the budget's cost, and the rows of its groups."""

    model: onnx.ModelProto
    removed: frozenset[int]
    share: float
    groups: list[dict[str, Any]]
    training: dict[str, Any] | None = None  # how the soft pruning before the cut went


def check_excluded(analysis: Analysis, settings: PruneSettings) -> None:
    """BadInput for a pattern of exclude that no group fits: what it names would not stay whole."""
    names = [group.name for group in analysis.groups]
    for pattern in settings.exclude:
        if names and not fnmatch.filter(names, pattern):
            raise BadInput(
                f"prune.exclude: no group is called '{pattern}'", hint=suggestion(pattern, names)
            )


def without_excluded(analysis: Analysis, settings: PruneSettings) -> Analysis:
    """The analysis without the groups that the recipe leaves whole."""

    def excluded(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.exclude)

    kept = tuple(group for group in analysis.groups if not excluded(group.name))
    return replace(analysis, groups=kept)


def widths_of(work: Work, weakness: float, power: float = 1.0) -> dict[str, float]:
    """Units that remain of the groups that [prune.ratios] names.

    weakness: 0 as asked, towards 1 everything; power: of the ratio, for a round of several.
    Raises BadInput for a pattern that no group fits.
    """
    ratios = work.settings.ratios
    found, used = {}, set()
    for group in work.analysis.groups:
        fitting = [p for p in ratios if fnmatch.fnmatchcase(group.name, p)]
        used.update(fitting)
        if fitting:
            asked = ratios[max(fitting, key=lambda p: (p == group.name, len(p), p))]
            ratio = asked + (1 - asked) * weakness
            found[group.name] = len(group.units) * ratio**power
    for pattern in ratios:
        if pattern not in used:
            names = [group.name for group in work.analysis.groups]
            raise BadInput(
                f"prune.ratios: no group is called '{pattern}'", hint=suggestion(pattern, names)
            )
    return found


def judged(work: Work, found: Pruned) -> onnx.ModelProto:
    """What the metric is asked about: the cut model, compensated if the recipe has [recover]
    and nothing was trained before the cut. Without varied samples: it is asked often."""
    settings = work.job.recipe.recover
    if settings is None or work.settings.soft:
        return found.model
    settings = replace(settings, vary=0)
    repaired, kept = cut(work.model, work.analysis, found.removed)
    compensate(
        work.model,
        repaired,
        kept,
        lambda: fitting(settings, work.feeds(settings.samples)()),
        work.job.tell,
        work.job.folder,
    )
    return repaired


def at_budget(work: Work, weakness: float = 0.0) -> Pruned:
    """The model cut to its budget and ratios, trained before if the recipe says so.

    weakness: from 0, all that is asked, towards 1, nothing.
    """
    of, asked = work.settings.budget.named()
    share = asked + (1 - asked) * weakness
    if work.settings.soft == "regrow":
        return regrowing(work, share, widths_of(work, weakness))
    if of == "latency":
        found = at_latency(work, share, widths_of(work, weakness))
    else:
        found = in_rounds(work, share, weakness)
    if work.settings.soft == "lasso":
        return replace(found, training=before(work)[1])
    return growing(work, found) if work.settings.soft == "grow" else found


def before(work: Work) -> tuple[onnx.ModelProto, dict[str, Any] | None]:
    """What units are chosen in and cut from: the original, or what lasso made of it."""
    if work.settings.soft != "lasso":
        return work.model, None
    if work.thin is None:
        train, job = work.settings.train, work.job
        feeds = work.feeds(train.samples)
        work.thin = thinned(work.model, work.analysis, feeds, train, work.unfinished(), job.tell)
    return work.thin


def growing(work: Work, found: Pruned) -> Pruned:
    """The same units cut, from a model that was trained to do without them."""
    train = work.settings.train
    model, told = grown(
        work.model,
        work.analysis,
        found.removed,
        work.feeds(train.samples),
        train,
        work.unfinished(),
        work.job.tell,
    )
    small, _ = cut(model, work.analysis, found.removed)
    return replace(found, model=small, training=told)


def regrowing(work: Work, share: float, widths: dict[str, float]) -> Pruned:
    """The model cut to a share of the budget's cost by units chosen while it is trained."""
    settings, analysis = work.settings, work.analysis
    of, _ = settings.budget.named()

    def choose(energy: dict[int, float]) -> Selection:
        costs = Costs(work.model, analysis, COSTS[of], work.sizes)
        return select(analysis, energy, costs, share, work.multiple, settings.allocation, widths)

    feeds = work.feeds(settings.train.samples)
    model, last, told = regrown(
        work.model, analysis, choose, feeds, settings.train, work.unfinished(), work.job.tell
    )
    small, _ = cut(model, analysis, last.remove)
    return Pruned(small, last.remove, last.share, list(last.rows), told)


def in_rounds(work: Work, share: float, weakness: float) -> Pruned:
    """The model cut to a share of the budget's cost, in `steps` rounds of equal factors."""
    settings = work.settings
    name, _ = settings.budget.named()
    (model, _), analysis = before(work), work.analysis
    whole = Costs(model, analysis, COSTS[name], work.sizes).total
    removed: frozenset[int] = frozenset()
    rows: list[dict[str, Any]] = []
    current, left = model, whole
    for step in range(settings.steps):
        power = (step + 1) / settings.steps
        widths = widths_of(work, weakness, power)
        now = analysis if step == 0 else without_excluded(analyse(current), settings)
        costs = Costs(current, now, COSTS[name], work.sizes)
        part = min(1.0, share**power * whole / costs.total)
        if part == 1 and not widths:
            continue  # rounding has met this round's goal in the one before
        units = scores_of(work) if step == 0 else score(work, current, now)
        chosen = select(now, units, costs, part, work.multiple, settings.allocation, widths)
        removed |= translated(now, chosen.remove, analysis, removed)
        left = chosen.share * costs.total
        rows = list(chosen.rows) if step == 0 else joined(rows, list(chosen.rows))
        if step + 1 < settings.steps:  # scores of a model that is only cut would say little
            small, _ = cut(model, analysis, removed)
            current = opened(judged(work, Pruned(small, removed, 1.0, rows)))
    small, _ = cut(model, analysis, removed)  # and what was judged is not what is handed on
    return Pruned(small, removed, left / whole, rows)


def scores_of(work: Work) -> dict[int, float]:
    """The scores of the whole model's units, computed once."""
    if work.known is None:
        work.known = score(work, before(work)[0], work.analysis)
    return work.known


def score(work: Work, model: onnx.ModelProto, analysis: Analysis) -> dict[int, float]:
    """How much every unit matters, by the recipe's criterion."""
    job, settings = work.job, work.settings
    job.tell(f"scoring by {settings.criterion}")
    feeds = work.feeds(settings.samples)
    if settings.criterion == "taylor" or settings.criterion == "fisher":
        with needs_torch(f"prune.criterion {settings.criterion}", "another prune.criterion"):
            from edgewright.recover import gradients

        truth = truth_of(job.recipe, model)
        labels = None if truth is None else truth.tolist()
        kind = settings.criterion
        return gradients.scores(model, analysis, kind, feeds, job.tell, labels, settings.seed)
    return scores(model, analysis, settings.criterion, feeds, job.tell, settings.seed)


def needs(work: Work) -> Needs:
    """What the criterion reads; labels where it can use them and the recipe has them."""
    recover, criterion = work.job.recipe.recover, work.settings.criterion
    if criterion in GRADIENT and recover is not None and recover.labels:
        return "labelled"
    return CRITERIA[criterion]


def translated(
    now: Analysis, remove: Iterable[int], first: Analysis, gone: frozenset[int]
) -> frozenset[int]:
    """Units of a model that is cut already, as units of the model it was cut from.

    Slices keep their order, so the n-th index of an axis is the n-th that has not gone.
    """
    wanted = set(remove)
    found = set()
    for group in now.groups:
        tensor, axis = group.slices[0]
        left = [unit for unit in first.labels[tensor][axis].tolist() if unit not in gone]
        for unit, old in zip(now.labels[tensor][axis].tolist(), left, strict=True):
            if unit in wanted:
                found.add(old)
    return frozenset(found)


def joined(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all rounds: units as in the first, kept as in the last."""
    last = {row["group"]: row for row in after}
    return [{**row, "kept": last.get(row["group"], row)["kept"]} for row in before]


def at_latency(work: Work, share: float, widths: dict[str, float]) -> Pruned:
    """The model whose CPU time on this machine is the share of the original's.

    Raises BadInput for targets that are not this machine.
    """
    job, settings = work.job, work.settings
    if job.target.run.how != "local":
        raise BadInput(
            "prune.budget.latency",
            expected="a target that is this machine: emulated time is not latency",
            found=job.target.name,
            hint="give a budget of macs",
        )
    if settings.steps > 1:
        raise BadInput("prune.steps with a latency budget", expected="1", found=str(settings.steps))
    known, (model, _) = scores_of(work), before(work)
    feeds = list(work.feeds(TIMED)())

    def chosen(part: float) -> Selection:
        costs = Costs(model, work.analysis, "macs", work.sizes)
        return select(work.analysis, known, costs, part, work.multiple, settings.allocation, widths)

    def measure(selection: Selection) -> float:
        job.tell(f"timing the model at {selection.share:.0%} of the work")
        small, _ = cut(model, work.analysis, selection.remove)
        return cpu_ratio(small, job.input_model(), feeds)

    found = for_latency(chosen, measure, share)
    small, _ = cut(model, work.analysis, found.remove)
    return Pruned(small, found.remove, measure(found), list(found.rows))
