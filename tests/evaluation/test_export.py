"""Exports load where they are meant to, strictly, with the checkpoint's bits; what has no place there is refused."""

import json
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import timm
import torch
import torchvision
from torch import Tensor, nn

from synco_fast.engine.weights import load_weights
from synco_fast.evaluation.export import detectron2_name
from synco_fast.files import sha256
from synco_fast.models.encoders import NARROW, Encoder, architectures
from tests import others
from tests.command import call, check_error, contents
from tests.conftest import RESNET18

SUFFIXES = {"torchvision": ".pth", "timm": ".safetensors", "safetensors": ".safetensors", "detectron2": ".pkl"}


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own checkpoint after a step, images prepared in another way than the defaults."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(RESNET18)
    settings = [f"output={folder}/run", "trainer.max_steps=1", "loss.temperature=0.1", "data.eval_resize=40", "seed=3"]
    options = [part for setting in settings for part in ("--set", setting)]
    done = call("pretrain", folder / "tiny.yaml", "--data", images, *options)
    assert done.code == 0, done.err
    return folder / "run" / "checkpoints" / "latest.pt"


@pytest.fixture(scope="module")
def moco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A MoCo v2 checkpoint of a ResNet-50, and the query encoder in it."""
    query = others.network("resnet50", "v2", 0)
    file = tmp_path_factory.mktemp("moco") / "moco.pth.tar"
    torch.save(others.pretraining(query, query, torch.randn(16, 64)), file)
    return file, query


def export(checkpoint: Path, out: Path, form: str) -> dict[str, Any]:
    """What stands beside the file, checked against it and against what was said."""
    done = call("export", checkpoint, out, "--format", form)
    assert done.code == 0, done.err
    result = json.loads((out.parent / f"{out.name}.json").read_text())
    assert result["load"] in done.out and str(out) in done.out
    assert done.err.splitlines() == [f"export: reading {checkpoint}", f"export: writing {out}"]
    assert (result["command"], result["settings"], result["metrics"]) == ("export", {"format": form}, {})
    assert result["file"]["path"] == str(out) and result["file"]["sha256"] == sha256(out)
    assert result["weights"]["sha256"] == sha256(checkpoint)
    assert {path.name for path in out.parent.iterdir()} == {out.name, f"{out.name}.json"}
    return result


def loaded(result: dict[str, Any]) -> nn.Module:
    """The network that the line of Python in the result gives."""
    assert isinstance(result["load"], str)
    names: dict[str, Any] = {"torch": torch, "torchvision": torchvision, "timm": timm}
    exec(result["load"], names)
    return names["model"].eval()


def query_encoder(trained: Path) -> dict[str, Tensor]:
    """Tensors of the query encoder in a checkpoint of ours."""
    model = torch.load(trained, weights_only=True)["model"]
    prefix = "query_encoder."
    return {name.removeprefix(prefix): value for name, value in model.items() if name.startswith(prefix)}


@pytest.mark.parametrize("form", ["torchvision", "timm"])
def test_a_run_in_torchvision_and_timm(form: str, trained: Path, images: Path, tmp_path: Path) -> None:
    result = export(trained, tmp_path / f"out{SUFFIXES[form]}", form)
    model, pixels = loaded(result), others.pixels(images)
    expected = query_encoder(trained)
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    assert state.keys() == {name for name in expected if name.startswith("backbone.")}
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert result["file"]["tensors"] == len(state)
    assert result["file"]["parameters"] == sum(value.numel() for value in model.parameters())
    ours = load_weights(trained).encoder.eval().backbone
    with torch.no_grad():
        assert torch.equal(model(pixels), ours(pixels))
    assert result["weights"]["step"] == 1 and result["weights"]["method"] == "synco"
    assert (result["preprocessing"]["resize"], result["preprocessing"]["image_size"]) == (40, 32)


def test_a_run_as_safetensors_and_back(trained: Path, images: Path, tmp_path: Path) -> None:
    """All that `load_weights` knows of the run comes back; kNN of both is the same."""
    out = tmp_path / "export" / "out.safetensors"
    out.parent.mkdir()
    export(trained, out, "safetensors")
    before, after = load_weights(trained), load_weights(out)
    assert after.built == before.built and after.temperature == before.temperature == 0.1
    assert {key: after.about[key] for key in ("method", "step", "seed")} == {"method": "synco", "step": 1, "seed": 3}
    assert (after.data.image_size, after.data.eval_resize) == (32, 40)
    state, expected = after.encoder.state_dict(), query_encoder(trained)
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    with safetensors.safe_open(out, framework="np") as file:
        assert set(file.keys()) == expected.keys()
        described = json.loads(file.metadata()["synco_fast"])
    assert described["mean"] == [0.485, 0.456, 0.406] and described["std"] == [0.229, 0.224, 0.225]

    found = []
    for name, given in (("before", trained), ("after", out)):
        batch = ("--set", "data.batch_size=16", "--set", "data.threads=1")
        done = call("knn", given, "--data", images, "--k", "7", "--output", tmp_path / name, *batch)
        assert done.code == 0, done.err
        found.append(json.loads((tmp_path / name / "result.json").read_text()))
    assert found[0]["metrics"] == found[1]["metrics"] and found[1]["data"]["eval_resize"] == 40
    assert found[1]["weights"]["kind"] == "safetensors export"


@pytest.mark.parametrize("arch", [arch for arch in architectures() if arch != NARROW])
def test_timms_names_are_torchvisions(arch: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(arch, num_classes=0).state_dict()
        ours = Encoder(arch, dim=None).backbone.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


def test_moco_in_torchvision(moco: tuple[Path, nn.Module], images: Path, tmp_path: Path) -> None:
    file, query = moco
    model, pixels = loaded(export(file, tmp_path / "out.pth", "torchvision")), others.pixels(images)
    features, _ = others.embed(query, pixels)
    with torch.no_grad():
        assert torch.equal(model(pixels), features)


def test_knn_of_mocos_file_and_of_its_export(images: Path, tmp_path: Path) -> None:
    query, key = (others.network("resnet18", "v2", seed) for seed in (0, 1))
    files = tmp_path / "moco.pth.tar", tmp_path / "export" / "out.pth"
    torch.save(others.pretraining(query, key, torch.randn(64, 16)), files[0])
    files[1].parent.mkdir()
    export(*files, "torchvision")
    found = []
    for number, file in enumerate(files):
        settings = [f"data.{setting}" for setting in ("image_size=32", "eval_resize=32", "batch_size=20", "threads=1")]
        options = [part for setting in settings for part in ("--set", setting)]
        output = tmp_path / f"knn-{number}"
        done = call("knn", file, "--data", images, "--k", "7", "--output", output, *options)
        assert done.code == 0, done.err
        found.append(json.loads((output / "result.json").read_text()))
    assert found[0]["metrics"] == found[1]["metrics"]
    kinds = [(result["weights"]["kind"], result["weights"].get("epoch")) for result in found]
    assert kinds == [("MoCo-style checkpoint", 7), ("state dict", None)]


def r50_c4() -> dict[str, tuple[int, ...]]:
    """Names and shapes of detectron2's R50-C4 backbone and res5, with batch norm, from the structure of its blocks."""
    found: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, outputs: int, inputs: int, side: int) -> None:
        found[f"{name}.weight"] = (outputs, inputs, side, side)
        for kind in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.norm.{kind}"] = (outputs,)
        found[f"{name}.norm.num_batches_tracked"] = ()

    convolution("stem.conv1", 64, 3, 7)
    inputs = 64
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        width = 64 * 2 ** (stage - 2)
        for block in range(blocks):
            name = f"res{stage}.{block}"
            if block == 0:
                convolution(f"{name}.shortcut", 4 * width, inputs, 1)
            convolution(f"{name}.conv1", width, inputs, 1)
            convolution(f"{name}.conv2", width, width, 3)
            convolution(f"{name}.conv3", 4 * width, width, 1)
            inputs = 4 * width
    return found


