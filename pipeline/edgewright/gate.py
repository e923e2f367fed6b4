"""gate: the reports against the thresholds. PASS, FAIL or INCONCLUSIVE, each with its reason.

A check is PASS or FAIL only where the evidence decides it. A number that is missing, not finite
or not above zero decides nothing. What cannot be judged on a target at all (time and memory under
emulation, a metric the recipe does not name) is NOT JUDGED: it is listed, and neither passes nor
fails anything.
"""

import math
from collections.abc import Collection, Iterable
from typing import Any, Final, Literal

from edgewright.recipe import GateSettings
from edgewright.stage import Job, Report
from edgewright.target import Budget

PASS: Final = "PASS"
FAIL: Final = "FAIL"
INCONCLUSIVE: Final = "INCONCLUSIVE"
NOT_JUDGED: Final = "NOT JUDGED"
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "NOT JUDGED"]
Check = dict[str, Any]

LATENCY_MARGIN = 0.02  # equal models differ by up to 1 % between launches, so 2 % is no slowdown
MEMORY_MARGIN = 0.01  # with MEMORY_SLACK: repeats of one model differ by less
MEMORY_SLACK = 256 << 10  # bytes
SIGNIFICANCE = 0.05
# Conditions of the target: they can fail a model, but passing them proves no quality.
DEMANDS = ("runs", "min_provider_share")


def run(job: Job) -> Report:
    """The stage: judge the reports of validate and measure; see `decide`."""
    raw = job.recipe.raw.get("gate", {})
    report = decide(
        job.recipe.gate,
        job.target.budget,
        job.reports.get("validate", {}),
        job.reports.get("measure", {}),
        explicit=tuple(raw),
    )
    quantize = job.reports.get("quantize", {})
    warnings = [n for n in quantize.get("notes", []) if n.get("level") == "warning"]
    report["notes"] += [{**n, "text": f"quantize: {n.get('text', '')}"} for n in warnings]
    return report


def decide(
    gate: GateSettings,
    budget: Budget,
    validate: Report,
    measure: Report,
    *,
    explicit: Collection[str] = (),
) -> Report:
    """Judge the reports against the thresholds of the recipe and the budget of the target.

    explicit: the keys that the recipe itself sets in [gate]. Any FAIL fails; else anything
    inconclusive, or no threshold judged at all, is INCONCLUSIVE; else PASS.
    """
    checks: list[Check] = []
    if gate.min_retained is not None:
        checks.append(retained(gate.min_retained, validate, "min_retained" in explicit))
    if gate.min_agreement is not None:
        checks.append(agreement(gate.min_agreement, validate))
    if gate.max_latency_ratio is not None:
        checks.append(latency_ratio(gate.max_latency_ratio, measure))
    if gate.max_size_ratio is not None:
        checks.append(size("max_size_ratio", gate.max_size_ratio, measure, "ratio"))
    if gate.max_memory_ratio is not None:
        checks.append(memory_ratio(gate.max_memory_ratio, measure))
    for limit in tightest(gate.max_size_bytes, budget.max_size_bytes):
        checks.append(size("max_size_bytes", limit, measure, "candidate_bytes"))
    for limit in tightest(gate.max_peak_memory_bytes, budget.max_peak_memory_bytes):
        checks.append(peak_memory(limit, measure))
    for limit in tightest(gate.max_latency_ms, budget.max_latency_ms):
        checks.append(latency_ms(limit, measure))
    checks += target_demands(measure)
    notes = [
        {"level": "warning", "text": f"{c['name']} not judged: {c['reason']}"}
        for c in checks
        if c["verdict"] == NOT_JUDGED
    ]
    verdict = overall(checks)
    if verdict == INCONCLUSIVE and not any(c["verdict"] in (PASS, FAIL) for c in limits(checks)):
        text = "no threshold could be judged: name a metric or set a limit in [gate]"
        notes.append({"level": "warning", "text": text})
    return {"verdict": verdict, "checks": checks, "notes": notes}


