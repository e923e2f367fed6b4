"""From the raw heats of a race to the parts of the report. Pure functions, no model runs."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from edgewright.measure import statistics
from edgewright.measure.race import CANDIDATE, ORIGINAL, SIDES
from edgewright.runtime.providers import on_host_cpu
from edgewright.target import Target

Note = dict[str, str]

QUIET_CV = 0.02  # of the noise probe
QUIET_WAIT = 0.01  # share of the time spent waiting for the core
LAUNCH_SPREAD = 0.1  # between launches; the bounds allow for it, a reader should know
DISAGREE = 0.1  # between CPU and wall ratio


def note(level: str, text: str) -> Note:
    """A line of the report: level info or warning."""
    return {"level": level, "text": text}


def primary_clock(target: Target) -> str:
    """cpu: CPU time, free of waiting, counts all of a single-thread run on the CPU. Else wall."""
    return "cpu" if on_host_cpu(target) and target.runtime.threads == 1 else "wall"


def log_ratios(heat: dict[str, Any], clock: str) -> list[float] | None:
    """ln(candidate / original) of the pairs of a heat, None where the clock is too coarse.

    cpu: median CPU time of a slice's calls; wall: least wall time (per size of input).
    """
    statistic: Callable[[np.ndarray], float] = np.median if clock == "cpu" else np.min
    sizes, key = heat["feed_bytes"], f"{clock}_us"
    values = []
    for pair in heat["pairs"]:
        candidate, original = pair[CANDIDATE][key], pair[ORIGINAL][key]
        if min(candidate + original) <= 0:
            return None
        classes = [sizes[(pair["turn"] + k) % len(sizes)] for k in range(len(candidate))]
        values.append(statistics.slice_log_ratio(candidate, original, classes, statistic))
    return values


def balanced(heats: list[dict[str, Any]], clock: str) -> list[list[float]] | None:
    """Per launch the means of a pair of one heat and a pair of the other, as log-ratios.

    The advantage of the process started later has opposite signs in the two heats and cancels.
    None where the clock is too coarse.
    """
    launches: dict[int, list[list[float]]] = {}
    for heat in heats:
        values = log_ratios(heat, clock)
        if values is None:
            return None
        launches.setdefault(heat["launch"], []).append(values)
    return [
        [(a + b) / 2 for a, b in zip(first, second, strict=False)]
        for first, second in launches.values()
    ]


def flat(groups: Iterable[Iterable[float]]) -> list[float]:
    """All values of all groups."""
    return [value for group in groups for value in group]


def cold_start(
    heats: list[dict[str, Any]], clock: str, tails: tuple[float, float]
) -> dict[str, Any]:
    """Session creation and first run in a warm process: ratio, bounds, medians in seconds."""
    pairs = [pair for heat in heats for pair in heat["restarts"]]
    key = f"{clock}_s"
    usable = all(min(p[CANDIDATE][key], p[ORIGINAL][key]) > 0 for p in pairs)
    logs = [math.log(p[CANDIDATE][key] / p[ORIGINAL][key]) for p in pairs] if usable else []
    return {
        "primary": clock,
        **statistics.sign_ratio(logs, *tails),
        "pairs": len(pairs),
        **{f"{s}_s": float(np.median([p[s][key] for p in pairs])) for s in SIDES if pairs},
    }


def steady_calls(pairs: Iterable[dict[str, Any]], side: str) -> list[float]:
    """Wall seconds of single calls, without the first of a slice: it refills the caches."""
    calls: list[float] = []
    for pair in pairs:
        wall = pair[side]["wall_us"]
        calls += [t / 1e6 for t in (wall[1:] if len(wall) > 1 else wall)]
    return calls


def latency(
    heats: list[dict[str, Any]],
    clock: str,
    confidence: float,
    tails: tuple[float, float] | None = None,
) -> tuple[dict[str, Any], list[Note]]:
    """The latency report: ratio candidate / original with bounds, and times of both in ms.

    tails: the errors of the lower and of the upper bound, for bounds of the sign test alone.
    """
    notes = []
    logs = {name: balanced(heats, name) for name in ("cpu", "wall")}
    for name, values in logs.items():
        if values is None:
            notes.append(note("warning", f"the {name} clock of this machine is too coarse"))
    if logs[clock] is None:
        clock = "wall"
    if tails is None:
        ratios = {k: statistics.launch_ratio(v or [], confidence) for k, v in logs.items()}
        bounds = "the wider of exact sign test over the pairs and Student's t over the launches"
    else:
        ratios = {k: statistics.sign_ratio(flat(v or []), *tails) for k, v in logs.items()}
        bounds = f"exact sign test over the pairs, errors {tails[0]:.2g} and {tails[1]:.2g}"
    each = [math.exp(float(np.median(values))) for values in logs[clock] or []]
    if len(each) > 1 and max(each) / min(each) > 1 + LAUNCH_SPREAD:
        text = ", ".join(f"{ratio:.3f}" for ratio in each)
        notes.append(note("warning", f"the launches disagree about the latency ratio: {text}"))
    pairs = [pair for heat in heats for pair in heat["pairs"]]
    report: dict[str, Any] = {
        "primary": clock,
        "ratio": ratios[clock]["ratio"],
        "ratio_low": ratios[clock]["low"],
        "ratio_high": ratios[clock]["high"],
        "confidence": confidence,
        "statistic": "candidate / original, median over pairs of "
        + ("the median CPU time of a slice" if clock == "cpu" else "the least wall time of a slice")
        + f", mean of both start orders; bounds: {bounds}",
        "cpu_ratio": ratios["cpu"]["ratio"],
        "cpu_ratio_bounds": [ratios["cpu"]["low"], ratios["cpu"]["high"]],
        "wall_ratio": ratios["wall"]["ratio"],
        "wall_ratio_bounds": [ratios["wall"]["low"], ratios["wall"]["high"]],
        "launch_ratios": each,
        "pairs": len(pairs),
        "launches": len({heat["launch"] for heat in heats}),
        "calls_per_slice": [heat["calls"] for heat in heats],
    }
    for side in SIDES:
        cpu_ms = float(np.median([t for p in pairs for t in p[side]["cpu_us"]])) / 1e3
        report[side] = {
            **statistics.percentile_claims(steady_calls(pairs, side)),
            "cpu_p50_ms": cpu_ms,
        }
    return report, notes


def disagreement(latency_report: dict[str, Any]) -> list[Note]:
    """A note where CPU and wall time tell different stories; for quiet machines only."""
    cpu, wall = latency_report["cpu_ratio"], latency_report["wall_ratio"]
    if not cpu or not wall or abs(wall / cpu - 1) <= DISAGREE:
        return []
    return [note("warning", f"CPU time ratio {cpu:.3f} and wall time ratio {wall:.3f} differ")]


def straddles(latency_report: dict[str, Any], border: float) -> bool:
    """Whether the bounds leave open on which side of the border the ratio is."""
    low, high = latency_report["ratio_low"], latency_report["ratio_high"]
    return low is None or high is None or low <= border < high


def memory(
    heats: list[dict[str, Any]], no_arena: dict[str, tuple[int, bool]]
) -> tuple[dict[str, Any], list[Note]]:
    """Peak resident bytes of both processes, largest over the heats.

    `peak` is that of running, `load_peak` that of importing and loading; `cost` is the peak
    without what the process held before it loaded the model (Python and the runtime).
    no_arena: by side, the peak in KiB without the arena and whether it was reset before.
    """
    starts = {side: [heat["start"][side] for heat in heats] for side in SIDES}
    notes = []
    resets = [s["reset"] for side in SIDES for s in starts[side]]
    if not all([*resets, *(reset for _, reset in no_arena.values())]):
        text = "the kernel cannot reset the peak of memory, so peaks include loading"
        notes.append(note("warning", text))
    report: dict[str, Any] = {}
    for side in SIDES:
        peak = max(s["peak_kib"] for s in starts[side])
        before = min(s["rss_before_load_kib"] for s in starts[side])
        if not peak or not before:
            reason = "the kernel does not tell the peak of resident memory (VmHWM)"
            return {"candidate_peak_bytes": None, "ratio": None, "reason": reason}, notes
        report[f"{side}_peak_bytes"] = 1024 * peak
        report[f"{side}_cost_bytes"] = 1024 * max(0, peak - before)
        load_peak = max(s["peak_after_load_kib"] for s in starts[side])
        report[f"{side}_load_peak_bytes"] = 1024 * load_peak
        report[f"{side}_peaks_bytes"] = [1024 * s["peak_kib"] for s in starts[side]]
    for side, (peak, _) in no_arena.items():
        report[f"{side}_peak_no_arena_bytes"] = 1024 * peak
    report["ratio"] = report["candidate_peak_bytes"] / report["original_peak_bytes"]
    original = report["original_cost_bytes"]
    report["cost_ratio"] = report["candidate_cost_bytes"] / original if original else None
    if any("device_reason" in s for s in starts[CANDIDATE]):
        report |= device_memory(starts)
    return report, notes


def device_memory(starts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Peak bytes on the GPU of both processes, or why they are not known."""
    reasons = [s["device_reason"] for side in SIDES for s in starts[side] if s["device_reason"]]
    if reasons:
        return {"device_reason": reasons[0]}
    peaks = {f"{side}_device_bytes": max(s["device_bytes"] for s in starts[side]) for side in SIDES}
    ratio = peaks["candidate_device_bytes"] / max(1, peaks["original_device_bytes"])
    return {**peaks, "device_ratio": ratio}


