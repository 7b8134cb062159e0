"""Checkpoints that cannot be gone on from or evaluated: one screen, nothing run from them, nothing half-written."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from synco_fast.engine import checkpoints
from tests.command import call, check_error, check_refused, check_refused_there, contents, one_step
from tests.conftest import TINY, write_images


@pytest.fixture(scope="module")
def checkpoint(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of one step of TINY; without momentum it is a third smaller."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY)
    done = call(*one_step(folder / "tiny.yaml", images, folder / "run", "optim.momentum=0"))
    assert done.code == 0, done.err
    return folder / "run" / "checkpoints" / "latest.pt"


def test_output_that_holds_a_run(checkpoint: Path, images: Path, tiny: Path, synco_fast: Callable[..., Any]) -> None:
    output = checkpoint.parent.parent
    before = contents(output)
    done = synco_fast(*one_step(tiny, images, output))
    check_error(done.returncode, done.stderr, (str(output), "--resume auto"))
    assert contents(output) == before


class Planted:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Rewrite a checkpoint with its state changed."""

    def rewrite(file: Path) -> None:
        state = checkpoints.load(file)
        change(state)
        torch.save(state, file)

    return rewrite


WRONG_ROWS = torch.zeros(32, 16, dtype=torch.float16)
FIRST = "query_encoder.backbone.0.weight"

CHECKPOINT_DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (Path.unlink, ("No such file",)),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), ("Is a directory",)),
    "empty": (lambda file: os.truncate(file, 0), ("not a readable checkpoint",)),
    "text": (lambda file: file.write_text("no checkpoint\n"), ("not a readable checkpoint",)),
    "cut short": (cut, ("not a readable checkpoint",)),
    "one bit flipped": (flip_a_bit, ("not a readable checkpoint", "damaged")),
    "weights alone": (lambda file: torch.save({"state_dict": {}}, file), ("not a checkpoint of synco-fast", "config")),
    "a list": (lambda file: torch.save([1, 2], file), ("not a checkpoint", "holds a list")),
    "without its rng": (edited(lambda state: state.pop("rng")), ("not a checkpoint of synco-fast", "lacks rng")),
    "step as text": (edited(lambda state: state.update(step="1")), ("not a checkpoint of synco-fast", "step")),
    "queue of another size": (edited(lambda state: state["model"].update({"queue.rows": WRONG_ROWS})), ("queue.rows",)),
    "a weight missing": (edited(lambda state: state["model"].pop(FIRST)), (FIRST,)),
    "an unknown weight": (edited(lambda state: state["model"].update(extra=torch.ones(1))), ("extra",)),
    "numbers for names": (
        edited(lambda state: state.update(model=dict(enumerate(state["model"].values())))),
        ("its model names a tensor 0, expected text",),
    ),
    "numbers for names of settings": (edited(lambda state: state["config"].update({0: 1})), ("0 is None, was 1",)),
    "optimizer of another model": (
        edited(lambda state: state["optimizer"]["param_groups"][0]["params"].pop()),
        ("parameter group",),
    ),
    "momentum of another shape": (
        edited(lambda state: state["optimizer"].update(state={0: {"momentum_buffer": torch.ones(3)}})),
        ("momentum",),
    ),
    "meter of another length": (edited(lambda state: state["meter"].update(sums=torch.ones(2))), ("does not fit",)),
    "rng of another kind": (edited(lambda state: state["rng"].update(cpu=torch.ones(3))), ("does not fit",)),
    "place in the data without skipped files": (
        edited(lambda state: state["loader"].pop("skipped")),
        ("place in the data", "skipped"),
    ),
    "place in the data of text": (
        edited(lambda state: state["loader"].update(epoch="one")),
        ("place in the data", "one"),
    ),
    "skipped files that are not there": (
        edited(lambda state: state["loader"].update(skipped=[[100]])),
        ("place in the data", "out of range"),
    ),
    "configuration of another version": (
        edited(lambda state: state["config"]["data"].update(crops=2)),
        ("data.crops is None, was 2",),
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINT_DAMAGE)
def test_damaged_checkpoints(kind: str, checkpoint: Path, images: Path, tiny: Path, tmp_path: Path) -> None:
    damage, names = CHECKPOINT_DAMAGE[kind]
    given = tmp_path / "given.pt"
    shutil.copyfile(checkpoint, given)
    damage(given)
    output = tmp_path / "run"
    command = one_step(tiny, images, output, "optim.momentum=0", "trainer.max_steps=2", resume=given)
    check_refused_there(output, *command, names=(str(given), *names))
    if given.is_file():
        given.unlink()


def test_a_broken_latest(images: Path, tiny: Path, tmp_path: Path) -> None:
    latest = tmp_path / "run" / "checkpoints" / "latest.pt"
    latest.parent.mkdir(parents=True)
    latest.write_bytes(b"PK\3\4")
    before = contents(tmp_path / "run")
    done = call(*one_step(tiny, images, tmp_path / "run", resume="auto"))
    check_error(done.code, done.err, (str(latest), "not a readable checkpoint"))
    assert contents(tmp_path / "run") == before


