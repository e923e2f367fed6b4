"""The page of a build: one file that needs no network, no script and no other file."""

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from edgewright.report import compression, instructions, plots, tables
from edgewright.report.tables import find, number, plain, rows, table

TEMPLATE = "report.html.j2"
NAMES_SHOWN = 12  # of the nodes in one group
KINDS = (
    ("int8", "int8 kernels"),
    ("border", "conversions between them"),
    ("float", "float kernels"),
    ("other", "other"),
)


def render(report: tables.Report, past: dict[str, Any] = {}) -> str:
    """The page for a build report, `edgewright-report/1`; same report, same page.

    past: the verdicts before, as `trend.view` tells them. Names from models and users are
    escaped. Parts that a report lacks are shown as such.
    """
    return template().render(view(report), past=past)


@cache
def template(name: str = TEMPLATE) -> jinja2.Template:
    """A page with everything left out; an unknown name in it is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def view(report: tables.Report) -> dict[str, Any]:
    """Everything the template shows, as text."""
    measure = tables.stage_report(report, "measure")
    verdict = tables.verdict(report)
    return {
        "name": plain(report.get("name")),
        "version": plain(report.get("version")),
        "target": plain(report.get("target")),
        "verdict": verdict,
        "tone": verdict.lower().replace(" ", "-"),
        "explanation": tables.explanation(report),
        "emulated": measure.get("emulated") is True,
        "tiles": tables.tiles(report),
        "checks": tables.gate(report),
        "stages": tables.stages(report),
        "steps": tables.steps(report),
        "paired": tables.paired(report),
        "total": total_time(report),
        "latency": latency(report, measure),
        "instructions": instructions.view(measure),
        "kernels": kernels(measure),
        "quantize": quantize(tables.stage_report(report, "quantize")),
        "compression": compression.view(report),
        "notes": tables.notes(report),
        "digests": digests(report),
        "environment": list(tables.flat(table(report.get("environment")))),
        "machine": list(tables.flat(table(measure.get("host")))),
        "missing": tables.MISSING,
        "schema": plain(report.get("schema")),
    }


def total_time(report: tables.Report) -> str:
    """Seconds of all stages together, those from the cache as long as they once took."""
    times = [number(find(row, "report", "seconds")) for row in rows(report.get("stages"))]
    known = [time for time in times if time is not None]
    return tables.seconds_text(sum(known)) if known else tables.MISSING


def latency(report: tables.Report, measure: tables.Report) -> dict[str, Any]:
    """The latency section: plots, percentiles of both models, how it was measured."""
    facts = measure.get("latency")
    if not isinstance(facts, dict):
        reason = measure.get("latency_reason")
        return {"reason": plain(reason) if reason else "the measure stage did not run"}
    limit = next(
        (
            number(check.get("limit"))
            for check in rows(tables.stage_report(report, "gate").get("checks"))
            if check.get("name") == "max_latency_ratio"
        ),
        None,
    )
    percentiles = []
    for key, label in (("p50_ms", "median"), ("p90_ms", "p90"), ("p99_ms", "p99")):
        cells = [latency_cell(facts, side, key) for side in ("original", "candidate")]
        percentiles.append((label, *cells, quotient(facts, key)))
    load = measure.get("load")
    cold = [number(find(load, side, "cold_start_s")) for side in ("original", "candidate")]
    if all(time is not None for time in cold):
        cells = [f"{1e3 * (time or 0):.0f} ms" for time in cold]
        ratio = tables.ratio_text((cold[1] or 0) / cold[0]) if cold[0] else tables.MISSING
        percentiles.append(("cold start", *cells, ratio))
    noise = measure.get("noise")
    return {
        "reason": "",
        "plot": Markup(plots.latency(measure)),
        "ratios": Markup(plots.pair_ratios(measure, limit)),
        "percentiles": percentiles,
        "method": plain(facts.get("statistic") or ""),
        "pairs": tables.count_text(facts.get("pairs")),
        "launches": tables.count_text(facts.get("launches")),
        "quiet": find(noise, "quiet"),
        "noise": plain(find(noise, "reason") or ""),
    }


def latency_cell(facts: tables.Report, side: str, key: str) -> str:
    """One percentile of one model, or why there is none."""
    if number(find(facts, side, key)) is not None:
        return tables.ms_text(find(facts, side, key))
    reason = find(facts, side, key.replace("_ms", "_reason"))
    return plain(reason) if reason else tables.MISSING


def quotient(facts: tables.Report, key: str) -> str:
    new, old = (number(find(facts, side, key)) for side in ("candidate", "original"))
    return tables.ratio_text(new / old) if new is not None and old else tables.MISSING


def kernels(measure: tables.Report) -> dict[str, Any]:
    """Which kernels the runtime took: share of time per kind, operators, strays."""
    placement = measure.get("placement")
    if not isinstance(placement, dict):
        return {"reason": "the measure stage has not profiled the model"}
    shares = [(key, label, number(placement.get(f"{key}_share"))) for key, label in KINDS]
    known = [share for share in shares if share[2] is not None]
    unit = "of the time"
    if not known:
        counts = table(placement.get("nodes_by_kind"))
        total = sum(number(count) or 0 for count in counts.values())
        unit = "of the executed nodes"
        known = [
            (key, label, (number(find(counts, key)) or 0) / total)
            for key, label in KINDS
            if total and number(find(counts, key))
        ]
    return {
        "reason": "",
        "provider": plain(placement.get("provider")),
        "provider_share": tables.rough_share_text(placement.get("provider_share")),
        "required_share": tables.rough_share_text(placement.get("required_share")),
        "shares": [(k, label, s, tables.rough_share_text(s)) for k, label, s in known if s],
        "unit": unit,
        "share_reason": plain(placement.get("share_reason") or ""),
        "operators": [
            (
                plain(row.get("op")),
                tables.KINDS.get(str(row.get("kind")), plain(row.get("kind"))),
                tables.count_text(row.get("count")),
                tables.rough_share_text(row.get("share")),
            )
            for row in rows(placement.get("operators"))
        ],
        "strays": [
            (plain(row.get("name")), plain(row.get("op")), plain(row.get("provider")))
            for row in rows(placement.get("strays"))
        ],
    }


def quantize(report: tables.Report) -> dict[str, Any]:
    """What the quantize stage decided: scheme, nodes per kind, reasons of what stayed float."""
    if not report:
        return {"reason": "the quantize stage did not run"}
    nodes = rows(report.get("placement"))
    kept = [row for row in nodes if row.get("runs_as") != "int8"]
    groups = [
        (op, reason, len(names), ", ".join(names[:NAMES_SHOWN]), max(0, len(names) - NAMES_SHOWN))
        for (op, reason), names in tables.grouped(kept, "op", "reason")
    ]
    return {
        "reason": "",
        "facts": list(tables.flat({"scope": report.get("scope"), **table(report.get("scheme"))})),
        "audit": list(tables.flat(table(report.get("audit")))),
        "int8": len(nodes) - len(kept),
        "float": len(kept),
        "groups": groups,
        "choices": [choice_row(row) for row in rows(report.get("choices"))],
        "prices": prices(table(report.get("prices"))),
    }


def prices(found: tables.Report) -> dict[str, Any]:
    """What int8 gains per region, dearest first, and by which margins regions were dropped."""
    regions = rows(found.get("regions"))
    facts = {k: v for k, v in found.items() if k != "regions" and v not in (None, "")}
    regions.sort(key=lambda r: -(number(r.get("float_us")) or 0.0))
    return {
        "facts": list(tables.flat(facts)),
        "regions": [
            (
                ", ".join(plain(n) for n in (row.get("nodes") or [])[:NAMES_SHOWN]),
                *(f"{number(row.get(k)) or 0.0:.1f}" for k in ("float_us", "int8_us", "border_us")),
                plain(row.get("decision")),
            )
            for row in regions
        ],
    }


def choice_row(row: tables.Report) -> tuple[str, str, str]:
    """One thing the quantizer tried: what, what came of it, what was decided."""
    step = plain(row.get("step"))
    label = plain(row.get("correction")) if row.get("correction") else step
    before, after = number(row.get("sqnr_db_before")), number(row.get("sqnr_db_after"))
    if before is not None and after is not None:
        found = f"{before:.1f} dB → {after:.1f} dB on held-out inputs"
        return label, found, "kept" if row.get("kept") else "dropped: it does not help here"
    retained = number(row.get("retained"))
    if retained is not None:
        regions = row.get("regions_in_float") or 0
        where = f"{regions} regions in float" if regions else "all planned nodes int8"
        wanted = number(row.get("wanted"))
        goal = f"wanted: {tables.share_text(wanted)}" if wanted is not None else ""
        return label, f"{where}: {tables.share_text(retained)} of the metric kept", goal
    ratio = number(row.get("cpu_ratio"))
    if ratio is not None:
        return "does int8 pay", f"{ratio:.2f} of the float model's time", ""
    return label, plain(row.get("reason")), "dropped" if row.get("kept") is False else ""


def digests(report: tables.Report) -> list[tuple[str, str]]:
    """What fixes the artefacts: SHA-256 by what it is of."""
    found = []
    for row in rows(report.get("stages")):
        if digest := find(row, "report", "model", "sha256"):
            found.append((f"model after {plain(row.get('stage'))}", plain(digest)))
    bundle = tables.stage_report(report, "bundle")
    if bundle.get("sha256"):
        found.append((plain(bundle.get("bundle")), plain(bundle["sha256"])))
    for entry in rows(bundle.get("files")):
        found.append((f"in the bundle: {plain(entry.get('path'))}", plain(entry.get("sha256"))))
    return found
