"""Runs over hostile files, through the console command: `fail`, `skip`, a kill in between, two processes."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synco_fast.data.index import scan
from synco_fast.engine.distributed import Processes
from synco_fast.engine.run import loader_place
from tests.command import call, check_error
from tests.conftest import TINY, environment
from tests.data.conftest import photograph
from tests.engine.runs import differences, final_state, kill_after, pretrain_command, rows
from tests.engine.test_distributed import launch
from tests.hostile import CLASSES, encoded, write_hostile

GOOD, HOSTILE = 300, 30
N = GOOD + HOSTILE
SKIP = [
    "--set",
    "data.on_corrupt=skip",
    "--set",
    "trainer.epochs=2",
    "--set",
    "knn.every_epochs=1",
    "--set",
    "optim.momentum=0",
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A data set of 330 files, 23 of them bad, with a good and a bad held-out file of each class."""
    root = tmp_path_factory.mktemp("hostile")
    bad = write_hostile(root, GOOD, HOSTILE)
    for seed, name in enumerate(CLASSES):
        (root / "val" / name).mkdir(parents=True)
        jpeg = encoded(photograph(np.random.default_rng(seed), 50, 60), "JPEG")
        (root / "val" / name / "good.jpg").write_bytes(jpeg)
        (root / "val" / name / "bad.jpg").write_bytes(jpeg[:-9])
    return root, bad


