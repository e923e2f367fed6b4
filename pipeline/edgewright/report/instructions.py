"""The instruction section of a report: classes of opcodes, shipped against original."""

from typing import Any

from edgewright.report import tables
from edgewright.report.tables import find, number, plain

# What the classes of `runtime.counting` are, in the order of the page.
CLASSES = {
    "dot": "dot products of int8 (SDOT, UDOT)",
    "i8mm": "int8 matrices (SMMLA, USMMLA, USDOT)",
    "mlal": "widening multiplications (SMLAL, SMULL)",
    "fmla": "multiplications of floats (FMLA)",
    "simd": "other vector and float instructions",
    "sve": "SVE and SME",
    "memory": "loads and stores",
    "branch": "branches and system",
    "other": "integers and addresses",
}


def view(measure: tables.Report) -> dict[str, Any]:
    """What the template shows; empty where nothing was counted."""
    counts = measure.get("instructions")
    if not isinstance(counts, dict):
        return {}
    sides = ("original", "candidate")
    rows = [row("all", *(find(counts, side, "total") for side in sides))]
    for key, label in CLASSES.items():
        values = [find(counts, side, "classes", key) for side in sides]
        if any(number(value) for value in values):
            rows.append(row(label, *values))
    numbers = [find(counts, side, "runs") for side in sides]
    return {
        "rows": rows,
        "alike": all(isinstance(runs, list) and len(set(runs)) == 1 for runs in numbers),
        "method": plain(counts.get("statistic")),
        "emulator": plain(counts.get("emulator")),
    }


def row(label: str, before: Any, after: Any) -> tuple[str, str, str, str]:
    """One line: original, shipped, ratio."""
    old, new = number(before), number(after)
    ratio = tables.ratio_text(new / old) if new is not None and old else tables.MISSING
    return label, tables.count_text(before), tables.count_text(after), ratio
