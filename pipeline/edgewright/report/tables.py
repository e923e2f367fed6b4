"""The tables of a build report as text, shared by the page and the terminal.

A build may have stopped early, so any part of a report may be absent: look-ups go through
`find`, and what is not there reads as MISSING, with the reason beside it where one is known.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Report = dict[str, Any]

MISSING = "–"  # noqa: RUF001 - an en dash, as typeset tables have it
NOT_AVAILABLE = "not available"
VERDICTS = ("PASS", "FAIL", "INCONCLUSIVE")
NO_VERDICT = "NO VERDICT"
# Before the name of a check against an earlier release: which one.
RELEASES = {"baseline_": "the baseline", "golden_": "the golden release"}
# The checks of a release beside an earlier one: what may not rise, what may not fall.
RATIOS = ("latency", "memory", "size", "cold_start", "instructions")
SHARES = ("metric", "agreement")
KINDS = {
    "int8": "int8",
    "border": "conversion",
    "float": "float",
    "other": "other",
    "compiled": "compiled",
}
LABELS = {
    "min_retained": "metric kept",
    "max_latency_ratio": "latency, shipped / original",
    "max_size_ratio": "size, shipped / original",
    "max_memory_ratio": "peak memory, shipped / original",
    "max_size_bytes": "size",
    "max_peak_memory_bytes": "peak memory",
    "max_latency_ms": "latency",
    "min_agreement": "same answer as the original",
    "min_provider_share": "work on the provider",
    "min_int8_share": "work in int8",
    "runs": "loads and runs",
    "max_instruction_ratio": "instructions, shipped / original",
    "max_instructions": "instructions",
    "int8_instructions": "instructions of int8 layers",
}


@dataclass(frozen=True)
class Tile:
    """One headline figure; `detail` says how it came about, or why there is none."""

    label: str
    value: str
    detail: str
    known: bool = True


@dataclass(frozen=True)
class Check:
    """One line of the gate."""

    name: str
    label: str
    limit: str
    value: str
    bounds: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class Stage:
    """One line of the stage table; `size_share` is relative to the largest stage, 0 to 1."""

    name: str
    cached: bool
    score: str
    retained: str
    size: str
    size_share: float
    nodes: str
    seconds: str
    memory: str


@dataclass(frozen=True)
class Step:
    """What a stage left of the original: metric, same outputs, size, work, time."""

    stage: str
    kept: str
    same: str
    top1: str
    size: str
    macs: str
    latency: str


@dataclass(frozen=True)
class Note:
    """One remark of a stage."""

    stage: str
    level: str
    text: str


def find(value: Any, *keys: str) -> Any:
    """The value at a path of keys; None where the path ends early."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer that no float holds
        return None


def table(value: Any) -> dict[str, Any]:
    """The value if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def rows(value: Any) -> list[dict[str, Any]]:
    """The dicts of a list; empty for anything else."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def plain(value: Any) -> str:
    """Text with everything that could steer a terminal or reorder a line spelt out."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = value if isinstance(value, str) else MISSING if value is None else str(value)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def stage_report(report: Report, stage: str) -> Report:
    """The report of a stage, empty if the build has none."""
    for row in rows(report.get("stages")):
        if row.get("stage") == stage:
            return table(row.get("report"))
    return {}


def bytes_text(value: Any) -> str:
    """3 904 496 -> 3.90 MB."""
    size = number(value)
    if size is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{digits(size)} {unit}"


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")  # 0.9996 has its digits where 1.00 has them
    places = 2 - math.floor(math.log10(abs(rounded)))
    return f"{value:.{max(0, min(places, 6))}f}"


def share_text(value: Any) -> str:
    """0.9943 -> 99.43 %."""
    share = number(value)
    return MISSING if share is None else f"{100 * share:.2f} %"


def rough_share_text(value: Any) -> str:
    """0.279 -> 28 %; below 1 % with one digit."""
    share = number(value)
    if share is None:
        return MISSING
    return f"{100 * share:.0f} %" if share == 0 or abs(share) >= 0.01 else f"{100 * share:.1f} %"


def ratio_text(value: Any) -> str:
    """0.4454 -> 0.445."""
    ratio = number(value)
    return MISSING if ratio is None else f"{ratio:.3f}"


def ms_text(value: Any) -> str:
    """Milliseconds with three digits."""
    time = number(value)
    return MISSING if time is None else f"{digits(time)} ms"


def seconds_text(value: Any) -> str:
    """12.3 s, or 3 min 05 s."""
    time = number(value)
    if time is None:
        return MISSING
    if time < 100:
        return f"{time:.1f} s"
    return f"{int(time) // 60} min {int(time) % 60:02d} s"


def score_text(value: Any) -> str:
    """A metric's value."""
    score = number(value)
    return MISSING if score is None else f"{score:.4g}"