ANOTHER_RUN: list[tuple[list[str], tuple[str, ...]]] = [
    (["model.arch=resnet34"], ("model.arch is 'resnet34', was 'resnet10_narrow'",)),
    (["seed=1"], ("seed is 1, was 0",)),
    (["queue.size=128"], ("queue.size is 128, was 64",)),
    (["optim.lr=0.5", "trainer.epochs=9"], ("optim.lr is 0.5, was 0.03", "trainer.epochs is 9, was 4")),
    (["method=moco", "negatives={}"], ("method is 'moco', was 'synco'", "negatives.noisy is 0, was 4")),
]


@pytest.mark.parametrize(("overrides", "names"), ANOTHER_RUN, ids=lambda value: str(value[0])[:40])
def test_checkpoints_of_another_run(
    overrides: list[str],
    names: tuple[str, ...],
    checkpoint: Path,
    images: Path,
    tiny: Path,
    tmp_path: Path,
) -> None:
    command = one_step(tiny, images, tmp_path / "run", "optim.momentum=0", *overrides, resume=checkpoint)
    check_refused_there(tmp_path / "run", *command, names=(str(checkpoint), "another run", *names))


def test_a_checkpoint_of_another_data_set(checkpoint: Path, images: Path, tiny: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "data", 16, seed=9)
    command = one_step(tiny, tmp_path / "data", tmp_path / "run", "optim.momentum=0", resume=checkpoint)
    check_refused_there(tmp_path / "run", *command, names=(str(checkpoint), "has 16 images", "it had 100"))


@pytest.mark.parametrize("suffix", [".pt", ".pth.tar", ".safetensors"])
@pytest.mark.parametrize("form", ["torch", "torch before 1.6", "pickle"])
def test_a_malicious_checkpoint(
    form: str, suffix: str, images: Path, tiny: Path, tmp_path: Path, synco_fast: Callable[..., Any]
) -> None:
    """What is planted would run under an ordinary unpickler; it runs in no command here, whatever the file's name."""
    given, planted = tmp_path / f"given{suffix}", tmp_path / "planted"
    if form == "pickle":
        given.write_bytes(pickle.dumps(Planted(planted)))
        pickle.loads(given.read_bytes())
    else:
        # As MoCo's, whose optimizer is what nobody looks into who wants the weights.
        content = {"epoch": 1, "state_dict": {"conv1.weight": torch.ones(1)}, "optimizer": Planted(planted)}
        torch.save(content, given, _use_new_zipfile_serialization=form == "torch")
        torch.load(io.BytesIO(given.read_bytes()), weights_only=False)
    assert planted.is_dir()
    planted.rmdir()
    command = one_step(tiny, images, tmp_path / "run", resume=given)
    found = form != "pickle" and suffix != ".safetensors"  # torch reads neither as what it wrote
    reason = "mkdir among them, which is not run here" if found else "not a readable checkpoint"
    if form == "torch" and suffix == ".pt":
        done = synco_fast(*command)
        check_error(done.returncode, done.stderr, (str(given), reason))
        assert "weights_only" not in done.stderr
    check_refused(tmp_path / "run", *command, names=(str(given), reason))
    kind = "not a readable safetensors file" if suffix == ".safetensors" else reason
    check_refused(tmp_path / "run", "knn", given, "--data", tmp_path, names=(str(given), kind))
    for name in ("torchvision", "safetensors"):
        out = tmp_path / f"out.{'pth' if name == 'torchvision' else name}"
        done = call("export", given, out, "--format", name)
        check_error(done.code, done.err, (str(given), kind))
        assert not out.exists()
    assert not planted.exists()


def no_held_out(root: Path) -> None:
    write_images(root / "train" / "cat", 2, seed=0)


def other_classes(root: Path) -> None:
    write_images(root / "train" / "cat", 2, seed=0)
    write_images(root / "val" / "dog", 2, seed=1)


def unlabelled(root: Path) -> None:
    write_images(root / "train", 2, seed=0)
    write_images(root / "val", 2, seed=1)


def held_out_without_images(root: Path) -> None:
    write_images(root / "train" / "cat", 2, seed=0)
    (root / "val").mkdir()


def broken_held_out(root: Path) -> None:
    write_images(root / "train" / "cat", 2, seed=0)
    write_images(root / "val" / "cat", 2, seed=1)
    (root / "val" / "cat" / "000.jpg").write_text("no image")


KNN_DATA: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (lambda root: None, ("does not exist",)),
    "no held-out split": (no_held_out, ("held-out", "val/")),
    "other classes": (other_classes, ("same classes", "cat", "dog")),
    "unlabelled": (unlabelled, ("class folders",)),
    "held-out without images": (held_out_without_images, ("val is empty",)),
    "broken image": (broken_held_out, ("000.jpg",)),
}


@pytest.mark.parametrize("kind", KNN_DATA)
def test_knn_data(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    make, names = KNN_DATA[kind]
    root = tmp_path / "data"
    make(root)
    done = call("knn", checkpoint, "--data", root)
    check_error(done.code, done.err, (str(root), *names))
    assert done.out == ""


def test_knn_of_a_checkpoint_that_lacks_weights(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.pt"
    state = checkpoints.load(checkpoint)
    torch.save(state | {"model": {}}, given)
    done = call("knn", given, "--data", images)
    check_error(done.code, done.err, (str(given), "weights"))
    torch.save(state | {"model": dict(enumerate(state["model"].values()))}, given)
    done = call("knn", given, "--data", images)
    check_error(done.code, done.err, (str(given), "its model names a tensor 0, expected text"))
