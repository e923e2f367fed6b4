"""All that `edgewright bench` tells: the comparison of `measure`, then throughput and energy."""

from pathlib import Path
from typing import Any

from edgewright.data import Feed, samples
from edgewright.errors import BadInput
from edgewright.measure import MAX_FEEDS, compare, host, summary
from edgewright.measure.energy import energy
from edgewright.measure.race import CANDIDATE, blame, open_side
from edgewright.measure.throughput import throughput
from edgewright.model import input_specs, load
from edgewright.runtime.launch import launch_for
from edgewright.stage import Job, Report
from edgewright.target import Target

NAMED = 5  # nodes that the message names


def run(job: Job) -> Report:
    """The stage: raises where either model does not run, or not where the target says.

    Nothing is judged here, but the times of another provider are not what was asked for.
    """
    original, candidate = job.models["export"], job.input_model()
    feeds = list(samples(job.recipe, input_specs(load(original)), MAX_FEEDS))
    report = compare(candidate, original, feeds, job.target, job.tell)
    refuse_misplaced(report["placement"])
    if report["emulated"]:
        return report
    job.tell("measuring throughput", 0, 0)
    more, reasons = beyond(candidate, feeds, job.target, job)
    notes = [summary.note("info", reason) for reason in reasons]
    return {**report, **more, "notes": [*report["notes"], *notes]}


def refuse_misplaced(where: dict[str, Any]) -> None:
    """BadInput with the nodes that run elsewhere where the provider takes too little."""
    if where["ok"]:
        return
    strays = [f"{n['name']} ({n['op']} on {n['provider']})" for n in where["strays"]]
    more = f" and {len(strays) - NAMED} more" if len(strays) > NAMED else ""
    raise BadInput(
        f"too little of the model runs on {where['provider']}, so nothing was measured",
        expected=f"at least {where['required_share']:.0%} of the {where['share_of']} there",
        found=f"{where['provider_share']:.1%}; elsewhere: {', '.join(strays[:NAMED])}{more}",
        hint="to measure it all the same, lower runtime.min_provider_share in a profile of your "
        "own",
    )


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
