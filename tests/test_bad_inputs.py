"""Data, outputs and usage that cannot work: one screen that names the culprit, and nothing half-written."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command import call, check_error, check_refused, contents, one_step
from tests.conftest import SYNCO_FAST, environment, write_images


def few_images(root: Path) -> None:
    write_images(root / "train" / "a", 15, seed=0)


def text_files(root: Path) -> None:
    root.mkdir()
    (root / "notes.txt").write_text("no image")


def only_held_out(root: Path) -> None:
    write_images(root / "val" / "a", 2, seed=0)


def mixed_layout(root: Path) -> None:
    write_images(root, 2, seed=0)
    write_images(root / "a", 2, seed=1)


def a_list(*lines: str) -> Callable[[Path], None]:
    return lambda root: root.write_text("".join(line + "\n" for line in lines)) and None


def one_image(root: Path) -> None:
    write_images(root.parent / "made", 1, seed=0)
    (root.parent / "made" / "000.jpg").rename(root)


DATA: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "missing": ("data", lambda root: None, ("does not exist",)),
    "empty": ("data", Path.mkdir, ("is empty",)),
    "text files": ("data", text_files, ("notes.txt", "no images")),
    "fewer than a batch": ("data", few_images, ("15 images", "one batch of 16")),
    "held-out only": ("data", only_held_out, ("val/", "no train/")),
    "mixed layout": ("data", mixed_layout, ("000.jpg", "a/")),
    "one image": ("data.jpg", one_image, ("single image",)),
    "list of missing files": ("list.txt", a_list("gone.jpg", "away.jpg"), ("2 files that do not exist", "away.jpg")),
    "list leaving its folder": ("list.txt", a_list("a.jpg", "../other/b.jpg"), ("line 2", "../other/b.jpg")),
    "list of absolute paths": ("list.txt", a_list("/etc/passwd.jpg"), ("line 1", "/etc/passwd.jpg")),
    "list of other files": ("list.txt", a_list("a.txt"), ("line 1", "a.txt")),
    "list with a bad label": ("list.txt", a_list("a.jpg\tcat"), ("line 1", "'cat'")),
    "list naming a file twice": ("list.txt", a_list("a.jpg", "./a.jpg"), ("more than once", "a.jpg")),
    "empty list": ("list.txt", a_list(), ("names no files",)),
    "binary list": ("list.txt", lambda root: root.write_bytes(b"\xff\xfe\x00"), ("not UTF-8",)),
    "name too long": ("n" * 300, lambda root: None, ("File name too long",)),
}


@pytest.mark.parametrize("kind", DATA)
def test_data(kind: str, tiny: Path, tmp_path: Path) -> None:
    name, make, names = DATA[kind]
    make(tmp_path / name)
    check_refused(tmp_path / "run", *one_step(tiny, tmp_path / name, tmp_path / "run"), names=(name, *names))


def test_no_data(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    check_refused(output, "pretrain", tiny, "--set", f"output={output}", names=("data.root", "--data"))


def test_knn_while_training_needs_held_out_classes(tiny: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    write_images(flat, 16, seed=0)
    command = one_step(tiny, flat, tmp_path / "run", "knn.every_epochs=1")
    check_refused(tmp_path / "run", *command, names=("knn.every_epochs = 1", str(flat)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(images: Path, tiny: Path, tmp_path: Path) -> None:
    command = one_step(tiny, images, tmp_path / "run", "trainer.device=cuda")
    check_refused(tmp_path / "run", *command, names=("trainer.device = cuda", "doctor"))


def broken_images(root: Path, damage: Callable[[Path], object]) -> Path:
    """A data set of one batch, one of whose files is damaged; returns that file."""
    write_images(root, 16, seed=0)
    damage(root / "007.jpg")
    return root / "007.jpg"


IMAGE_DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no image"),
    "cut in its pixels": lambda file: file.write_bytes(file.read_bytes()[:-400]),
    "cut in its header": lambda file: file.write_bytes(file.read_bytes()[:100]),
}


@pytest.mark.parametrize("kind", IMAGE_DAMAGE)
def test_a_broken_image_met_in_training(kind: str, tiny: Path, tmp_path: Path) -> None:
    """Training had begun, so there is an output folder; but no checkpoint, and no file that is half of one."""
    file = broken_images(tmp_path / "data", IMAGE_DAMAGE[kind])
    done = call(*one_step(tiny, tmp_path / "data", tmp_path / "run"))
    check_error(done.code, done.err, (str(file),))
    assert not any((tmp_path / "run" / "checkpoints").iterdir())
    assert not list((tmp_path / "run").rglob(".*.tmp"))


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_output_where_a_file_is(below: str, images: Path, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("somebody's")
    done = call(*one_step(tiny, images, file / below))
    check_error(done.code, done.err, (f"output = {file / below}", "Not a directory"))
    assert file.read_text() == "somebody's"


def lower_privileges() -> None:
    """In the child: root without the right to ignore permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    if os.geteuid() == 0:
        for capability in (1, 2):
            # PR_CAPBSET_DROP: what exec may gain.
            if ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) != 0:
                raise PermissionError("capabilities cannot be dropped here")


