"""What came of a sweep: the table and the page against numpy, and with hostile names."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synco_fast.evaluation import sweep_page
from tests.page import check_self_contained, read

HOSTILE = """"'></pre></title></style><script>alert(1)</script><img src=x onerror=alert(2)>&amp;$title ${x}|"""


def made_up(names: list[str], seeds: int, values: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"run": name, "seed": seed, "overrides": {}, "metrics": {"knn.accuracy": float(values[i, seed])}}
        for i, name in enumerate(names)
        for seed in range(seeds)
    ]


def test_mean_and_deviation() -> None:
    """Against numpy; the bound is a few roundings of sums of numbers below 1."""
    values = np.random.default_rng(0).random((2, 5))
    found = made_up(["a", "b"], 5, values)
    found[0]["metrics"]["linear.top1"] = 0.25
    for i, row in enumerate(sweep_page.summary(found)):
        metric = row["metrics"]["knn.accuracy"]
        assert metric["n"] == 5
        assert abs(metric["mean"] - values[i].mean()) < 1e-15
        assert abs(metric["deviation"] - values[i].std(ddof=1)) < 1e-15
    assert sweep_page.summary(found)[0]["metrics"]["linear.top1"] == {"mean": 0.25, "deviation": None, "n": 1}


def test_table_and_page(tmp_path: Path) -> None:
    """Hostile names too, that no sweep would take."""
    found = made_up(["a", HOSTILE], 2, np.array([[0.5, 0.51], [0.125, 0.125]]))
    found[0]["metrics"]["linear.top1"] = 0.25
    about = {"command": HOSTILE, "started": HOSTILE, "torch": HOSTILE}
    result = {"rows": found, "summary": sweep_page.summary(found), "settings": {"runs": {HOSTILE: {}}}}
    result |= {"about": about, "stages": {"done": 3, "of": 4}}
    table = sweep_page.table(result).splitlines()
    assert table[:3] == [
        "| run | knn.accuracy | linear.top1 |",
        "| --- | --- | --- |",
        "| a | 50.50 ± 0.71 (2) | 25.00 (1) |",
    ]
    assert table[3].endswith("&#124; | 12.50 ± 0.00 (2) | - |")
    (tmp_path / "report.html").write_text(sweep_page.page(result, HOSTILE), encoding="utf-8")
    check_self_contained(tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert page.text.count(HOSTILE) >= 6 and "50.50 ± 0.71 (2)" in page.text and "3 of 4" in page.text
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == ["knn.accuracy of each run, by seed", "linear.top1 of each run, by seed"]
    assert sweep_page.page(result, HOSTILE) == (tmp_path / "report.html").read_text(encoding="utf-8")


def test_dots_stand_where_their_numbers_are() -> None:
    """A run's mean lies between its dots, in the same row."""
    found = made_up(["a", "b"], 2, np.array([[0.2, 0.4], [0.6, 0.6]]))
    svg = sweep_page.dots({"rows": found, "summary": sweep_page.summary(found)}, "knn.accuracy")
    groups = re.findall(r'<g id="PathCollection_\d">(.*?)\n   </g>', svg, re.DOTALL)
    means, seeds = (
        [(float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="(.+?)" y="(.+?)"', g)] for g in groups[:2]
    )
    assert len(means) == 2 and len(seeds) == 4
    # Numbers are written with 6 decimals.
    assert means[0] == pytest.approx(np.mean(seeds[:2], axis=0), abs=1e-5)
    assert means[1] == pytest.approx(seeds[2], abs=1e-5) and seeds[2] == seeds[3]
    assert seeds[0][0] < seeds[1][0] < seeds[2][0]
    assert seeds[0][1] == seeds[1][1] < seeds[2][1]


@pytest.mark.parametrize("values", [[0.29, 0.484], [0.5, 0.5001], [0.1, 0.9], [0.31, 0.325], [0.5, 0.5]])
def test_ticks_say_where_they_are(values: list[float]) -> None:
    """Rounded labels would not be evenly spaced, as the ticks are."""
    found = made_up(["a"], 2, np.array([values]))
    svg = sweep_page.dots({"rows": found, "summary": sweep_page.summary(found)}, "knn.accuracy")
    labels = [float(text) for text in re.findall(r">(-?[0-9.]+)%<", svg)]
    assert len(labels) > 2 and np.allclose(np.diff(labels), labels[1] - labels[0]) and labels[1] > labels[0]
