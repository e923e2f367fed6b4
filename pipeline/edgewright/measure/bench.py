"""All that `edgewright bench` tells: the comparison of `measure`, then throughput and energy."""

from pathlib import Path
from typing import Any

from edgewright.data import Feed, samples
from edgewright.measure import MAX_FEEDS, compare, host, summary
from edgewright.measure.energy import energy
from edgewright.measure.race import CANDIDATE, blame, open_side
from edgewright.measure.throughput import throughput
from edgewright.model import input_specs, load
from edgewright.runtime.launch import launch_for
from edgewright.stage import Job, Report
from edgewright.target import Target


def run(job: Job) -> Report:
    """The stage: raises where either model does not run; nothing is judged here."""
    original, candidate = job.models["export"], job.input_model()
    feeds = list(samples(job.recipe, input_specs(load(original)), MAX_FEEDS))
    report = compare(candidate, original, feeds, job.target, job.tell)
    if report["emulated"]:
        return report
    job.tell("measuring throughput", 0, 0)
    more, reasons = beyond(candidate, feeds, job.target, job)
    notes = [summary.note("info", reason) for reason in reasons]
    return {**report, **more, "notes": [*report["notes"], *notes]}


def beyond(
    candidate: Path, feeds: list[Feed], target: Target, job: Job
) -> tuple[dict[str, Any], list[str]]:
    """Throughput and energy of the candidate, and why one of them is not there."""
    if target.runtime.provider != "CPUExecutionProvider" or target.run.how != "local":
        elsewhere = "throughput and energy are measured on this machine's CPU only"
        return {"throughput": None, "energy": None, "energy_reason": elsewhere}, [elsewhere]
    launch = launch_for(target)
    with host.exclusive(job.tell):
        cores = host.usable_cores(target, host.look(target))
        rates = throughput(candidate, feeds, target, launch, cores)
        with open_side(CANDIDATE, candidate, target, launch, cores=frozenset(cores)) as session:
            with blame(CANDIDATE):
                session.keep_feeds(feeds)
            joules, reason = energy(session)
    found = {"throughput": rates, "energy": joules, "energy_reason": reason}
    return found, [f"no energy: {reason}"] if reason else []
