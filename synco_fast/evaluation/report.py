"""One HTML page that shows a run: a function of the files in its folder, loading nothing from elsewhere."""

import base64
import html
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from string import Template
from typing import Any

from synco_fast import config
from synco_fast.errors import UserError
from synco_fast.evaluation import charts
from synco_fast.files import read_json_lines, write_atomically

METHODS = {"moco": "MoCo", "mochi": "MoCHi", "synco": "SynCo"}
BASELINES = {
    "guessing": "guessing",
    "raw_pixels": "raw pixels",
    "random_initialisation": "random initialisation",
    "random_initialisation_calibrated": "random initialisation, calibrated",
}
"""Names in `baselines.json`, and what a person reads for them."""


@dataclass(frozen=True)
class Run:
    """What a run's folder says.

    Attributes:
        config: resolved configuration, and `config_text`, the file it came from.
        train, knn: rows of `metrics.jsonl` by kind.
        baselines: accuracies by name, from `baselines.json`; empty without one.
        environment: content of `environment.json`: `command`, `started` and `machine`, what `synco-fast doctor` said
            then; empty without one.
        views: the PNG `views.png`, or None.
    """

    config: config.Config
    config_text: str
    train: list[dict[str, Any]]
    knn: list[dict[str, Any]]
    baselines: dict[str, float]
    environment: dict[str, str]
    views: bytes | None

    @property
    def name(self) -> str:
        return METHODS[self.config.method]

    @property
    def images_per_second(self) -> float:
        """Over the steps that were timed: those since the last evaluation or log row, at each log row."""
        timings = [row["timing"] for row in self.train]
        images = sum(timing["images_per_second"] * timing["seconds"] for timing in timings)
        return images / sum(timing["seconds"] for timing in timings)

    @property
    def training_seconds(self) -> float:
        """All steps at that rate, so evaluations and checkpoints' reading are left out."""
        return self.train[-1]["step"] * self.config.data.batch_size / self.images_per_second

    @property
    def warmup_end(self) -> int | None:
        """The last step seen before synthetic negatives began; None if there were none or no warm-up."""
        before = [row["step"] for row in (*self.train, *self.knn) if row["epoch"] < self.config.negatives.warmup_epochs]
        return max(before) if before and self.config.method != "moco" else None


def read_run(folder: Path) -> Run:
    """Read a run's folder: `config.yaml` and `metrics.jsonl`, and the files of `Run` that are optional.

    Raises:
        UserError: the folder holds no run, or one that has reported no step yet.
    """
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: not the folder of a run: it has no {name}")
    rows = read_json_lines(folder / "metrics.jsonl")
    train = [row for row in rows if row.get("kind") == "train"]
    if not train:
        raise UserError(f"{folder}: nothing to report yet: metrics.jsonl has no row of training")
    views = folder / "views.png"
    return Run(
        config=config.load(folder / "config.yaml"),
        config_text=(folder / "config.yaml").read_text(encoding="utf-8"),
        train=train,
        knn=[row for row in rows if row.get("kind") == "knn"],
        baselines=_json(folder / "baselines.json").get("accuracy", {}),
        environment=_json(folder / "environment.json"),
        views=views.read_bytes() if views.is_file() else None,
    )


def baseline_rows(run: Run) -> list[tuple[str, float]]:
    """(features, kNN accuracy) of what was not trained."""
    return [(text, run.baselines[name]) for name, text in BASELINES.items() if name in run.baselines]


def knn_rows(run: Run) -> list[tuple[str, float]]:
    """(features, kNN accuracy) of the run after each evaluated epoch."""
    return [(f"{run.name} after epoch {row['epoch'] + 1}", row["accuracy"]) for row in run.knn]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder, and return its path.

    Raises:
        UserError: see `read_run`; or the file cannot be written.
    """
    run = read_run(folder)
    started = run.environment.get("started")
    page = PAGE.substitute(
        title=escaped(f"{run.name} pretraining, {run.config.model.arch}"),
        subtitle=escaped(run.config.output + (f", started {started}" if started else "")),
        facts=_facts(run),
        sections="\n".join(_sections(run)),
        environment=_environment(run),
        config=escaped(run.config_text),
    )
    path = folder / "report.html"
    write_page(path, page)
    return path


def write_page(path: Path, page: str) -> None:
    """Write a page of HTML as UTF-8. Names of files are bytes: one that stands for no character is shown as ?.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(path, lambda file: file.write(page.encode("utf-8", "replace")))


