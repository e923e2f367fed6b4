"""recover: what is left after the cut learns to do what the whole did, without labels.

Compensation by least squares (`recover.compensate`), then, where the recipe asks for it,
distillation from the original (`recover.distill`, needs torch). This file is the stage.
"""

from typing import Any

import numpy as np
import onnx

from edgewright import model as graph
from edgewright.data import samples
from edgewright.errors import BadInput, EnvironmentMissing
from edgewright.prune.cut import Kept, cut
from edgewright.prune.labels import analyse
from edgewright.prune.marks import removed_units, unmarked
from edgewright.prune.untie import untie
from edgewright.recipe import RecoverSettings
from edgewright.recover.compensate import compensate
from edgewright.stage import Job, Report


def run(job: Job) -> Report:
    """The stage: the cut model with repaired weights, file layout and names unchanged."""
    settings = job.recipe.recover or RecoverSettings()
    pruned = graph.load(job.input_model())
    original = untie(graph.load(job.models.get("simplify", job.models["export"])))
    graph.name_nodes(original)
    report: dict[str, Any] = {"notes": [], "method": settings.method, "layers": []}
    model, kept = repaired(job, settings, original, pruned, report)
    if settings.method == "distill":
        report["distillation"] = distilled(job, settings, original, model, kept)
    graph.save(model, job.output_model())
    return {**report, "model": graph.summary(job.output_model())}


def repaired(
    job: Job,
    settings: RecoverSettings,
    original: onnx.ModelProto,
    pruned: onnx.ModelProto,
    report: Report,
) -> tuple[onnx.ModelProto, Kept]:
    """The pruned model, compensated, and what was kept; as it is where nothing was cut."""
    analysis = analyse(original)
    removed = removed_units(pruned, analysis)
    if not removed:
        text = "no unit was cut from this model: there is nothing to compensate"
        report["notes"].append({"level": "info", "text": text})
        return unmarked(pruned), {}
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
        original,
        model,
        kept,
        lambda: samples(job.recipe, specs, settings.samples),
        job.tell,
        job.folder,
    )
    return model, kept


def distilled(
    job: Job,
    settings: RecoverSettings,
    original: onnx.ModelProto,
    model: onnx.ModelProto,
    kept: Kept,
) -> Report:
    """Train the model in place by the original's answers; how that went.

    Raises EnvironmentMissing where torch is not installed.
    """
    try:
        from edgewright.recover.distill import distill
    except ImportError as error:
        raise EnvironmentMissing(
            "distillation needs torch",
            found=str(error),
            hint="pip install 'edgewright[torch]', or set recover.method to \"compensate\"",
        ) from None
    specs = graph.input_specs(original)
    if job.unfinished is not None:
        job.unfinished.mkdir(mode=0o700, parents=True, exist_ok=True)
    return distill(
        original,
        model,
        lambda: samples(job.recipe, specs, settings.distill.samples),
        settings.distill,
        kept=kept,
        labels=labels_of(job, settings),
        folder=job.unfinished,
        tell=job.tell,
    )


def labels_of(job: Job, settings: RecoverSettings) -> np.ndarray | None:
    """The labels of the calibration samples, where the recipe gives them."""
    if not settings.labels:
        return None
    path = job.recipe.path(settings.labels)
    try:
        labels = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise BadInput(f"labels not found: {path}", hint="check recover.labels") from None
    except (ValueError, OSError, EOFError) as error:
        raise BadInput(f"{path} cannot be read", expected="an .npy", found=str(error)) from None
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise BadInput(
            f"labels {path}",
            expected="one whole number for each calibration sample",
            found=f"{getattr(labels, 'dtype', '?')} {list(getattr(labels, 'shape', []))}",
        )
    return labels.astype(np.int64)
