"""recover: what is left after the cut learns to do what the whole did, without labels.

Compensation by least squares (`recover.compensate`), then, where the recipe asks for it,
distillation from the original (`recover.distill`, needs torch). This file is the stage.
"""

from typing import Any

import onnx

from edgewright import model as graph
from edgewright.data import samples
from edgewright.errors import BadInput
from edgewright.prune.cut import cut
from edgewright.prune.labels import analyse
from edgewright.prune.marks import removed_units, unmarked
from edgewright.recipe import RecoverSettings
from edgewright.recover.compensate import compensate
from edgewright.stage import Job, Report


def run(job: Job) -> Report:
    """The stage: the cut model with repaired weights, file layout and names unchanged."""
    settings = job.recipe.recover or RecoverSettings()
    pruned = graph.load(job.input_model())
    original = graph.load(job.models.get("simplify", job.models["export"]))
    graph.name_nodes(original)
    report: dict[str, Any] = {"notes": [], "method": settings.method, "layers": []}
    model = repaired(job, settings, original, pruned, report)
    graph.save(model, job.output_model())
    return {**report, "model": graph.summary(job.output_model())}


def repaired(
    job: Job,
    settings: RecoverSettings,
    original: onnx.ModelProto,
    pruned: onnx.ModelProto,
    report: Report,
) -> onnx.ModelProto:
    """The pruned model, compensated; as it is where nothing was cut."""
    analysis = analyse(original)
    removed = removed_units(pruned, analysis)
    if not removed:
        text = "no unit was cut from this model: there is nothing to compensate"
        report["notes"].append({"level": "info", "text": text})
        return unmarked(pruned)
    model, kept = cut(original, analysis, removed)
    if {t.name: list(t.dims) for t in model.graph.initializer} != {
        t.name: list(t.dims) for t in pruned.graph.initializer
    }:
        raise BadInput(
            "the pruned model was not cut from this original",
            expected="tensors of the same names and shapes",
            hint="name the model that `prune` was given with --original",
        )
    specs = graph.input_specs(original)
    report["layers"] = compensate(
        original, model, kept, lambda: samples(job.recipe, specs, settings.samples), job.tell
    )
    return model
