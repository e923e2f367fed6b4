"""prune: units leave the graph itself, until the budget holds.

Which units there are, how much each matters and which go is decided in the package `prune`; this
file is the stage: it runs the rounds, asks the metric where the recipe sets a `max_drop`, and
marks the result so that `recover` knows what went.
"""

from typing import Any

from edgewright import model as graph
from edgewright.cuts import PruneSettings
from edgewright.cutting import (
    Pruned,
    Work,
    at_budget,
    check_excluded,
    judged,
    needs,
    without_excluded,
)
from edgewright.data import samples
from edgewright.errors import BadInput
from edgewright.metric import retention
from edgewright.prune.labels import analyse
from edgewright.prune.marks import mark
from edgewright.prune.outputs import closed
from edgewright.prune.prepare import prepared
from edgewright.prune.select import nothing_to_prune
from edgewright.prune.unstructured import sparse
from edgewright.runtime.timing import cpu_ratio
from edgewright.stage import Job, Report

TRIES = 4  # of the bisection for a budget that the metric allows
TIMED = 4  # samples that zeros are timed with
CLOSE = 0.02  # shares of the budget that near are not told apart


def run(job: Job) -> Report:
    """The stage: the model without the units that matter least."""
    settings = job.recipe.prune
    if settings is None:
        raise BadInput("the recipe has no [prune]", hint="add [prune] with budget = { macs = 0.7 }")
    if settings.zero:
        return zeroed(job, settings)
    model = prepared(graph.load(job.input_model()))
    analysis = analyse(model)
    check_excluded(analysis, settings)
    analysis = without_excluded(analysis, settings)
    if not analysis.groups:
        raise nothing_to_prune(analysis)
    work = Work(job, settings, model, analysis)
    name, share = settings.budget.named()
    report: dict[str, Any] = {
        "notes": [],
        "criterion": settings.criterion,
        "needs": needs(work),
        "allocation": settings.allocation,
        "multiple": work.multiple,
        "budget": {"of": name, "asked": share if share < 1 else None},
        "ratios": settings.ratios,
        "frozen": list(analysis.frozen),
        "tries": [],
    }
    if settings.soft == "regrow":
        report |= {"criterion": "energy", "needs": "label-free"}
        note(report, "info", "regrow chooses by what units own while it trains, not by a criterion")
    found = within_drop(work, report)
    if found is None:
        graph.save(closed(model), job.output_model())
        report["budget"]["left"] = 1.0
    else:
        report["budget"]["left"] = round(found.share, 5)
        report["groups"] = found.groups
        if found.training is not None:
            report["soft"] = {"way": settings.soft, **found.training}
        graph.save(mark(found.model, analysis, found.removed), job.output_model())
    return {**report, "model": graph.summary(job.output_model())}


def zeroed(job: Job, settings: PruneSettings) -> Report:
    """The model with zeros among its weights, as many as the budget asks for or N:M gives.

    What that does for latency is measured where the target is this machine's processor.
    """
    name, share = settings.budget.named()
    model, found = sparse(graph.load(job.input_model()), settings.zero, 1 - share)
    graph.save(model, job.output_model())
    left = round(1 - found["zeros"] / found["weights"], 5)
    notes = [{"level": "info", "text": text} for text in found["notes"]]
    ratio = None
    if job.target.run.how == "local" and job.target.runtime.provider == "CPUExecutionProvider":
        job.tell("timing the model with zeros")
        feeds = list(samples(job.recipe, graph.input_specs(model), TIMED))
        ratio = round(cpu_ratio(model, job.input_model(), feeds), 3)
        text = f"measured: {ratio:.2f} of the processor time without the zeros"
        notes.append({"level": "info", "text": text})
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
        "cpu_ratio": ratio,
        "model": graph.summary(job.output_model()),
    }


def within_drop(work: Work, report: Report) -> Pruned | None:
    """The model at the budget, or the smallest one that keeps `max_drop`; None where none does.

    Every try is judged as `recover` will leave it: with compensation, if the recipe has it and
    nothing was trained. Soft pruning trains again for every try (lasso once for all).
    """
    job, settings = work.job, work.settings
    name, asked = settings.budget.named()
    retained = retention(job.recipe, job.models.get("export", job.input_model()), job.tell)
    found = at_budget(work)
    most = settings.max_drop
    if most is None:
        return found
    if retained is None:
        note(report, "warning", "max_drop is not checked: the recipe names no metric")
        return found
    before = retained(work.model)

    def drop(one: Pruned) -> float:
        lost = before - retained(judged(work, one))
        row = {"budget": round(one.share, 4), "drop": round(lost, 5)}
        report["tries"].append(row | {"kept": lost <= most})
        return lost

    if drop(found) <= most:
        return found
    best: Pruned | None = None
    too_strong, whole = 0.0, 1.0
    for _ in range(TRIES):
        if (whole - too_strong) * (1 - found.share) < CLOSE:
            break
        middle = (too_strong + whole) / 2
        one = at_budget(work, middle)
        if drop(one) <= most:
            best, whole = one, middle
        else:
            too_strong = middle
    what = f"a budget of {asked:g} {name}" if asked < 1 else "the cut by ratios"
    text = f"{what} costs more than {most:.2%} of the metric"
    left = f"{best.share:.3f} of the {name} is left instead" if best else "nothing is pruned"
    note(report, "warning", f"{text}: {left}")
    return best


def note(report: Report, level: str, text: str) -> None:
    report["notes"].append({"level": level, "text": text})
