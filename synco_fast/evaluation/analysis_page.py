"""An analysis as one HTML page that loads nothing from elsewhere, and its figures."""

import json
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from synco_fast import config_text
from synco_fast.evaluation.charts import BLUE, DARK, MASS_COLOURS, STYLE, WIDTH, svg
from synco_fast.evaluation.report import PAGE, escaped, fact_list, html_table, section

_HARD_SET = "#8c8c8c"
_POINTS = (*list(MASS_COLOURS.values())[2:], DARK, "#cc79a7", "#882255", "#999999")
_MARKERS = "os^Dv"
_VISIBLE = 1e-3  # of a histogram's height: less is no reason to widen the axis
_COLUMNS = 90  # of a histogram, over what the figure shows of it


def page(result: dict[str, Any]) -> str:
    """The page of an analysis, `result` being what `result.json` holds."""
    weights, settings, about = (result[name] for name in ("weights", "settings", "about"))
    return PAGE.substitute(
        title=escaped(f"Analysis: {weights['arch']}"),
        subtitle=escaped(f"{weights['path']} on {result['data']['root']}, started {about['started']}"),
        facts=fact_list(_facts(result)),
        sections="\n".join(_sections(result)),
        environment=_environment(result),
        config=escaped(config_text.to_yaml({"settings": settings, "data": result["data"]})),
    )


def _readable(text: str) -> str:
    """Text that UTF-8 has: names of files are bytes, which may stand for no character."""
    return text.encode("utf-8", "replace").decode()


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    metrics = result["metrics"]
    return [
        ("alignment", f"{metrics['alignment']:.3f}"),
        ("uniformity", f"{metrics['uniformity']:.3f}"),
        ("proxy acc@1", f"{metrics['proxy_acc1']:.1%}"),
        ("with synthetic", f"{metrics['proxy_acc1_with_synthetic']:.1%}"),
        ("same class in the hard set", f"{metrics['same_class_share']:.1%}"),
    ]


def _sections(result: dict[str, Any]) -> Iterable[str]:
    settings = result["settings"]
    yield section(
        "On the sphere",
        _geometry(result["geometry"]) + _proxy(result["proxy"]),
        f"From two augmented views of {settings['queries']:,} training images. Alignment is the mean squared distance "
        "of an image's two views: 0 is best, 2 is no better than chance. Uniformity is the log of the mean of "
        "exp(-2 d^2) over pairs of different images: 0 when all lie on one point, about -4 at best. Either alone is "
        f"easy; good features have both low. Proxy task: of a query's own key and {settings['queue']:,} others, the "
        "own one scores highest (acc@1), or with fewer than five above it (acc@5); with synthetic negatives, these "
        "count as others, too.",
    )
    yield section(
        "Similarities to the query",
        similarity_figure(result) + html_table(_similarity_rows(result)),
        "Cosine similarity of each query with its key, with the queue, with the hard set (the "
        f"{settings['negatives']['n_hard']:,} rows of the queue most similar to it), and with each kind of synthetic "
        "negative. Each row is scaled to its own height; the bar spans the 5th to the 95th percentile, the white tick "
        "is the median. A negative is hard where it lies right of the queue, and harder than the key where it lies "
        "right of the positives. The softmax share is what the group holds of the loss's denominator at temperature "
        f"{settings['temperature']:g}.",
    )
    yield section(
        "False negatives",
        same_class_figure(result)
        + "<details><summary>As a table</summary>"
        + html_table(_same_class_rows(result["same_class"]))
        + "</details>",
        "Negatives of the query's own class, which training without labels pushes away all the same. Left: their share "
        "among the N hardest rows of the queue, beside their share in all of it: the better the features, the more of "
        "the hardest negatives are of the same class. Right: synthetic negatives with a parent of the query's class "
        "(dashed: the whole queue's share); a mixed one has two parents. "
        "loss.class_oracle trains without them.",
    )
    yield section(
        "Held-out images",
        projection_figure(result["projection"]),
        f"Backbone features of {len(result['projection']['labels']):,} held-out images, scaled to unit length and "
        "projected: their first two principal components"
        + (", and t-SNE, which shows neighbourhoods and not distances" if "tsne" in result["projection"] else "")
        + ". Look for classes that lie together. The coordinates are in result.json.",
    )


def _geometry(geometry: dict[str, Any]) -> str:
    names = {"embeddings": "embeddings (what the loss sees)", "features": "backbone features"}
    rows = [[names[key], f"{row['alignment']:.4f}", f"{row['uniformity']:.4f}"] for key, row in geometry.items()]
    return html_table([["of", "alignment", "uniformity"], *rows])


def _proxy(proxy: dict[str, Any]) -> str:
    names = {"without_synthetic": "against the queue", "with_synthetic": "against synthetic negatives, too"}
    rows = [[text, f"{proxy[key]['acc1']:.2%}", f"{proxy[key]['acc5']:.2%}"] for key, text in names.items()]
    return html_table([["proxy task", "acc@1", "acc@5"], *rows])


def _similarity_rows(result: dict[str, Any]) -> list[list[str]]:
    mass = result["proxy"]["mass"]
    rows = [["", "similarities", "mean", "5%", "median", "95%", "softmax share"]]
    for name, found in result["similarities"].items():
        numbers = [f"{found[key]:.4f}" for key in ("mean", "p5", "p50", "p95")]
        rows.append([name, f"{found['count']:,}", *numbers, f"{mass[name]:.2%}" if name in mass else "in the queue's"])
    return rows


