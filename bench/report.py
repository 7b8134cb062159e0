"""Tables and figures of whole training steps, from rows of bench.step alone: python -m bench.report FILE...

Prints the tables, as Markdown; the figures go to the folder that --output names.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from bench import plots, rows, step_rows
from bench.rows import Row
from bench.step_contenders import CONTENDERS
from bench.step_rows import ratio_text, setting
from synco_fast.errors import UserError

_DEVICES = (1, 4, 8)
_ABLATED = "synco "
_MAIN = (
    *("contender", "images/s", "ms a step", "/ plain MoCo", "/ our MoCo", "peak memory", "MFU"),
    f"hours for {step_rows.EPOCHS} epochs of {step_rows.IMAGENET_IMAGES:,} such images on "
    f"{', '.join(map(str, _DEVICES))} such devices, if it scaled perfectly",
)
_ABLATION = ("changed", "images/s", "ms a step", "/ synco", "peak memory")

Run = list[Row]
"""Rows of one run at one batch, ablations and contenders that could not run included."""


class Shown(NamedTuple):
    """Which runs are shown, of those of the same device and sizes. Ratios are of one run always.

    Attributes:
        main: the last that timed plain MoCo, or the last if none did. fed: the last fed from files, unless that is
            `main`, or empty. ablation: the last with ablations, or empty.
    """

    main: Run
    fed: Run
    ablation: Run


def shown(found: Sequence[Row]) -> list[Shown]:
    """The runs to show, for each device and sizes."""
    by_run: dict[tuple[str, ...], Run] = {}
    for row in sorted(found, key=lambda row: row["date"]):
        by_run.setdefault((row["date"], str(row["batch"])), []).append(row)
    same: dict[str, list[Run]] = {}
    for run in by_run.values():
        same.setdefault(_what(run), []).append(run)
    return [_shown(several) for several in same.values()]


def _shown(several: Sequence[Run]) -> Shown:
    def last(matches: Callable[[Row], bool]) -> Run:
        return next((run for run in reversed(several) if any(map(matches, run))), [])

    main = last(lambda row: row["contender"] == step_rows.BASES[0] and row["n"]) or several[-1]
    fed = last(lambda row: row["contender"] == "synco_from_files")
    return Shown(main, fed if fed is not main else [], last(_is_ablated))


def _is_ablated(row: Row) -> bool:
    return bool(row["contender"].startswith(_ABLATED))


def _what(run: Run) -> str:
    """The device and the sizes of a run, in words; its first row is no ablation unless all are."""
    threads = "" if run[0]["versions"]["cuda"] else f", {run[0]['threads']} threads"
    return f"{run[0]['device']}{threads}: {setting(run[0])}"


def markdown(these: Shown) -> str:
    """The tables, those that are not empty, each with what made it."""
    parts = []
    for run in (these.main, these.fed):
        plain = [row for row in run if not _is_ablated(row)]
        if plain:
            parts += [_heading(run), _table(_MAIN, [_main_cells(row) for row in plain])]
    if these.ablation:
        base = [row for row in these.ablation if row["contender"] == "synco"]
        ablated = [_ablation_cells(row, base) for row in (*base, *filter(_is_ablated, these.ablation))]
        parts += [_heading(these.ablation), _table(_ABLATION, ablated)]
    return "\n\n".join(parts)


def _heading(run: Run) -> str:
    said = f"{step_rows.NO_INTERVAL}." if step_rows.has_few_rounds(run) else "in brackets: intervals of 95%."
    return (
        f"{_what(run)}; torch {run[0]['versions']['torch']}, {run[0]['commit']}, {run[0]['date'][:10]}, "
        f"median of {max(row['n'] for row in run)} rounds; {said}"
    )


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown; a line of one cell fewer than the header says in its last why there is no number."""
    ruled = ["---", *["---:"] * (len(header) - 1)]
    filled = [[*cells, *[""] * (len(header) - len(cells))] for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruled, *filled))


def _main_cells(row: Row) -> list[str]:
    if row["median_ms"] is None:
        return [f"`{row['contender']}`", f"did not run: {row['skipped']}"]
    hours = " / ".join(plots.number_text(row["hours_200_epochs"] / devices) for devices in _DEVICES)
    return [
        f"`{row['contender']}`",
        *_speed_cells(row),
        *(ratio_text(row[f"ratio_to_{base}"]) for base in step_rows.BASES),
        _memory_text(row),
        f"{row['mfu']:.1%}",
        hours,
    ]


def _ablation_cells(row: Row, base: Sequence[Row]) -> list[str]:
    changed = f"`{row['contender'].removeprefix(_ABLATED)}`" if row not in base else "nothing"
    if row["median_ms"] is None:
        return [changed, f"did not run: {row['skipped']}"]
    ratio = step_rows.ratio_of(row, base[0]) if base and base[0]["n"] else None
    return [changed, *_speed_cells(row), ratio_text(ratio), _memory_text(row)]


def _speed_cells(row: Row) -> list[str]:
    return [plots.number_text(row["images_per_second"]), plots.number_text(row["median_ms"])]


def _memory_text(row: Row) -> str:
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB"


