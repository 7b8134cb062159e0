"""Fine-tuning on a share of the labels through the command line, against its protocol written out in float64."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from synco_fast.data.index import Index, held_out, scan
from synco_fast.engine import checkpoints
from synco_fast.engine.weights import load_weights
from synco_fast.evaluation.subset import named_by
from tests.command import call, check_error
from tests.conftest import environment
from tests.engine.runs import differences, rows
from tests.evaluation.probes import (
    ByHand,
    commanded,
    cosine,
    process,
    result_of,
    signalled,
    trained_by_hand,
    write_classes,
    write_weights,
)

TUNED = ("--fraction", 0.5, "--epochs", 2, "--batch-size", 10, "--lr-backbone", "0.001,0.01", "--lr-head", "0.05")
"""50 of the 100 images: trials of 4 steps an epoch on 40 of them; 2 x 8 + 10 steps in all."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "resnet18.pth")


@pytest.fixture(scope="module")
def undisturbed(weights: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one run of two pairs of rates, from start to end."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = call(*commanded("semisup", weights, images, output, *TUNED))
    assert done.code == 0, done.err
    result = result_of(output)
    assert done.out.count("validation top-1") == 2 and f"top-1 {result['metrics']['top1']:.2%}" in done.out
    return output


def splits(data: Path) -> tuple[Index, Index]:
    test = held_out(data)
    assert test is not None
    return scan(data), test


def state_of(output: Path) -> dict[str, Any]:
    return checkpoints.read(checkpoints.folder(output) / checkpoints.LATEST)


WHOLE = ("--fraction", 1, "--epochs", 2, "--batch-size", 36, "--lr-backbone", 0.001, "--lr-head", 0.01)


def by_hand(weights: Path, data: Path, parts: int) -> ByHand:
    return trained_by_hand(
        weights,
        *splits(data),
        epochs=2,
        batch_size=36,
        rates=lambda epoch: [0.001 * cosine(epoch, 2), 0.01 * cosine(epoch, 2)],
        weight_decay=1.0,
        frozen=False,
        parts=parts,
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_equals_the_protocol_written_out(processes: int, weights: Path, tmp_path: Path) -> None:
    """Two steps in float32 against float64: weights, statistics of batch norm, and what was reported.

    A change may be off by a twentieth of the largest in its tensor, for what 20 layers round is multiplied by batch
    norm over 36 or 18 images, and by the last bits of the weight. The rate of the other group, a wrong cosine, no
    momentum or no weight decay (of 1, for this) make it off by more than a tenth. Of two processes each has statistics
    of its own half, as if the halves were batches, and the first one's are kept.
    """
    data = write_classes(tmp_path / "data", 6, 6, 2)
    output = tmp_path / "run"
    arguments = commanded("semisup", weights, data, output, *WHOLE, "--weight-decay", 1)
    if processes == 1:
        done = call(*arguments)
        assert done.code == 0, done.err
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "synco_fast", *arguments]
        ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]
    expected = by_hand(weights, data, processes)
    start = torch.load(weights, weights_only=True)
    found = torch.load(output / "finetuned.pth", weights_only=True)
    assert found.keys() == {name for name in start if not name.startswith("fc.")}
    assert found.pop("bn1.num_batches_tracked") == 2
    for name, value in expected.backbone.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        change, size = (value - start[name]).abs().max(), value.abs().max()
        assert change > 0 and (found[name] - value).abs().max() <= 0.05 * change + 4 * 2**-23 * size, name
    train = [row for row in rows(output) if row["kind"] == "train"]
    assert [row["lr_backbone"] for row in train] == [0.001, 0.0005]
    assert [row["lr_head"] for row in train] == [0.01, 0.005]
    assert [row["loss"] for row in train] == pytest.approx(expected.losses, rel=1e-4)
    result = result_of(output)
    assert result["epochs"] == expected.accuracies and result["metrics"] == expected.accuracies[-1]
    assert result["validation"] == [] and result["chosen"] == {"lr_backbone": 0.001, "lr_head": 0.01}
    assert load_weights(output / "finetuned.pth").about["arch"] == "resnet18"


def test_rates_are_chosen_on_what_is_held_back(images: Path, undisturbed: Path) -> None:
    result, found = result_of(undisturbed), rows(undisturbed)
    pairs = [(0.001, 0.05), (0.01, 0.05)]
    assert [(row["lr_backbone"], row["lr_head"]) for row in result["validation"]] == pairs
    evaluations = [row for row in found if row["kind"] == "eval"]
    assert [row["on"] for row in evaluations] == ["validation"] * 4 + ["held out"] * 2
    last = [row["top1"] for row in evaluations[1:4:2]]
    assert last == [row["top1"] for row in result["validation"]]
    # 5 of 25 images of each class are held back.
    assert all((10 * row["top1"]).is_integer() for row in evaluations[:4])
    assert tuple(result["chosen"].values()) == pairs[last.index(max(last))]
    assert [row["step"] for row in evaluations] == [4, 8, 12, 16, 21, 26]
    bank = scan(images)
    subset = bank.take(named_by(undisturbed / "subset.txt", bank))
    assert result["subset"] == {"images": 50, "digest": subset.digest, "list": None}
    assert subset.labels is not None and subset.labels.bincount().tolist() == [25, 25]