def _sections(run: Run) -> Iterable[str]:
    if run.knn:
        last = run.knn[-1]
        yield section(
            "kNN accuracy",
            charts.knn(run.knn, dict(baseline_rows(run)), run.name)
            + _table(baseline_rows(run) + knn_rows(run)[-1:])
            + f"<details><summary>After every evaluated epoch</summary>{_table(knn_rows(run))}</details>",
            f"Share of the {last['held_out']} held-out images whose class wins the weighted vote of their {last['k']} "
            f"nearest training images (of {last['bank']}) in the backbone's features. Labels are used here only, "
            "never in training. Look for a curve that climbs above the level lines: features learnt from images "
            "alone then tell classes apart better than pixels or an untrained network do. The untrained network is "
            "shown as training starts from it, and with its batch norm statistics calibrated on training images.",
        )
    yield section(
        "Learning",
        charts.learning(run.train, run.warmup_end),
        "Left: the InfoNCE loss of telling an image's other view from all negatives. Right: how often the other view "
        "scores above the whole queue (acc@1), or with fewer than five of its rows above it (acc@5). "
        + (
            "When the warm-up ends, synthetic negatives join the denominator and the loss jumps, so compare it within "
            "each part only; the accuracies do not count them. They stay low where many images look alike: others of "
            "its kind then score as high as an image's own view, which is what the kNN accuracy rewards."
            if run.warmup_end is not None
            else "The loss should fall and the accuracies rise."
        ),
    )
    yield section(
        "Who holds the softmax",
        charts.mass(run.train),
        "Mean share of the softmax denominator held by the positive, by the real negatives in the queue, and by each "
        "kind of synthetic negative. A negative pushes the query away in proportion to its share. The positive's "
        "share should grow. A kind with next to no share teaches next to nothing; one that takes nearly everything "
        "drowns the queue.",
    )
    if run.views is not None:
        image = base64.b64encode(run.views).decode()
        yield section(
            "What the network sees",
            f'<img class="views" alt="images and their augmented views" src="data:image/png;base64,{image}">',
            "Each row is an image's centre crop and the two random views of it that training compares: a crop, "
            "perhaps flipped, in shifted colours or grey, perhaps blurred. Look for the same object in both views, "
            "natural colours in the first column, and no black borders.",
            layout="beside",
        )
    yield section(
        "Pace",
        charts.pace(run.train),
        "Throughput of training, the share of its time that was spent waiting for images (high: the loader is the "
        "bottleneck, near 0: the network is), and the learning rate.",
    )


def section(title: str, content: str, caption: str, layout: str = "above") -> str:
    """A part of the page: a figure, as HTML, under a title and with a caption, both plain text."""
    return (
        f'<section class="{layout}"><h2>{escaped(title)}</h2><figure><div>{content}</div>'
        f"<figcaption>{escaped(caption)}</figcaption></figure></section>"
    )


def _facts(run: Run) -> str:
    facts = [
        ("steps", f"{run.train[-1]['step']:,}"),
        ("batch size", f"{run.config.data.batch_size:,}"),
        ("queue", f"{run.config.queue.size:,}"),
        ("synthetic negatives", f"{run.config.negatives.hard().total:,}"),
        ("training time", str(timedelta(seconds=round(run.training_seconds)))),
        ("images/s", f"{run.images_per_second:,.0f}"),
    ]
    if run.knn:
        facts.insert(0, ("kNN accuracy", f"{run.knn[-1]['accuracy']:.1%}"))
    return fact_list(facts)


def fact_list(facts: list[tuple[str, str]]) -> str:
    """The figures at the head of a page: (name, value), plain text."""
    return "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts)


def html_table(rows: list[list[str]]) -> str:
    """A table of text, the first row its header."""
    header = "".join(f"<th>{escaped(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<div><table><tr>{header}</tr>{body}</table></div>"


def _table(rows: list[tuple[str, float]]) -> str:
    cells = "".join(f"<tr><td>{escaped(name)}</td><td>{value:.1%}</td></tr>" for name, value in rows)
    return f"<table><tr><th>features</th><th>kNN accuracy</th></tr>{cells}</table>"


def _environment(run: Run) -> str:
    if not run.environment:
        return ""
    return (
        f"<h2>How to repeat it</h2><pre>{escaped(run.environment['command'])}</pre>"
        f"<details><summary>Versions and machine</summary><pre>{escaped(run.environment['machine'])}</pre></details>"
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def escaped(text: str) -> str:
    """Text as HTML that shows it."""
    return html.escape(str(text))


PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>
:root { color-scheme: light; }
body { max-width: 900px; margin: 3rem auto; padding: 0 1.5rem; background: #fff; color: #222;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 3rem 0 .8rem; font-size: 1.25rem; }
.subtitle { margin: .4rem 0 1.8rem; color: #666; }
dl { display: flex; flex-wrap: wrap; gap: .8rem 2.2rem; margin: 0; padding: 1rem 0;
  border: solid #ddd; border-width: 1px 0; }
dt { color: #666; font-size: .8rem; }
dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figure svg { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .7rem; color: #555; font-size: .9rem; }
.beside figure { display: flex; gap: 1.5rem; align-items: flex-start; }
.beside figcaption { margin: 0; }
.views { display: block; width: 380px; border: 1px solid #ddd; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
td, th { padding: .25rem 2rem .25rem 0; border-bottom: 1px solid #e8e8e8; text-align: left; }
td:last-child, th:last-child { padding-right: .3rem; text-align: right; }
figure > div > table { margin-top: 1rem; }
figure > div > table tr:last-child td { font-weight: 600; }
pre { padding: .8rem 1rem; overflow-x: auto; background: #f6f6f6; font: .85rem/1.5 ui-monospace, Consolas, monospace; }
details { margin: 1rem 0; }
summary { cursor: pointer; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="subtitle">$subtitle</p>
<dl>$facts</dl>
$sections
$environment
<details><summary>Resolved configuration</summary><pre>$config</pre></details>
</body>
</html>
""")
"""A page of a report: title, subtitle, facts (dt and dd), sections, environment and config, all of them HTML."""