def test_output_without_permission(images: Path, tiny: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    command = [*SYNCO_FAST, *one_step(tiny, images, locked / "run")]
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=False, preexec_fn=lower_privileges
        )
    except subprocess.SubprocessError:
        pytest.skip("root cannot drop its capabilities here")
    check_error(done.returncode, done.stderr, (f"output = {locked / 'run'}", "Permission denied"))
    assert not any(locked.iterdir())


VIEW: dict[str, tuple[list[str], tuple[str, ...], int]] = {
    "recipe": (["--recipe", "moco_v3"], ("--recipe moco_v3", "moco_v2"), 1),
    "output in a missing folder": (["--output", "{folder}/gone/views.png"], ("gone/views.png", "No such file"), 1),
    "output that is a folder": (["--output", "{folder}"], ("Is a directory",), 1),
    "no images": (["--images", "0"], ("--images", "equal to 1"), 2),
    "tiny views": (["--image-size", "8"], ("--image-size", "equal to 16"), 2),
    "negative seed": (["--seed", "-1"], ("--seed", "equal to 0"), 2),
}


@pytest.mark.parametrize("kind", VIEW)
def test_data_view(kind: str, images: Path, tmp_path: Path) -> None:
    options, names, code = VIEW[kind]
    filled = [option.format(folder=tmp_path) for option in options]
    given = [] if "--output" in options else ["--output", str(tmp_path / "views.png")]
    done = call("data", "view", images, "--image-size", "32", *given, *filled)
    check_error(done.code, done.err, names)
    assert done.code == code
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["view", "stats", "verify"])
def test_data_of_a_missing_folder(command: str, tmp_path: Path) -> None:
    done = call("data", command, tmp_path / "gone")
    check_error(done.code, done.err, (str(tmp_path / "gone"), "does not exist"))


