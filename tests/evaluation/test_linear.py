"""The linear probe through the command line, on real JPEGs, against its protocol written out in float64."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from synco_fast.data.index import Index, held_out, scan
from synco_fast.engine import checkpoints
from synco_fast.evaluation.linear import check_unchanged
from tests.command import call, check_error, check_refused_there, contents, one_step
from tests.conftest import TINY, environment
from tests.engine.runs import differences, rows
from tests.evaluation.probes import (
    backbone_of,
    commanded,
    process,
    result_of,
    signalled,
    trained_by_hand,
    write_classes,
    write_weights,
)

OPTIONS = ("--epochs", 4, "--lr", 0.3, "--batch-size", 14, "--milestones", "2,3")
"""On 63 images: 4 steps an epoch, and 7 images of each epoch left out."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 classes of 9 images, and of 3 held-out ones: 21 are no even share for two processes."""
    return write_classes(tmp_path_factory.mktemp("classes"), 7, 9, 3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "resnet18.pth")


@pytest.fixture(scope="module")
def splits(data: Path) -> tuple[Index, Index]:
    test = held_out(data)
    assert test is not None
    return scan(data), test


@pytest.fixture(scope="module")
def undisturbed(weights: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one run from start to end."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = call(*commanded("linear", weights, data, output, *OPTIONS))
    assert done.code == 0, done.err
    top1, best = result_of(output)["metrics"]["top1"], result_of(output)["best"]["top1"]
    assert f"top-1 {top1:.2%}" in done.out and f"best top-1 {best:.2%}" in done.out
    return output


def state_of(output: Path) -> dict[str, Any]:
    return checkpoints.read(checkpoints.folder(output) / checkpoints.LATEST)


def test_equals_the_protocol_written_out(weights: Path, splits: tuple[Index, Index], undisturbed: Path) -> None:
    """16 steps, the rate falling twice. Features in float32 are off by some 1e-6 of their size, and a layer is a sum of
    such; a wrong rate, momentum, weight decay of 1e-4 or crop shows in the third digit.
    """
    expected = trained_by_hand(
        weights,
        *splits,
        epochs=4,
        batch_size=14,
        rates=lambda epoch: [0.0, 0.3 * 0.1 ** ((epoch >= 2) + (epoch >= 3))],
        weight_decay=0.0,
        frozen=True,
    )
    head = load_file(undisturbed / "head.safetensors")
    for name, value in expected.head.state_dict().items():
        assert (head[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    found = rows(undisturbed)
    train = [row for row in found if row["kind"] == "train"]
    assert [row["step"] for row in found] == [4, 4, 8, 8, 12, 12, 16, 16]
    means = torch.tensor(expected.losses).view(4, 4).mean(dim=1).tolist()
    assert [row["loss"] for row in train] == pytest.approx(means, rel=1e-5)
    assert [row["lr"] for row in train] == pytest.approx([0.3, 0.3, 0.03, 0.003])
    result = result_of(undisturbed)
    assert result["epochs"] == expected.accuracies
    assert [{name: row[name] for name in ("top1", "top5")} for row in found if row["kind"] == "eval"] == result[
        "epochs"
    ]
    best = max(row["top1"] for row in expected.accuracies)
    assert result["metrics"] == expected.accuracies[-1] and result["best"]["top1"] == best
    assert result["epochs"][result["best"]["epoch"] - 1]["top1"] == best
    assert 0 < result["metrics"]["top1"] < result["metrics"]["top5"] < 1
    assert result["protocol"] == "probe" and result["settings"]["milestones"] == [2, 3]


def edited(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({name: change(state[name])})


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a weight's last bit": edited("layer4.1.conv2.weight", lambda weight: torch.nextafter(weight, weight + 1)),
    "a running mean": edited("bn1.running_mean", lambda mean: mean + 1e-3),
    "a counter of batches": edited("bn1.num_batches_tracked", lambda count: count + 1),
    "a sign of zero": edited("bn1.bias", torch.neg),
    "a tensor missing": lambda state: state.pop("bn1.bias"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_frozen_backbone_that_changed(kind: str, weights: Path) -> None:
    backbone = backbone_of(weights).float()
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    check_unchanged(backbone.to(memory_format=torch.channels_last), state)
    CHANGES[kind](state)
    with pytest.raises(RuntimeError, match="the frozen backbone changed in training: 1 tensors"):
        check_unchanged(backbone, state)


def test_a_frozen_backbone_with_nan_is_itself(weights: Path) -> None:
    backbone = backbone_of(weights)
    backbone.bn1.running_mean[0] = torch.nan
    check_unchanged(backbone, {name: value.clone() for name, value in backbone.state_dict().items()})


def test_stopped_killed_and_resumed(weights: Path, images: Path, tmp_path: Path) -> None:
    """SIGTERM within an epoch of 100 steps, SIGKILL at its end: the bits and metrics of a run left alone."""
    options = ("--epochs", 2, "--lr", 0.01, "--batch-size", 1, "--resume", "auto")
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert call(*commanded("linear", weights, images, whole, *options)).code == 0
    arguments = commanded("linear", weights, images, output, *options)
    code, said = signalled(process(arguments), "step 50/200", signal.SIGTERM, pause=0.2)
    assert code == 75 and "--resume auto" in said and "Traceback" not in said, said
    stopped = state_of(output)
    assert 50 < stopped["step"] < 100 and stopped["training"]["means"]["steps"] == stopped["step"] - 50
    assert not (output / "result.json").exists()
    code, said = signalled(process(arguments), "step 100/200 epoch 1: top-1", signal.SIGKILL)
    assert code == -signal.SIGKILL and state_of(output)["step"] in (100, stopped["step"]), said
    done = call(*arguments)
    assert done.code == 0 and "step 200/200" in done.err and "step 50/200" not in done.err, done.err
    assert differences(state_of(output), state_of(whole)) == []
    assert rows(output) == rows(whole) and result_of(output) == result_of(whole)
    assert (output / "head.safetensors").read_bytes() == (whole / "head.safetensors").read_bytes()
    assert not list(output.rglob(".*.tmp"))
    # Once more, there is nothing left to do but to say so.
    again = call(*arguments)
    assert again.code == 0 and "nothing to do: step 200 of 200 is done" in again.err, again.err
    assert again.out == done.out and rows(output) == rows(whole)


def test_two_processes_equal_one(weights: Path, data: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Only the order of float32 sums differs; held-out images are counted once each, 10 here and 11 there."""
    arguments = commanded("linear", weights, data, tmp_path / "two", *OPTIONS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "synco_fast", *arguments], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert result_of(tmp_path / "two")["epochs"] == result_of(undisturbed)["epochs"]
    head = load_file(tmp_path / "two" / "head.safetensors")
    for name, value in load_file(undisturbed / "head.safetensors").items():
        # 16 steps of sums over 14 rows: some 100 roundings of what is added.
        assert (head[name] - value).abs().max() <= 100 * 2**-23 * value.abs().max(), name
    for one, two in zip(rows(undisturbed), rows(tmp_path / "two"), strict=True):
        numbers = {name: value for name, value in one.items() if not isinstance(value, str)}
        assert {name: two[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)


def test_of_a_pretraining_checkpoint_with_bad_images(images: Path, tmp_path: Path) -> None:
    """Images are prepared as the checkpoint's were; bad ones are left out where that is asked for."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = call(*one_step(tmp_path / "tiny.yaml", images, tmp_path / "run", "optim.momentum=0"))
    assert done.code == 0, done.err
    data = shutil.copytree(images, tmp_path / "data")
    for split in ("train", "val"):
        (data / split / "class1" / "003.jpg").write_text("no image")
    checkpoint = tmp_path / "run" / "checkpoints" / "latest.pt"
    arguments = ["linear", checkpoint, "--data", data, "--epochs", 1, "--batch-size", 25, "--lr", 0.01]
    skip = ["--set", "data.on_corrupt=skip", "--output", tmp_path / "skip", "--precision", "bf16"]
    done = call(*arguments, *skip)
    assert done.code == 0, done.err
    result = result_of(tmp_path / "skip")
    assert result["data"]["image_size"] == 32 and result["weights"]["method"] == "synco"
    assert (19 * result["metrics"]["top1"]).is_integer() and result["settings"]["milestones"] == []
    assert sum(line.startswith("skipping image file") for line in done.err.splitlines()) == 2
    done = call(*arguments, "--output", tmp_path / "fail")
    check_error(done.code, done.err, ("003.jpg",))
    assert not (tmp_path / "fail" / "result.json").exists()


def test_a_loss_that_is_not_finite(weights: Path, images: Path, tmp_path: Path) -> None:
    arguments = commanded("linear", weights, images, tmp_path / "run", "--epochs", 2, "--lr", 1e38, "--batch-size", 50)
    done = call(*arguments)
    check_error(done.code, done.err, ("not finite", "--lr 1e+38", "lower"))
    assert done.code == 1 and done.out == ""
    assert not any((tmp_path / "run" / "checkpoints").iterdir()) and not (tmp_path / "run" / "result.json").exists()


BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "lr 0": (["--lr", "0"], ("--lr 0", "above 0")),
    "lr below 0": (["--lr", "-1"], ("--lr -1",)),
    "lr nan": (["--lr", "nan"], ("--lr nan",)),
    "lr inf": (["--lr", "inf"], ("--lr inf",)),
    "milestones beyond the end": (["--epochs", "60", "--milestones", "30,60"], ("--milestones 30,60", "--epochs 60")),
    "milestones descending": (["--milestones", "60,30"], ("--milestones 60,30", "ascend")),
    "milestones of text": (["--milestones", "late"], ("--milestones late",)),
    "milestones at 0": (["--milestones", "0,60"], ("--milestones 0,60",)),
    "a batch beyond the data": (["--batch-size", "101"], ("--batch-size 101", "at most 100")),
    "image size": (["--set", "data.image_size=8"], ("data.image_size = 8",)),
    "another section": (["--set", "model.arch=resnet18"], ("model",)),
    "resume from nothing": (["--batch-size", "50", "--resume", "gone.pt"], ("gone.pt", "No such file")),
    "options of training for --cached": (["--cached", "--lr", "3"], ("--cached", "--lr")),
    "resuming for --cached": (["--cached", "--resume", "auto"], ("--cached", "--resume")),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_options(kind: str, weights: Path, images: Path, tmp_path: Path) -> None:
    options, names = BAD[kind]
    output = tmp_path / "run"
    done = call(*commanded("linear", weights, images, output, *options))
    check_error(done.code, done.err, names)
    assert (done.code, done.out) == (1, "") and not output.exists()


def test_bad_weights_and_data(weights: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    gone = tmp_path / "gone.pth"
    check_refused_there(output, *commanded("linear", weights, images, output), names=(str(output), "notes.txt"))
    shutil.rmtree(output)
    done = call(*commanded("linear", gone, images, output))
    check_error(done.code, done.err, (str(gone), "No such file"))
    other = write_classes(tmp_path / "other", 1, 2, 1)
    (other / "val" / "class0").rename(other / "val" / "class7")
    done = call(*commanded("linear", weights, other, output))
    check_error(done.code, done.err, ("same classes", "class7"))
    assert not output.exists()


def test_output_that_holds_a_run(weights: Path, data: Path, undisturbed: Path) -> None:
    before = contents(undisturbed)
    done = call(*commanded("linear", weights, data, undisturbed, *OPTIONS))
    check_error(done.code, done.err, (str(undisturbed), "--resume auto", "--output"))
    done = call(*commanded("linear", weights, data, undisturbed, "--cached"))
    check_error(done.code, done.err, (str(undisturbed), "checkpoints"))
    assert contents(undisturbed) == before


ANOTHER: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "rate": (["--lr", "0.2"], ("lr is 0.2, was 0.3",)),
    "seed": (["--seed", "1"], ("seed is 1, was 0",)),
    "epochs": (["--epochs", "5"], ("epochs is 5, was 4",)),
    "precision": (["--precision", "bf16"], ("precision is 'bf16', was 'fp32'",)),
    "image size": (["--set", "data.eval_resize=40"], ("data.eval_resize is 40, was 32",)),
}


@pytest.mark.parametrize("kind", ANOTHER)
def test_resuming_another_run(kind: str, weights: Path, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    options, names = ANOTHER[kind]
    latest = checkpoints.folder(undisturbed) / checkpoints.LATEST
    arguments = commanded("linear", weights, data, tmp_path / "run", *OPTIONS, "--resume", latest, *options)
    done = call(*arguments)
    check_error(done.code, done.err, (str(latest), "another run", *names))
    assert not (tmp_path / "run").exists()


def cut_momentum(state: dict[str, Any]) -> None:
    state["training"]["optimizer"]["state"][0]["momentum_buffer"] = torch.ones(3)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = {
    "of another command": (lambda state: state.update(command="semisup"), ("synco-fast linear", "semisup")),
    "without its training": (lambda state: state.pop("training"), ("lacks training",)),
    "of other weights": (lambda state: state["run"].update(weights="0" * 64), ("another run", "weights is")),
    "of other images": (lambda state: state["run"].update({"training images": ""}), ("training images is",)),
    "head of another width": (
        lambda state: state["training"]["model"].update(weight=torch.ones(7, 3)),
        ("does not fit", "weight"),
    ),
    "momentum of another shape": (cut_momentum, ("does not fit", "momentum")),
    "no place in the data": (lambda state: state["training"]["loader"].pop("epoch"), ("place in the data",)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints(kind: str, weights: Path, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    change, names = DAMAGE[kind]
    state = state_of(undisturbed)
    change(state)
    torch.save(state, tmp_path / "given.pt")
    arguments = commanded("linear", weights, data, tmp_path / "run", *OPTIONS, "--resume", str(tmp_path / "given.pt"))
    done = call(*arguments)
    check_error(done.code, done.err, (str(tmp_path / "given.pt"), *names))
    assert not (tmp_path / "run").exists()