@pytest.fixture(scope="module")
def undisturbed(hostile: tuple[Path, set[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two epochs under `skip`, with checkpoints every eight steps, and what it said."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.yaml").write_text(TINY)
    command = pretrain_command(
        folder / "tiny.yaml", hostile[0], folder / "run", *SKIP, "--set", "checkpoint.every_steps=8"
    )
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run", done.stderr


def skipped_in(said: str) -> list[str]:
    return re.findall(r"^skipping image file (\S+): it ", said, flags=re.MULTILINE)


def test_skip_says_and_counts_each_bad_file_once(hostile: tuple[Path, set[str]], undisturbed: tuple[Path, str]) -> None:
    root, bad = hostile
    output, said = undisturbed
    training = [Path(file) for file in skipped_in(said)]
    expected = {root / "train" / name for name in bad} | {root / "val" / name / "bad.jpg" for name in CLASSES}
    assert expected >= set(training)
    # The kNN bank is the training set, so a file may be met once there and once in training.
    assert max(map(training.count, training)) <= 2
    found = final_state(output)["loader"]["skipped"]
    index = scan(root)
    assert {index.files[i] for i in found[0]} <= bad and len(found) == 1
    counts = [row["skipped"] for row in rows(output) if row["kind"] == "train"]
    assert counts == sorted(counts) and counts[-1] == len(found[0]) > len(bad) - 16
    [first, second] = [row for row in rows(output) if row["kind"] == "knn"]
    assert first["bank"] == second["bank"] == N - len(bad) and first["held_out"] == 2


@pytest.mark.parametrize("step", [9, pytest.param(27, marks=pytest.mark.slow)])
def test_killed_after_skips(
    step: int, hostile: tuple[Path, set[str]], undisturbed: tuple[Path, str], tiny: Path, tmp_path: Path
) -> None:
    """SIGKILL in the first or the second epoch; what is resumed ends in the same bits."""
    command = pretrain_command(tiny, hostile[0], tmp_path / "run", *SKIP, "--set", "checkpoint.every_steps=8")
    kill_after(command, step)
    known = final_state(tmp_path / "run")["loader"]["skipped"][0]
    assert known, "nothing had been skipped"
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    assert differences(final_state(tmp_path / "run"), final_state(undisturbed[0])) == []
    assert rows(tmp_path / "run") == rows(undisturbed[0])


def test_fail_then_go_on_with_skip(hostile: tuple[Path, set[str]], tiny: Path, tmp_path: Path) -> None:
    """The advice of the error can be followed: the same run goes on, from its checkpoint, with the key changed."""
    root, bad = hostile
    options = [part for setting in ("trainer.max_steps=8", "checkpoint.every_steps=1") for part in ("--set", setting)]
    command = pretrain_command(tiny, root, tmp_path / "run", *options)[3:]
    done = call(*command)
    check_error(done.code, done.err.splitlines()[-1], ("data.on_corrupt=skip", "data verify", str(root / "train")))
    assert any(name in done.err for name in bad)
    done = call(*command, "--set", "data.on_corrupt=skip")
    assert done.code == 0, done.err
    assert final_state(tmp_path / "run")["step"] == 8


def test_two_processes_replace_from_shares_of_their_own(
    hostile: tuple[Path, set[str]], tiny: Path, tmp_path: Path
) -> None:
    """An epoch over the good files and 6 bad ones: no sample twice, no bad one, and the checkpoint has both lists."""
    root, bad = hostile
    some = sorted(bad)[:6] + [name for name in scan(root).files if name not in bad]
    (root / "train" / "some.txt").write_text("".join(f"{name}\n" for name in some))
    names = scan(root / "train" / "some.txt").files
    settings = [
        f"data.root={root / 'train' / 'some.txt'}",
        "data.batch_size=64",
        "data.on_corrupt=skip",
        "bn.group_size=4",
    ]
    first, second = launch(2, tiny, tmp_path / "two", "loader", *settings)
    assert first["state"] == second["state"]
    assert first["state"]["skipped"] == [first["skipped"], second["skipped"]]
    samples = [*first["samples"].tolist(), *second["samples"].tolist()]
    assert len(samples) == len(set(samples)) == first["steps"] * 64
    found = [*first["skipped"], *second["skipped"]]
    assert found and not set(found) & set(samples)
    assert {names[i] for i in found} <= bad and not bad & {names[i] for i in samples}


def test_lists_of_skipped_files_on_another_number_of_processes() -> None:
    saved = {"epoch": 1, "step": 2, "skipped": [[3, 1], [1, 7]]}

    def skipped(rank: int, world_size: int) -> list[int]:
        return loader_place(saved, Processes(rank, world_size, torch.device("cpu")), Path("latest.pt"), 8)["skipped"]

    assert [skipped(0, 2), skipped(1, 2)] == saved["skipped"]
    assert skipped(0, 1) == skipped(3, 4) == [3, 1, 7]


def test_verify_and_what_its_list_is_good_for(
    hostile: tuple[Path, set[str]], tiny: Path, tmp_path: Path, synco_fast: Callable[..., Any]
) -> None:
    """The list holds the good files with their labels; pretraining with kNN goes over it."""
    root, bad = hostile
    listing = root / "clean.txt"
    done = synco_fast("data", "verify", root, "--output", listing, "--workers", "2")
    assert (done.returncode, done.stderr) == (1, "")
    assert f"{N} images: {N - len(bad)} good, {len(bad)} bad" in done.stdout and "1  is empty" in done.stdout
    for name in bad:
        assert f"\n  {name}\n" in done.stdout
    index, clean = scan(root), scan(listing)
    assert set(clean.files) == {name for name in index.files if name not in bad}
    assert clean.classes == index.classes and clean.labels is not None
    assert all(
        name.split("/")[0] == clean.classes[label] for name, label in zip(clean.files, clean.labels, strict=True)
    )

    done = call("data", "verify", root / "val", "--workers", "1", "--output", root / "val" / "clean.txt")
    assert done.code == 1 and "4 images: 2 good, 2 bad" in done.out
    done = call("data", "verify", root / "val" / "clean.txt", "--workers", "1")
    assert done.code == 0 and "2 images: 2 good, 0 bad" in done.out
    options = ["--set", "trainer.max_steps=19", "--set", "knn.every_epochs=1", "--set", "data.on_corrupt=skip"]
    done = call(*pretrain_command(tiny, listing, tmp_path / "run", *options)[3:])
    assert done.code == 0, done.err
    assert set(skipped_in(done.err)) == {str(root / "val" / name / "bad.jpg") for name in CLASSES}
    knn = next(row for row in rows(tmp_path / "run") if row["kind"] == "knn")
    assert (knn["bank"], knn["held_out"]) == (N - len(bad), 2)


def test_knn_where_both_splits_have_the_same_names(images: Path, tiny: Path, tmp_path: Path) -> None:
    """A bad file of one is not one of the other; and without any good one there is no accuracy."""
    for split in ("train", "val"):
        shutil.copytree(images / "train", tmp_path / "data" / split)
    (tmp_path / "data" / "train" / "class0" / "003.jpg").write_bytes(b"")
    options = ["--set", "trainer.max_steps=1", "--set", "knn.every_epochs=1", "--set", "data.on_corrupt=skip"]
    done = call(*pretrain_command(tiny, tmp_path / "data", tmp_path / "run", *options)[3:])
    assert done.code == 0, done.err
    knn = next(row for row in rows(tmp_path / "run") if row["kind"] == "knn")
    assert (knn["bank"], knn["held_out"]) == (99, 100)

    for path in (tmp_path / "data" / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    checkpoint = tmp_path / "run" / "checkpoints" / "latest.pt"
    done = call("knn", checkpoint, "--data", tmp_path / "data")
    assert done.code == 1 and "none of the 100 images in" in done.err and "(held out) can be used" in done.err