def draw(found: Sequence[Row], folder: Path) -> list[Path]:
    """Write every figure that the rows allow, as PNG; returns the files.

    Raises:
        UserError: no row has a time against plain MoCo.
    """
    timed = [[row for row in run if row["ratio_to_moco_eager"] is not None] for run, _, _ in shown(found)]
    timed = [run for run in timed if run]
    if not timed:
        raise UserError("no row has a ratio to moco_eager, so there is nothing to draw: run it with the others")
    figures: dict[str, Callable[[], Figure]] = {}
    sweeps: dict[tuple[str, str], list[Run]] = {}
    for run in timed:
        figures[f"step-{_slug(_what(run))}"] = lambda run=run: bars(run)  # type: ignore[misc]
        sweeps.setdefault((run[0]["date"], _what(_without_batch(run))), []).append(run)
    for (_, what), several in sweeps.items():
        if len(several) > 1:
            figures[f"step-batches-{_slug(what)}"] = lambda several=several: batches(several)  # type: ignore[misc]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(plots.STYLE):
        for name, make in figures.items():
            path = folder / f"{name}.png"
            make().savefig(path, dpi=130, metadata={"Software": None})
            written.append(path)
    return written


def _without_batch(run: Run) -> Run:
    return [{**row, "batch": "several"} for row in run]


def bars(run: Run) -> Figure:
    """Images a second of each contender, as multiples of plain MoCo's."""
    figure = Figure(figsize=(8.5, 1.3 + 0.3 * len(run)), layout="constrained")
    ax = figure.subplots()
    ratios = [row["ratio_to_moco_eager"] for row in run]
    middles, lows, ends = ([_drawn(ratio, key) for ratio in ratios] for key in ("median", "low", "high"))
    spread = [
        [middle - low for middle, low in zip(middles, lows, strict=True)],
        [end - middle for middle, end in zip(middles, ends, strict=True)],
    ]
    look: Any = {"color": [_colour(row) for row in run], "edgecolor": "white"}
    ax.barh(range(len(run)), middles, xerr=spread, error_kw={"lw": 0.9, "ecolor": "#555555"}, **look)
    for at, (row, middle, end) in enumerate(zip(run, middles, ends, strict=True)):
        plots.note(ax, end, at, f"{middle:.2f}  ({plots.number_text(row['images_per_second'])} images/s)")
    ax.set(xlim=(0, 1.35 * max(ends)), yticks=range(len(run)), yticklabels=[row["contender"] for row in run])
    ax.axvline(1, color="#8c8c8c", lw=0.9, ls="--")
    said = step_rows.NO_INTERVAL if step_rows.has_few_rounds(run) else "line: interval of 95%"
    ax.set_title(f"whole training steps ({said})")
    ax.set_xlabel("images a second, in multiples of plain MoCo's")
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    return _titled(figure, run)


def _drawn(ratio: Row, key: str) -> float:
    """Where there is no interval, its ends are the median, and nothing is seen of it."""
    return float(ratio["median"] if ratio[key] is None else ratio[key])


def batches(several: Sequence[Run]) -> Figure:
    """Images a second over the batch, and as multiples of plain MoCo's."""
    figure = Figure(figsize=(10.5, 4), layout="constrained")
    rates, ratios = figure.subplots(1, 2)
    for name in dict.fromkeys(row["contender"] for run in several for row in run):
        line = sorted((row for run in several for row in run if row["contender"] == name), key=lambda row: row["batch"])
        xs, look = [row["batch"] for row in line], {"color": _colour(line[0]), "marker": "o", "label": name}
        rates.plot(xs, [row["images_per_second"] for row in line], **look)
        middle, low, high = (
            [_drawn(row["ratio_to_moco_eager"], key) for row in line] for key in ("median", "low", "high")
        )
        ratios.plot(xs, middle, **look)
        ratios.fill_between(xs, low, high, color=look["color"], alpha=0.15, lw=0)
    few = any(map(step_rows.has_few_rounds, several))
    said = step_rows.NO_INTERVAL if few else "band: interval of 95%"
    for ax, title in ((rates, "images a second"), (ratios, f"in multiples of plain MoCo's ({said})")):
        ticks = sorted({row["batch"] for run in several for row in run})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, list(map(str, ticks)))
        ax.set_ylim(bottom=0)
        ax.set_title(title)
        ax.set_xlabel("batch")
    ratios.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _titled(figure, _without_batch(several[0]))


def _colour(row: Row) -> str:
    return plots.COLOURS.get(row["contender"], plots.COLOURS["synco"] if _is_ablation(row) else "#333333")


def _is_ablation(row: Row) -> bool:
    return row["contender"] not in CONTENDERS


def _titled(figure: Figure, run: Run) -> Figure:
    text = f"{_what(run)}\ntorch {run[0]['versions']['torch']}, {run[0]['commit']}, {run[0]['date'][:10]}"
    figure.suptitle(text, x=0.01, ha="left", fontsize=8.5, color="#555555")
    return figure


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rows of python -m bench.step")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the PNG files go; default: none are drawn")
    options = parser.parse_args(arguments)
    try:
        found = [row for file in options.files for row in rows.read(file, step_rows.FIELDS, "bench.step")]
        print("\n\n".join(map(markdown, shown(found))))
        for path in draw(found, options.output) if options.output is not None else ():
            print(path, file=sys.stderr)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
