"""The plots of the page: SVG text that carries no date, no script and no fixed colours.

Drawn with stand-in colours, which become the page's CSS variables, so that one picture is
right in light, in dark and on paper. Labels are ours: nothing from a model gets into a plot.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from edgewright.report.tables import digits, find, number, rows

INK, MUTED, LINE, ORIGINAL, SHIPPED, LIMIT = (f"#0102{k:02x}" for k in range(6))
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    ORIGINAL: "var(--original)",
    SHIPPED: "var(--shipped)",
    LIMIT: "var(--fail)",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgewright",
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
BINS = 56
TAIL = 0.99  # the distribution is shown up to here; what lies beyond is told


def draw(name: str, paint: Callable[[Axes], None], size: tuple[float, float] = (5.4, 2.9)) -> str:
    """One plot as an <svg> element; ids are prefixed with `name`, so that plots do not clash."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says, pages look alike
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = re.sub(r'font: ([^;"]*?px) [^;"]*', r"font: \1 var(--font)", text)
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, variable)
    return text.strip()


def calls_ms(pairs: Sequence[dict[str, Any]], side: str) -> np.ndarray:
    """Wall milliseconds of single calls, without the first of a slice: it refills the caches."""
    calls: list[float] = []
    for pair in pairs:
        times = find(pair, side, "wall_us")
        if isinstance(times, list):
            known = [t for t in (number(time) for time in times) if t is not None and t > 0]
            calls += known[1:] if len(known) > 1 else known
    return np.asarray(calls) / 1e3


def latency(measure: dict[str, Any]) -> str:
    """Distribution of single calls of both models, from the raw slices; empty without them."""
    pairs = rows(find(measure, "raw", "pairs"))
    original, shipped = calls_ms(pairs, "original"), calls_ms(pairs, "candidate")
    if original.size < 2 or shipped.size < 2:
        return ""

    def paint(axes: Axes) -> None:
        low = min(original.min(), shipped.min())
        high = max(np.quantile(original, TAIL), np.quantile(shipped, TAIL))
        edges = np.linspace(low, high if high > low else low + 1e-3, BINS + 1)
        top = 0.0
        for times, colour in ((original, ORIGINAL), (shipped, SHIPPED)):
            counts, _ = np.histogram(times, edges)
            share = 100 * counts / times.size
            axes.stairs(share, edges, fill=True, color=colour, alpha=0.35)
            axes.stairs(share, edges, color=colour, linewidth=1.4)
            top = max(top, float(share.max()))
        axes.set_ylim(0, top * 1.35)  # a band above the bars, for words
        words = ((original, ORIGINAL, "original", 1.24), (shipped, SHIPPED, "shipped", 1.11))
        for times, colour, word, height in words:
            middle = float(np.median(times))
            axes.plot([middle, middle], [0, top * 1.05], color=colour, linewidth=1.4)
            axes.annotate(
                f"{word}, median {digits(middle)} ms",
                (0.995, top * height),
                xycoords=("axes fraction", "data"),
                ha="right",
                color=colour,
                weight="bold",
            )
        beyond = (original > edges[-1]).sum() + (shipped > edges[-1]).sum()
        tail = f" ({beyond} slower ones not shown)" if beyond else ""
        axes.set_xlabel(f"wall time of one call, ms{tail}")
        axes.set_ylabel("calls, %")

    return draw("latency", paint)


def pair_ratios(measure: dict[str, Any], limit: float | None) -> str:
    """Ratio shipped / original of every pair of slices in the order they ran; empty without."""
    clock = "cpu_us" if find(measure, "latency", "primary") == "cpu" else "wall_us"
    reduce = np.median if clock == "cpu_us" else np.min
    values, launches = [], []
    for pair in rows(find(measure, "raw", "pairs")):
        sides = [find(pair, side, clock) for side in ("candidate", "original")]
        if not all(isinstance(times, list) and times for times in sides):
            continue
        new, old = (float(reduce([number(t) or 0.0 for t in times])) for times in sides)
        if new > 0 and old > 0:
            values.append(new / old)
            launches.append(pair.get("launch"))
    if len(values) < 2:
        return ""
    middle = number(find(measure, "latency", "ratio"))
    low, high = (number(find(measure, "latency", key)) for key in ("ratio_low", "ratio_high"))

    def paint(axes: Axes) -> None:
        turns = np.arange(1, len(values) + 1)
        axes.scatter(turns, values, s=14, color=SHIPPED, alpha=0.55, linewidths=0)
        for k in range(1, len(launches)):
            if launches[k] != launches[k - 1]:
                axes.axvline(k + 0.5, color=LINE, linewidth=1, linestyle=(0, (2, 3)))
        if low is not None and high is not None:
            axes.axhspan(low, high, color=SHIPPED, alpha=0.2, linewidth=0)
        if middle is not None:
            axes.axhline(middle, color=SHIPPED, linewidth=1.4)
        marks = [(1.0, ORIGINAL, "original = 1")]
        if limit is not None and abs(limit - 1) > 0.005:
            marks.append((limit, LIMIT, f"limit {limit:g}"))
        elif limit is not None:
            marks = [(limit, LIMIT, f"original = 1, limit {limit:g}")]
        shown = np.quantile(values, [0.01, 0.99])
        bottom = min(shown[0], *(mark[0] for mark in marks))
        top = max(shown[1], *(mark[0] for mark in marks))
        room = 0.12 * (top - bottom) or 0.05
        axes.set_ylim(bottom - room, top + 2 * room)
        axes.set_xlim(0, len(values) + 1)
        for height, colour, word in marks:
            axes.axhline(height, color=colour, linewidth=1.2, linestyle=(0, (5, 3)))
            axes.annotate(
                word,
                (0.995, height),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                color=colour,
            )
        axes.set_xlabel("pair of slices, in turn (dotted line: new processes)")
        axes.set_ylabel("shipped / original")

    return draw("pairs", paint)
