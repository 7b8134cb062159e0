"""The console command, command by command."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import synco_fast as package
from synco_fast import config
from synco_fast.ops import backends
from tests.command import call
from tests.conftest import TINY

HELP = {
    "": (
        "demo",
        "pretrain",
        "knn",
        "linear",
        "semisup",
        "export",
        "analyze",
        "sweep",
        "profile",
        "data",
        "doctor",
        "--version",
    ),
    "demo": ("--output",),
    "pretrain": ("CONFIG", "--set", "KEY=VALUE", "--data", "--resume", "--print-config"),
    "knn": ("checkpoint", "--data", "--k", "--temperature", "--set", "--device", "--precision", "--output"),
    "linear": (
        *("checkpoint", "--data", "--epochs", "--lr", "--batch-size", "--milestones", "--seed", "--resume"),
        *("--cached", "--set", "--output"),
    ),
    "semisup": (
        *("checkpoint", "--fraction", "--list", "--lr-backbone", "--lr-head", "--epochs", "--weight-decay"),
        *("--resume", "--set", "--output"),
    ),
    "export": ("checkpoint", "out", "--format", "torchvision", "detectron2"),
    "analyze": ("checkpoint", "--data", "--queries", "--queue", "--n-hard", "--seed", "--tsne", "--set", "--output"),
    "sweep": ("SWEEP", "--data", "--output", "--jobs"),
    "profile": ("CONFIG", "--set", "--data", "--synthetic", "--steps", "--rounds", "--output"),
    "data": ("view", "stats", "pack"),
    "data view": ("root", "--output", "--images", "--recipe", "--image-size", "--seed"),
    "data stats": ("root",),
    "data pack": ("source", "output", "--shard-size"),
    "doctor": ("--help",),
}


@pytest.mark.parametrize("command", HELP)
def test_help(command: str) -> None:
    done = call(*command.split(), "--help")
    assert done.code == 0
    assert [name for name in HELP[command] if name not in done.out] == []


def test_version(synco_fast: Callable[..., Any]) -> None:
    done = synco_fast("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{package.__version__}\n", "")


def test_doctor() -> None:
    done = call("doctor")
    assert done.code == 0, done.err
    lines = [re.split(r"  +", line.strip(), maxsplit=1) for line in done.out.splitlines() if line.startswith("  ")]
    found = {words[0]: words[1] for words in lines}
    for name, state in backends().items():
        assert found[name] == state
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["DALI"].startswith("ok: nvidia-dali-cuda")
    assert "cores" in found["CPU"]
    assert torch.cuda.is_available() or "none: " in found["GPU"]


@pytest.mark.parametrize(
    ("file", "said"), [("__init__.py", "not NVIDIA's"), ("optimizers/__init__.py", "built without its CUDA extensions")]
)
def test_doctor_tells_the_two_apexes_apart(
    file: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing PyPI's fails where what it needs is missing, and looking must not import."""
    (tmp_path / "apex").mkdir()
    for name in {"__init__.py", file}:
        (tmp_path / "apex" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "apex" / name).write_text("import pyramid_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    done = call("doctor")
    assert done.code == 0, done.err
    assert said in done.out


def test_doctor_finds_compilers_where_the_build_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "a toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'nvcc: NVIDIA'\necho 'Cuda compilation tools, release 98.7'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    monkeypatch.setenv("CXX", "")
    done = call("doctor")
    assert done.code == 0, done.err
    assert "Cuda compilation tools, release 98.7" in done.out
    assert re.search(r"C\+\+ compiler +\S*c\+\+", done.out)
    monkeypatch.setenv("CUDA_HOME", "none")
    monkeypatch.setenv("CXX", "no-c++ -m64")
    done = call("doctor")
    assert done.code == 0, done.err
    assert "none/bin/nvcc not found: the CUDA kernel needs it" in done.out
    assert "no-c++ -m64 not found: the kernels need it" in done.out


def test_data_stats(images: Path) -> None:
    done = call("data", "stats", images)
    assert done.code == 0, done.err
    assert "images   100" in done.out
    assert "JPEG 100" in done.out
    assert re.search(r"class0 +50\b", done.out) and re.search(r"class1 +50\b", done.out)


def test_data_view(images: Path, tmp_path: Path) -> None:
    """Three images a row: 32 pixels each with gaps of 4."""
    output = tmp_path / "views.png"
    done = call("data", "view", images, "--output", output, "--images", "5", "--image-size", "32")
    assert done.code == 0, done.err
    assert str(output) in done.out
    with Image.open(output) as picture:
        picture.load()
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (3 * 36 + 4, 5 * 36 + 4))
        assert len(picture.getcolors(maxcolors=2**24) or []) > 1000


def test_pretrain_and_knn(images: Path, tmp_path: Path) -> None:
    """Two steps; what the run measured at its end is what `knn` measures on its checkpoint."""
    file, output = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(TINY)
    settings = [f"output={output}", "trainer.max_steps=2", "knn={every_epochs: 1, k: 7, temperature: 0.2}"]
    options = [part for setting in settings for part in ("--set", setting)]
    done = call("pretrain", file, "--data", images, *options)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 1), ("train", 2), ("knn", 2)]
    written = config.load(output / "config.yaml")
    assert written == config.load(file, [*settings, f"data.root={images}"])
    printed = call("pretrain", file, "--data", images, *options, "--print-config").out
    assert yaml.safe_load(printed) == written.model_dump()

    checkpoint = output / "checkpoints" / "latest.pt"
    done = call(
        "knn", checkpoint, "--data", images, "--k", "7,200", "--temperature", "0.2,0.07", "--output", tmp_path / "knn"
    )
    assert done.code == 0, done.err
    accuracy = rows[-1]["accuracy"]
    assert done.out.startswith(f"kNN accuracy {accuracy:.2%} (k 7, t 0.2)\n")
    result = json.loads((tmp_path / "knn" / "result.json").read_text())
    assert result["metrics"] == {"accuracy": accuracy} and result["used"] == {"bank": 100, "held_out": 20}
    swept = [(row["k"], row["temperature"]) for row in result["accuracies"]]
    assert swept == [(7, 0.2), (7, 0.07), (100, 0.2), (100, 0.07)]
    assert result["weights"]["step"] == 2 and result["data"]["train"]["images"] == 100
    assert "knn, images: 120/120" in done.err

    done = call("pretrain", file, "--data", images, *options, "--resume", "auto")
    assert done.code == 0, done.err
    assert "nothing to do: step 2 of 2 is done" in done.err
