"""The report of hand-written runs: what it shows, that the curves are right, that it loads and runs nothing."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synco_fast import config
from synco_fast.errors import UserError
from synco_fast.evaluation import charts
from synco_fast.evaluation.report import write_report
from synco_fast.ops import KINDS
from tests.page import check_self_contained, read

HOSTILE = """"'></pre></title></style><script>alert(1)</script><img src=x onerror=alert(2)>&amp;$title ${x}"""
ACCURACY = [0.3, 0.45, 0.55, 0.5]
BASELINES = {
    "guessing": 0.1,
    "raw_pixels": 0.21,
    "random_initialisation": 0.34,
    "random_initialisation_calibrated": 0.38,
}
STEPS_PER_EPOCH, BATCH = 12, 16


def train_row(step: int, kinds: tuple[str, ...] = KINDS, **changes: Any) -> dict[str, Any]:
    epoch = (step - 1) // STEPS_PER_EPOCH
    share = 0.05 if epoch else 0.0
    row = {"kind": "train", "step": step, "epoch": epoch, "lr": 0.03, "loss": 7 - step / 20, "gradient_norm": 1.0}
    row |= {"acc1": step / 100, "acc5": 1 - 1 / step, "positive_similarity": 0.5}
    row |= {"mass_positive": 0.1, "mass_queue": 0.9 - share * len(kinds)}
    row |= {f"mass_{kind}": share for kind in kinds}
    row |= {"synthetic_share": share * len(kinds), "hard_similarity": 0.4 if epoch else None}
    timing = {"images_per_second": 80.0, "data_wait": 0.1 + step / 100, "seconds": 1.0, "remaining_seconds": 3.0}
    return row | {"timing": timing} | changes


def knn_row(epoch: int, accuracy: float) -> dict[str, Any]:
    step = (epoch + 1) * STEPS_PER_EPOCH
    row = {"kind": "knn", "step": step, "epoch": epoch, "accuracy": accuracy}
    return row | {"k": 20, "bank": 200, "held_out": 77}


def write_run(folder: Path, rows: list[dict[str, Any]], **values: Any) -> Path:
    """A run's folder as the engine leaves it."""
    folder.mkdir()
    small = {"data": {"batch_size": BATCH}, "bn": {"group_size": 8}, "negatives": {"warmup_epochs": 1}}
    (folder / "config.yaml").write_text(config.parse(small | values, "test").to_yaml())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A run with everything a report can show."""
    rows = [train_row(step) for step in range(4, 49, 4)] + [knn_row(e, a) for e, a in enumerate(ACCURACY)]
    folder = write_run(tmp_path / "full", sorted(rows, key=lambda row: row["step"]), output="runs/full")
    (folder / "baselines.json").write_text(json.dumps({"accuracy": BASELINES, "of": {}}))
    environment = {
        "command": "synco-fast demo --output 'a b'",
        "started": "2026-11-23 10:00 UTC",
        "machine": "torch 2.14.1\nCPU",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    Image.fromarray(np.full((30, 20, 3), 99, np.uint8)).save(folder / "views.png")
    return folder


def test_it_shows_what_it_must(full: Path) -> None:
    path = write_report(full)
    assert path == full / "report.html"
    check_self_contained(path)
    page = read(path)
    for expected in (
        "SynCo pretraining, resnet50",
        "runs/full, started 2026-11-23 10:00 UTC",
        "synco-fast demo --output 'a b'",
        "torch 2.14.1\nCPU",
        "guessing10.0%",
        "raw pixels21.0%",
        "random initialisation34.0%",
        "random initialisation, calibrated38.0%",
        "SynCo after epoch 130.0%",  # epoch 1: 30.0%
        "SynCo after epoch 450.0%",  # epoch 4: 50.0%
        "77 held-out images",
        "20 nearest training images (of 200)",
        "loss (grey: queue-only warm-up)",
        "acc@1",
        "acc@5",
        "images/s80",
        "training time0:00:10",  # 48 steps of 16 images at 80 images/s: 9.6 s
        "data wait",
        "learning rate",
        "warmup_epochs: 1",
        "positive",
        "queue",
        *KINDS,
    ):
        assert expected in page.text, expected
    assert page.tags.count("svg") == 4 and page.tags.count("img") == 1


def test_drawing_it_again_gives_the_same_page(full: Path) -> None:
    first = write_report(full).read_bytes()
    assert write_report(full).read_bytes() == first
    assert not list(full.glob(".*"))


@pytest.mark.parametrize("place", ["config", "command", "machine", "started"])
def test_what_comes_from_files_is_escaped(full: Path, place: str) -> None:
    if place == "config":
        folder = full.with_name("hostile")
        write_run(folder, [train_row(4)], output=HOSTILE, data={"batch_size": BATCH, "root": HOSTILE})
    else:
        folder = full
        environment = json.loads((folder / "environment.json").read_text())
        (folder / "environment.json").write_text(json.dumps(environment | {place: HOSTILE}))
    path = write_report(folder)
    check_self_contained(path)
    page = read(path)
    assert HOSTILE in page.text
    assert page.tags.count("img") == (0 if place == "config" else 1)
    assert "<script" not in path.read_text(encoding="utf-8")


def test_a_run_without_extras(tmp_path: Path) -> None:
    """Plain MoCo, no kNN, no baselines, one row, an unknown quantity: sections that have nothing are left out."""
    folder = write_run(
        tmp_path / "moco", [train_row(5, kinds=(), acc5=None)], method="moco", negatives={"warmup_epochs": 3}
    )
    path = write_report(folder)
    check_self_contained(path)
    page = read(path)
    assert "MoCo pretraining" in page.text and "Learning" in page.text
    for absent in ("kNN", "What the network sees", "How to repeat it", "warm-up", "interpolated"):
        assert absent not in page.text.partition("Resolved configuration")[0], absent


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not the folder of a run: it has no config\.yaml"):
        write_report(tmp_path)
    empty = write_run(tmp_path / "empty", [])
    with pytest.raises(UserError, match="nothing to report yet"):
        write_report(empty)
    (empty / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"it has no metrics\.jsonl"):
        write_report(empty)
    assert not list(tmp_path.rglob("report.html"))


def test_a_long_run_gives_a_small_page(tmp_path: Path) -> None:
    """200 epochs of ImageNet log 20,000 rows; drawn in full, their shares alone would take megabytes."""
    rows = [
        train_row(step, timing={"images_per_second": 1.0 + step % 7, "data_wait": 0.1, "seconds": 1.0})
        for step in range(1, 20001)
    ]
    path = write_report(write_run(tmp_path / "long", rows))
    assert path.stat().st_size < 1_500_000
    assert "steps20,000" in read(path).text


def line(svg: str, colour: str) -> np.ndarray:
    """The points (n, 2) of the one line of a colour, y upwards; the legend's samples are not clipped to the axes."""
    [path] = re.findall(rf'<path d="([^"]*)" clip-path="[^"]*" style="fill: none;[^"]* stroke: {colour};', svg)
    return np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path), float) * (1, -1)


