"""The way of a model: the stage list, the run folder, the cache between them.

`build` takes one recipe for one target through all stages and returns the build report. Each
stage runs in a child process in a scratch folder; its files are then kept in the cache and
placed in the run folder, every file as a whole:

    OUT/TARGET/model.onnx, report.json, report.html, NAME-VERSION-TARGET.bundle.tar
    OUT/TARGET/stages/01-export/..., 02-simplify/..., ...

The run folder only ever holds the stages of one build: the first stage whose files change takes
the later stages and the results away with it. `report.json` is written last.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from edgewright import __version__, keys
from edgewright.baseline import Baseline, merged, nothing_to_compare, open_baseline
from edgewright.cache import Cache
from edgewright.decision import settle
from edgewright.errors import BadInput, EnvironmentMissing
from edgewright.files import (
    copy_atomic,
    copy_folder,
    digests_in,
    flush,
    flush_files,
    locked,
    same_bytes,
    sha256_of,
    write_atomic,
)
from edgewright.gate.release import decide_release
from edgewright.recipe import Recipe, digest, parse_recipe
from edgewright.runtime.doctor import host
from edgewright.runtime.launch import launch_for
from edgewright.runtime.providers import need_provider
from edgewright.runtime.ssh.link import held
from edgewright.signatures import Signed, farewell, is_still, signed_in
from edgewright.stage import Job, Report, run_in_child
from edgewright.target import Target

SCHEMA = "edgewright-report/1"
MODEL, REPORT, PAGE, BUNDLES = "model.onnx", "report.json", "report.html", "*.bundle.tar*"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a stage depends on. All of it is in the stage's key; nothing else is handed to it.

    settings: names of `keys.FACTS`. models: models of finished stages, or from outside, by the
    name the stage knows them by; "newest" is the last one made. reports: of finished stages.
    module: what runs, if that has not the stage's own name. Where a model that `optional` names
    is not there, or the recipe has no `table` of that name, the stage is left out.
    """

    settings: tuple[str, ...]
    models: dict[str, str] = field(default_factory=dict)
    reports: tuple[str, ...] = ()
    module: str = ""
    optional: str = ""
    table: str = ""


