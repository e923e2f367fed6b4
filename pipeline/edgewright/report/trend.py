"""The trend of a model on a target: its figures over the verdicts that a history holds."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from edgewright.report import history, plots, tables
from edgewright.report.tables import number, plain

SHOWN = 60  # verdicts, the newest
BEYOND = 1e15  # no figure of ours, so a damaged line: it would break the plot
FIGURES = (
    ("latency_ratio", "latency, shipped / original", 1.0),
    ("retained", "metric kept, %", 100.0),
    ("size_bytes", "size, MB", 1e-6),
    ("peak_bytes", "peak memory, MB", 1e-6),
)
COLOURS = {"PASS": plots.SHIPPED, "FAIL": plots.LIMIT}


def view(
    report: tables.Report, entries: Sequence[history.Entry], faults: Sequence[history.Fault]
) -> dict[str, Any]:
    """What the page shows of a history: plots, the newest verdicts, damaged lines."""
    known = history.same_model(entries, report)[-SHOWN:]
    drawn = [plot(key, label, scale, known) for key, label, scale in FIGURES]
    return {
        "plots": [
            (label, Markup(svg)) for (_, label, _), svg in zip(FIGURES, drawn, strict=True) if svg
        ],
        "rows": [row(count, one) for count, one in enumerate(known, 1)][::-1],
        "faults": history.told(faults),
    }


def row(count: int, one: history.Entry) -> tuple[str, ...]:
    """One verdict as text: its number in the plots, version, commit, label, what decided."""
    decisive = one.get("failed") or one.get("unsure") or []
    names = [tables.check_label(plain(name)) for name in decisive if isinstance(name, str)]
    return (
        str(count),
        plain(one["version"]),
        plain(one["verdict"]),
        plain(one.get("commit")),
        plain(one.get("label") or ""),
        ", ".join(names),
    )


def plot(key: str, label: str, scale: float, entries: Sequence[history.Entry]) -> str:
    """One figure over the verdicts, with its bounds where it has some; empty below two points."""
    points = [
        (count, scale * value, one)
        for count, one in enumerate(entries, 1)
        if (value := number(one["metrics"].get(key))) is not None and abs(value) < BEYOND
    ]
    if len(points) < 2:
        return ""

    def paint(axes: Axes) -> None:
        across, up = [x for x, _, _ in points], [y for _, y, _ in points]
        axes.plot(across, up, color=plots.LINE, linewidth=1.2, zorder=1)
        for x, y, one in points:
            low, high = (number(one["metrics"].get(f"{key}_{side}")) for side in ("low", "high"))
            colour = COLOURS.get(one["verdict"], plots.MUTED)
            if low is not None and high is not None and max(abs(low), abs(high)) < BEYOND:
                axes.plot([x, x], [scale * low, scale * high], color=colour, linewidth=1.2)
            # A FAIL differs in form, too: colours alone do not tell everyone.
            form = {"PASS": "o", "FAIL": "X"}.get(one["verdict"], "D")
            axes.plot([x], [y], form, color=colour, markersize=5.5, zorder=3)
        axes.set_xlim(0.5, len(entries) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(y=0.2)
        axes.set_xlabel("verdict, the oldest first (cross: FAIL, diamond: INCONCLUSIVE)")
        axes.set_ylabel(label)

    return plots.draw(f"trend-{key.replace('_', '-')}", paint)
