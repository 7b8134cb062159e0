"""What `synco-fast data view` and `data stats` show."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synco_fast.data.grid import save_grid
from synco_fast.data.index import scan
from synco_fast.data.recipes import RECIPES
from synco_fast.data.stats import statistics
from synco_fast.errors import UserError


def test_grid_shows_originals_and_views(jpeg_root: Path, tmp_path: Path) -> None:
    index = scan(jpeg_root)
    save_grid(index, tmp_path / "grid.png", n=5, image_size=40, recipe=RECIPES["moco_v2"], seed=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert grid.shape == (5 * 44 + 4, 3 * 44 + 4, 3)
    inside = np.zeros(44 * 5 + 4, bool), np.zeros(44 * 3 + 4, bool)
    for lines in inside:
        for start in range(4, len(lines), 44):
            lines[start : start + 40] = True
    assert (grid[~inside[0]] == 255).all() and (grid[:, ~inside[1]] == 255).all()
    cells = grid[inside[0]][:, inside[1]].reshape(5, 40, 3, 40, 3).transpose(0, 2, 1, 3, 4)
    assert (cells.std(axis=(2, 3, 4)) > 3).all()
    assert not np.array_equal(cells[:, 1], cells[:, 2])


def test_grid_that_cannot_be_written(jpeg_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/grid.png cannot be written"):
        save_grid(
            scan(jpeg_root),
            tmp_path / "nowhere" / "grid.png",
            n=2,
            image_size=32,
            recipe=RECIPES["moco_v1"],
            seed=0,
        )


def test_statistics(jpeg_root: Path) -> None:
    facts = statistics(scan(jpeg_root))
    assert facts["images"] == 60
    assert facts["classes"] == {"ant": 15, "bee": 15, "cat": 15, "dog": 15}
    assert facts["formats"] == {"JPEG": 60}
    assert facts["unreadable"] == []
    heights = [Image.open(path).height for path in (jpeg_root / "train").glob("*/*.jpg")]
    assert facts["height"][0.0] == min(heights) and facts["height"][1.0] == max(heights)
    assert facts["height"][0.5] == np.median(heights)


def test_statistics_name_unreadable_files(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_text("text")
    facts = statistics(scan(tmp_path))
    assert facts["images"] == 2 and facts["formats"] == {"PNG": 1} and facts["classes"] == {}
    assert facts["width"][0.5] == 30
    [message] = facts["unreadable"]
    assert "b.jpg" in message