def count_text(value: Any) -> str:
    count = number(value)
    return MISSING if count is None else f"{int(count):,}".replace(",", "\u202f")


def times_text(ratio: float, less: str, more: str, same: str) -> str:
    """0.445 -> 2.24x faster, with the words given for below and above 1."""
    if abs(ratio - 1) < 0.005:
        return same
    return f"{1 / ratio:.2f}× {less}" if ratio < 1 else f"{ratio:.2f}× {more}"  # noqa: RUF001


def verdict(report: Report) -> str:
    """PASS, FAIL or INCONCLUSIVE; NO VERDICT where the gate did not run."""
    for value in (report.get("verdict"), stage_report(report, "gate").get("verdict")):
        if value in VERDICTS:
            return str(value)
    return NO_VERDICT


def explanation(report: Report) -> str:
    """One sentence: why the verdict is what it is."""
    found = verdict(report)
    checks = gate(report)
    if found == "PASS":
        passed = sum(check.verdict == "PASS" for check in checks)
        rest = len(checks) - passed
        text = f"{passed} checks passed" if passed != 1 else "1 check passed"
        return f"{text}, none failed{f', {rest} could not be judged' if rest else ''}."
    if found == NO_VERDICT:
        stages = [plain(row.get("stage")) for row in rows(report.get("stages"))]
        after = f"the last finished stage is {stages[-1]}" if stages else "no stage finished"
        return f"The gate did not run: {after}. Nothing says that this model may ship."
    decisive = [check for check in checks if check.verdict == found]
    texts = [f"{check.label}: {check.reason or check.value}" for check in decisive]
    return "; ".join(texts) + "." if texts else "No check gives a reason."


def tiles(report: Report) -> list[Tile]:
    """The headline figures, shipped against original."""
    return [
        size_tile(report),
        latency_tile(report),
        metric_tile(report),
        memory_tile(report),
        agreement_tile(report),
        kernel_tile(report),
    ]


def unknown(label: str, *reasons: Any) -> Tile:
    """A tile without a figure; the first reason that is a text."""
    reason = next((plain(r) for r in reasons if isinstance(r, str) and r), "the stage did not run")
    return Tile(label, NOT_AVAILABLE, reason, known=False)


def size_tile(report: Report) -> Tile:
    size = find(stage_report(report, "measure"), "size")
    ratio = number(find(size, "ratio"))
    if ratio is None or ratio <= 0:
        return unknown("Size")
    return Tile(
        "Size",
        times_text(ratio, "smaller", "larger", "as large"),
        f"{bytes_text(find(size, 'original_bytes'))} → {bytes_text(find(size, 'candidate_bytes'))}",
    )


def latency_tile(report: Report) -> Tile:
    measure = stage_report(report, "measure")
    latency = measure.get("latency")
    ratio = number(find(latency, "ratio"))
    if ratio is None or ratio <= 0:
        counted = number(find(measure, "instructions", "ratio"))
        if counted is not None and counted > 0:
            return instruction_tile(measure, counted)
        return unknown("Latency", measure.get("latency_reason"), find(latency, "reason"))
    confidence = number(find(latency, "confidence")) or 0.95
    bounds = bounds_text(find(latency, "ratio_low"), find(latency, "ratio_high"), ratio_text)
    clock = {"cpu": "CPU time", "wall": "wall time"}.get(str(find(latency, "primary")), "time")
    return Tile(
        "Latency",
        times_text(ratio, "faster", "slower", "as fast"),
        f"{clock} ratio {ratio_text(ratio)}, {100 * confidence:.3g} % bounds {bounds}",
    )


def instruction_tile(measure: Report, ratio: float) -> Tile:
    """What stands in for latency where the target is emulated."""
    before, after = (
        count_text(find(measure, "instructions", side, "total"))
        for side in ("original", "candidate")
    )
    detail = f"{before} → {after} of one inference, counted; emulated time is not latency"
    return Tile("Instructions", times_text(ratio, "fewer", "more", "as many"), detail)