@pytest.mark.parametrize(
    ("output", "names"),
    [
        ("gone/clean.txt", ("gone/clean.txt", "no list of images can be written there")),
        ("data/clean.jpg", ("clean.jpg", "named like an image")),
        ("data/clean.tar", ("clean.tar", "named like an image or a shard")),
    ],
)
def test_data_verify_with_a_list_that_cannot_be(output: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """Found out before anything is decoded."""
    write_images(tmp_path / "data", 1, seed=0)
    done = call("data", "verify", tmp_path / "data", "--output", tmp_path / output)
    check_error(done.code, done.err, names)
    assert done.out == "" and not (tmp_path / output).exists()


def test_data_verify_with_a_name_that_a_list_cannot_hold(tmp_path: Path) -> None:
    write_images(tmp_path / "data", 2, seed=0)
    (tmp_path / "data" / "000.jpg").rename(tmp_path / "data" / "a\tb.jpg")
    done = call("data", "verify", tmp_path / "data", "--output", tmp_path / "clean.txt", "--workers", "1")
    check_error(done.code, done.err, (r"a\tb.jpg", "rename it"))
    assert done.out == "" and not (tmp_path / "clean.txt").exists()


@pytest.mark.parametrize("command", ["stats", "verify"])
def test_names_that_are_not_utf8(command: str, tmp_path: Path) -> None:
    """They are printed as the bytes they are."""
    write_images(tmp_path / "data" / "train", 1, seed=0)
    name = b"bad\xff.jpg"
    (tmp_path / "data" / "train" / os.fsdecode(name)).write_bytes(b"text")
    done = subprocess.run(
        [*SYNCO_FAST, "data", command, tmp_path / "data"],
        env=environment() | {"PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == (command == "verify") and name in done.stdout, done.stderr


def test_data_view_of_a_broken_image(tmp_path: Path) -> None:
    file = broken_images(tmp_path / "data", IMAGE_DAMAGE["text"])
    done = call("data", "view", tmp_path / "data", "--images", "16", "--output", tmp_path / "views.png")
    check_error(done.code, done.err, (str(file),))
    assert not (tmp_path / "views.png").exists()


USAGE: list[tuple[list[str], tuple[str, ...]]] = [
    (["pretrian"], ("pretrian",)),
    (["data", "veiw"], ("veiw",)),
    (["pretrain"], ("CONFIG",)),
    (["pretrain", "x.yaml", "--sett", "a=b"], ("--sett",)),
    (["pretrain", "x.yaml", "--set"], ("--set",)),
    (["pretrain", "x.yaml", "y.yaml"], ("y.yaml",)),
    (["knn", "x.pt"], ("--data",)),
    (["knn", "x.pt", "--data", "y", "--device", "gpu"], ("--device", "gpu")),
    (["data", "stats"], ("root",)),
    (["data", "verify", "x", "--workers", "0"], ("--workers", "equal to 1")),
    (["data", "view", "x", "--image-size", "5000"], ("--image-size", "4096")),
]


@pytest.mark.parametrize(("arguments", "names"), USAGE, ids=lambda value: " ".join(value))
def test_usage(arguments: list[str], names: tuple[str, ...]) -> None:
    done = call(*arguments)
    check_error(done.code, done.err, names)
    assert done.code == 2


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "0.1,0", "0.1,", "warm"])
def test_knn_temperature(value: str) -> None:
    done = call("knn", "x.pt", "--data", "y", "--temperature", value)
    check_error(done.code, done.err, ("--temperature", value))
    assert done.code == 1


@pytest.mark.parametrize("value", ["0", "-3", "2.5", "many", "10,", ""])
def test_knn_k(value: str) -> None:
    done = call("knn", "x.pt", "--data", "y", f"--k={value}")
    check_error(done.code, done.err, ("--k", value))
    assert done.code == 1


PROCESSES: list[tuple[list[str], tuple[str, ...]]] = [
    (["{config}", "--set", "optim.leraning_rate=0.1"], ("optim.leraning_rate",)),
    (["{config}", "--data", "{folder}/gone"], ("{folder}/gone",)),
]


@pytest.mark.parametrize(("arguments", "names"), PROCESSES, ids=["key", "data"])
def test_as_a_process_of_its_own(
    arguments: list[str], names: tuple[str, ...], tiny: Path, tmp_path: Path, synco_fast: Callable[..., Any]
) -> None:
    """From a folder of its own, which stays as it is: the default output is relative."""
    given = [argument.format(config=tiny, folder=tmp_path) for argument in arguments]
    before = contents(tmp_path)
    done = synco_fast("pretrain", *given, cwd=tmp_path)
    check_error(done.returncode, done.stderr, tuple(name.format(folder=tmp_path) for name in names))
    assert done.returncode == 1
    assert done.stdout == ""
    assert contents(tmp_path) == before