def _same_class_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = [["of", "share of the query's class"], ["the whole queue", f"{found['queue']:.2%}"]]
    rows += [[f"the {row['n']:,} hardest", f"{row['share']:.2%}"] for row in found["hardest"]]
    return rows + [[f"{kind}, by a parent", f"{share:.2%}"] for kind, share in found["parents"].items()]


def _environment(result: dict[str, Any]) -> str:
    facts = {name: result[name] for name in ("about", "weights", "data")}
    return (
        f"<h2>How to repeat it</h2><pre>{escaped(result['about']['command'])}</pre>"
        f"<details><summary>Versions, weights and data</summary><pre>{escaped(json.dumps(facts, indent=1))}</pre>"
        "</details>"
    )


def similarity_figure(result: dict[str, Any]) -> str:
    """One row for each group of similarities, on one axis."""
    return _drawn(lambda: _similarity_figure(result["similarities"]), "similarities to the query, by kind of negative")


def same_class_figure(result: dict[str, Any]) -> str:
    """Same-class negatives over N, and by kind."""
    return _drawn(lambda: _same_class_figure(result["same_class"]), "share of same-class negatives")


def projection_figure(projection: dict[str, Any]) -> str:
    """Held-out images by class."""
    return _drawn(lambda: _projection_figure(projection), "held-out images in two dimensions, by class")


def _drawn(draw: Any, description: str) -> str:
    with matplotlib.rc_context(STYLE):
        return svg(draw(), description)


def _similarity_figure(groups: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(WIDTH, 0.5 * len(groups) + 0.7), layout="constrained")
    ax = figure.subplots()
    counts = {name: np.asarray(found["histogram"]) for name, found in groups.items()}
    bins = len(next(iter(counts.values())))
    filled = np.flatnonzero(np.any([count > count.max() * _VISIBLE for count in counts.values()], axis=0))
    together = max(1, (filled[-1] - filled[0]) // _COLUMNS)  # so that few similarities do not make a comb
    for height, (name, found) in zip(range(len(groups) - 1, -1, -1), groups.items(), strict=True):
        colour = MASS_COLOURS.get(name, _HARD_SET)
        starts = np.arange(0, bins, together)
        density = np.add.reduceat(counts[name], starts) / np.diff([*starts, bins])
        edges = np.array([*starts, bins]) * 2 / bins - 1
        level = height + 0.74 * density / density.max()
        ax.stairs(level, edges, baseline=height, fill=True, color=colour, alpha=0.55)
        ax.plot([found["p5"], found["p95"]], [height - 0.07] * 2, color=colour, linewidth=5, solid_capstyle="butt")
        ax.plot([found["p50"]] * 2, [height - 0.115, height - 0.025], color="white", linewidth=1.6)
    ax.set_yticks([i + 0.2 for i in range(len(groups))], list(groups)[::-1])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)
    margin = 0.03 * 2
    left, right = filled[0] * 2 / bins - 1, (filled[-1] + 1) * 2 / bins - 1
    ax.set(xlabel="cosine similarity to the query", xlim=(max(-1, left - margin), min(1, right + margin)))
    ax.set_ylim(-0.2, len(groups) - 0.2)
    return figure


def _same_class_figure(found: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes, shares = [row["n"] for row in found["hardest"]], [row["share"] for row in found["hardest"]]
    left.plot(sizes, shares, color=BLUE, marker="o", markersize=4, label="the N hardest")
    left.axhline(found["queue"], color=DARK, linestyle="--", label="the whole queue")
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.set(title="same class among the N hardest", xlabel="N")
    left.legend()
    kinds = list(found["parents"])[::-1]
    shares = [found["parents"][kind] for kind in kinds]
    right.barh(kinds, shares, color=[MASS_COLOURS[kind] for kind in kinds])
    right.axvline(found["queue"], color=DARK, linestyle="--")
    right.set(title="synthetic negatives with a same-class parent", xlim=(0, None))
    right.grid(visible=False, axis="y")
    left.set_ylim(0, None)
    left.yaxis.set_major_formatter(PercentFormatter(1))
    right.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _projection_figure(projection: dict[str, Any]) -> Figure:
    first, second = projection["pca_variance"]
    panels = {f"PCA: {first:.0%} and {second:.0%} of the variance": projection["pca"]}
    if "tsne" in projection:
        panels["t-SNE"] = projection["tsne"]
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = list(figure.subplots(1, len(panels), squeeze=False)[0])
    for ax, (title, points) in zip(axes, panels.items(), strict=True):
        _scatter(ax, np.asarray(points), projection)
        ax.set_title(title)
    _legend(axes[-1], projection["classes"])
    return figure


def _legend(ax: Axes, classes: list[str]) -> None:
    """Names of any kind for what `_scatter` drew: as labels, matplotlib would leave out _name and set $name$ as TeX."""
    places = [str(i) for i in range(len(classes))]
    legend = ax.legend(ax.collections, places, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.5)
    for text, name in zip(legend.get_texts(), classes, strict=True):
        text.set_parse_math(False)
        text.set_text(_readable(name))


def _scatter(ax: Axes, points: Any, projection: dict[str, Any]) -> None:
    labels = np.asarray(projection["labels"])
    for i, name in enumerate(projection["classes"]):
        chosen = points[labels == name]
        marker, colour = _MARKERS[i % len(_MARKERS)], _POINTS[i]
        ax.scatter(chosen[:, 0], chosen[:, 1], s=12, marker=marker, color=colour, alpha=0.75, linewidths=0)
    ax.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    ax.grid(visible=False)
