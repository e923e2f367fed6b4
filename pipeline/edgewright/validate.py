"""validate: how much of the user's metric is left after each stage, and how alike the outputs are.

The original and the models in between run on this machine; the model that ships runs through the
target's own runtime. Differences are taken per sample, between the same samples.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgewright import model as graph
from edgewright.data import samples
from edgewright.errors import BadInput
from edgewright.files import sha256_of
from edgewright.metric import Metric, Run, has_metric, paired_difference
from edgewright.runtime.ahead import Feeds, Recorder, fingerprint, running_ahead
from edgewright.runtime.launch import open_on_target
from edgewright.runtime.local import open_local
from edgewright.runtime.providers import CPU
from edgewright.runtime.session import Session
from edgewright.runtime.timing import cpu_ratio
from edgewright.stage import Job, Report, Tell

BETWEEN = (
    "simplify",
    "prune",
    "recover",
    "share",
    "quantize",
)  # stages that may change the model, in order
AGREEMENT_SAMPLES = 64
TIMED_SAMPLES = 4
EMULATED_SAMPLES = 8
REMEMBERED_BYTES = 256 << 20  # of outputs, per model
TELL_S = 0.2
EQUAL_DB = 200.0

Notes = list[dict[str, str]]
Outputs = list[np.ndarray]


def run(job: Job) -> Report:
    """The stage: metric and agreement of the shipped model against the original."""
    notes: Notes = []
    metric = None
    if has_metric(job.recipe):
        metric = evaluate(job, notes)
    else:
        notes.append(note("info", "the recipe names no metric: only outputs are compared"))
    return {
        "metric": metric,
        "agreement": agreement(job, job.input_model(), notes, on_target=True),
        "steps": steps(job, metric),
        "notes": notes,
    }


def note(level: str, text: str) -> dict[str, str]:
    return {"level": level, "text": text}


def evaluate(job: Job, notes: Notes) -> Report:
    """The metric of the original, of what ships, and after each stage that changed the model."""
    metric, rises = Metric(job.recipe), job.recipe.data.higher_is_better
    original, shipped = job.models["export"], job.input_model()
    total = 0  # runs of one evaluation, known after the first
    asked: list[Feeds] = []  # by the metric, of the original; kept for an emulated target only
    foresee = job.target.run.how == "emulate"

    def scored(path: Path, where: str, on_target: bool = False) -> tuple[float, np.ndarray | None]:
        nonlocal total, asked
        with opened(job, path, on_target, asked) as plain:
            recorder = Recorder(plain) if not asked and foresee else None
            counted = Counted(recorder or plain, job.tell, f"evaluating {where}", total)
            remembered = remembering(counted)
            values = metric.score(remembered), metric.per_sample(remembered)
        total, asked = counted.runs, recorder.feeds if recorder else asked
        return values

    score, samples_before = scored(original, "the original")
    if score == 0:
        notes.append(note("warning", "the original scores 0: a share of it says nothing"))
    seen = {sha256_of(original): score}
    changed = {}
    for stage in BETWEEN:
        if stage in job.models and (key := sha256_of(job.models[stage])) not in seen:
            changed[stage] = key
            seen[key] = float("nan")
    ships = sha256_of(shipped)
    for stage, key in changed.items():
        if key != ships:
            seen[key] = scored(job.models[stage], f"after {stage}")[0]
    where = f"on {job.target.name}"
    if job.target.emulated:
        where += " (emulated)"
    final, samples_after = scored(shipped, f"the shipped model {where}", on_target=True)
    seen[ships] = final
    report: Report = {
        "name": job.recipe.data.metric,
        "higher_is_better": rises,
        "original": {"score": score},
        "shipped": {"score": final, "retained": metric.retained(final, score), "where": where},
        "stages": {
            stage: {"score": seen[key], "retained": metric.retained(seen[key], score)}
            for stage, key in changed.items()
        },
        "paired": None,
        "runs": total,
    }
    if samples_before is not None and samples_after is not None:
        if len(samples_before) != len(samples_after):
            raise BadInput(
                f"per-sample metric {job.recipe.data.per_sample}",
                expected=f"{len(samples_before)} values, as for the original",
                found=str(len(samples_after)),
                hint="return one value per sample of the evaluation set, whatever the model says",
            )
        report["paired"] = paired_difference(samples_before, samples_after, rises)
        report["raw"] = {"original": samples_before.tolist(), "shipped": samples_after.tolist()}
    return report


@contextmanager
def opened(job: Job, path: Path, on_target: bool, expected: Sequence[Feeds] = ()) -> Iterator[Run]:
    """A way to run the model: through the target's runtime, or on this machine.

    expected: inputs that will probably be asked for; an emulated target then uses all cores.
    """
    if not on_target:
        yield open_local(path).run
    elif expected:
        with running_ahead(lambda: open_shipped(job, path), expected) as ahead:
            yield ahead
    else:
        with open_shipped(job, path) as session:
            yield session.run


def open_shipped(job: Job, path: Path) -> Session:
    return open_on_target(path, job.target, name="the shipped model")


class Counted:
    """Runs a model and tells how many runs are done."""

    def __init__(self, plain: Run, tell: Tell, text: str, total: int) -> None:
        self.plain, self.tell, self.text, self.total = plain, tell, text, total
        self.runs = 0
        self.told = 0.0
        tell(text, 0, total)

    def __call__(self, feeds: dict[str, Any]) -> Outputs:
        values = self.plain(feeds)
        self.runs += 1
        if time.monotonic() - self.told > TELL_S:
            self.tell(self.text, self.runs, max(self.total, self.runs) if self.total else 0)
            self.told = time.monotonic()
        return values


def remembering(plain: Run) -> Run:
    """The same, but inputs seen before are answered from memory while there is room.

    Score and per-sample values are two passes over one set. What is kept and what is handed out
    are copies: the user's code may write into either.
    """
    kept: dict[bytes, Outputs] = {}
    room = REMEMBERED_BYTES

    def run_once(feeds: dict[str, Any]) -> Outputs:
        nonlocal room
        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        key = fingerprint(arrays)
        if key in kept:
            return [value.copy() for value in kept[key]]
        values = plain(arrays)
        size = sum(value.nbytes for value in values)
        if size <= room:
            kept[key] = [value.copy() for value in values]
            room -= size
        return values

    return run_once


def steps(job: Job, metric: Report | None) -> list[Report]:
    """One row per stage that changed the model, each against the original.

    bytes, parameters, macs: of the stage's model; macs None where sizes are not known.
    original_macs: of the original, beside them.
    sqnr_db, top1: see `agreement`. cpu_ratio: CPU time on this machine, one thread, quick (see
    `timing`); None for targets that are not this machine's CPU provider.
    """
    before, original = sha256_of(job.models["export"]), job.models["export"]
    specs = graph.input_specs(graph.load(original))
    feeds = list(samples(job.recipe, specs, TIMED_SAMPLES))
    original_macs = total_macs(graph.load(original))
    rows = []
    for stage in BETWEEN:
        path = job.models.get(stage)
        if path is None or (digest := sha256_of(path)) == before:
            continue
        before = digest
        model = graph.load(path)
        alike = agreement(job, path, [], on_target=False)
        local = job.target.run.how == "local" and job.target.runtime.provider == CPU
        if local:
            job.tell(f"timing the model after {stage}")
        scored = (metric or {}).get("stages", {}).get(stage, {})
        rows.append(
            {
                "stage": stage,
                "bytes": path.stat().st_size,
                "parameters": graph.parameter_count(model),
                "macs": total_macs(model),
                "original_macs": original_macs,
                "sqnr_db": min(alike["sqnr_db"].values(), default=None),
                "top1": alike["top1"],
                "cpu_ratio": round(cpu_ratio(path, original, feeds), 3) if local else None,
                "score": scored.get("score"),
                "retained": scored.get("retained"),
            }
        )
    return rows


def total_macs(model: onnx.ModelProto) -> int | None:
    """Multiply-accumulates of one run, None where sizes are not known."""
    from edgewright.work import work  # brings sympy, which a comparison of releases needs not

    macs, unknown = work(model)
    return None if unknown else sum(macs.values())


def agreement(job: Job, shipped: Path, notes: Notes, *, on_target: bool) -> Report:
    """How alike the outputs of the original and of a model are on calibration inputs.

    sqnr_db: 10 log10(sum of squares / sum of squared differences) per float output, 200 where
    equal. equal: share of equal values per other output. top1: share of rows of the first
    output of scores (float, two axes) whose largest entry is at the same place.
    """
    original = job.models["export"]
    emulated = on_target and job.target.emulated
    limit = EMULATED_SAMPLES if emulated else AGREEMENT_SAMPLES
    reference = open_local(original)
    names = reference.outputs
    power = {name: [0.0, 0.0] for name in names}  # of the signal, of the difference
    same = {name: [0, 0] for name in names}  # equal values, values; for float outputs: rows
    floats: set[str] = set()
    broken: set[str] = set()
    count = 0
    specs = graph.input_specs(graph.load(original))
    with opened(job, shipped, on_target) as candidate:
        for feed in samples(job.recipe, specs, limit):
            if count % 8 == 0 or emulated:
                job.tell("comparing outputs", count, limit)
            count += 1
            for name, a, b in zip(names, reference.run(feed), candidate(feed), strict=True):
                if a.shape != b.shape:
                    raise BadInput(
                        f"output '{name}' of the shipped model on calibration sample {count - 1}",
                        expected=f"shape {list(a.shape)}, as in the original",
                        found=f"shape {list(b.shape)}",
                        hint="switch off [quantize] to see which stage changes it",
                    )
                if a.dtype.kind != "f":
                    add(same[name], int((a == b).sum()), a.size)
                    continue
                floats.add(name)
                if np.isfinite(a).all() and not np.isfinite(b).all():
                    broken.add(name)
                add(power[name], *powers(a, b))
                if a.ndim == 2 and a.shape[1] > 1:
                    add(same[name], int((a.argmax(1) == b.argmax(1)).sum()), len(a))
    for name in sorted(broken):
        notes.append(note("warning", f"output '{name}' has NaN or Inf where the original has none"))
    scores = next((n for n in names if n in floats and same[n][1]), None)
    return {
        "sqnr_db": {name: sqnr_db(*power[name]) for name in names if name in floats},
        "equal": {n: same[n][0] / same[n][1] for n in names if n not in floats and same[n][1]},
        "samples": count,
        "top1": same[scores][0] / same[scores][1] if scores else None,
        "top1_output": scores,
    }


def add(total: list[Any], *values: float) -> None:
    """Add to running sums, in place."""
    for k, value in enumerate(values):
        total[k] += value


def powers(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Sums of squares of `a` and of `a - b`; equal values that are not finite count for nothing.

    A value that is finite in one and not in the other makes the difference infinite.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.where(equal, 0.0, a - b)
        signal = float(np.square(np.where(np.isfinite(a), a, 0.0)).sum())
        noise = float(np.square(np.nan_to_num(gap, nan=np.inf)).sum())
    return signal, noise


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to noise ratio in dB, held to -200..200; 200 where nothing differs."""
    if noise == 0:
        return EQUAL_DB
    if signal == 0 or not np.isfinite(noise):
        return -EQUAL_DB
    return float(np.clip(10 * np.log10(signal / noise), -EQUAL_DB, EQUAL_DB))