def test_detectron2(moco: tuple[Path, nn.Module], images: Path, tmp_path: Path) -> None:
    file, query = moco
    result = export(file, tmp_path / "out.pkl", "detectron2")
    content = (tmp_path / "out.pkl").read_bytes()
    data = pickle.loads(content, encoding="latin1")  # as detectron2 does
    model = data.pop("model")
    assert data == {"__author__": "synco_fast", "matching_heuristics": True}
    assert {name: value.shape for name, value in model.items()} == r50_c4() and len(model) == 318
    integers = {name for name in model if name.endswith("num_batches_tracked")}
    assert {name for name, value in model.items() if value.dtype != np.float32} == integers
    assert {model[name].dtype for name in integers} == {np.dtype(np.int64)}
    assert all(isinstance(value, np.ndarray) and value.flags.writeable for value in model.values())
    # Modules of numpy 2, which numpy 1 lacks, would be named in it.
    named = {
        argument for _, argument, _ in pickletools.genops(content) if isinstance(argument, str) and " " in argument
    }
    assert named == {"numpy ndarray", "builtins bytearray"}

    back = torchvision.models.resnet50()
    back.fc = nn.Identity()
    back.load_state_dict({name: torch.from_numpy(model[detectron2_name(name)]) for name in back.state_dict()})
    pixels = others.pixels(images)
    features, _ = others.embed(query, pixels)
    with torch.no_grad():
        assert torch.equal(back.eval()(pixels), features)
    assert "MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.STRIDE_IN_1X1 False INPUT.FORMAT RGB" in result["load"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoders that not all formats have a place for, as exports of ours."""
    folder = tmp_path_factory.mktemp("odd")
    files = {}
    for name, built in {
        "narrow": {"arch": NARROW, "stem": "imagenet", "dim": 16, "mlp": True},
        "cifar": {"arch": "resnet18", "stem": "cifar", "dim": 16, "mlp": True},
        "cifar50": {"arch": "resnet50", "stem": "cifar", "dim": None},
        "basic": {"arch": "resnet18", "stem": "imagenet", "dim": None},
    }.items():
        files[name] = folder / f"{name}.safetensors"
        described = {"built": built, "data": {}, "temperature": 0.2, "method": "moco", "step": 4}
        state = Encoder(**built).state_dict()
        safetensors.torch.save_file(state, files[name], {"synco_fast": json.dumps(described)})
    return files


@pytest.mark.parametrize(
    ("which", "form", "reason"),
    [
        ("narrow", "torchvision", "neither torchvision nor timm has resnet10_narrow; use --format safetensors"),
        ("narrow", "timm", "neither torchvision nor timm has resnet10_narrow"),
        ("narrow", "detectron2", "it is resnet10_narrow, expected one of resnet50, resnet101, resnet152"),
        ("cifar", "torchvision", "it has the cifar stem, a 3x3 conv1"),
        ("cifar", "timm", "it has the cifar stem"),
        ("cifar50", "detectron2", "it is resnet50 with the cifar stem, expected one of resnet50"),
        (
            "basic",
            "detectron2",
            "it is resnet18, expected one of resnet50, resnet101, resnet152 with the",
        ),
    ],
)
def test_no_place_for_it(which: str, form: str, reason: str, odd: dict[str, Path], tmp_path: Path) -> None:
    done = call("export", odd[which], tmp_path / f"out{SUFFIXES[form]}", "--format", form)
    check_error(done.code, done.err, (f"{odd[which]}: cannot be exported as {form}: {reason}",))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("which", ["narrow", "cifar"])
def test_all_have_a_place_in_safetensors(which: str, odd: dict[str, Path], tmp_path: Path) -> None:
    export(odd[which], tmp_path / "out.safetensors", "safetensors")
    before, after = load_weights(odd[which]), load_weights(tmp_path / "out.safetensors")
    assert after.built == before.built and after.about["step"] == 4
    for one, other in zip(before.encoder.state_dict().values(), after.encoder.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def refused(checkpoint: Path, out: Path, form: str, *names: str) -> None:
    before = sorted(out.parent.glob("*"))
    done = call("export", checkpoint, out, "--format", form)
    check_error(done.code, done.err, names)
    assert done.out == "" and sorted(out.parent.glob("*")) == before


def test_what_cannot_be_written(odd: dict[str, Path], tmp_path: Path) -> None:
    for form, suffix in SUFFIXES.items():
        for out in (tmp_path / "out.bin", tmp_path, tmp_path / suffix, Path(".")):
            refused(odd["basic"], out, form, f"{out}: a file of format {form} ends in {suffix}; name it so")
    refused(odd["basic"], tmp_path / "none" / "out.pth", "torchvision", "there is no folder")
    refused(odd["basic"], tmp_path / "out.pth", "caffe", "--format", "caffe")
    refused(tmp_path / "missing.pth", tmp_path / "out.pth", "torchvision", "missing.pth", "No such file")
    for name in ("out.pth", "out.pth.json"):
        (tmp_path / name).write_text("somebody's")
        refused(odd["basic"], tmp_path / "out.pth", "torchvision", name, "is there already")
        (tmp_path / name).unlink()
    (tmp_path / "out.pth").mkdir()
    refused(odd["basic"], tmp_path / "out.pth", "torchvision", "out.pth: is there already")


def test_names_that_are_too_long(odd: dict[str, Path], tmp_path: Path) -> None:
    """Of the description alone, and of a file that it is written to at first: nothing is left in another try's way."""
    for length in (244, 254, 300):
        out = tmp_path / f"{'x' * length}.pth"
        for _ in range(2):
            refused(odd["basic"], out, "torchvision", out.name[:60], "cannot write it: File name too long")


def test_refused_under_torchrun(odd: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(odd["basic"], tmp_path / "out.pth", "torchvision", "export: under torchrun", "start it without")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    state["layer2.0.bn1.running_var"][3] = torch.inf
    torch.save(state, tmp_path / "given.pth")
    for form in ("torchvision", "timm", "safetensors"):
        out = tmp_path / f"out{SUFFIXES[form]}"
        reason = "not finite: 1 tensors"
        refused(tmp_path / "given.pth", out, form, str(tmp_path / "given.pth"), reason, "layer2.0.bn1.running_var")
