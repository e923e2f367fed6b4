"""What `edgewright bench` prints: figures of one measurement, for people."""

from typing import Any

Lines = list[tuple[str, str]]
SIDES = {"candidate": "the model", "original": "the other"}


def lines(report: dict[str, Any], *, alone: bool) -> Lines:
    """Rows of a name and a value; `alone`: both sides are the one model."""
    found: Lines = []
    sides = {"candidate": "the model"} if alone else SIDES
    latency, memory = report.get("latency") or {}, report.get("memory") or {}
    for side, name in sides.items():
        found += times(f"latency of {name}", latency.get(side) or {})
        load = (report.get("load") or {}).get(side) or {}
        if load:
            text = ", ".join(
                f"{what} {1e3 * load[key]:.1f} ms"
                for what, key in (
                    ("cold start", "cold_start_s"),
                    ("of it the runtime", "import_s"),
                    ("the load", "load_s"),
                    ("the first run", "first_run_s"),
                )
            )
            found.append((f"start of {name}", text))
        if peak := memory.get(f"{side}_peak_bytes"):
            cost = memory[f"{side}_cost_bytes"] / 1e6
            text = f"{peak / 1e6:.1f} MB, of it the model's {cost:.1f}"
            if without := memory.get(f"{side}_peak_no_arena_bytes"):
                text += f"; {without / 1e6:.1f} MB without the arena"
            found.append((f"peak memory of {name}", text))
    if counted := report.get("instructions"):
        found += instructions(counted, sides)
    if not alone and latency.get("ratio"):
        found.append(("latency, the model / the other", ratio(latency)))
    rates = report.get("throughput") or {}
    for kind in ("threads", "streams"):
        for row in rates.get(kind, []):
            word = kind if row[kind] > 1 else kind.removesuffix("s")
            text = f"{row['per_second']:.1f} a second"
            text += f" ({min(row['rounds']):.1f} to {max(row['rounds']):.1f})"
            found.append((f"throughput, {row[kind]} {word}", text))
    if joules := report.get("energy"):
        text = f"{joules['joules_per_call']:.4g} J a call, {joules['remark']}"
        found.append(("energy", text))
    elif report.get("energy_reason"):
        found.append(("energy", f"not measured: {report['energy_reason']}"))
    noise = report.get("noise")
    if noise:
        quiet = "can bind here" if noise["quiet"] else f"cannot bind here: {noise['reason']}"
        found.append(("limits in ms and bytes", quiet))
    if not latency:
        found.append(("no latency", report.get("latency_reason") or "no reason given"))
    return found


def times(name: str, side: dict[str, Any]) -> Lines:
    """The percentiles that the calls support, and why another one is missing."""
    if not side:
        return []
    parts = []
    for key in ("p50", "p90", "p99"):
        value = side.get(f"{key}_ms")
        parts.append(f"{key} {value:.3f} ms" if value else f"no {key}: {side.get(f'{key}_reason')}")
    return [(name, f"{', '.join(parts)} ({side['runs']} calls)")]


def instructions(counted: dict[str, Any], sides: dict[str, str]) -> Lines:
    """Instructions of one inference under emulation, the largest classes, and the ratio."""
    found = []
    for side, name in sides.items():
        counts = counted[side]
        classes = sorted(counts["classes"].items(), key=lambda item: -item[1])
        parts = ", ".join(f"{key} {count:,}" for key, count in classes if count)
        alike = counts["runs"].count(counts["total"])
        text = f"{counts['total']:,} in {alike} of {len(counts['runs'])} runs; of them {parts}"
        found.append((f"instructions of {name}", text))
    if len(sides) > 1:
        found.append(("instructions, the model / the other", f"{counted['ratio']:.3f}"))
    return found


def ratio(latency: dict[str, Any]) -> str:
    """The ratio with its bounds."""
    low, high = latency.get("ratio_low"), latency.get("ratio_high")
    bounds = f" ({low:.3f} to {high:.3f})" if low and high else ", too few pairs for bounds"
    return f"{latency['ratio']:.3f}{bounds}, {latency['primary']} time"
