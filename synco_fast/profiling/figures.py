"""Charts of a profile as SVG, to stand inside an HTML page."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from synco_fast.evaluation.charts import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    MASS_COLOURS,
    ORANGE,
    SKY,
    STYLE,
    VERMILLION,
    WIDTH,
    YELLOW,
    svg,
)
from synco_fast.profiling.text import milliseconds

_ROW, _MARGIN = 0.27, 0.75  # inches: a bar with its gap, and what the axis takes
_ROOM = 1.22  # to the right of the longest bar, for its label
_LETTER = 0.0085  # of the axis: the width of a letter of a stage's name
_MIB = 2**20
_STAGE_COLOURS = {
    "data wait": VERMILLION,
    "momentum update": YELLOW,
    "query forward": BLUE,
    "key forward": SKY,
    "op": ORANGE,
    "backward": GREEN,
    "unattributed": GREY,
}


def stages(step: dict[str, Any]) -> str:
    """Median of each stage with its 20th to 80th percentile, and its share of all steps' time."""
    rows = step["stages"]
    with matplotlib.rc_context(STYLE):
        labels = {name: f"{milliseconds(row['median_ms'])} ms, {row['share']:.1%}" for name, row in rows.items()}
        figure, ax = _bars(
            {name: row["median_ms"] for name, row in rows.items()},
            labels,
            _STAGE_COLOURS,
            {name: row["p80_ms"] for name, row in rows.items()},
        )
        for y, row in enumerate(rows.values()):
            ax.plot([row["p20_ms"], row["p80_ms"]], [y, y], color=DARK, linewidth=1, solid_capstyle="butt")
        ax.set_xlabel("ms of a step: median, and a line from the 20th to the 80th percentile")
        return svg(figure, "time of each stage of a step")


def phases(result: dict[str, Any]) -> str:
    """Each phase's part of the op's stage."""
    stage = result["step"]["stages"]["op"]["median_ms"]
    shares = result["op"]["phases"]
    with matplotlib.rc_context(STYLE):
        labels = {name: f"{milliseconds(share * stage)} ms, {share:.1%}" for name, share in shares.items()}
        figure, ax = _bars({name: share * stage for name, share in shares.items()}, labels, MASS_COLOURS)
        ax.set_xlabel("ms of the op in a step")
        return svg(figure, "time of each phase of the op")


def kinds(op: dict[str, Any]) -> str:
    """What each kind costs: by leaving it out, with the 95% interval, and by the clock inside the op."""
    rows = op["kinds"]
    with matplotlib.rc_context(STYLE):
        figure, ax = _rows([row["kind"] for row in rows])
        medians = [row["left_out"]["median_ms"] for row in rows]
        below = [max(0.0, row["left_out"]["median_ms"] - row["left_out"]["low_ms"]) for row in rows]
        above = [max(0.0, row["left_out"]["high_ms"] - row["left_out"]["median_ms"]) for row in rows]
        ax.errorbar(medians, range(len(rows)), xerr=[below, above], fmt="o", color=BLUE, capsize=3, label="left out")
        clocked = [(row["clock_ms"], y) for y, row in enumerate(rows) if row["clock_ms"] is not None]
        if clocked:
            ax.plot(
                *zip(*clocked, strict=True), "D", color=ORANGE, markersize=5, zorder=3, label="clocks inside the op"
            )
        ax.axvline(0, color=DARK, linewidth=0.8)
        ax.set_xlabel("ms of a call of the op")
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return svg(figure, "cost of each kind of synthetic negative")


def memory(devices: dict[str, list[list[float]]], stages: list[dict[str, Any]]) -> str:
    """Allocated memory over a step of each device, with the stages of the host in the background."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9 * len(devices)), layout="constrained")
        for ax, (device, points) in zip(
            figure.subplots(len(devices), squeeze=False)[:, 0], devices.items(), strict=True
        ):
            end = points[-1][0]
            values = [size / _MIB for _, size in points]
            top = 1.15 * max(*values, 1.0)  # room for the names of the stages
            ax.set(xlim=(0, end), ylim=(0, top), title=f"{device}: MiB allocated, highest {max(values):,.0f}")
            for stage in stages:
                _stage_band(ax, stage, end)
            times = [time for time, _ in points]
            ax.fill_between(times, values, step="post", color=BLUE, alpha=0.25, linewidth=0)
            ax.step(times, values, where="post", color=BLUE, linewidth=1)
        ax.set_xlabel("ms of a step under the profiler")
        return svg(figure, "memory allocated over a step")


def _stage_band(ax: Axes, stage: dict[str, Any], end: float) -> None:
    start, stop = stage["start_ms"], stage["end_ms"]
    ax.axvspan(start, stop, color=_STAGE_COLOURS.get(stage["name"], GREY), alpha=0.13, linewidth=0, zorder=0)
    if stop - start > _LETTER * len(stage["name"]) * end and stage["name"] != "gather":
        ax.text(
            (start + stop) / 2,
            0.99,
            stage["name"],
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=8,
        )


def _bars(
    values: dict[str, float], labels: dict[str, str], colours: dict[str, str], ends: dict[str, float] | None = None
) -> tuple[Figure, Axes]:
    """Horizontal bars from top to bottom, each with its label after it, or after an end further to the right."""
    figure, ax = _rows(list(values))
    ax.barh(range(len(values)), list(values.values()), height=0.72, color=[colours.get(name, DARK) for name in values])
    ends = {name: max(value, 0.0, (ends or {}).get(name, 0.0)) for name, value in values.items()}
    right = _ROOM * max(*ends.values(), 1e-6)
    for y, name in enumerate(values):
        ax.text(ends[name] + 0.01 * right, y, labels[name], va="center", fontsize=8.5)
    ax.set_xlim(0, right)
    return figure, ax


def _rows(names: list[str]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, _MARGIN + _ROW * len(names)), layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    return figure, ax