def test_a_list_repeats_what_was_drawn(weights: Path, images: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The list that a run wrote, with the rates it chose: its last training, bit for bit."""
    chosen = result_of(undisturbed)["chosen"]
    rates = ["--lr-backbone", chosen["lr_backbone"], "--lr-head", chosen["lr_head"]]
    options = [*TUNED[:6], *rates, "--list", undisturbed / "subset.txt"]
    done = call(*commanded("semisup", weights, images, tmp_path / "run", *options))
    assert done.code == 0, done.err
    result, drawn = result_of(tmp_path / "run"), result_of(undisturbed)
    assert result["subset"]["digest"] == drawn["subset"]["digest"] and result["epochs"] == drawn["epochs"]
    ours, theirs = (torch.load(run / "finetuned.pth", weights_only=True) for run in (tmp_path / "run", undisturbed))
    assert differences(ours, theirs) == []
    assert not (tmp_path / "run" / "subset.txt").exists()


def test_stopped_killed_and_resumed(weights: Path, images: Path, tmp_path: Path, undisturbed: Path) -> None:
    """SIGTERM within an epoch of the second trial, SIGKILL in the last training: nothing that was finished is done
    again, and the end is that of a run left alone.
    """
    output = tmp_path / "run"
    arguments = commanded("semisup", weights, images, output, *TUNED, "--resume", "auto")
    code, said = signalled(process(arguments), "step 12/26 epoch 1: top-1", signal.SIGTERM, saved_in=output)
    assert code == 75 and "--resume auto" in said and "Traceback" not in said, said
    stopped = state_of(output)
    assert 12 < stopped["step"] <= 16 and len(stopped["finished"]) == 1
    assert stopped["training"]["step"] == stopped["step"] - 8
    code, said = signalled(process(arguments), "step 21/26 epoch 1: top-1", signal.SIGKILL, saved_in=output)
    first = "step 16/26 epoch 2 loss" if stopped["step"] < 16 else "step 21/26"
    assert code == -signal.SIGKILL and said.startswith(first), said
    done = call(*arguments)
    assert done.code == 0 and done.err.startswith("step 26/26"), done.err
    assert differences(state_of(output), state_of(undisturbed)) == []
    assert rows(output) == rows(undisturbed) and result_of(output) == result_of(undisturbed)
    ours, theirs = (torch.load(run / "finetuned.pth", weights_only=True) for run in (output, undisturbed))
    assert differences(ours, theirs) == []
    assert (output / "subset.txt").read_bytes() == (undisturbed / "subset.txt").read_bytes()
    assert not list(output.rglob(".*.tmp"))


def test_a_loss_that_is_not_finite(weights: Path, images: Path, tmp_path: Path) -> None:
    options = [*TUNED[:6], "--lr-backbone", 1e38, "--lr-head", 0.5]
    done = call(*commanded("semisup", weights, images, tmp_path / "run", *options))
    check_error(done.code, done.err, ("not finite", "--lr-backbone 1e+38 --lr-head 0.5"))
    assert not any((tmp_path / "run" / "checkpoints").iterdir()) and not (tmp_path / "run" / "result.json").exists()


BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "fraction 0": (["--fraction", "0"], ("--fraction 0", "above 0")),
    "fraction below 0": (["--fraction", "-0.1"], ("--fraction -0.1",)),
    "fraction beyond 1": (["--fraction", "1.5"], ("--fraction 1.5", "at most 1")),
    "fraction nan": (["--fraction", "nan"], ("--fraction nan",)),
    "fraction without epochs": (["--fraction", "0.2"], ("--fraction 0.2", "--epochs")),
    "rate 0": (["--fraction", "1", "--lr-backbone", "0"], ("--lr-backbone 0", "above 0")),
    "rate nan": (["--fraction", "1", "--lr-head", "0.5,nan"], ("--lr-head 0.5,nan",)),
    "rate of text": (["--fraction", "1", "--lr-head", "fast"], ("--lr-head fast",)),
    "weight decay below 0": (["--fraction", "1", "--weight-decay", "-1"], ("--weight-decay -1",)),
    "weight decay nan": (["--fraction", "1", "--weight-decay", "nan"], ("--weight-decay nan",)),
    "a batch beyond the trials": (["--fraction", "1", "--batch-size", "81"], ("--batch-size 81", "80 images")),
    "a batch beyond the subset": (
        ["--fraction", "1", "--lr-backbone", "0.1", "--batch-size", "101"],
        ("--batch-size 101", "100 images"),
    ),
    "a batch of one": (["--fraction", "1", "--batch-size", "1"], ("--batch-size 1", "2 or more")),
    "one image a class": (["--fraction", "0.01", "--batch-size", "2"], ("class0 (1)", "several rates")),
    "a list that is not there": (["--fraction", "1", "--list", "gone.txt"], ("--list gone.txt", "No such file")),
    "a list of other images": (["--fraction", "1", "--list", "{other}"], ("--list {other}", "n01_1.JPEG")),
    "a list that is ambiguous": (["--fraction", "1", "--list", "{bare}"], ("--list {bare}", "class0/001.jpg")),
    "a list of one class": (["--fraction", "0.01", "--list", "{one}"], ("--list {one}", "class1 (0)")),
    "a list of another share": (["--fraction", "1", "--list", "{few}"], ("--list {few}", "2 of 100", "--fraction")),
}
LISTS = {
    "other": "class0/001.jpg\nn01_1.JPEG\n",
    "bare": "001.jpg\n",
    "one": "class0/001.jpg\n",
    "few": "class0/001.jpg\nclass1/001.jpg\n",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_options(kind: str, weights: Path, images: Path, tmp_path: Path) -> None:
    given = {name: tmp_path / f"{name}.txt" for name in LISTS}
    for name, content in LISTS.items():
        given[name].write_text(content)
    options, names = BAD[kind]
    output = tmp_path / "run"
    done = call(*commanded("semisup", weights, images, output, *(option.format(**given) for option in options)))
    check_error(done.code, done.err, tuple(name.format(**given) for name in names))
    assert (done.code, done.out) == (1, "") and not output.exists()
