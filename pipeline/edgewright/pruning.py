"""prune: units leave the graph itself, until the budget holds.

Which units there are, how much each matters and which go is decided in the package `prune`; this
file is the stage: it runs the rounds, asks the metric where the recipe sets a `max_drop`, and
marks the result so that `recover` knows what went.
"""

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import onnx

from edgewright import model as graph
from edgewright.data import Feed, samples
from edgewright.errors import BadInput
from edgewright.metric import retention
from edgewright.prune.costs import Costs, Kind
from edgewright.prune.criteria import CRITERIA, scores
from edgewright.prune.cut import cut
from edgewright.prune.labels import Analysis, analyse
from edgewright.prune.marks import mark
from edgewright.prune.select import Selection, for_latency, select
from edgewright.prune.unstructured import sparse
from edgewright.prune.untie import untie
from edgewright.recipe import PruneSettings
from edgewright.recover.compensate import compensate
from edgewright.runtime.timing import cpu_ratio
from edgewright.stage import Job, Report

COSTS: dict[str, Kind] = {"macs": "macs", "params": "params", "size": "size_bytes"}
TRIES = 4  # of the bisection for a budget that the metric allows
CLOSE = 0.02  # shares of the budget that near are not told apart
TIMED = 4  # samples to time a latency budget on


@dataclass(frozen=True)
class Pruned:
    """A cut model: what is left of the budget's cost, and the rows of each round's groups."""

    model: onnx.ModelProto
    removed: frozenset[int]
    share: float
    groups: list[dict[str, Any]]


def run(job: Job) -> Report:
    """The stage: the model without the units that matter least."""
    settings = job.recipe.prune
    if settings is None:
        raise BadInput("the recipe has no [prune]", hint="add [prune] with budget = { macs = 0.7 }")
    if settings.zero:
        return zeroed(job, settings)
    model = untie(graph.load(job.input_model()))
    graph.name_nodes(model)
    analysis = without_excluded(analyse(model), settings)
    name, share = settings.budget.named()
    report: dict[str, Any] = {
        "notes": [],
        "criterion": settings.criterion,
        "needs": CRITERIA[settings.criterion],
        "allocation": settings.allocation,
        "multiple": settings.multiple or job.target.prune.multiple,
        "budget": {"of": name, "asked": share},
        "frozen": list(analysis.frozen),
        "tries": [],
    }
    found = within_drop(job, settings, model, analysis, report)
    if found is None:
        graph.save(model, job.output_model())
        report["budget"]["left"] = 1.0
    else:
        report["budget"]["left"] = round(found.share, 5)
        report["groups"] = found.groups
        graph.save(mark(found.model, analysis, found.removed), job.output_model())
    return {**report, "model": graph.summary(job.output_model())}


def zeroed(job: Job, settings: PruneSettings) -> Report:
    """The model with zeros among its weights, as many as the budget asks for or N:M gives."""
    name, share = settings.budget.named()
    model, found = sparse(graph.load(job.input_model()), settings.zero, 1 - share)
    graph.save(model, job.output_model())
    left = round(1 - found["zeros"] / found["weights"], 5)
    notes = [{"level": "info", "text": text} for text in found["notes"]]
    told = f"single weights became zero: {name} and latency stay, {left:.0%} of weights are left"
    notes.append({"level": "info", "text": told})
    if settings.max_drop is not None:
        text = "max_drop holds for whole units only; what zeros cost is the gate's to judge"
        notes.append({"level": "warning", "text": text})
    return {
        "notes": notes,
        "criterion": f"zeros: {settings.zero}",
        "needs": "data-free",
        "allocation": "global" if settings.zero == "magnitude" else "uniform",
        "multiple": 1,
        "budget": {"of": "weights", "asked": share, "left": left},
        "tensors": found["tensors"],
        "bytes": found["bytes"],
        "compressed_bytes": found["compressed_bytes"],
        "model": graph.summary(job.output_model()),
    }


def without_excluded(analysis: Analysis, settings: PruneSettings) -> Analysis:
    """The analysis without the groups that the recipe leaves whole."""

    def excluded(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.exclude)

    kept = tuple(group for group in analysis.groups if not excluded(group.name))
    return replace(analysis, groups=kept)


def within_drop(
    job: Job, settings: PruneSettings, model: onnx.ModelProto, analysis: Analysis, report: Report
) -> Pruned | None:
    """The model at the budget, or the smallest one that keeps `max_drop`; None where none does.

    Every try is judged as `recover` will leave it: with compensation, if the recipe has it.
    """
    name, asked = settings.budget.named()
    retained = retention(job.recipe, job.models.get("export", job.input_model()), job.tell)
    found = at_budget(job, settings, model, analysis, asked)
    most = settings.max_drop
    if most is None:
        return found
    if retained is None:
        note(report, "warning", "max_drop is not checked: the recipe names no metric")
        return found
    before = retained(model)

    def drop(one: Pruned) -> float:
        lost = before - retained(judged(job, model, analysis, one))
        row = {"budget": round(one.share, 4), "drop": round(lost, 5)}
        report["tries"].append(row | {"kept": lost <= most})
        return lost

    if drop(found) <= most:
        return found
    best: Pruned | None = None
    too_small, whole = found.share, 1.0
    for _ in range(TRIES):
        if whole - too_small < CLOSE:
            break
        middle = (too_small + whole) / 2
        one = at_budget(job, settings, model, analysis, middle)
        if drop(one) <= most:
            best, whole = one, middle
        else:
            too_small = middle
    text = f"a budget of {asked:g} {name} costs more than {most:.2%} of the metric"
    left = f"{best.share:.3f} of the {name} is left instead" if best else "nothing is pruned"
    note(report, "warning", f"{text}: {left}")
    return best


