"""Figures of kernel benchmarks, drawn from their rows and nothing else: python -m bench.plots FILE... --output FOLDER.

One figure for each sweep of each device, dtypes and number of threads; of several such runs, the last one. The run at
one size gives two: bars, and a roofline.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.contenders import BASELINES
from bench.rows import Row, read
from synco_fast.errors import UserError
from synco_fast.ops import KINDS

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "moco_eager": "#8c8c8c",
    "published": "#d55e00",
    "published_vectorised": "#e69f00",
    "compiled": "#cc79a7",
    "eager": "#56b4e9",
    "cpu": "#009e73",
    "triton": "#0072b2",
    "cuda": "#333333",
    # Those of whole steps.
    "moco_eager_split": "#b3b3b3",
    "moco_compiled": "#cc79a7",
    "vectorised": "#e69f00",
    "moco": "#56b4e9",
    "mochi": "#0072b2",
    "synco": "#009e73",
}
_DASHES = {"moco": "--", "mochi": ":"}
_MARKERS = {"moco": "o", "synco": "s", "mochi": "^"}
# By the place of a row's dtype among those of its run.
_FILLS = ("full", "none", "left")
_HATCHES = ("", "////", "....")
_AXES = {
    "batch": "queries B",
    "queue": "queue rows K",
    "n_hard": "hard negatives N",
    "dim": "dimension D",
    "counts": "synthetic negatives, in multiples of SynCo's",
}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write every figure that the rows allow, as PNG; returns the files.

    Raises:
        UserError: no row has a time.
    """
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["median_ms"] is not None:
            runs.setdefault((row["device"], str(row["threads"]), row["date"], row["sweep"]), []).append(row)
    if not runs:
        raise UserError("no row has a time, so there is nothing to draw")
    # By name, so that a later run replaces an earlier one.
    named = {f"{sweep}-{_slug(run)}": run for (*_, sweep), run in sorted(runs.items(), key=lambda item: item[0][2])}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, run in named.items():
            figures: dict[str, Callable[[Sequence[Row]], Figure]] = {name: scaling}
            if run[0]["sweep"] == "default":
                rest = name.removeprefix("default")
                figures = {f"bars{rest}": bars, f"roofline{rest}": roofline}
            elif run[0]["sweep"] == "kinds":
                figures = {name: kinds}
            for file_name, make in figures.items():
                path = folder / f"{file_name}.png"
                make(run).savefig(path, dpi=130, metadata={"Software": None})
                written.append(path)
    return written


