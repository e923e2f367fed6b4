"""A ladder of pruning budgets: one row per build, and the page that draws them."""

from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from edgewright.report import plots, tables
from edgewright.report.html import template
from edgewright.report.tables import find, number, plain

TEMPLATE = "sweep.html.j2"
Row = dict[str, Any]


def row(budget: float | None, result: dict[str, Any]) -> Row:
    """The figures of one build; `budget` None is the build without pruning.

    latency: the gate's ratio on the target; None under emulation. work: of the original's
    multiply-accumulates. Shares are of the original.
    """
    report = result["report"]
    found: Row = {"budget": budget, "verdict": result["verdict"], "error": result.get("error")}
    if not report:
        return {**found, "retained": None, "latency": None, "size": None, "work": None}
    measure = tables.stage_report(report, "measure")
    steps = tables.rows(find(tables.stage_report(report, "validate"), "steps"))
    work = number(find(steps[-1], "macs")) if steps else None
    whole = number(find(steps[-1], "original_macs")) if steps else None
    return {
        **found,
        "retained": find(tables.stage_report(report, "validate"), "metric", "shipped", "retained"),
        "latency": find(measure, "latency", "ratio"),
        "size": find(measure, "size", "ratio"),
        "work": work / whole if work and whole else None,
    }


def cells(one: Row) -> tuple[str, ...]:
    """One row as text: budget, metric kept, latency, size, work, verdict."""
    return (
        "whole" if one["budget"] is None else f"{one['budget']:g}",
        tables.share_text(one["retained"]),
        tables.ratio_text(one["latency"]),
        tables.ratio_text(one["size"]),
        tables.rough_share_text(one["work"]),
        one["verdict"] if not one["error"] else f"{one['verdict']}: {plain(one['error'])}",
    )


HEADS = ("budget", "metric kept", "latency", "size", "work", "verdict")


def page(name: str, target: str, of: str, ladder: list[Row]) -> str:
    """The page of a sweep: what is kept against latency and size, and the table behind it."""
    return template(TEMPLATE).render(
        name=plain(name),
        target=plain(target),
        of=plain(of),
        heads=HEADS,
        rows=[cells(one) for one in ladder],
        plots=[
            Markup(drawn(key, label, ladder))
            for key, label in (
                ("latency", "latency, shipped / original"),
                ("size", "size, shipped / original"),
            )
        ],
    )


def drawn(key: str, label: str, ladder: list[Row]) -> str:
    """Metric kept against one figure; empty with fewer than two points."""
    known = [
        (number(one[key]), number(one["retained"]), one["budget"])
        for one in ladder
        if number(one[key]) is not None and number(one["retained"]) is not None
    ]
    if len(known) < 2:
        return ""

    def paint(axes: Axes) -> None:
        across = [x or 0.0 for x, _, _ in known]
        up = [100 * (y or 0.0) for _, y, _ in known]
        axes.plot(across, up, color=plots.SHIPPED, linewidth=1.4, marker="o", markersize=5)
        for x, y, (_, _, budget) in zip(across, up, known, strict=True):
            word = "whole" if budget is None else f"{budget:g}"
            axes.annotate(
                word,
                (x, y),
                color=plots.INK,
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
            )
        axes.margins(0.12, 0.2)
        axes.set_xlabel(label)
        axes.set_ylabel("metric kept, %")

    return plots.draw(f"sweep-{key}", paint)
