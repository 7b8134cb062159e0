"""The curves of a run as SVG, to stand inside an HTML page."""

import html
import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from synco_fast.ops import KINDS

Rows = Sequence[dict[str, Any]]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, SKY, GREEN, YELLOW, ORANGE, VERMILLION = "#0072b2", "#56b4e9", "#009e73", "#f0e442", "#e69f00", "#d55e00"
DARK, GREY = "#333333", "#c4c4c4"
MASS_COLOURS = dict(
    zip(("positive", "queue", *KINDS), (DARK, GREY, BLUE, SKY, GREEN, YELLOW, ORANGE, VERMILLION), strict=True)
)

WIDTH = 9.2
_POINTS = 1000
_ROOM = 1.02  # to the right of a line, so that its last point is not cut
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    # Text stays text, and the same run gives the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "synco-fast",
}


def knn(rows: Rows, references: dict[str, float], name: str) -> str:
    """kNN accuracy after each evaluated epoch.

    Args:
        rows: of kind knn. references: accuracies drawn as level lines, by label. name: of the method.
    """
    with matplotlib.rc_context(STYLE):
        figure, [ax] = _figure(1, 3.3)
        epochs = [row["epoch"] + 1 for row in rows]
        ax.plot(epochs, _column(rows, "accuracy"), color=BLUE, marker="o", markersize=4, label=name)
        dashes = (":", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
        colours = (DARK, ORANGE, VERMILLION, GREEN)
        for (label, value), dash, colour in zip(references.items(), dashes, colours, strict=False):
            ax.axhline(value, color=colour, linestyle=dash, label=label)
        ax.set(xlabel="epochs done", xlim=(0, epochs[-1] + 0.5))
        _percent(ax)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return svg(figure, f"kNN accuracy over epochs of {name}")


def learning(rows: Rows, warmup_end: int | None) -> str:
    """Loss and proxy accuracy over steps; the steps before `warmup_end` see the queue only."""
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = _figure(2, 2.9)
        rows = _thinned(rows)
        steps, note = _column(rows, "step"), "" if warmup_end is None else " (grey: queue-only warm-up)"
        left.plot(steps, _column(rows, "loss"), marker=_marker(rows), color=BLUE)
        left.set_title(f"loss{note}")
        right.plot(steps, _column(rows, "acc1"), marker=_marker(rows), color=BLUE, label="acc@1")
        right.plot(steps, _column(rows, "acc5"), "--", marker=_marker(rows), color=ORANGE, label="acc@5")
        right.set_title(f"proxy accuracy{note}")
        _percent(right)
        right.legend(loc="upper right")
        for ax in (left, right):
            ax.set_xlim(0, steps[-1] * _ROOM)
            if warmup_end is not None:
                ax.axvspan(0, warmup_end, color="#ececec", zorder=0)
        return svg(figure, "loss and proxy accuracy over steps")


def mass(rows: Rows) -> str:
    """Mean share of the softmax denominator that the positive, the queue and each kind of synthetic negative hold."""
    with matplotlib.rc_context(STYLE):
        figure, [ax] = _figure(1, 3.3)
        rows = _thinned(rows)
        kinds = [kind for kind in MASS_COLOURS if any(f"mass_{kind}" in row for row in rows)]
        ax.stackplot(
            _column(rows, "step"),
            [_column(rows, f"mass_{kind}") for kind in kinds],
            colors=[MASS_COLOURS[kind] for kind in kinds],
            labels=kinds,
            edgecolor="white",
            linewidth=0.4,
        )
        ax.set_xlim(0, rows[-1]["step"])
        _percent(ax, top=1)
        handles, labels = ax.get_legend_handles_labels()
        # In the order of the layers, the upper ones first.
        ax.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))
        return svg(figure, "share of the softmax denominator over steps, by kind of negative")


def pace(rows: Rows) -> str:
    """Throughput, share of time spent waiting for data, and learning rate, over steps."""
    with matplotlib.rc_context(STYLE):
        figure, (speed, wait, rate) = _figure(3, 2.4)
        rows = _thinned(rows)
        steps, timings = _column(rows, "step"), [row["timing"] for row in rows]
        speed.plot(steps, _column(timings, "images_per_second"), marker=_marker(rows), color=BLUE)
        speed.set_title("images/s")
        wait.plot(steps, _column(timings, "data_wait"), marker=_marker(rows), color=VERMILLION)
        wait.set_title("data wait")
        rate.plot(steps, _column(rows, "lr"), marker=_marker(rows), color=GREEN)
        rate.set_title("learning rate")
        for ax in (speed, wait, rate):
            ax.set(xlim=(0, steps[-1] * _ROOM), ylim=(0, None))
        _percent(wait, top=1)
        return svg(figure, "images per second, data wait and learning rate over steps")


def _figure(columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for ax in axes:
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=10 // columns + 1, integer=True, steps=[1, 2, 5, 10]))
    return figure, axes


def _column(rows: Rows, key: str) -> list[float]:
    """A metric's values; null, which stands for not a number, leaves a gap."""
    return [math.nan if row.get(key) is None else row[key] for row in rows]


def _thinned(rows: Rows) -> Rows:
    """Every n-th row, so that a long run's page stays small; the last is among them."""
    n = -(-len(rows) // _POINTS)
    return rows[(len(rows) - 1) % n :: n]


def _marker(rows: Rows) -> str:
    """Points are shown where there are few: a line through one row would be invisible."""
    return "." if len(rows) <= 50 else ""


def _percent(ax: Axes, top: float | None = None) -> None:
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_ylim(0, top)


def svg(figure: Figure, description: str) -> str:
    """A figure as an element to stand in a page, with what it shows in words. Drawn with `STYLE`, it is the same file
    each time.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    # What comes before the element, an XML declaration and a document type, has no place inside a page.
    element = buffer.getvalue().partition("<svg ")[2]
    return f'<svg role="img" aria-label="{html.escape(description)}" {element}'
