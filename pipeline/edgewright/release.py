"""A release against the one before it: models or bundles, with a recipe or without.

The artefacts themselves are run beside each other, never their numbers. A baseline that is
damaged, or of another model, target or runtime, is refused: nothing passes by comparing with it.
"""

import importlib.metadata
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.baseline import merged
from edgewright.build import Event, Watch
from edgewright.bundle import golden, manifest
from edgewright.decision import Settled, settle
from edgewright.device.fit import check_runtime
from edgewright.device.verify import extract
from edgewright.errors import BadInput, EnvironmentMissing
from edgewright.files import sha256_of
from edgewright.gate.absolute import absolute_limits
from edgewright.gate.demands import target_demands
from edgewright.gate.release import decide_release
from edgewright.recipe import Recipe, parse_recipe
from edgewright.runtime.launch import launch_for
from edgewright.runtime.providers import need_provider
from edgewright.runtime.ssh import link
from edgewright.stage import Job, Report, run_in_child
from edgewright.target import Target

SAMPLES = 8  # of generated inputs
FREE = 32  # size of a free dimension of generated inputs, the first aside, which is 1
Reports = dict[str, Report]


@dataclass(frozen=True)
class Side:
    """A model to compare: its file, and its bundle's manifest and folder where it came in one."""

    model: Path
    manifest: dict[str, Any] | None = None
    folder: Path | None = None


def judge(
    candidate: Path,
    baseline: Path,
    target: Target,
    *,
    recipe: Recipe | None = None,
    pinned: Path | None = None,
    watch: Watch = lambda event: None,
) -> Reports:
    """The reports `validate`, `measure` and `gate` of the comparison, and those with `pinned`.

    A baseline model with a recipe stands for the recipe's original and is judged by its [gate];
    any other is an earlier release, see `gate.release`. pinned: a golden release beside it.
    """
    launch_for(target)
    need_provider(target)
    with link.held(target), tempfile.TemporaryDirectory(prefix="edgewright-") as name:
        work = Path(name)
        new, old = opened(candidate, work / "new"), opened(baseline, work / "old")
        gold = opened(pinned, work / "golden") if pinned else None
        for side, path in ((old, baseline), (gold, pinned)):
            if side is not None:
                refuse_strangers(side, new, path, recipe, target)
        sides = [new, old] + ([gold] if gold else [])
        copies = admitted(sides, recipe or named(""), target, work)
        stand_in, notes = (recipe, []) if recipe else without_recipe(sides, copies[0], work)
        chain = Chain(stand_in, target, copies[0], work, watch)
        if recipe is not None and old.manifest is None:
            reports = chain.run(copies[1], ("validate", "measure", "gate"))
        else:
            reports = chain.run_release(copies[1])
        if gold is not None and reports["gate"]["verdict"] != "FAIL":
            chain.recipe = relaxed(stand_in, settle(stand_in.gate.tolerance, target.tolerance))
            same = sha256_of(copies[1]) == sha256_of(copies[2])
            known = {k: v for k, v in reports.items() if k != "gate"} if same else None
            more = chain.run_release(copies[2], known)
            reports |= {f"golden-{k}": v for k, v in more.items() if k != "gate"}
            reports["gate"] = merged(reports["gate"], more["gate"], "golden_")
        reports["gate"]["notes"] = [*notes, *reports["gate"]["notes"]]
        return reports


def measured(
    candidate: Path,
    other: Path | None,
    target: Target,
    *,
    recipe: Recipe | None = None,
    watch: Watch = lambda event: None,
) -> Reports:
    """The report `measure` of `measure.bench`: candidate and `other`, or itself, side by side."""
    launch_for(target)
    need_provider(target)
    with link.held(target), tempfile.TemporaryDirectory(prefix="edgewright-") as name:
        work = Path(name)
        sides = [opened(candidate, work / "new")]
        sides += [opened(other, work / "old")] if other is not None else []
        copies = admitted(sides, recipe or named(""), target, work)
        stand_in, notes = (recipe, []) if recipe else without_recipe(sides, copies[0], work)
        chain = Chain(stand_in, target, copies[0], work, watch)
        report = chain.stage("measure", "measure.bench", copies[-1], {})
        return {"measure": {**report, "notes": [*notes, *report["notes"]]}}


