"""recover: what is left after the cut learns to do what the whole did, without labels.

Compensation by least squares (`recover.compensate`), then, where the recipe asks for it,
distillation from the original (`recover.distill`, needs torch). This file is the stage.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from edgewright import model as graph
from edgewright.data import Feed, samples
from edgewright.errors import BadInput
from edgewright.model import array
from edgewright.prune.criteria import GRADIENT
from edgewright.prune.cut import Kept, cut
from edgewright.prune.labels import analyse
from edgewright.prune.marks import removed_units, unmarked
from edgewright.prune.prepare import prepared
from edgewright.recipe import Recipe, RecoverSettings
from edgewright.recover import fitting, needs_torch
from edgewright.recover.compensate import compensate
from edgewright.recover.truth import truth_of
from edgewright.stage import Job, Report

Start = Callable[[bool], onnx.ModelProto] | None


def run(job: Job) -> Report:
    """The stage: the cut model with repaired weights, file layout and names unchanged."""
    settings = job.recipe.recover or RecoverSettings()
    pruned = graph.load(job.input_model())
    original = prepared(graph.load(job.models.get("simplify", job.models["export"])))
    report: dict[str, Any] = {"notes": [], "method": settings.method, "layers": []}
    if settings.labels and not labels_read(job.recipe, settings):
        text = "recover.labels are not read: neither recover.distill.hard nor a criterion uses them"
        report["notes"].append({"level": "warning", "text": text})
    model, kept, start = cut_again(job, settings, original, pruned, report)
    if settings.method == "distill":
        report["distillation"] = distilled(job, settings, original, model, kept, start)
    elif start is not None:
        model = start(True)
    graph.save(model, job.output_model())
    return {**report, "model": graph.summary(job.output_model())}


def labels_read(recipe: Recipe, settings: RecoverSettings) -> bool:
    """Whether training or the criterion of [prune] uses true labels."""
    hard = settings.method == "distill" and settings.distill.hard > 0
    return hard or (recipe.prune is not None and recipe.prune.criterion in GRADIENT)


def cut_again(
    job: Job,
    settings: RecoverSettings,
    original: onnx.ModelProto,
    pruned: onnx.ModelProto,
    report: Report,
) -> tuple[onnx.ModelProto, Kept, Start]:
    """The pruned model and what was kept. Last, what compensates it, on all samples or on those
    that training is not judged by; None where there is nothing to compensate.
    """
    check_same_ends(original, pruned)
    analysis = analyse(original)
    removed = removed_units(pruned, analysis)
    if not removed:
        text = "no unit was cut from this model: there is nothing to compensate"
        report["notes"].append({"level": "info", "text": text})
        return unmarked(pruned), {}, None
    model, kept = cut(original, analysis, removed)
    if {t.name: list(t.dims) for t in model.graph.initializer} != {
        t.name: list(t.dims) for t in pruned.graph.initializer
    }:
        raise BadInput(
            "the pruned model was not cut from this original",
            expected="tensors of the same names and shapes",
            hint="name the model that `prune` was given with --original",
        )
    if trained(model, pruned):
        text = "the weights were trained before the cut: least squares would undo that"
        report["notes"].append({"level": "info", "text": text})
        return unmarked(pruned), kept, None
    specs = graph.input_specs(original)

    def start(every: bool) -> onnx.ModelProto:
        student, _ = cut(original, analysis, removed)
        some = replace(settings, method="compensate") if every else settings
        counts: Counter[str] = Counter()

        def feeds() -> Iterator[Feed]:
            given = counted(samples(job.recipe, specs, settings.samples), counts, "read")
            return counted(fitting(some, given), counts, "fitted")

        report["layers"] = compensate(original, student, kept, feeds, job.tell, job.folder)
        text = f"compensated on {counts['fitted']} samples, made of {counts['read']} given ones"
        report["notes"].append({"level": "info", "text": text})
        if report["layers"] and all(row["reason"] for row in report["layers"]):
            text = f"no layer was repaired: {report['layers'][0]['reason']}"
            report["notes"].append({"level": "warning", "text": text})
        return student

    return model, kept, start


def counted(feeds: Iterable[Feed], counts: Counter[str], key: str) -> Iterator[Feed]:
    for feed in feeds:
        counts[key] += 1
        yield feed


def trained(sliced: onnx.ModelProto, pruned: onnx.ModelProto) -> bool:
    """Whether the pruned model holds other values than slices of the original."""
    mine = {t.name: array(t) for t in pruned.graph.initializer}
    return any(
        not np.array_equal(array(t), mine[t.name], equal_nan=t.data_type == t.FLOAT)
        for t in sliced.graph.initializer
    )


def check_same_ends(original: onnx.ModelProto, pruned: onnx.ModelProto) -> None:
    """BadInput where the two differ in the name, type or shape of an input or output."""

    def told(values: Iterable[onnx.ValueInfoProto]) -> str:
        return ", ".join(onnx.helper.printable_value_info(v) for v in values)

    for kind, mine, theirs in (
        ("inputs", graph.real_inputs(pruned), graph.real_inputs(original)),
        ("outputs", pruned.graph.output, original.graph.output),
    ):
        if told(mine) != told(theirs):
            raise BadInput(
                f"the pruned model was not cut from this original: their {kind} differ",
                expected=f"{told(mine)}, as in the pruned model",
                found=told(theirs),
                hint="name the model that `prune` was given with --original",
            )


def distilled(
    job: Job,
    settings: RecoverSettings,
    original: onnx.ModelProto,
    model: onnx.ModelProto,
    kept: Kept,
    start: Start,
) -> Report:
    """Train the model in place by the original's answers; how that went.

    start: gives the compensated model that training begins at; see `recover.distill`.

    Raises EnvironmentMissing where torch is not installed.
    """
    with needs_torch("distillation", 'recover.method to "compensate"'):
        from edgewright.recover.distill import distill
    specs = graph.input_specs(original)
    if job.unfinished is not None:
        job.unfinished.mkdir(mode=0o700, parents=True, exist_ok=True)
    return distill(
        original,
        model,
        lambda: samples(job.recipe, specs, settings.distill.samples),
        settings.distill,
        kept=kept,
        start=start,
        labels=truth_of(job.recipe, original),
        folder=job.unfinished,
        tell=job.tell,
    )