def check_proportional(drawn: np.ndarray, values: list[float]) -> None:
    """Pixels are a straight-line function of the values, rising with them."""
    slope, offset = np.polyfit(values, drawn, 1)
    assert slope > 0
    np.testing.assert_allclose(drawn, slope * np.array(values) + offset, atol=1e-3)


def test_curves_show_the_numbers() -> None:
    rows = [train_row(step) for step in range(4, 49, 4)]
    drawn = line(charts.learning(rows, warmup_end=12), charts.ORANGE)
    check_proportional(drawn[:, 0], [row["step"] for row in rows])
    check_proportional(drawn[:, 1], [row["acc5"] for row in rows])
    drawn = line(charts.pace(rows), charts.VERMILLION)
    check_proportional(drawn[:, 1], [row["timing"]["data_wait"] for row in rows])

    knn_rows = [knn_row(e, a) for e, a in enumerate(ACCURACY)]
    svg = charts.knn(knn_rows, {"raw pixels": 0.21, "nothing": 0.1}, "SynCo")
    curve = line(svg, charts.BLUE)
    check_proportional(curve[:, 0], [1, 2, 3, 4])
    levels = [line(svg, colour)[:, 1] for colour in (charts.DARK, charts.ORANGE)]
    assert all(level[0] == level[-1] for level in levels)
    # Curve and level lines share one scale.
    check_proportional(np.array([*curve[:, 1], *(level[0] for level in levels)]), [*ACCURACY, 0.21, 0.1])


def test_layers_stack_to_one() -> None:
    """Each layer's height is its kind's share: what is drawn between 0 and 1 is all of the denominator."""
    svg = charts.mass([train_row(step) for step in range(4, 49, 4)])
    heights = []
    for colour in charts.MASS_COLOURS.values():
        [name] = re.findall(rf'<use xlink:href="#(\w+)"[^>]*style="fill: {colour}; stroke: #ffffff', svg)
        [path] = re.findall(rf'<path id="{name}" d="([^"]*)"', svg)
        points = np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path), float)
        last = points[points[:, 0] == points[:, 0].max()]
        heights.append(last[:, 1].max() - last[:, 1].min())
    assert sum(heights) > 100
    np.testing.assert_allclose(np.array(heights) / sum(heights), [0.1, 0.6, *[0.05] * 6], atol=1e-5)


@pytest.mark.parametrize("count", [2, 1000, 1001, 2000, 20001])
def test_thinning_keeps_the_last_row(count: int) -> None:
    rows = [train_row(step, lr=0.5) for step in range(1, count)] + [train_row(count, lr=0.1)]
    drawn = line(charts.pace(rows), charts.GREEN)
    assert len(drawn) <= 1000 and drawn[-1, 1] < drawn[0, 1]


def test_the_pace_weighs_rows_by_their_time(tmp_path: Path) -> None:
    """100 images in a second, then 120 in three: 55 a second, at which 8 steps of 16 images take 2.3 seconds."""
    rates = ((4, 100.0, 1.0), (8, 40.0, 3.0))
    rows = [
        train_row(step, timing={"images_per_second": rate, "data_wait": 0.0, "seconds": seconds})
        for step, rate, seconds in rates
    ]
    page = read(write_report(write_run(tmp_path / "run", rows)))
    assert "images/s55" in page.text and "training time0:00:02" in page.text
