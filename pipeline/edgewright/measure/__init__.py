"""measure: latency, memory, cold start, size and placement of the shipped model on the target.

Everything is relative to the original, re-run beside the candidate; see `race`. Under emulation
there is no latency and no memory: only whether the model runs, its size, its kernels, and the
instructions it takes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from edgewright import model as graph
from edgewright.data import Feed, samples
from edgewright.errors import UsageError
from edgewright.measure import host, summary
from edgewright.measure.instructions import instructions
from edgewright.measure.placement import profile_nodes
from edgewright.measure.race import (
    CANDIDATE,
    MIN_PAIRS,
    ORIGINAL,
    CandidateFailed,
    no_arena_peak_kib,
    open_side,
    run_launch,
)
from edgewright.runtime.engines import engine_folder
from edgewright.runtime.launch import launch_for
from edgewright.runtime.providers import on_host_cpu, runtime_packages
from edgewright.runtime.session import Launch
from edgewright.runtime.ssh.link import held
from edgewright.stage import Job, Report, Tell
from edgewright.target import Target

MAX_FEEDS = 8
CONFIDENCE = 0.95
MARGIN = 0.02  # the gate's equivalence margin on the latency ratio; a test keeps them equal
EMULATED_RUNS = 2
PROFILE_RUNS = 30  # fewer where a run is slow
SEED = 0
Heat = dict[str, Any]  # what `race.run_heat` returns
EMULATED = "emulated time is not latency"
EMULATED_MEMORY = "the memory of an emulated process is mostly the emulator's"


def run(job: Job) -> Report:
    """The stage: compare the model of the stage before with the original as exported.

    A candidate that cannot be loaded or run is a finding (`failed`), not an error.
    """
    original, candidate = job.models["export"], job.input_model()
    specs = graph.input_specs(graph.load(original))
    feeds = list(samples(job.recipe, specs, MAX_FEEDS))
    limit = job.recipe.gate.max_latency_ratio
    border = limit * (1 + MARGIN) if limit is not None else None
    try:
        return compare(candidate, original, feeds, job.target, job.tell, limit=border)
    except CandidateFailed as error:
        return failed(error, candidate, original, feeds, job.target)


def failed(
    error: CandidateFailed, candidate: Path, original: Path, feeds: list[Feed], target: Target
) -> Report:
    """The report on a candidate that does not run; raises where the original does not, either."""
    emulated = target.emulated
    if emulated:  # is it the model or the emulator?
        check_runs(original, feeds, target, launch_for(target))
    reason = f"the candidate does not run: {error}"
    return {
        "notes": [summary.note("warning", reason)],
        "emulated": emulated,
        "failed": str(error),
        "latency": None,
        "latency_reason": reason,
        "memory": None,
        "memory_reason": reason,
        "countable": target.run.how == "emulate",
        "instructions": None,
        "instructions_reason": reason,
        "load": {"ok": False},
        "size": sizes(candidate, original),
        "placement": None,
        "noise": None,
        "host": host.facts(host.look(target)),
        "raw": {"pairs": []},
    }


def compare(
    candidate: Path,
    original: Path,
    feeds: list[Feed],
    target: Target,
    tell: Tell,
    *,
    launches: int = 3,
    seconds: float = 3.0,
    limit: float | None = None,
) -> Report:
    """Measure candidate against original on the target; the report of the stage.

    `launches` of about `seconds` each (see `race`); as many again where the bounds of the latency
    ratio enclose `limit`. Raises CandidateFailed where the candidate cannot be loaded or run, and
    whatever is wrong with the original or the machine.
    """
    if not feeds:
        raise UsageError("measuring needs inputs", expected="at least 1 sample", found="none")
    feeds = feeds[:MAX_FEEDS]
    launch = launch_for(target)
    if target.emulated:
        with held(target):
            return emulated(candidate, original, feeds, target, launch, tell)
    holding = held(target) if target.run.how == "ssh" else host.exclusive(tell)
    with holding, engine_folder(launch) as launch:
        return measured(candidate, original, feeds, target, launch, tell, launches, seconds, limit)


def measured(
    candidate: Path,
    original: Path,
    feeds: list[Feed],
    target: Target,
    launch: Launch,
    tell: Tell,
    launches: int,
    seconds: float,
    limit: float | None,
) -> Report:
    """`compare` where time is time: placement, the race, memory without arena.

    A candidate that does not run where the target says is not raced: its times would be those of
    another provider.
    """
    before = host.look(target)
    threads, allowed = target.runtime.threads, host.usable_cores(target, before)
    on_cpu = on_host_cpu(target)
    tell("profiling", 0, 0)
    where = profile_nodes(candidate, target, launch, feeds, PROFILE_RUNS)
    facts = {
        **host.facts(before),
        "onnxruntime": where["onnxruntime"],
        "runtime": list(runtime_packages(target)),
        "threads": threads,
        "feeds": len(feeds),
    }
    if not where["ok"]:
        return misplaced(where, sizes(candidate, original), facts)
    cores = host.core_sets(allowed, threads if on_cpu else len(allowed))
    models = {CANDIDATE: candidate, ORIGINAL: original}
    # Two looks at the data at most, so each gets half of the chance to err (Bonferroni).
    confidence = CONFIDENCE if limit is None else 1 - (1 - CONFIDENCE) / 2

    def look(heats: list[Heat]) -> tuple[dict[str, Any], list[summary.Note]]:
        return summary.latency(heats, summary.primary_clock(target), confidence)

    def race(first: int, planned: int) -> list[Heat]:
        heats = []
        for number in range(first, planned):
            heats += run_launch(
                number,
                models,
                feeds,
                target,
                launch,
                cores[number % len(cores)],
                seconds,
                SEED,
                progress(tell, number, planned),
            )
        return heats

    heats = race(0, launches)
    if limit is not None and summary.straddles(look(heats)[0], limit):
        heats += race(launches, 2 * launches)
    latency, notes = look(heats)
    tell("measuring memory", 0, 0)
    no_arena = {
        side: no_arena_peak_kib(side, model, feeds, target, launch, cores[0])
        for side, model in models.items()
    }
    memory, more = summary.memory(heats, no_arena)
    after = host.look(target)
    noise = summary.noise(heats, after["steal_ticks"] - before["steal_ticks"])
    notes += more
    if (unsteady := host.unsteady(before, after)) is not None:
        notes.append(summary.note("warning", unsteady))
    if threads > len(allowed) and on_cpu:
        text = f"{threads} threads share the {len(allowed)} cores of this machine"
        notes.append(summary.note("warning", text))
    if noise["quiet"]:
        notes += summary.disagreement(latency)
    else:
        text = f"this machine was not quiet, limits in ms and bytes cannot bind: {noise['reason']}"
        notes.append(summary.note("info", text))
    return {
        "notes": notes,
        "emulated": False,
        "latency": latency,
        "memory": memory,
        "countable": False,
        "instructions": None,
        "instructions_reason": "they are counted under emulation only; here time is measured",
        "load": summary.load(heats),
        "size": sizes(candidate, original),
        "placement": where,
        "noise": noise,
        "unsteady": unsteady,
        "host": {**facts, "after": host.state(after)},
        "raw": summary.raw(heats, SEED),
    }


def misplaced(where: dict[str, Any], size: dict[str, Any], facts: dict[str, Any]) -> Report:
    """The report of a candidate that does not run where the target says it must."""
    reason = f"not measured: too little of the model runs on {where['provider']}"
    return {
        "notes": [summary.note("warning", reason)],
        "emulated": False,
        "latency": None,
        "latency_reason": reason,
        "memory": None,
        "memory_reason": reason,
        "cold_start_reason": reason,
        "load": {"ok": True},
        "size": size,
        "placement": where,
        "noise": None,
        "host": facts,
        "raw": {"pairs": []},
    }


def progress(tell: Tell, number: int, planned: int) -> Callable[[int], None]:
    """A callback for the pairs of one launch that tells them out of all planned."""

    def tell_pairs(done: int) -> None:
        tell("measuring latency", number * 2 * MIN_PAIRS + done, planned * 2 * MIN_PAIRS)

    return tell_pairs


def emulated(
    candidate: Path,
    original: Path,
    feeds: list[Feed],
    target: Target,
    launch: Launch,
    tell: Tell,
) -> Report:
    """`compare` under an emulator: does it run, how large is it, which kernels does it get.

    And how many instructions it takes beside the other model, where the emulator is on this side.
    """
    tell("profiling under emulation", 0, 0)
    where = profile_nodes(candidate, target, launch, feeds[:1], EMULATED_RUNS, timed=False)
    notes = [summary.note("info", f"no latency and no memory: {EMULATED}")]
    countable = target.run.how == "emulate"
    if countable:
        tell("counting instructions", 0, 0)
        counts, reason = instructions(candidate, original, feeds[0], target)
        if reason is not None:
            notes.append(summary.note("warning", f"no instruction counts: {reason}"))
        elif target.runtime.threads > 1:
            notes.append(summary.note("info", "instructions are those of one thread"))
    else:
        counts, reason = None, "the emulator is behind SSH, where none are counted"
    return {
        "notes": notes,
        "emulated": True,
        "latency": None,
        "latency_reason": EMULATED,
        "memory": None,
        "memory_reason": EMULATED_MEMORY,
        "cold_start_reason": EMULATED,
        "countable": countable,
        "instructions": counts,
        "instructions_reason": reason,
        "load": {"ok": True},
        "size": sizes(candidate, original),
        "placement": where,
        "noise": None,
        "host": {
            **host.facts(host.look(target)),
            "onnxruntime": where["onnxruntime"],
            "threads": target.runtime.threads,
            "feeds": 1,
        },
        "raw": {"pairs": []},
    }


def check_runs(original: Path, feeds: list[Feed], target: Target, launch: Launch) -> None:
    """Raise what is wrong where not even the original runs on the target."""
    with open_side(ORIGINAL, original, target, launch) as session:
        session.run(feeds[0])


def stored_bytes(path: Path) -> int:
    """Bytes of a model file and, if it is one, of the external data files it names."""
    try:
        tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    except DecodeError:  # a candidate that does not even parse has been reported as such
        return path.stat().st_size
    names = {
        entry.value
        for tensor in tensors
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in names)


def sizes(candidate: Path, original: Path) -> dict[str, Any]:
    """Bytes of both models and their ratio."""
    new, old = stored_bytes(candidate), stored_bytes(original)
    return {"candidate_bytes": new, "original_bytes": old, "ratio": new / old if old else None}


__all__ = ["CandidateFailed", "compare", "run"]
