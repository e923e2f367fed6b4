"""What of a build's reports goes into a bundle: only what the same inputs give again.

Times and memory depend on the day and the machine; they stay in the build's own report.
"""

import html
from collections.abc import Sequence
from typing import Any

from edgewright.bundle.manifest import Manifest
from edgewright.stage import Report

# Checks whose values do not depend on the day.
DETERMINISTIC = (
    "min_retained",
    "min_agreement",
    "max_size_ratio",
    "max_size_bytes",
    "min_provider_share",
    "min_int8_share",
)
LEFT_OUT = "latency, memory and start-up, which no second build gives again: see report.json"


def public(report: Report) -> Report:
    """The part of a gate report that is the same for the same inputs: no times, no memory."""
    checks = []
    for check in report["checks"]:
        kept = {key: check[key] for key in ("name", "limit", "verdict")}
        # Less than all of the work is a share of time.
        timed = check["name"] == "min_provider_share" and check["value"] != 1
        if check["name"] in DETERMINISTIC and not timed:
            kept["value"] = check["value"]
        checks.append(kept)
    return {"verdict": report["verdict"], "checks": checks}


def benchmark(reports: dict[str, Report], model: Report) -> Report:
    """Size, work, metric and agreement of what ships and of the original; `model`: its facts."""
    validate = reports.get("validate") or {}
    metric = validate.get("metric") or {}
    original = (reports.get("export") or {}).get("model") or {}
    size = {"shipped_bytes": model["bytes"]}
    if original.get("bytes"):
        size |= {"original_bytes": original["bytes"], "ratio": model["bytes"] / original["bytes"]}
    return {
        "size": size,
        "metric": {
            key: metric.get(key) for key in ("name", "higher_is_better", "original", "shipped")
        }
        | {"paired": metric.get("paired")}
        if metric
        else None,
        "agreement": validate.get("agreement"),
        "nodes": {"shipped": model["nodes"], "original": original.get("nodes")},
        "left_out": LEFT_OUT,
    }


def page(manifest: Manifest, bench: Report, gate: Report | None) -> bytes:
    """The evidence as one page without scripts; `bench`, `gate`: what the bundle holds of them."""
    model, runtime = manifest["model"], manifest["runtime"]
    metric, size = bench["metric"] or {}, bench["size"]
    title = f"{manifest['name']} {manifest['version']} for {manifest['target']}"
    facts = [
        ("sequence", manifest["sequence"] or "0 (not set)"),
        ("model", f"{model['bytes']} bytes, SHA-256 {model['sha256']}"),
        ("original", f"{size['original_bytes']} bytes" if "original_bytes" in size else "-"),
        ("runtime", f"{runtime['name']} {runtime['exact']}, {runtime['provider']}"),
        ("device", " ".join([manifest["device"]["arch"], *manifest["device"]["isa"]])),
        ("golden vectors", manifest["golden"]["count"]),
    ]
    if metric:
        shipped, original = metric["shipped"] or {}, metric["original"] or {}
        facts.append((metric["name"], f"{shipped.get('score')} (original {original.get('score')})"))
        facts.append(("metric kept", shipped.get("retained")))
    checks = [
        (c["name"], c["limit"], c.get("value", "not in a reproducible bundle"), c["verdict"])
        for c in (gate or {}).get("checks", [])
    ]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>Gate: <b>{html.escape((gate or {}).get('verdict', 'none'))}</b>. "
        f"Left out: {html.escape(LEFT_OUT)}.</p>",
        rows(("fact", "value"), facts),
        "<h2>Gate</h2>" + rows(("check", "limit", "value", "verdict"), checks) if checks else "",
    ]
    style = "body{font:16px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em .8em"
    style += ";text-align:left;border-bottom:1px solid #ccc;overflow-wrap:anywhere}"
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    body = "\n".join(part for part in parts if part)
    page = f'<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
    return f"<!doctype html>\n{page}".encode()


def rows(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table; every cell is escaped."""

    def row(tag: str, cells: Sequence[Any]) -> str:
        inner = "".join(
            f"<{tag}>{html.escape('-' if c is None else str(c))}</{tag}>" for c in cells
        )
        return f"<tr>{inner}</tr>"

    return "<table>" + row("th", head) + "".join(row("td", line) for line in lines) + "</table>"