STAGES = {
    "export": Needs(settings=("source", "inputs", "calibration")),
    "simplify": Needs(settings=("inputs", "calibration"), models={"previous": "newest"}),
    "prune": Needs(
        module="pruning",
        table="prune",
        settings=("prune", "recover", "calibration", "evaluation", "device", "host"),
        models={"export": "export", "previous": "newest"},
    ),
    "recover": Needs(
        module="recovery",
        table="recover",
        settings=("recover", "calibration"),
        models={"export": "export", "simplify": "simplify", "previous": "newest"},
    ),
    "share": Needs(
        table="share",
        settings=("share", "quantize", "calibration", "evaluation", "device", "host"),
        models={"export": "export", "previous": "newest"},
    ),
    "quantize": Needs(
        settings=(
            "quantize",
            "share",
            "min_retained",
            "calibration",
            "evaluation",
            "device",
            "host",
        ),
        models={"export": "export", "previous": "newest"},
    ),
    "validate": Needs(
        settings=("calibration", "evaluation", "device", "host"),
        models={
            "export": "export",
            "simplify": "simplify",
            "prune": "prune",
            "recover": "recover",
            "share": "share",
            "quantize": "quantize",
            "previous": "newest",
        },
    ),
    "measure": Needs(
        settings=("inputs", "calibration", "device", "host", "max_latency_ratio"),
        models={"export": "export", "previous": "newest"},
    ),
    "baseline-validate": Needs(
        module="validate",
        optional="baseline",
        settings=("calibration", "evaluation", "device", "host"),
        models={"export": "baseline", "previous": "newest"},
    ),
    "baseline-measure": Needs(
        module="measure.release",
        optional="baseline",
        settings=("inputs", "calibration", "device", "host", "tolerance"),
        models={"export": "baseline", "previous": "newest"},
    ),
    "gate": Needs(
        settings=("gate", "budget", "tolerance"),
        reports=("quantize", "validate", "measure", "baseline-validate", "baseline-measure"),
    ),
    "bundle": Needs(
        settings=("recipe", "release", "source", "calibration", "evaluation")
        + ("profile", "host", "runner", "epoch"),
        models={"previous": "newest"},
        reports=("export", "simplify", "prune", "recover", "share", "quantize", "validate", "gate"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something a person who waits wants to see. `done` and `seconds` belong to their kinds."""

    kind: Literal["start", "step", "end", "note"]
    stage: str
    text: str = ""
    done: int = 0
    total: int = 0
    cached: bool = False
    seconds: float = 0.0


Watch = Callable[[Event], None]


@dataclass(frozen=True)
class Finished:
    """A stage that is done: its files with their SHA-256, and whether the cache had them."""

    folder: Path
    digests: dict[str, str]
    cached: bool

    @property
    def model(self) -> Path | None:
        """The model this stage made, None if it makes none."""
        return self.folder / MODEL if MODEL in self.digests else None

    @cached_property
    def report(self) -> Report:
        report: Report = json.loads((self.folder / REPORT).read_bytes())
        return report

    def content(self) -> str:
        """Digest of what the report says; how long the work took is no part of it."""
        return digest({k: v for k, v in self.report.items() if k not in keys.VOLATILE})


def build(
    recipe: Recipe,
    target: Target,
    out: Path,
    *,
    cache: Cache | None,
    baseline: Path | None = None,
    watch: Watch = lambda event: None,
) -> Report:
    """Build one target into `out/TARGET`; the build report. `cache` None: nothing is kept.

    Raises what a stage raised; the stages before it then stay in the run folder.
    """
    launch_for(target)  # say now what this machine lacks, not after minutes of work
    need_provider(target)
    keys.runner_tools(recipe, target)
    folder = out.absolute() / target.name

    def busy(owner: str) -> None:
        raise EnvironmentMissing(
            f"another build is at work in {folder}",
            found=f"process {owner}",
            hint="wait for it, or name another folder with --out",
        )

    folder.mkdir(parents=True, exist_ok=True)
    with held(target), locked(folder / ".lock", busy), scratch(folder) as work:
        line = Line(recipe, target, folder, work, cache, watch)
        if baseline is not None:
            line = replace(line, baseline=open_baseline(baseline, recipe, target, work / "old"))
        signed = signed_in(sorted(folder.glob(BUNDLES)))
        for stage in line.stages():
            line.advance(stage)
        return line.results(signed)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder below `.work`, gone afterwards; what a killed build left goes first."""
    parent = folder / ".work"
    shutil.rmtree(parent, ignore_errors=True)
    parent.mkdir(exist_ok=True)
    try:
        yield Path(tempfile.mkdtemp(dir=parent))
    finally:
        shutil.rmtree(parent, ignore_errors=True)


@dataclass(frozen=True)
class Line:
    """A build on its way through the stages; `done` grows by one at a time.

    folder: the run folder. work: scratch inside it. given, told: models and reports from
    outside, by the names that STAGES has for them.
    """

    recipe: Recipe
    target: Target
    folder: Path
    work: Path
    cache: Cache | None
    watch: Watch
    baseline: Baseline | None = None
    given: dict[str, Path] = field(default_factory=dict)
    told: dict[str, Report] = field(default_factory=dict)
    done: dict[str, Finished] = field(default_factory=dict)

    def stages(self) -> list[str]:
        """The stages of this build, in order."""
        outside = {"baseline"} if self.baseline and self.baseline.model else set()
        return [
            name
            for name, needs in STAGES.items()
            if {needs.optional} <= {"", *outside}
            and (not needs.table or getattr(self.recipe, needs.table) is not None)
        ]

    def advance(self, stage: str) -> None:
        """Bring the next stage's files to the run folder, from the cache or by doing the work."""
        begin = time.monotonic()
        self.watch(Event(kind="start", stage=stage))
        if self.cache is None:
            made = self.make(stage)
            self.done[stage] = self.settle(stage, made, digests_in(made), cached=False)
        else:
            self.done[stage] = self.take_or_make(stage, self.cache)
        seconds, cached = time.monotonic() - begin, self.done[stage].cached
        self.watch(Event(kind="end", stage=stage, cached=cached, seconds=seconds))

    def take_or_make(self, stage: str, cache: Cache) -> Finished:
        """The stage from the cache, or made and kept there."""

        def busy(owner: str) -> None:
            self.note(stage, f"waiting for process {owner}, which is building the same")

        key = self.key(stage)
        with cache.locked(key, busy):
            kept = cache.lookup(key, lambda text: self.note(stage, text))
            if kept is not None:
                return self.settle(stage, kept.folder, kept.digests, cached=True)
            unfinished = cache.unfinished(key)
            made = self.make(stage, unfinished)
            shutil.rmtree(unfinished, ignore_errors=True)
            if self.key(stage) != key:
                raise BadInput(
                    f"a file that the recipe names changed while stage {stage} was at work",
                    hint="leave these files alone during a build, and build again",
                )
            return self.settle(stage, made, cache.store(key, stage, made).digests, cached=False)

    def key(self, stage: str) -> str:
        """The digest of everything that can change what the stage makes."""
        needs = STAGES[stage]
        return digest(
            {
                "stage": stage,
                "code": keys.code_digest(),
                "versions": keys.versions(self.recipe),
                "settings": {n: keys.FACTS[n](self.recipe, self.target) for n in needs.settings},
                "models": {n: self.model_digest(path) for n, path in self.models(stage).items()},
                "reports": {n: self.done[n].content() for n in needs.reports if n in self.done},
                "fault": self.baseline.fault if self.baseline and stage == "gate" else "",
            }
        )

    def models(self, stage: str) -> dict[str, Path]:
        """The models the stage may look at, by the name it knows them by."""
        known = {name: one.model for name, one in self.done.items() if one.model is not None}
        if known:
            known["newest"] = list(known.values())[-1]
        if self.baseline and self.baseline.model:
            known["baseline"] = self.baseline.model
        known |= self.given
        return {name: known[n] for name, n in STAGES[stage].models.items() if n in known}

    def model_digest(self, path: Path) -> str:
        """SHA-256 of a model; that of a stage's own model is known already."""
        made = {one.model: one.digests[MODEL] for one in self.done.values() if one.model}
        return made.get(path) or sha256_of(path)

    def make(self, stage: str, unfinished: Path | None = None) -> Path:
        """Do the stage's work; the scratch folder that holds its files and report."""
        folder = self.work / stage
        folder.mkdir()
        needed = STAGES[stage].reports
        reports = {**self.told, **{n: self.done[n].report for n in needed if n in self.done}}
        report = self.child(stage, self.recipe, reports, unfinished)
        if stage == "gate" and self.baseline is not None:
            report = merged(report, self.against_baseline())
        (folder / REPORT).write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", "utf-8")
        return folder

    def child(
        self,
        stage: str,
        recipe: Recipe,
        reports: dict[str, Report],
        unfinished: Path | None = None,
    ) -> Report:
        """Run the stage's module in a child; its report."""
        models = self.models(stage)
        job = Job(
            recipe=recipe,
            target=self.target,
            folder=self.work / stage,
            model=models.pop("previous", None),
            models=models,
            reports=reports,
            unfinished=unfinished,
        )

        def tell(text: str, done: int, total: int) -> None:
            self.watch(Event(kind="step", stage=stage, text=text, done=done, total=total))

        return run_in_child(STAGES[stage].module or stage, job, tell)

    def against_baseline(self) -> Report:
        """The gate's report on the new model beside the baseline."""
        assert self.baseline is not None
        if self.baseline.fault:
            return nothing_to_compare(self.baseline.fault)
        assert self.baseline.model is not None
        return decide_release(
            settle(self.recipe.gate.tolerance, self.target.tolerance),
            self.done["baseline-validate"].report,
            self.done["baseline-measure"].report,
            same_file=self.model_digest(self.baseline.model)
            == self.model_digest(self.models("baseline-measure")["previous"]),
        )

    def settle(
        self, stage: str, source: Path, digests: dict[str, str], *, cached: bool
    ) -> Finished:
        """Make the stage's folder in the run folder hold the files of `source`.

        Where it does already nothing is touched. Else everything that followed from the old
        files goes first, and the folder is exchanged as a whole.
        """
        place = self.folder / "stages" / f"{self.stages().index(stage) + 1:02}-{stage}"
        if not place.is_dir() or digests_in(place) != digests:
            self.forget(stage)
            if cached:
                fresh = self.work / stage
                copy_folder(source, fresh)
            else:
                fresh = source
            flush_files(fresh)
            place.parent.mkdir(exist_ok=True)
            fresh.rename(place)
            flush(place.parent)
        return Finished(place, digests, cached)

    def forget(self, stage: str) -> None:
        """Remove the results, and the files of this stage and of all that follow or are unknown."""
        for path in [self.folder / REPORT, *results_in(self.folder)]:
            path.unlink(missing_ok=True)
        kept = {one.folder for one in self.done.values()}
        stages = self.folder / "stages"
        for number, old in enumerate(sorted(stages.iterdir() if stages.is_dir() else [])):
            if old not in kept:
                old.rename(self.work / f"{stage}-old-{number}")

    def note(self, stage: str, text: str) -> None:
        self.watch(Event(kind="note", stage=stage, text=text))

    def results(self, signed: dict[str, Signed]) -> Report:
        """Place what ships and the report of the whole build beside the stages; the report.

        signed: the bundles that lay there before. What is built again as it was stays as it is,
        signatures and all; where it is another, the loss is told.
        """
        report = self.build_report()
        shipped = self.models("bundle")["previous"]
        wanted = {MODEL: shipped, **{p.name: p for p in self.done["bundle"].folder.glob(BUNDLES)}}
        for stale in results_in(self.folder):
            if stale.name not in wanted and stale.name != PAGE:
                stale.unlink()
        for name, source in wanted.items():
            if same_bytes(source, place := self.folder / name):
                continue
            if is_still(place, signed.get(name), source):
                self.note("bundle", f"{name} is as it was: it keeps its signatures")
                continue
            if name in signed:
                self.note("bundle", farewell(name, signed[name]))
            copy_atomic(source, place)
        if not (self.folder / PAGE).exists() or told(self.folder / REPORT) != essence(report):
            write_report(self.folder, report)
        return report

    def build_report(self) -> Report:
        """The report of the whole build."""
        return {
            "schema": SCHEMA,
            "name": self.recipe.model.name,
            "version": self.recipe.model.version,
            "target": self.target.name,
            "verdict": self.done["gate"].report["verdict"],
            "stages": [
                {"stage": name, "cached": one.cached, "report": one.report}
                for name, one in self.done.items()
            ],
            "baseline": self.baseline.facts if self.baseline else None,
            "environment": {
                "host": host(),
                "versions": keys.versions(self.recipe),
                "edgewright": __version__,
                "code": keys.code_digest(),
            },
        }


def write_report(folder: Path, report: Report, past: Report = {}) -> None:
    """Write the page and the report of a run folder, the report last: it ends a build.

    past: what the page shows of the verdicts before, as `report.trend` makes it.
    """
    from edgewright.report import html  # brings the plotting library: seconds

    text = json.dumps(report, indent=1, sort_keys=True) + "\n"
    page = html.render(json.loads(text), past)  # as `report` will read it
    write_atomic(folder / PAGE, page.encode())
    write_atomic(folder / REPORT, text.encode())


def results_in(folder: Path) -> list[Path]:
    """The results in a run folder, its report aside."""
    return [p for p in [folder / MODEL, folder / PAGE, *folder.glob(BUNDLES)] if p.exists()]


def told(path: Path) -> str:
    """`essence` of the report in a file, empty where there is none that can be read."""
    try:
        return essence(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def essence(report: Report) -> str:
    """Digest of a build report without what a repeated build may say differently."""
    stages = [[part["stage"], part["report"]] for part in report["stages"]]
    code = report["environment"]["code"]
    return digest([report[k] for k in ("schema", "name", "version", "target")] + [stages, code])


def run_stages(
    stages: Sequence[str],
    recipe: Recipe,
    target: Target,
    *,
    models: dict[str, Path],
    reports: dict[str, Report] = {},
    watch: Watch = lambda event: None,
    keep: Callable[[Path], None] = lambda folder: None,
    unfinished: Path | None = None,
) -> dict[str, Report]:
    """Run stages on files, outside any run folder and cache; their reports by name.

    models: untrusted files by the names that STAGES has for them; "newest" is worked on.
    keep: called with the last stage's folder before it goes away. unfinished: where training
    leaves its checkpoint, for the same command to go on from when this one was killed.
    """
    with tempfile.TemporaryDirectory(prefix="edgewright-") as name:
        folder = Path(name)
        line = Line(recipe, target, folder, folder, None, watch, told=reports)
        line.given.update(admitted(models, line))
        for stage in stages:
            begin = time.monotonic()
            watch(Event(kind="start", stage=stage))
            made = line.make(stage, unfinished)
            line.done[stage] = Finished(made, digests_in(made), cached=False)
            watch(Event(kind="end", stage=stage, seconds=time.monotonic() - begin))
        keep(made)
        return {stage: one.report for stage, one in line.done.items()}


def admitted(models: dict[str, Path], line: Line) -> dict[str, Path]:
    """Checked, self-contained copies of the models, made in limited children."""
    copies: dict[Path, Path] = {}
    for path in models.values():
        if path not in copies:
            folder = line.work / f"admitted-{len(copies)}"
            folder.mkdir()
            job = Job(recipe=line.recipe, target=line.target, folder=folder, model=path)
            run_in_child("admit", job, lambda text, done, total: None)
            copies[path] = job.output_model()
    return {name: copies[path] for name, path in models.items()}


def no_recipe(source: str) -> Recipe:
    """What stages that look at files only get in place of a recipe."""
    raw = {
        "model": {"name": "inspected", "version": "0", "source": source},
        "data": {"calibration": ""},
    }
    return parse_recipe(raw, Path.cwd())


def pool(models: dict[str, Path], target: Target, out: Path, watch: Watch) -> Report:
    """Store the equal tensors of untrusted models once, in the new folder `out`; the report."""
    with tempfile.TemporaryDirectory(prefix="edgewright-", dir=out.absolute().parent) as name:
        work = Path(name)
        line = Line(no_recipe(""), target, work, work, None, watch)
        copies = admitted(models, line)
        made = work / "pool"
        made.mkdir(mode=0o755)
        job = Job(recipe=line.recipe, target=target, folder=made, models=copies)

        def tell(text: str, done: int, total: int) -> None:
            watch(Event(kind="step", stage="pool", text=text, done=done, total=total))

        report = run_in_child("pool", job, tell)
        flush_files(made)
        made.rename(out)
        return report


def inspect(model: Path, target: Target) -> Report:
    """What `inspection` says of an untrusted model file."""
    with tempfile.TemporaryDirectory(prefix="edgewright-") as name:
        job = Job(
            recipe=no_recipe(str(model)),
            target=target,
            folder=Path(name),
            model=model.absolute(),
        )
        return run_in_child("inspection", job, lambda text, done, total: None)