def metric_tile(report: Report) -> Tile:
    validate = stage_report(report, "validate")
    metric = validate.get("metric")
    retained = number(find(metric, "shipped", "retained"))
    if retained is None:
        return unknown(
            "Metric",
            validate.get("metric_reason"),
            "the recipe names no metric" if validate else None,
        )
    name = plain(find(metric, "name") or "score")
    before, after = find(metric, "original", "score"), find(metric, "shipped", "score")
    return Tile(
        "Metric",
        f"{share_text(retained)} kept",
        f"{name}: {score_text(before)} → {score_text(after)}",
    )


def memory_tile(report: Report) -> Tile:
    measure = stage_report(report, "measure")
    memory = measure.get("memory")
    ratio = number(find(memory, "ratio"))
    if ratio is None or ratio <= 0:
        return unknown("Peak memory", measure.get("memory_reason"), find(memory, "reason"))
    words = f"{rough_share_text(abs(1 - ratio))} {'less' if ratio < 1 else 'more'}"
    before, after = find(memory, "original_peak_bytes"), find(memory, "candidate_peak_bytes")
    return Tile(
        "Peak memory",
        words if abs(ratio - 1) >= 0.005 else "the same",
        f"{bytes_text(before)} → {bytes_text(after)}, whole process",
    )


def agreement_tile(report: Report) -> Tile:
    agreement = find(stage_report(report, "validate"), "agreement")
    top1 = number(find(agreement, "top1"))
    noise = sqnr(agreement)
    samples = count_text(find(agreement, "samples"))
    if top1 is not None:
        detail = f"same top answer as the original on {samples} samples"
        return Tile("Agreement", share_text(top1), detail)
    if noise is not None:
        detail = f"signal to quantization noise, worst output, {samples} samples"
        return Tile("Agreement", noise, detail)
    return unknown("Agreement", find(agreement, "reason"))


def sqnr(agreement: Any) -> str | None:
    """The least signal-to-noise ratio over the outputs; exact outputs have none."""
    table = find(agreement, "sqnr_db")
    if not isinstance(table, dict) or not table:
        return None
    known = [v for v in (number(value) for value in table.values()) if v is not None]
    return f"{min(known):.1f} dB" if known else "exact"


def kernel_tile(report: Report) -> Tile:
    placement = find(stage_report(report, "measure"), "placement")
    kinds = find(placement, "nodes_by_kind")
    if not isinstance(kinds, dict) or not kinds:
        return unknown("Int8 kernels", find(placement, "reason"))
    counts = ", ".join(
        f"{count_text(kinds[kind])} {KINDS.get(kind, plain(kind))}"
        for kind in sorted(kinds, key=lambda kind: [*KINDS, kind].index(kind))
    )
    share = number(find(placement, "int8_share"))
    if share is not None:
        return Tile("Int8 kernels", f"{rough_share_text(share)} of the time", f"nodes: {counts}")
    work = number(find(placement, "int8_work_share"))
    if work is not None and "compiled" in kinds:
        detail = f"layers in int8 form; kernels are the provider's own; nodes: {counts}"
        return Tile("Int8 kernels", f"{rough_share_text(work)} of the work", detail)
    total = sum(int(c) for c in (number(v) for v in kinds.values()) if c is not None)
    int8 = int(number(kinds.get("int8")) or 0)
    return Tile("Int8 kernels", f"{int8} of {total} nodes", f"executed nodes: {counts}")


def bounds_text(low: Any, high: Any, form: Any) -> str:
    """An interval; MISSING on the side that has no bound."""
    if number(low) is None and number(high) is None:
        return MISSING
    return f"{form(low)} to {form(high)}"


def check_kind(name: str) -> tuple[str, str]:
    """The name of a check without its prefix, and the release that the prefix names, or ""."""
    for prefix, release in RELEASES.items():
        if name.startswith(prefix):
            return name.removeprefix(prefix), release
    return name, ""


def check_label(name: str) -> str:
    """What a check is about, in words."""
    kind, release = check_kind(name)
    label = LABELS.get(kind, kind.replace("_", " "))
    if not release:
        return label
    ours = label.replace("the original", release).replace("original", release.removeprefix("the "))
    return ours if ours != label else f"{label}, against {release}"


def check_form(kind: str) -> Any:
    """How the values of a check are written, by its name without prefix."""
    if kind.endswith("_bytes"):
        return bytes_text
    if kind.endswith("_ms"):
        return ms_text
    if kind.endswith("ratio") or kind in RATIOS:
        return ratio_text
    if kind == "max_instructions":
        return count_text
    if kind.startswith("min_") or kind in SHARES:
        return share_text
    return score_text