def judged(job: Job, model: onnx.ModelProto, analysis: Analysis, found: Pruned) -> onnx.ModelProto:
    """What the metric is asked about: the cut model, compensated if the recipe has [recover]."""
    if job.recipe.recover is None:
        return found.model
    repaired, kept = cut(model, analysis, found.removed)
    compensate(
        model,
        repaired,
        kept,
        feeds_of(job, model, job.recipe.recover.samples),
        job.tell,
        job.folder,
    )
    return repaired


def note(report: Report, level: str, text: str) -> None:
    report["notes"].append({"level": level, "text": text})


def feeds_of(job: Job, model: onnx.ModelProto, limit: int) -> Callable[[], Iterable[Feed]]:
    specs = graph.input_specs(model)
    return lambda: samples(job.recipe, specs, limit)


def sizes_of(job: Job) -> dict[str, tuple[int, ...]]:
    """The typical sizes of the inputs that have free dimensions."""
    return {name: one.typical for name, one in job.recipe.model.inputs.items() if one.typical}


def at_budget(
    job: Job, settings: PruneSettings, model: onnx.ModelProto, analysis: Analysis, share: float
) -> Pruned:
    """The model cut to a share of the budget's cost, in `steps` rounds of equal factors."""
    name, _ = settings.budget.named()
    if name == "latency":
        return at_latency(job, settings, model, analysis, share)
    sizes = sizes_of(job)
    whole = Costs(model, analysis, COSTS[name], sizes).total
    removed: frozenset[int] = frozenset()
    rows: list[dict[str, Any]] = []
    current = model
    for step in range(settings.steps):
        goal = share ** ((step + 1) / settings.steps)
        now = analysis if step == 0 else without_excluded(analyse(current), settings)
        costs = Costs(current, now, COSTS[name], sizes)
        chosen = choose(job, settings, current, now, costs, goal * whole / costs.total)
        removed |= translated(now, chosen.remove, analysis, removed)
        rows = list(chosen.rows) if step == 0 else joined(rows, list(chosen.rows))
        current, _ = cut(model, analysis, removed)
        if step + 1 < settings.steps:  # scores of a model that is only cut would say little
            current = judged(job, model, analysis, Pruned(current, removed, 1.0, rows))
    return Pruned(current, removed, chosen.share * costs.total / whole, rows)


def choose(
    job: Job,
    settings: PruneSettings,
    model: onnx.ModelProto,
    analysis: Analysis,
    costs: Costs,
    share: float,
) -> Selection:
    """One round: score the units, select."""
    job.tell(f"scoring by {settings.criterion}")
    return select(
        analysis,
        score(job, settings, model, analysis),
        costs,
        share,
        settings.multiple or job.target.prune.multiple,
        settings.allocation,
    )


def score(
    job: Job, settings: PruneSettings, model: onnx.ModelProto, analysis: Analysis
) -> dict[int, float]:
    """How much every unit matters, by the recipe's criterion."""
    feeds = feeds_of(job, model, settings.samples)
    if settings.criterion in ("taylor", "fisher"):
        from edgewright.recover import gradients  # brings torch

        kind = settings.criterion
        return gradients.scores(model, analysis, kind, feeds, job.tell, seed=settings.seed)
    return scores(model, analysis, settings.criterion, feeds, job.tell, settings.seed)


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


def at_latency(
    job: Job, settings: PruneSettings, model: onnx.ModelProto, analysis: Analysis, share: float
) -> Pruned:
    """The model whose CPU time on this machine is the share of the original's.

    Raises BadInput for targets that are not this machine.
    """
    if job.target.run.how != "local":
        raise BadInput(
            "prune.budget.latency",
            expected="a target that is this machine: emulated time is not latency",
            found=job.target.name,
            hint="give a budget of macs",
        )
    if settings.steps > 1:
        raise BadInput("prune.steps with a latency budget", expected="1", found=str(settings.steps))
    known = score(job, settings, model, analysis)
    multiple = settings.multiple or job.target.prune.multiple
    feeds = list(samples(job.recipe, graph.input_specs(model), TIMED))

    def chosen(work: float) -> Selection:
        costs = Costs(model, analysis, "macs", sizes_of(job))
        return select(analysis, known, costs, work, multiple, settings.allocation)

    def measure(selection: Selection) -> float:
        job.tell(f"timing the model at {selection.share:.0%} of the work")
        return cpu_ratio(cut(model, analysis, selection.remove)[0], job.input_model(), feeds)

    found = for_latency(chosen, measure, share)
    small, _ = cut(model, analysis, found.remove)
    return Pruned(small, found.remove, measure(found), list(found.rows))
