"""Real JPEGs, real processes: what the tests of whole runs share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
SYNCO_FAST = [sys.executable, "-m", "synco_fast"]

TINY = """
method: synco
data: {batch_size: 16, image_size: 32, eval_resize: 32, threads: 1}
model: {arch: resnet10_narrow, dim: 16, momentum: 0.9}
bn: {mode: split, group_size: 4}
queue: {size: 64}
negatives:
  {n_hard: 16, interpolated: 4, extrapolated: 4, mixed: 4, noisy: 4, perturbed: 4, adversarial: 4, warmup_epochs: 1}
trainer: {epochs: 4, device: cpu, precision: fp32, log_every: 1}
"""
"""A run of a twentieth of a second a step: 6 an epoch on `images`, synthetic negatives from the second epoch."""

RESNET18 = TINY.replace("resnet10_narrow", "resnet18")
"""The same with a network that other libraries know."""


def write_images(folder: Path, count: int, seed: int) -> None:
    """Noise on a colour, as JPEG: enough to be told apart, nothing to be learnt."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        height, width = random.integers(36, 60, size=2)
        pixels = random.integers(0, 256, size=3) + random.normal(0, 30, size=(height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=85)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 training and 20 held-out JPEGs in two classes: train/<class>/*, val/<class>/*."""
    root = tmp_path_factory.mktemp("images")
    for number, (split, count) in enumerate((("train", 50), ("val", 10))):
        for label in range(2):
            write_images(root / split / f"class{label}", count, seed=2 * number + label)
    return root


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The configuration TINY as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same file for many tests, which leave it as it is."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


def environment() -> dict[str, str]:
    """One thread a process: what runs side by side must not fight for two cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture
def synco_fast() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the console command to its end."""

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*SYNCO_FAST, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment(),
            cwd=cwd,
            check=False,
        )

    return run