def gate(report: Report) -> list[Check]:
    """The checks of the gate, in its own order."""
    lines = []
    for row in rows(stage_report(report, "gate").get("checks")):
        name = plain(row.get("name"))
        kind, _ = check_kind(name)
        form = check_form(kind)
        limit = form(row.get("limit"))
        least = kind.startswith("min_") or kind in SHARES
        most = kind.startswith("max_") or kind in RATIOS
        sign = "≥ " if least else "≤ " if most else ""
        lines.append(
            Check(
                name=name,
                label=check_label(name),
                limit=limit if limit == MISSING else sign + limit,
                value=form(row.get("value")),
                bounds=bounds_text(row.get("low"), row.get("high"), form),
                verdict=plain(row.get("verdict")),
                reason=plain(row.get("reason") or ""),
            )
        )
    return lines


def stages(report: Report) -> list[Stage]:
    """One line per finished stage."""
    found = rows(report.get("stages"))
    metric = find(stage_report(report, "validate"), "metric")
    sizes = [number(find(row, "report", "model", "bytes")) for row in found]
    largest = max((s for s in sizes if s), default=1.0)
    lines = []
    for row, size in zip(found, sizes, strict=True):
        name = plain(row.get("stage"))
        inner = row.get("report")
        at_stage = find(metric, "stages", name) if name != "export" else find(metric, "original")
        retained = 1.0 if name == "export" and at_stage else find(at_stage, "retained")
        lines.append(
            Stage(
                name=name,
                cached=row.get("cached") is True,
                score=score_text(find(at_stage, "score")),
                retained=share_text(retained),
                size=bytes_text(size),
                size_share=(size or 0.0) / largest,
                nodes=count_text(find(inner, "model", "nodes")),
                seconds=seconds_text(find(inner, "seconds")),
                memory=bytes_text(find(inner, "peak_rss_bytes")),
            )
        )
    return lines


def steps(report: Report) -> list[Step]:
    """One line per stage that changed the model; sizes and work as shares of the original's."""
    found = rows(find(stage_report(report, "validate"), "steps"))
    export = stage_report(report, "export")
    before = number(find(export, "model", "bytes"))
    lines = []
    for row in found:
        size, work = number(row.get("bytes")), number(row.get("macs"))
        macs = number(row.get("original_macs"))
        noise = number(row.get("sqnr_db"))
        lines.append(
            Step(
                stage=plain(row.get("stage")),
                kept=share_text(row.get("retained")),
                same=MISSING if noise is None else "equal" if noise >= 200 else f"{noise:.1f} dB",
                top1=share_text(row.get("top1")),
                size=rough_share_text(size / before) if size and before else bytes_text(size),
                macs=rough_share_text(work / macs) if work and macs else MISSING,
                latency=ratio_text(row.get("cpu_ratio")),
            )
        )
    return lines


def paired(report: Report) -> str:
    """The paired comparison of samples in one sentence; empty where there is none."""
    facts = find(stage_report(report, "validate"), "metric", "paired")
    loss = number(find(facts, "mean_loss"))
    if loss is None:
        return ""
    counts = [count_text(find(facts, key)) for key in ("samples", "worse", "better")]
    bounds = bounds_text(find(facts, "mean_loss_low"), find(facts, "mean_loss_high"), score_text)
    chance = score_text(find(facts, "sign_test_p"))
    return (
        f"Sample by sample, shipped against original: of {counts[0]} samples {counts[1]} are worse "
        f"and {counts[2]} better; mean loss {score_text(loss)} (95 % bounds {bounds}), "
        f"sign test p = {chance}."
    )


def notes(report: Report) -> list[Note]:
    """All remarks, warnings first, else in the order of the stages."""
    found = []
    for row in rows(report.get("stages")):
        for note in rows(find(row, "report", "notes")):
            found.append(
                Note(plain(row.get("stage")), plain(note.get("level")), plain(note.get("text")))
            )
    return sorted(found, key=lambda note: note.level != "warning")


def flat(value: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """A nested dict as (dotted name, text) pairs."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{above}.{plain(key)}" if above else plain(key))
    elif isinstance(value, list):
        yield above, ", ".join(plain(item) for item in value) or MISSING
    else:
        yield above, plain(value)


def grouped(items: Sequence[dict[str, Any]], *keys: str) -> list[tuple[tuple[str, ...], list[str]]]:
    """Rows with equal values at `keys` together, with their node names; largest group first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in items:
        place = tuple(plain(row.get(key) or MISSING) for key in keys)
        groups.setdefault(place, []).append(plain(row.get("node") or row.get("name") or MISSING))
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