def bars(rows: Sequence[Row]) -> Figure:
    """Time and peak memory of each contender, as multiples of plain MoCo's."""
    base = _plain_moco(rows)
    figure = Figure(figsize=(10, 1.3 + 0.3 * len(rows)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    positions = range(len(rows))
    look: Any = {
        "color": [COLOURS.get(row["contender"], "#333333") for row in rows],
        "hatch": [_HATCHES[_place(row, rows)] for row in rows],
        "edgecolor": "white",
    }

    ratios = [row["median_ms"] / base["median_ms"] for row in rows]
    spread = [
        [ratio - row["p20_ms"] / base["median_ms"] for ratio, row in zip(ratios, rows, strict=True)],
        [row["p80_ms"] / base["median_ms"] - ratio for ratio, row in zip(ratios, rows, strict=True)],
    ]
    time.barh(positions, ratios, xerr=spread, error_kw={"lw": 0.9, "ecolor": "#555555"}, **look)
    ends = [ratio + above for ratio, above in zip(ratios, spread[1], strict=True)]
    for at, (ratio, end, row) in enumerate(zip(ratios, ends, rows, strict=True)):
        note(time, end, at, f"{ratio:.2f}  ({number_text(row['median_ms'])} ms)")
    time.set(xlim=(0, 1.3 * max(ends)), yticks=positions, yticklabels=[_label(row, rows) for row in rows])
    time.set_title("forward + backward (bar: median; line: p20 to p80)")
    time.invert_yaxis()

    extra = [row["peak_extra_bytes"] for row in rows]
    reference = base.get("peak_extra_bytes")
    if reference:
        memory.barh(positions, [(value or 0) / reference for value in extra], **look)
        for at, value in enumerate(extra):
            if value is not None:
                note(memory, value / reference, at, f"{value / reference:.2f}  ({number_text(value / 1e6)} MB)")
        memory.set_xlim(0, 1.4 * max(value or 0 for value in extra) / reference)
        memory.set_title("peak memory of a step")
    else:
        memory.set_axis_off()
    for ax in (time, memory):
        ax.axvline(1, color="#8c8c8c", lw=0.9, ls="--")
        ax.set_xlabel("multiples of plain MoCo's")
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    return _titled(figure, rows, ("B", "K", "D", "N", "t"))


def note(ax: Axes, x: float, y: float, text: str) -> None:
    """A number right of a bar's end, legible over the grid."""
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
    ax.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8, bbox=paper)


def scaling(rows: Sequence[Row]) -> Figure:
    """Time and peak memory over what the sweep varies."""
    sweep = rows[0]["sweep"]
    with_memory = any(row["peak_extra_bytes"] for row in rows)
    figure = Figure(figsize=(10.5 if with_memory else 8.5, 4), layout="constrained")
    axes = list(figure.subplots(1, 1 + with_memory, squeeze=False)[0])
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(_label(row, rows), []).append(row)
    for line in lines.values():
        style = {**_style(line[0], rows), "linestyle": _DASHES.get(line[0]["setting"], "-")}
        line.sort(key=lambda row: row["x"])
        axes[0].plot([row["x"] for row in line], [row["median_ms"] for row in line], **style)
        limits = [[row[name] for row in line] for name in ("p20_ms", "p80_ms")]
        axes[0].fill_between([row["x"] for row in line], *limits, color=style["color"], alpha=0.15, lw=0)
        known = [row for row in line if row["peak_extra_bytes"]]
        if with_memory:
            axes[1].plot([row["x"] for row in known], [row["peak_extra_bytes"] / 1e6 for row in known], **style)
    axes[0].set_title("ms, forward + backward")
    if with_memory:
        axes[1].set_title("peak memory of a step, MB")
    for ax in axes:
        _scaled(ax, sorted({row["x"] for row in rows}), sweep)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    varied = {"batch": "B", "queue": "K", "dim": "D", "n_hard": "N"}.get(sweep)
    return _titled(figure, rows, [name for name in ("B", "K", "D", "N", "t") if name != varied])


def kinds(rows: Sequence[Row]) -> Figure:
    """What each kind alone adds to MoCo: to the contender's own, or to plain MoCo's where it has none."""
    base = _plain_moco(rows)
    moco = {_who(row, rows): row["median_ms"] for row in rows if row["setting"] == "moco"}
    contenders = list(dict.fromkeys(_who(row, rows) for row in rows if row["setting"] in KINDS))
    shown = [kind for kind in KINDS if any(row["setting"] == kind for row in rows)]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    ax = figure.subplots()
    width = 0.82 / max(1, len(contenders))
    for number, contender in enumerate(contenders):
        for at, kind in enumerate(shown):
            row = next((row for row in rows if (_who(row, rows), row["setting"]) == (contender, kind)), None)
            if row is not None:
                added = row["median_ms"] - moco.get(contender, base["median_ms"])
                place = at + (number - (len(contenders) - 1) / 2) * width
                look: Any = {"color": COLOURS.get(row["contender"], "#333333"), "hatch": _HATCHES[_place(row, rows)]}
                label = contender if at == 0 else None
                ax.bar(place, added, 0.92 * width, edgecolor="white", label=label, **look)
    counts = {row["setting"]: sum(row["counts"]) for row in rows}
    ax.set_xticks(range(len(shown)), [f"{kind}\n{counts[kind]} vectors" for kind in shown])
    ax.axhline(0, color="#777777", lw=0.8)
    ax.grid(axis="x", visible=False)
    ax.set_title(f"ms that one kind adds to MoCo ({number_text(base['median_ms'])} ms in plain PyTorch)")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _titled(figure, rows, ("B", "K", "D", "N", "t"))


def roofline(rows: Sequence[Row]) -> Figure:
    """Operations a second over operations a byte, both as counted for each contender, below the device's roofs: one for
    each dtype of the queue whose products have a peak of their own."""
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    ax = figure.subplots()
    peaks, bandwidth = {row["peak_flops"]: row["dtype"] for row in rows}, rows[0]["peak_bandwidth"]
    intensities = [row["flops"] / row["bytes"] for row in rows]
    rates = [row["flops"] / row["median_ms"] * 1e3 for row in rows]
    left, right = min(*intensities, min(peaks) / bandwidth) / 2, max(*intensities, max(peaks) / bandwidth) * 2
    for peak, dtype in peaks.items():
        ridge = peak / bandwidth
        ax.plot([left, ridge, right], [left * bandwidth, peak, peak], color="#555555", lw=1.2, zorder=1)
        text = f"{number_text(peak / 1e9)} GFLOP/s, measured" + (f" in {dtype}" if len(peaks) > 1 else "")
        side, place = ("bottom", 1.15 * peak) if peak == max(peaks) else ("top", peak / 1.15)
        ax.text(right, place, text, ha="right", va=side, fontsize=8)
    middle = (left * min(peaks) / bandwidth) ** 0.5
    text = f"{number_text(bandwidth / 1e9)} GB/s, measured"
    ax.text(1.15 * middle, 0.95 * middle * bandwidth, text, va="top", fontsize=8)
    for row, intensity, rate in zip(rows, intensities, rates, strict=True):
        style = _style(row, rows)
        style["label"] += f": {row['share_of_floor']:.0%} of its roof"
        ax.plot(intensity, rate, linestyle="none", markersize=6.5, zorder=2, **style)
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(*rates, left * bandwidth) / 1.5, 2.5 * max(peaks)))
    ax.set(xlabel="operations a byte moved, as counted", ylabel="operations a second")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _titled(figure, rows, ("B", "K", "D", "N", "t"))