def limits(checks: Iterable[Check]) -> list[Check]:
    """The checks of thresholds, without the demands of the target."""
    return [c for c in checks if c["name"] not in DEMANDS]


def overall(checks: list[Check]) -> Verdict:
    """The verdict of all checks together."""
    found = {c["verdict"] for c in checks}
    if FAIL in found:
        return FAIL
    judged = any(c["verdict"] == PASS for c in limits(checks))
    return INCONCLUSIVE if INCONCLUSIVE in found or not judged else PASS


def check(
    name: str,
    limit: float | None,
    verdict: Verdict,
    reason: str,
    value: float | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Check:
    """One line of the gate report; numbers that are not finite are left out of it."""
    return {
        "name": name,
        "limit": limit,
        "value": finite(value),
        "low": finite(low),
        "high": finite(high),
        "verdict": verdict,
        "reason": reason,
    }


def finite(value: Any) -> float | None:
    """The number, None for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def above_zero(value: Any) -> float | None:
    """The number, None for anything that is not a finite number above zero."""
    number = finite(value)
    return number if number is not None and number > 0 else None


def tightest(*candidates: float | None) -> list[float]:
    """The smallest limit that is set, as a list of one; empty where none is."""
    known = [c for c in candidates if c is not None]
    return [min(known)] if known else []


def part(report: Report, key: str) -> dict[str, Any]:
    """A table of a report, empty where it is missing or null."""
    found = report.get(key)
    return found if isinstance(found, dict) else {}


def missing(name: str, limit: float, measure: Report, key: str) -> Check | None:
    """The check where the measurement has no such part: emulated, failed, or simply not there."""
    if part(measure, key):
        return None
    reason = measure.get(f"{key}_reason") or f"the measurement has no {key}"
    if measure.get("failed"):
        return check(name, limit, NOT_JUDGED, "the model does not run on the target")
    if measure.get("emulated"):
        reason = f"it cannot be judged under emulation: {reason}"
        return check(name, limit, NOT_JUDGED, f"{reason}; measure on a device")
    return check(name, limit, INCONCLUSIVE, reason)


def no_number(name: str, limit: float, what: str, value: Any) -> Check:
    """The check where a number is NaN, zero, negative or absent."""
    reason = f"{what} must be a number above zero, the report has {value!r}"
    return check(name, limit, INCONCLUSIVE, reason)


def retained(limit: float, validate: Report, explicit: bool) -> Check:
    """Share of the original's metric that is left, with the paired test where it falls short.

    Below the limit it is a FAIL, unless the samples do not show it: the sign test finds no
    difference and the lower bound of the mean loss is within what the limit allows.
    """
    name, metric = "min_retained", part(validate, "metric")
    if not metric:
        if not explicit:
            return check(name, limit, NOT_JUDGED, "the recipe names no metric")
        reason = "the recipe sets min_retained but no metric was computed"
        return check(name, limit, INCONCLUSIVE, reason)
    original = part(metric, "original").get("score")
    shipped = part(metric, "shipped")
    value = finite(shipped.get("retained"))
    base = above_zero(original)
    if base is None:
        return no_number(name, limit, "the original's score", original)
    if value is None or finite(shipped.get("score")) is None:
        found = shipped.get("score"), shipped.get("retained")
        return no_number(name, limit, "the shipped model's score and share", found)
    if value >= limit:
        if value <= 0:
            return no_number(name, limit, "the share kept", value)
        reason = f"{value:.2%} of {metric.get('name', 'the metric')} kept"
        return check(name, limit, PASS, reason, value)
    reason = f"only {value:.2%} kept"
    paired = part(metric, "paired")
    p, low = finite(paired.get("sign_test_p")), finite(paired.get("mean_loss_low"))
    if p is None or low is None:
        return check(name, limit, FAIL, reason, value)
    rises = metric.get("higher_is_better", True)
    if not rises and limit <= 0:
        return check(name, limit, FAIL, reason, value)
    allowed = base * (1 - limit) if rises else base * (1 / limit - 1)
    if p >= SIGNIFICANCE and low <= allowed:
        reason += (
            f", but {paired.get('samples', '?')} samples do not prove a loss (sign test "
            f"p = {p:.2f}, loss at least {low:.4g}, allowed {allowed:.4g}); use more samples"
        )
        return check(name, limit, INCONCLUSIVE, reason, value)
    reason += f"; paired samples confirm it (sign test p = {p:.2g}, loss at least {low:.4g})"
    return check(name, limit, FAIL, reason, value)


def agreement(limit: float, validate: Report) -> Check:
    """Share of the samples on which both models choose the same class."""
    name = "min_agreement"
    value = part(validate, "agreement").get("top1")
    if value is None:
        return check(name, limit, INCONCLUSIVE, "no output of the model is a choice of a class")
    number = finite(value)
    if number is None or not 0 <= number <= 1:
        return no_number(name, limit, "agreement", value)
    verdict: Verdict = PASS if number >= limit and number > 0 else FAIL
    return check(name, limit, verdict, f"the same first choice for {number:.2%}", number)


def latency_ratio(limit: float, measure: Report) -> Check:
    """Candidate / original; the bounds must be clear of limit + 2 %.

    The margin: equal models differ by up to 1 % between launches of their processes.
    """
    name = "max_latency_ratio"
    if (nothing := missing(name, limit, measure, "latency")) is not None:
        return nothing
    latency = part(measure, "latency")
    numbers = [above_zero(latency.get(key)) for key in ("ratio_low", "ratio", "ratio_high")]
    low, value, high = numbers
    if value is None:
        return no_number(name, limit, "the ratio", latency.get("ratio"))
    if low is None or high is None:
        reason = f"too few pairs ({latency.get('pairs', '?')}) for bounds"
        return check(name, limit, INCONCLUSIVE, reason, value, low, high)
    border = limit * (1 + LATENCY_MARGIN)
    clock = "CPU time" if latency.get("primary") == "cpu" else "wall time"
    found = f"{clock} {value:.3f} of the original, {low:.3f} to {high:.3f}"
    if not low <= value <= high:
        reason = f"the bounds do not enclose the ratio: {found}"
        return check(name, limit, INCONCLUSIVE, reason, value, low, high)
    if high <= border:
        return check(name, limit, PASS, found, value, low, high)
    if low > border:
        return check(name, limit, FAIL, f"slower than allowed: {found}", value, low, high)
    reason = f"{found}: the limit of {limit:g} + 2 % is in between; the machine is too noisy"
    return check(name, limit, INCONCLUSIVE, reason, value, low, high)


def size(name: str, limit: float, measure: Report, key: str) -> Check:
    """Size of the file, as a ratio to the original or in bytes; it is known exactly."""
    value = above_zero(part(measure, "size").get(key))
    if value is None:
        return no_number(name, limit, "the size", part(measure, "size").get(key))
    shown = f"{value:.3f} of the original" if key == "ratio" else f"{value:,.0f} bytes"
    verdict: Verdict = PASS if value <= limit else FAIL
    return check(name, limit, verdict, shown, value)


def memory_ratio(limit: float, measure: Report) -> Check:
    """Peak resident memory, candidate / original; 1 % or 256 KiB more is no difference."""
    name = "max_memory_ratio"
    if (nothing := missing(name, limit, measure, "memory")) is not None:
        return nothing
    memory = part(measure, "memory")
    value = above_zero(memory.get("ratio"))
    original = above_zero(memory.get("original_peak_bytes"))
    if value is None or original is None:
        return no_number(name, limit, "the memory ratio", memory.get("reason", memory.get("ratio")))
    border = limit + max(limit * MEMORY_MARGIN, MEMORY_SLACK / original)
    verdict: Verdict = PASS if value <= border else FAIL
    return check(name, limit, verdict, f"{value:.3f} of the original's peak", value)


def noisy(measure: Report) -> str | None:
    """Why absolute limits cannot bind on the measuring machine; None where they can."""
    noise = part(measure, "noise")
    if noise.get("quiet") is True:
        return None
    return f"the machine was not quiet: {noise.get('reason') or 'unknown noise'}"


def peak_memory(limit: float, measure: Report) -> Check:
    """Peak resident bytes of the whole process, of running or of loading, whatever is larger."""
    name = "max_peak_memory_bytes"
    if (nothing := missing(name, limit, measure, "memory")) is not None:
        return nothing
    memory = part(measure, "memory")
    running = above_zero(memory.get("candidate_peak_bytes"))
    loading = above_zero(memory.get("candidate_load_peak_bytes")) or 0
    if running is None:
        found = memory.get("reason", memory.get("candidate_peak_bytes"))
        return no_number(name, limit, "the peak of memory", found)
    value = max(running, loading)
    found = f"{value:,.0f} bytes at the peak of {'running' if running >= loading else 'loading'}"
    if (reason := noisy(measure)) is not None:
        return check(name, limit, INCONCLUSIVE, f"{found}; {reason}", value)
    verdict: Verdict = PASS if value <= limit else FAIL
    return check(name, limit, verdict, found, value)


def latency_ms(limit: float, measure: Report) -> Check:
    """p90 of single calls in ms, with its bounds; only where the machine is quiet."""
    name = "max_latency_ms"
    if (nothing := missing(name, limit, measure, "latency")) is not None:
        return nothing
    times = part(part(measure, "latency"), "candidate")
    value = above_zero(times.get("p90_ms"))
    low, high = above_zero(times.get("p90_low_ms")), above_zero(times.get("p90_high_ms"))
    if value is None:
        return no_number(name, limit, "p90", times.get("p90_reason") or times.get("p90_ms"))
    found = f"p90 {value:.3g} ms"
    if (reason := noisy(measure)) is not None:
        return check(name, limit, INCONCLUSIVE, f"{found}; {reason}", value, low, high)
    if low is None or high is None:
        return check(name, limit, INCONCLUSIVE, f"{found} has no bounds", value, low, high)
    found += f", {low:.3g} to {high:.3g}"
    if high <= limit:
        return check(name, limit, PASS, found, value, low, high)
    if low > limit:
        return check(name, limit, FAIL, found, value, low, high)
    return check(name, limit, INCONCLUSIVE, f"{found}: the limit is in between", value, low, high)


def target_demands(measure: Report) -> list[Check]:
    """What the target demands of every model: that it runs, on the provider it names."""
    checks = []
    if measure.get("failed"):
        return [check("runs", None, FAIL, str(measure["failed"]))]
    placement = part(measure, "placement")
    if not placement:
        return [check("runs", None, INCONCLUSIVE, "the measurement says nothing of the target")]
    checks.append(check("runs", None, PASS, "loads and runs on the target"))
    name, share = "min_provider_share", finite(placement.get("provider_share"))
    limit = finite(placement.get("required_share"))
    if share is None or not 0 <= share <= 1 or "ok" not in placement:
        checks.append(check(name, limit, INCONCLUSIVE, "the measurement does not tell it"))
    elif placement["ok"] is True:
        found = f"{share:.1%} of the nodes on {placement.get('provider', 'the provider')}"
        checks.append(check(name, limit, PASS, found, share))
    else:
        strays = [stray_name(s) for s in placement.get("strays", [])]
        more = f" and {len(strays) - 10} more" if len(strays) > 10 else ""
        found = f"only {share:.1%} of the nodes on {placement.get('provider', 'the provider')}"
        reason = f"{found}; elsewhere: {', '.join(strays[:10])}{more}"
        checks.append(check(name, limit, FAIL, reason, share))
    return checks


def stray_name(stray: Any) -> str:
    """A node that runs elsewhere, for people."""
    if not isinstance(stray, dict):
        return str(stray)
    return f"{stray.get('name')} ({stray.get('op')} on {stray.get('provider')})"
