"""What came of a sweep: `result.json`, and the table and the page, which are functions of it."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from synco_fast.config_text import to_yaml
from synco_fast.engine.distributed import Processes, choose_device
from synco_fast.evaluation.charts import BLUE, ORANGE, STYLE, WIDTH, svg
from synco_fast.evaluation.report import PAGE, escaped, fact_list, html_table, section, write_page
from synco_fast.evaluation.session import about, write_result
from synco_fast.evaluation.sweep import PRETRAIN, REPORT, TABLE, Plan
from synco_fast.evaluation.sweep_state import Record
from synco_fast.files import write_text_atomically

_ROW, _MARGIN = 0.34, 0.75  # inches: a run, and what the axis takes


def write_results(plan: Plan, records: Sequence[Record], output: Path, stages: dict[str, int], started: float) -> None:
    """Write `result.json`, `table.md` and `report.html` of what is finished so far.

    Args:
        stages: `done` of them, and how many there are, `of`. started: the sweep, this time.
    """
    rows = [_row(record, plan) for record in records if PRETRAIN in record.finished]
    details = about(Processes(0, 1, choose_device("auto")), "", started)
    del details["precision"]  # each run has its own
    result = {
        "command": "sweep",
        "metrics": {},
        "settings": plan.settings,
        "stages": stages,
        "rows": rows,
        "summary": summary(rows),
        "about": details,
    }
    write_result(output, result)
    write_text_atomically(output / TABLE, table(result))
    write_page(output / REPORT, page(result, plan.source.stem))


def _row(record: Record, plan: Plan) -> dict[str, Any]:
    metrics = {
        f"{evaluation}.{name}": value
        for evaluation in plan.evaluations
        for name, value in record.finished.get(evaluation, {}).get("metrics", {}).items()
    }
    return {"run": record.run.name, "seed": record.run.seed, "overrides": record.run.overrides, "metrics": metrics}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run's metrics over its seeds: mean, standard deviation (n - 1; null for one seed) and n."""
    found = []
    for run in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == run]
        metrics = {}
        for name in dict.fromkeys(name for row in mine for name in row["metrics"]):
            values = [row["metrics"][name] for row in mine if name in row["metrics"]]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            metrics[name] = {"mean": statistics.fmean(values), "deviation": deviation, "n": len(values)}
        found.append({"run": run, "overrides": mine[0]["overrides"], "metrics": metrics})
    return found


def table(result: dict[str, Any]) -> str:
    """The summary in Markdown, in percent."""
    header, *rows = _cells(result)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def _cells(result: dict[str, Any]) -> list[list[str]]:
    """The summary as text, its header first."""
    names = _metrics(result)
    rows = [[row["run"], *(_cell(row["metrics"].get(name)) for name in names)] for row in result["summary"]]
    return [["run", *names], *rows]


def page(result: dict[str, Any], name: str) -> str:
    """One HTML page that loads nothing from elsewhere. `name`: of the sweep."""
    stages, made = result["stages"], result["about"]
    facts = [
        ("runs", str(len(result["summary"]))),
        ("seeds", str(len({row["seed"] for row in result["rows"]}))),
        ("stages done", f"{stages['done']} of {stages['of']}"),
    ]
    versions = "\n".join(f"{key}: {value}" for key, value in made.items() if key != "command")
    return PAGE.substitute(
        title=escaped(f"Sweep {name}"),
        subtitle=escaped(f"written by the sweep started {made['started']}"),
        facts=fact_list(facts),
        sections="\n".join(_sections(result)),
        environment=(
            f"<h2>How to repeat it</h2><pre>{escaped(made['command'])}</pre>"
            f"<details><summary>Versions and machine</summary><pre>{escaped(versions)}</pre></details>"
        ),
        config=escaped(to_yaml(result["settings"])),
    )


def _sections(result: dict[str, Any]) -> Iterable[str]:
    seeds = "Mean over seeds ± standard deviation (n - 1), in percent, with the number of seeds in parentheses."
    yield section("Results", html_table(_cells(result)), seeds)
    for name in _metrics(result):
        yield section(
            name,
            dots(result, name),
            "Each dot is a seed, each line a run's mean. Runs whose dots lie among each other's are not told apart "
            "by this many seeds.",
        )


def dots(result: dict[str, Any], name: str) -> str:
    """A metric of every seed, and each run's mean, with the first run on top."""
    with matplotlib.rc_context(STYLE):
        runs = [row for row in result["summary"] if name in row["metrics"]]
        figure = Figure(figsize=(WIDTH, _MARGIN + _ROW * len(runs)), layout="constrained")
        ax = figure.subplots()
        places = {row["run"]: y for y, row in enumerate(runs)}
        means = [row["metrics"][name]["mean"] for row in runs]
        ax.scatter(means, list(places.values()), marker="|", s=260, linewidth=2, color=ORANGE, label="mean", zorder=2)
        seeds = [row for row in result["rows"] if name in row["metrics"]]
        values, heights = [row["metrics"][name] for row in seeds], [places[row["run"]] for row in seeds]
        ax.scatter(values, heights, s=22, color=BLUE, alpha=0.8, linewidth=0, label="seed", zorder=3)
        ax.set_yticks(list(places.values()), list(places), parse_math=False)
        ax.set_ylim(len(runs) - 0.5, -0.5)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))  # as many as the ticks need
        ax.set_xlabel(name, parse_math=False)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return svg(figure, f"{name} of each run, by seed")


def _metrics(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in result["summary"] for name in row["metrics"]))


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    deviation = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.2f}"
    return f"{100 * found['mean']:.2f}{deviation} ({found['n']})"