def opened(path: Path, folder: Path) -> Side:
    """The model at `path`, out of its bundle where it is in one; bundles are verified."""
    if not path.exists():
        raise BadInput(f"model not found: {path}", hint="check the path")
    if path.suffix in (".onnx", ".ort"):
        return Side(path)
    facts = extract(path, folder)
    return Side(folder / facts["model"]["path"], facts, folder)


def refuse_strangers(
    old: Side, new: Side, path: Path | None, recipe: Recipe | None, target: Target
) -> None:
    """BadInput where a bundle is of another model, target or runtime than what is judged."""
    if old.manifest is None:
        return
    wanted = new.manifest["name"] if new.manifest else recipe.model.name if recipe else None
    if wanted is not None and wanted != old.manifest["name"]:
        differs(path, "a bundle of " + wanted, f"one of {old.manifest['name']}")
    if old.manifest["target"] != target.name:
        differs(path, f"a bundle for {target.name}", f"one for {old.manifest['target']}")
    runtime = old.manifest["runtime"]
    ours = target.runtime.provider, target.runtime.threads
    theirs = runtime["provider"], runtime["threads"]
    if ours != theirs:
        differs(path, *(f"{name} with {threads} threads" for name, threads in (ours, theirs)))
    try:
        check_runtime(old.manifest, runtime_version(target))
    except EnvironmentMissing as error:
        raise BadInput(f"baseline {path}: {error}") from None


def runtime_version(target: Target) -> str:
    """The version of onnxruntime that runs the target."""
    if target.run.how == "ssh":
        found = link.package(link.facts(target), "onnxruntime")
        return str(found["version"]) if found else ""
    return importlib.metadata.version("onnxruntime")


def differs(path: Path | None, expected: str, found: str) -> None:
    """The refusal of a baseline."""
    raise BadInput(
        f"baseline {path}",
        expected=expected,
        found=found,
        hint="name the bundle of an earlier release of this very model, target and runtime",
    )


def admitted(sides: list[Side], recipe: Recipe, target: Target, work: Path) -> list[Path]:
    """Checked, self-contained copies of the models, made in limited children side by side."""

    def admit(number: int) -> Path:
        folder = work / f"admitted-{number}"
        folder.mkdir()
        job = Job(recipe=recipe, target=target, folder=folder, model=sides[number].model)
        run_in_child("admit", job, lambda text, done, total: None)
        return job.output_model()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(admit, range(len(sides))))


def named(calibration: str) -> Recipe:
    """What stages get in place of a recipe; `calibration`: an absolute path."""
    raw = {
        "model": {"name": "candidate", "version": "0", "source": ""},
        "data": {"calibration": calibration},
    }
    return parse_recipe(raw, Path("/"))


def without_recipe(
    sides: list[Side], candidate: Path, work: Path
) -> tuple[Recipe, list[dict[str, str]]]:
    """A recipe with the golden inputs of a bundle, or with generated ones, and a note of it."""
    for side in sides:
        if side.folder is not None:
            inputs = side.folder / manifest.GOLDEN_INPUTS
            text = "no recipe: compared on the golden inputs of a bundle, and no metric"
            return named(str(inputs)), [{"level": "info", "text": text}]
    inputs = work / "inputs.npz"
    generate(candidate, inputs)
    text = (
        "no recipe: compared on random inputs made from the model's specs, and no metric; "
        "times may depend on real data"
    )
    return named(str(inputs)), [{"level": "warning", "text": text}]