def _scaled(ax: Axes, xs: Sequence[float], sweep: str) -> None:
    ax.set(yscale="log", xlabel=_AXES.get(sweep, sweep))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    if sweep != "counts":
        ax.set_xscale("log", base=2)
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(xs, [f"{x // 1024}k" if x >= 8192 and x % 1024 == 0 else f"{x:g}" for x in xs])


def _plain_moco(rows: Sequence[Row]) -> Row:
    base = next((row for row in rows if row["contender"] == "moco_eager"), None)
    if base is None:
        raise UserError("these rows lack moco_eager, which the others are drawn against: run it with them")
    return base


def _who(row: Row, rows: Sequence[Row]) -> str:
    """A contender's name, with its dtype where the run has several."""
    return row["contender"] + (f", {row['dtype']}" if len(_dtypes(rows)) > 1 else "")


def _label(row: Row, rows: Sequence[Row]) -> str:
    return f"{_who(row, rows)}, {row['setting']}"


def _place(row: Row, rows: Sequence[Row]) -> int:
    """Of a row's dtype among those of its run."""
    return 0 if row["contender"] in BASELINES else _dtypes(rows).index(row["dtype"])


def _style(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """Of points."""
    return {
        "color": COLOURS.get(row["contender"], "#333333"),
        "marker": _MARKERS.get(row["setting"], "o"),
        "fillstyle": _FILLS[_place(row, rows)],
        "label": _label(row, rows),
    }


def number_text(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _dtypes(rows: Sequence[Row]) -> list[str]:
    """The dtypes that were asked for: the baselines may hold another."""
    asked = dict.fromkeys(row["dtype"] for row in rows if row["contender"] not in BASELINES)
    return list(asked) or [rows[0]["dtype"]]


def _threads(rows: Sequence[Row]) -> str:
    threads = rows[0]["threads"]
    return "" if rows[0]["versions"]["cuda"] else f"{threads} thread{'s' * (threads != 1)}"


def _slug(rows: Sequence[Row]) -> str:
    text = " ".join((rows[0]["device"], *_dtypes(rows), _threads(rows)))
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _titled(figure: Figure, rows: Sequence[Row], sizes: Sequence[str]) -> Figure:
    values = {name: max(row[name] for row in rows) for name in sizes}
    fixed = ", ".join(f"{name} {value}" for name, value in values.items())
    about = ", ".join(filter(None, (rows[0]["device"], _threads(rows), f"queue in {' and '.join(_dtypes(rows))}")))
    versions = f"torch {rows[0]['versions']['torch']}, {rows[0]['commit']}, {rows[0]['date'][:10]}"
    figure.suptitle(f"{about}; {fixed}; {versions}", x=0.01, ha="left", fontsize=8.5, color="#555555")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rows of python -m bench.kernels")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the PNG files go")
    options = parser.parse_args(arguments)
    try:
        for path in draw([row for file in options.files for row in read(file)], options.output):
            print(path)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
