"""`synco-fast knn` on real JPEGs: in passes, over processes, of a plain state dict."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from synco_fast.engine import probe
from tests.command import call, check_error, check_refused
from tests.conftest import environment
from tests.engine.test_distributed import TORCHRUN

SWEEP = ("--k", "1,5,20,500", "--temperature", "0.07,1", "--set", "data.image_size=32", "--set", "data.eval_resize=32")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's ResNet-18 at a random start."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def alone(weights: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds in one pass."""
    return result(weights, images, tmp_path_factory.mktemp("knn") / "alone")


def result(weights: Path, images: Path, output: Path, *options: str) -> dict[str, Any]:
    done = call("knn", weights, "--data", images, *SWEEP, *options, "--output", output)
    assert done.code == 0, done.err
    return json.loads((output / "result.json").read_text())


def test_a_state_dict(alone: dict[str, Any]) -> None:
    assert [row["k"] for row in alone["accuracies"]] == [1, 1, 5, 5, 20, 20, 100, 100]
    assert len({row["accuracy"] for row in alone["accuracies"]}) > 1, "all alike, so the tests here could not fail"
    assert alone["weights"]["kind"] == "state dict" and alone["weights"]["arch"] == "resnet18"


def test_passes_over_the_held_out_images_add_up(
    alone: dict[str, Any], weights: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_HELD_OUT", 7)
    again = result(weights, images, tmp_path / "passes")
    assert again["accuracies"] == alone["accuracies"] and again["used"] == {"bank": 100, "held_out": 20}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work(
    processes: int, alone: dict[str, Any], weights: Path, images: Path, tmp_path: Path
) -> None:
    """Three do not divide the images evenly, and each has fewer rows than the 500 neighbours asked for."""
    command = [*TORCHRUN, f"--nproc-per-node={processes}", "-m", "synco_fast", "knn", str(weights)]
    command += ["--data", str(images), *SWEEP, "--output", str(tmp_path / "knn")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "knn" / "result.json").read_text())
    assert found["accuracies"] == alone["accuracies"] and found["used"] == alone["used"]
    assert found["about"]["processes"] == processes
    assert done.stdout.count("kNN accuracy") == len(alone["accuracies"]), "each process printed"


BAD: list[tuple[list[str], tuple[str, ...]]] = [
    (["--set", "data.image_sise=32"], ("data.image_sise", "did you mean data.image_size")),
    (["--set", "optim.lr=1"], ("optim", "no such key")),
    (["--set", "data.root=elsewhere"], ("data.root=elsewhere", "--data")),
    (["--set", "data.recipe=moco_v1"], ("data.recipe", "nothing here depends on it")),
    (["--set", "data.image_size=300"], ("data.eval_resize = 256", "at least data.image_size = 300")),
    (["--device", "cuda"], ("--device cuda", "no CUDA device")),
]


@pytest.mark.parametrize(("options", "names"), BAD, ids=lambda value: " ".join(value))
def test_bad_options(options: list[str], names: tuple[str, ...], weights: Path, images: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available() and "cuda" in options:
        pytest.skip("there is a GPU")
    output = tmp_path / "knn"
    check_refused_where_nothing_is(output, ["knn", weights, "--data", images, *options, "--output", output], names)


def check_refused_where_nothing_is(output: Path, command: list[Any], names: tuple[str, ...]) -> None:
    done = call(*command)
    check_error(done.code, done.err, names)
    assert done.out == "" and not output.exists()


def test_a_folder_that_holds_something_else(weights: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "knn"
    names = (str(output), "notes.txt", "no knn left there")
    output.mkdir()
    (output / "notes.txt").write_text("somebody's")
    done = call("knn", weights, "--data", images, "--output", output)
    check_error(done.code, done.err, names)
    assert (output / "notes.txt").read_text() == "somebody's"


def test_weights_of_nothing_known(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    torch.save({"patch_embed.weight": torch.zeros(3)}, path)
    check_refused(tmp_path / "run", "knn", path, "--data", images, names=(str(path), "no residual network"))


def test_features_that_overflow(weights: Path, images: Path, tmp_path: Path) -> None:
    """Not a number is as near to one image as to another, and would come out as a plausible accuracy."""
    state = torch.load(weights, weights_only=True)
    state["layer4.1.bn2.weight"] = torch.full((512,), 3e38)
    path = tmp_path / "huge.pth"
    torch.save(state, path)
    check_refused(tmp_path / "run", "knn", path, "--data", images, *SWEEP, names=("features are not finite",))