def generate(model: Path, path: Path) -> None:
    """Write SAMPLES random inputs of the model: normal floats, 0 or 1 for all other types."""
    import numpy as np

    from edgewright.model import input_specs, load

    rng = np.random.default_rng(0)
    arrays = {}
    for spec in input_specs(load(model)):
        shape = [(1 if k == 0 else FREE) if d is None else d for k, d in enumerate(spec.shape)]
        for n in range(SAMPLES):
            floats = spec.dtype.kind == "f"
            values = rng.standard_normal(shape) if floats else rng.integers(0, 2, shape)
            arrays[f"{spec.name}__{n:03d}"] = np.asarray(values).astype(spec.dtype)
    with path.open("wb") as file:
        file.write(golden.write_npz(arrays))


def relaxed(recipe: Recipe, settled: Settled) -> Recipe:
    """The recipe for the golden release: its own tolerance, and twice that of the answers."""
    tolerance = {
        **dict.fromkeys(
            ("latency", "memory", "size", "cold_start", "instructions"), settled.golden
        ),
        "metric": min(1.0, 2 * settled.metric),
        "agreement": min(1.0, 2 * settled.agreement),
        "margin": settled.margin,
        "budget_s": settled.budget_s,
    }
    gate = {**recipe.raw.get("gate", {}), "tolerance": tolerance}
    return parse_recipe({**recipe.raw, "gate": gate}, recipe.folder)


@dataclass
class Chain:
    """Runs stages that compare the candidate with another model."""

    recipe: Recipe
    target: Target
    candidate: Path
    work: Path
    watch: Watch

    def run_release(self, other: Path, known: Reports | None = None) -> Reports:
        """Race, then compare answers unless the race has failed, then judge.

        known: the reports of a comparison with the very same file, which is not repeated.
        """
        equal = sha256_of(self.candidate) == sha256_of(other)
        reports = known or {"measure": self.stage("measure", "measure.release", other, {})}
        measure = reports["measure"]
        looks = (measure.get("decided") or {}).get("looks") or [{}]
        if equal:
            reports["validate"] = {"skipped": "the same file, byte for byte", "notes": []}
        elif "FAIL" in looks[-1].values() or measure.get("failed"):
            reports["validate"] = {"skipped": "the race had decided before", "notes": []}
        elif not (measure.get("placement") or {"ok": True})["ok"]:
            reports["validate"] = {"skipped": measure["latency_reason"], "notes": []}
        elif known is None:
            reports["validate"] = self.stage("validate", "validate", other, {})
        more = absolute_limits(self.recipe.gate, self.target.budget, measure)
        if measure.get("placement") or measure.get("failed"):
            more += target_demands(measure)
        settled = settle(self.recipe.gate.tolerance, self.target.tolerance)
        gate = decide_release(settled, reports["validate"], measure, same_file=equal, more=more)
        return {**reports, "gate": gate}

    def run(self, other: Path, stages: tuple[str, ...]) -> Reports:
        """The stages of a build of these names, `other` in place of the original."""
        reports: Reports = {}
        for stage in stages:
            reports[stage] = self.stage(stage, stage, other, dict(reports))
        return reports

    def stage(self, name: str, module: str, other: Path, reports: Reports) -> Report:
        """Run a stage's module in a child; its report."""

        def tell(text: str, done: int, total: int) -> None:
            self.watch(Event(kind="step", stage=name, text=text, done=done, total=total))

        begin = time.monotonic()
        self.watch(Event(kind="start", stage=name))
        job = Job(
            recipe=self.recipe,
            target=self.target,
            folder=Path(tempfile.mkdtemp(prefix=name, dir=self.work)),
            model=self.candidate,
            models={"export": other, "newest": self.candidate},
            reports=reports,
        )
        report = run_in_child(module, job, tell)
        self.watch(Event(kind="end", stage=name, seconds=time.monotonic() - begin))
        return report
