"""The race of a release against the one before it: only as long as the verdict needs.

Launches like those of `measure`, with shorter slices: beside busy neighbours a slice of 15 ms of
CPU time takes about 60 ms, and as many pairs fit in a few seconds as the bounds need. After each
launch the evidence is judged; the race ends when latency, cold start and memory are all decided,
when it has failed, or when another launch would exceed the budget.
"""

import time
from pathlib import Path
from typing import Any

from edgewright.data import Feed, samples
from edgewright.decision import (
    FAIL,
    FAIL_TAIL,
    INCONCLUSIVE,
    LOOKS,
    PASS_TAIL,
    Settled,
    cold_start_verdict,
    latency_verdict,
    memory_verdict,
    settle,
)
from edgewright.errors import BadInput
from edgewright.measure import (
    MAX_FEEDS,
    PROFILE_RUNS,
    emulated,
    failed,
    host,
    misplaced,
    sizes,
    summary,
)
from edgewright.measure.placement import profile_nodes
from edgewright.measure.race import CANDIDATE, ORIGINAL, CandidateFailed, Pace, run_launch
from edgewright.model import input_specs, load
from edgewright.runtime.engines import engine_folder
from edgewright.runtime.launch import launch_for
from edgewright.runtime.providers import CPU, on_host_cpu
from edgewright.runtime.ssh.link import held
from edgewright.stage import Job, Report, Tell
from edgewright.target import Target

PACE = Pace(slice_s=0.015, pairs=(24, 60), restarts=6)
SECONDS = 2.2  # of a launch; its heats end after twice their half, whatever they have


def run(job: Job) -> Report:
    """The stage: compare the candidate with the release in place of the original."""
    baseline, candidate = job.models["export"], job.input_model()
    specs, theirs = input_specs(load(candidate)), input_specs(load(baseline))
    if [(s.name, s.dtype) for s in specs] != [(s.name, s.dtype) for s in theirs]:
        raise BadInput(
            "the baseline is no release of this model: it takes other inputs",
            expected=", ".join(f"{s.name} ({s.dtype})" for s in specs),
            found=", ".join(f"{s.name} ({s.dtype})" for s in theirs),
        )
    feeds = list(samples(job.recipe, theirs, MAX_FEEDS))
    settled = settle(job.recipe.gate.tolerance, job.target.tolerance)
    try:
        return compare(candidate, baseline, feeds, job.target, settled, job.tell)
    except CandidateFailed as error:
        return failed(error, candidate, baseline, feeds, job.target)


def compare(
    candidate: Path,
    baseline: Path,
    feeds: list[Feed],
    target: Target,
    settled: Settled,
    tell: Tell,
    *,
    seed: int = 0,
) -> Report:
    """The report of `measure.compare`, with `cold_start` and `decided`; the baseline is "original".

    Where the provider may leave work to the CPU, that is looked at first: a race on another
    provider decides nothing.

    Raises CandidateFailed where the candidate cannot be loaded or run, and whatever is wrong
    with the baseline or the machine.
    """
    launch = launch_for(target)
    if target.emulated:
        with held(target):
            return emulated(candidate, baseline, feeds, target, launch, tell)
    holding = held(target) if target.run.how == "ssh" else host.exclusive(tell)
    with holding, engine_folder(launch) as launch:
        before = host.look(target)
        begin = time.monotonic()
        threads, allowed = target.runtime.threads, host.usable_cores(target, before)
        cores = host.core_sets(allowed, threads if on_host_cpu(target) else len(allowed))
        facts = {**host.facts(before), "threads": threads, "feeds": len(feeds)}

        def place() -> dict[str, Any]:
            tell("profiling", 0, 0)
            return profile_nodes(candidate, target, launch, feeds, PROFILE_RUNS)

        where = place() if target.runtime.provider != CPU else None
        if where is not None and not where["ok"]:
            return misplaced(where, sizes(candidate, baseline), facts)
        models = {CANDIDATE: candidate, ORIGINAL: baseline}
        heats: list[dict[str, Any]] = []
        looks: list[dict[str, Any]] = []
        longest = 0.0
        for number in range(LOOKS):
            started = time.monotonic()
            tell(f"racing, launch {number + 1}", 0, 0)
            core = cores[number % len(cores)]
            heats += run_launch(
                number, models, feeds, target, launch, core, SECONDS, seed, no_steps, PACE
            )
            longest = max(longest, time.monotonic() - started)
            parts, notes = look(heats, target)
            seconds = time.monotonic() - begin
            looks.append({**judged(parts, settled), "seconds": round(seconds, 3)})
            if ends(looks[-1]) or seconds + longest > settled.budget_s:
                break
        if where is None and FAIL not in looks[-1].values():
            where = place()
        after = host.look(target)
    noise = summary.noise(heats, after["steal_ticks"] - before["steal_ticks"])
    if (unsteady := host.unsteady(before, after)) is not None:
        notes.append(summary.note("warning", unsteady))
    return {
        "notes": notes,
        "emulated": False,
        **parts,
        "decided": {"looks": looks, "budget_s": settled.budget_s, "most_looks": LOOKS},
        "load": summary.load(heats),
        "size": sizes(candidate, baseline),
        "placement": where,
        "placement_reason": None if where else "the race had decided before",
        "noise": noise,
        "unsteady": unsteady,
        "host": {**facts, "after": host.state(after)},
        "raw": summary.raw(heats, seed),
    }


def no_steps(pairs: int) -> None:
    """Launches are told, pairs are not: how many there will be is not known."""


def look(heats: list[dict[str, Any]], target: Target) -> tuple[dict[str, Any], list[summary.Note]]:
    """What the heats so far say: latency, cold start and memory."""
    clock, tails = summary.primary_clock(target), (FAIL_TAIL, PASS_TAIL)
    latency, notes = summary.latency(heats, clock, 1 - FAIL_TAIL - PASS_TAIL, tails)
    memory, more = summary.memory(heats, {})
    cold_start = summary.cold_start(heats, clock, tails)
    return {"latency": latency, "cold_start": cold_start, "memory": memory}, [*notes, *more]


def judged(parts: dict[str, Any], settled: Settled) -> dict[str, Any]:
    """The verdicts on the parts of a look."""
    return {
        "latency": latency_verdict(parts["latency"], settled.latency, settled.margin),
        "cold_start": cold_start_verdict(parts["cold_start"], settled.cold_start, settled.margin),
        "memory": memory_verdict(parts["memory"], settled.memory),
    }


def ends(verdicts: dict[str, Any]) -> bool:
    """Whether the race is decided: it has failed, or nothing is open.

    More memory alone does not end it: who must mend a release wants to know about its time, too.
    """
    failed = FAIL in (verdicts["latency"], verdicts["cold_start"])
    return failed or INCONCLUSIVE not in verdicts.values()