def load(heats: list[dict[str, Any]]) -> dict[str, Any]:
    """Cold start of both in seconds, medians over the heats.

    cold_start_s: from process start to the end of the first run, files probably cached.
    """
    report: dict[str, Any] = {"ok": True, "starts": len(heats)}
    for side in SIDES:
        starts = [heat["start"][side] for heat in heats]
        parts = {
            key: float(np.median([s[key] for s in starts]))
            for key in ("import_s", "load_s", "first_run_s")
        }
        cold = float(np.median([s["ready_s"] + s["first_run_s"] for s in starts]))
        report[side] = {**parts, "cold_start_s": cold}
    return report


def noise(heats: list[dict[str, Any]], steal_ticks: int) -> dict[str, Any]:
    """How quiet the machine was; `quiet`: absolute limits (ms, peak bytes) can be judged."""
    slices = [p[side] for heat in heats for p in heat["pairs"] for side in SIDES]
    cv = statistics.variation([heat["spin_s"] for heat in heats])
    total = sum(s["total_wall_s"] for s in slices)
    wait = sum(s["run_queue_s"] for s in slices) / total if total else None
    quiet = cv is not None and cv < QUIET_CV and wait is not None and wait < QUIET_WAIT
    reason = None
    if not quiet:
        reason = (
            f"fixed work varied by {'?' if cv is None else f'{cv:.1%}'} "
            f"(quiet: below {QUIET_CV:.0%}), {'?' if wait is None else f'{wait:.1%}'} of the time "
            f"was spent waiting for the core (quiet: below {QUIET_WAIT:.0%})"
        )
    return {
        "quiet": quiet,
        "reason": reason,
        "spin_cv": cv,
        "spins": sum(len(heat["spin_s"]) for heat in heats),
        "run_queue_share": wait,
        "involuntary_switches": sum(s["involuntary_switches"] for s in slices),
        "steal_ticks": steal_ticks,
    }


def raw(heats: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The samples themselves, from which everything else is derived."""
    return {
        "seed": seed,
        "pairs": [
            {"launch": heat["launch"], "heat": k, **pair}
            for k, heat in enumerate(heats)
            for pair in heat["pairs"]
        ],
        "heats": [{k: v for k, v in heat.items() if k != "pairs"} for heat in heats],
    }
