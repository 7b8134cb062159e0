"""The loader's benchmark and the comparison with torchvision, as commands and in their arithmetic."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bench import fidelity, loader
from bench.fidelity import Moments, differences
from bench.loader_contenders import CONTENDERS
from synco_fast.data.index import scan
from synco_fast.data.recipes import IMAGENET_MEAN, IMAGENET_STD, RECIPES
from tests.conftest import REPOSITORY, environment
from tests.formats import tar_with_folders


def bench(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", f"bench.{module}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=REPOSITORY, check=False)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_contender_and_every_change_has_a_row(images: Path, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    sizes = ("--batch", 8, "--size", 32, "--threads", 1, "--rounds", 1, "--batches", 2)
    done = bench("loader", "--data", images, *sizes, "--vary", "--step", tiny, "--steps", 4, "--output", output)
    assert done.returncode == 0, done.stderr
    rows = rows_of(output)
    timed = [row for row in rows if row["contender"] != "pretrain"]
    here = [name for name, contender in CONTENDERS.items() if not contender.needs_gpu]
    assert [row["contender"] for row in timed][: len(here)] == here and "left out without a GPU: read_" in done.stderr
    assert all(row["images_per_second"] > 0 and row["augmentation"] == "compiled" and row["commit"] for row in timed)
    base = {name: timed[0][name] for name in ("batch", "threads", "prefetch", "dtype", "page_cache", "format")}
    *varied, cold_shards = timed[len(here) :]
    changes = [[name for name, value in base.items() if row[name] != value] for row in varied]
    assert sorted({name for [name] in changes}) == sorted(base)
    assert (cold_shards["page_cache"], cold_shards["format"]) == ("cold", "shards")
    [step] = [row for row in rows if row["contender"] == "pretrain"]
    assert 0 <= step["data_wait"] <= 1 and step["config"] == "tiny.yaml"
    assert f"{'synco_fast':<24}" in done.stdout and "tiny.yaml" in done.stdout


def test_mistakes_are_named(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = tar_with_folders(scan(images), tmp_path / "shards")
    (tmp_path / "empty").mkdir()
    mistakes: list[tuple[ModuleType, tuple[object, ...], str]] = [
        (loader, (images, "--only", "synco_fast,dalli"), "--only dalli: expected some of synco_fast"),
        (loader, (images, "--batch", 101), "has 100 images, fewer than one batch of 101"),
        (loader, (images, "--batch", 8, "--steps", 1), "--steps 1: expected 2 or more"),
        (loader, (shards, "--batch", 8), "--only torchvision,dali_chain"),
        (loader, (tmp_path / "empty",), f"data folder {tmp_path / 'empty'} is empty"),
        (fidelity, (shards,), "holds shards"),
    ]
    for module, arguments, message in mistakes:
        monkeypatch.setattr(sys, "argv", ["bench", "--data", *map(str, arguments)])
        with pytest.raises(SystemExit, match=re.escape(message)):
            module.main()


def test_fidelity_has_a_row_for_every_operation(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    sizes = ("--images", 10, "--size", 32, "--views", 20)
    done = bench("fidelity", "--data", images, *sizes, "--output", output)
    assert done.returncode == 0, done.stderr
    operations = [row for row in rows_of(output) if "operation" in row]
    assert {row["operation"] for row in operations} >= {"resize", "hue", "blur", *RECIPES}
    assert all(row["max"] == 0 for row in operations if not row["pillow_order"])
    channels = [row for row in rows_of(output) if "channel" in row]
    assert len(channels) == 6 and all(row["relative"] < 0.5 for row in channels)


def test_differences_are_measured() -> None:
    theirs = np.zeros((2, 4, 4, 3), np.uint8) + np.array([200, 40, 40], np.uint8)  # a red: hue 0
    ours = theirs.copy()
    assert differences(ours, theirs) == {"mean": 0, "max": 0, "differing": 0, "hue_degrees": 0}
    ours[1, 2, 3] = (200, 40, 80)  # hue 345
    found = differences(ours, theirs)
    assert found == {"mean": 40 / 96, "max": 40, "differing": 1 / 96, "hue_degrees": pytest.approx(15)}
    ours[1, 2, 3] = (42, 40, 40)  # too dark to have a hue
    assert differences(ours, theirs)["hue_degrees"] == 0


def test_moments_are_those_of_all_pixels() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 5, 7, 3))
    moments = Moments()
    for view in pixels:
        moments.add((torch.from_numpy(view) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD))
    flat = pixels.reshape(-1, 3)
    np.testing.assert_allclose(moments.values(), [*flat.mean(axis=0), *flat.var(axis=0)])
