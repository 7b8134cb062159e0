"""Weights of others: the encoder computes the bits of the torchvision network that the file was made from."""

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from synco_fast.engine.weights import METADATA, Weights, load_weights
from synco_fast.errors import UserError
from synco_fast.models.encoders import NARROW, Encoder
from tests import others


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    from tests.conftest import write_images

    folder = tmp_path_factory.mktemp("pixels")
    write_images(folder / "jpegs", 4, seed=3)
    return others.pixels(folder)


@torch.no_grad()
def embed(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    features = encoder.eval().backbone(images)
    return features, encoder.head(features)


def check_same(weights: Weights, query: torch.nn.Module, images: Tensor, *, head: bool) -> None:
    features, embeddings = others.embed(query, images)
    our_features, our_embeddings = embed(weights.encoder, images)
    assert features.std() > 0 and torch.equal(our_features, features)
    assert torch.equal(our_embeddings, embeddings if head else features)


@pytest.mark.parametrize(
    ("prefix", "head", "columns", "zipped"),
    [
        ("module.", "v1", True, True),
        ("module.", "v2", True, False),
        ("module.", "v2", False, True),
        ("", "v2", True, True),
        ("model.module.", "v1", True, False),
    ],
)
def test_pretraining_checkpoints(
    prefix: str, head: str, columns: bool, zipped: bool, images: Tensor, tmp_path: Path
) -> None:
    """MoCo v1 and v2, whose queue is (D, K), and SynCo's, whose queue is (K, D); as zip, and as torch wrote before."""
    query, key = (others.network("resnet18", head, seed) for seed in (0, 1))
    content = others.pretraining(query, key, torch.randn(16, 64) if columns else torch.randn(64, 16), prefix)
    torch.save(content, tmp_path / "given.pth.tar", _use_new_zipfile_serialization=zipped)
    weights = load_weights(tmp_path / "given.pth.tar")
    assert weights.built == {"arch": "resnet18", "stem": "imagenet", "dim": 16, "mlp": head == "v2"}
    assert (weights.about["kind"], weights.about["epoch"]) == ("MoCo-style checkpoint", 7)
    check_same(weights, query, images, head=True)
    assert weights.key_encoder is not None
    for ours, theirs in zip(embed(weights.key_encoder, images), others.embed(key, images), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("prefix", "wrapped"),
    [
        ("module.encoder_q.", "state_dict"),
        ("encoder_q.", None),
        ("module.", "model"),
        ("module.", None),
        ("", "state_dict"),
        ("", None),
    ],
)
def test_state_dicts(prefix: str, wrapped: str | None, images: Tensor, tmp_path: Path) -> None:
    """A head is a projection head under `encoder_q`, and a classifier, which is left out, elsewhere."""
    contrast = "encoder_q" in prefix
    model = others.network("resnet18", "v2" if contrast else "classifier", 2)
    content: dict[str, Any] = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({wrapped: content} if wrapped else content, tmp_path / "given.pth")
    weights = load_weights(tmp_path / "given.pth")
    assert weights.key_encoder is None and weights.built["dim"] == (16 if contrast else None)
    check_same(weights, model, images, head=contrast)


def test_a_query_encoder_is_taken_and_the_other_left(images: Tensor, tmp_path: Path) -> None:
    """MoCo's order of names the other way round."""
    query, key = (others.network("resnet18", "v2", seed) for seed in (0, 1))
    content = others.pretraining(key, query, torch.zeros(1))["state_dict"]
    swapped = {"encoder_q": "encoder_k", "encoder_k": "encoder_q"}
    renamed = {
        ".".join(swapped.get(part, part) for part in name.split(".")): value
        for name, value in content.items()
        if "queue" not in name
    }
    assert "encoder_k" in next(iter(renamed))
    torch.save({"state_dict": renamed}, tmp_path / "given.pth")
    check_same(load_weights(tmp_path / "given.pth"), query, images, head=True)


def test_safetensors_of_others(images: Tensor, tmp_path: Path) -> None:
    model = others.network("resnet18", "classifier", 2)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "given.safetensors")
    check_same(load_weights(tmp_path / "given.safetensors"), model, images, head=False)


@pytest.mark.parametrize("prefix", ["", "module.backbone."])
def test_the_narrow_network(prefix: str, images: Tensor, tmp_path: Path) -> None:
    """Its backbone alone, as fine-tuning leaves it; counters may be missing, another tensor beside it is no matter."""
    encoder = Encoder(NARROW, dim=None).train()
    with torch.no_grad():
        encoder(images)  # moves batch norm's statistics
    state = {prefix + name: value for name, value in encoder.backbone.state_dict().items()}
    torch.save(state | {"fc.weight": torch.zeros(2, 2)}, tmp_path / "given.pth")
    weights = load_weights(tmp_path / "given.pth")
    assert weights.built == {"arch": NARROW, "stem": "imagenet", "dim": None}
    features = encoder.eval().backbone(images)
    assert features.std() > 0 and torch.equal(embed(weights.encoder, images)[0], features)


@pytest.mark.parametrize("damage", ["lacks a tensor", "has another shape", "goes on"])
def test_sequentials_are_not_all_the_narrow_network(damage: str, tmp_path: Path) -> None:
    state = Encoder(NARROW, dim=None).backbone.state_dict()
    if damage == "lacks a tensor":
        del state["6.bn2.running_var"]
    elif damage == "has another shape":
        state["4.conv1.weight"] = torch.zeros(48, 24, 1, 1)
    else:
        state["9.weight"] = torch.zeros(10, 192)
    torch.save(state, tmp_path / "given.pth")
    with pytest.raises(UserError, match=r"given\.pth: it has no residual network: no conv1\.weight"):
        load_weights(tmp_path / "given.pth")


NAMELESS: dict[str, Any] = {
    "itself": {0: torch.zeros(3)},
    "state_dict": {"state_dict": {0: torch.zeros(3), ("a",): torch.zeros(3)}},
    "model": {"model": {0: torch.zeros(3)}},
}


@pytest.mark.parametrize("kind", NAMELESS)
def test_tensors_without_names(kind: str, tmp_path: Path) -> None:
    torch.save(NAMELESS[kind], tmp_path / "given.pth")
    with pytest.raises(UserError, match=r"given\.pth: it has no residual network"):
        load_weights(tmp_path / "given.pth")


def test_tensors_without_names_are_left_out(images: Tensor, tmp_path: Path) -> None:
    model = others.network("resnet18", "classifier", 2)
    torch.save({0: torch.zeros(3), **model.state_dict()}, tmp_path / "given.pth")
    check_same(load_weights(tmp_path / "given.pth"), model, images, head=False)


REFUSED: dict[str, tuple[Any, str]] = {
    "two networks": ({"a.": 0, "b.": 1}, "several encoders, and none is encoder_q: 'a.', 'b.'"),
    "two query encoders": ({"a.encoder_q.": 0, "b.encoder_q.": 1}, "several encoders"),
    "none": ({}, "no residual network"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_meant_must_be_clear(kind: str, tmp_path: Path) -> None:
    networks, reason = REFUSED[kind]
    content = {"other": torch.zeros(3)}
    for prefix, seed in networks.items():
        state = others.network("resnet18", "classifier", seed).state_dict()
        content |= {prefix + name: value for name, value in state.items()}
    torch.save(content, tmp_path / "given.pth")
    with pytest.raises(UserError, match=reason) as error:
        load_weights(tmp_path / "given.pth")
    assert str(tmp_path / "given.pth") in str(error.value)


def test_a_head_that_lacks_its_bias_is_refused(tmp_path: Path) -> None:
    content = others.pretraining(*(others.network("resnet18", "v2", seed) for seed in (0, 1)), torch.zeros(1))
    del content["state_dict"]["module.encoder_q.fc.2.bias"]
    torch.save(content, tmp_path / "given.pth.tar")
    with pytest.raises(UserError, match=r"given\.pth\.tar: its head lacks fc\.2\.bias"):
        load_weights(tmp_path / "given.pth.tar")


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(()), r"its head's last weight is \[\], expected 2 dimensions"),
        # A head of 16 TB, were it built before it is compared.
        (torch.zeros(2**33, 0), r"tensor head\.2\.bias is \[16\], expected \[8589934592\]"),
    ],
)
def test_a_head_of_a_wrong_shape_is_refused(weight: Tensor, reason: str, tmp_path: Path) -> None:
    content = others.pretraining(*(others.network("resnet18", "v2", seed) for seed in (0, 1)), torch.zeros(1))
    content["state_dict"]["module.encoder_q.fc.2.weight"] = weight
    torch.save(content, tmp_path / "given.pth.tar")
    with pytest.raises(UserError, match=rf"given\.pth\.tar: .*{reason}"):
        load_weights(tmp_path / "given.pth.tar")


def test_an_epoch_that_no_result_could_hold_is_left_out(tmp_path: Path) -> None:
    state = others.network("resnet18", "classifier", 0).state_dict()
    for epoch in (True, -1, 10**300):
        torch.save({"epoch": epoch, "state_dict": state}, tmp_path / "given.pth")
        assert "epoch" not in load_weights(tmp_path / "given.pth").about


def described(**changes: str) -> str:
    """A good description with entries replaced, as JSON."""
    entries = {"built": '{"arch": "resnet18", "dim": null}', "data": "{}", "temperature": "0.1"} | changes
    return "{" + ", ".join(f'"{name}": {value}' for name, value in entries.items()) + "}"


# What is written, and a part of the reason.
DESCRIPTIONS = {
    "no JSON": "synco_fast: Invalid JSON",
    "[1]": "synco_fast: Input should be an object",
    "{}": "built: Field required",
    described(built='{"arch": "resnet99", "dim": null}'): "no such encoder",
    described(built='{"arch": "resnet18", "dim": 16}'): "tensor head.0.bias is missing, expected [512]",
    described(built='{"arch": "resnet18", "dim": 2147483647, "mlp": false}'): "expected [21474",  # 4 TB
    described(built='{"arch": "resnet18", "dim": -1}'): "built.dim: ",
    described(built='{"arch": "resnet18", "dim": "16"}'): "built.dim: ",
    described(built='{"arch": "resnet34", "dim": null}'): "is missing, expected",
    described(built='{"arch": "resnet18", "stem": "cifar", "dim": null}'): "is [64, 3, 7, 7], expected [64, 3, 3, 3]",
    described(built='{"arch": "resnet18", "dim": null, "depth": 3}'): "built.depth: Extra inputs",
    described(data='{"image_size": 1}'): "data.image_size: ",
    described(data='{"image_size": 224, "eval_resize": 223}'): "data.eval_resize = 223: must be at least data.image_",
    described(temperature='"x"'): "temperature: ",
    described(temperature="-1"): "temperature: ",
    described(temperature="0"): "temperature: ",
    described(temperature="NaN"): "temperature: ",
    described(temperature="Infinity"): "temperature: ",
    described(step="NaN"): "step: ",
    described(step="-1"): "step: ",
    described(epoch='"7"'): "epoch: ",
    described(seed="1" + 30 * "0"): "seed: ",
    described(method="[]"): "method: ",
    described(mean="[0.5, 0.5, 0.5]"): "mean = (0.5, 0.5, 0.5)",
    described(author='"somebody"'): "author: Extra inputs",
}


@pytest.mark.parametrize("text", DESCRIPTIONS)
def test_safetensors_whose_description_does_not_fit(text: str, tmp_path: Path) -> None:
    state = Encoder("resnet18", dim=None).state_dict()
    given = tmp_path / "given.safetensors"
    safetensors.torch.save_file(state, given, {METADATA: text})
    reason = re.escape(DESCRIPTIONS[text])
    with pytest.raises(UserError, match=rf"given\.safetensors: its weights do not fit its own description: .*{reason}"):
        load_weights(given)


def test_safetensors_with_a_good_description(tmp_path: Path) -> None:
    given = tmp_path / "given.safetensors"
    state = Encoder("resnet18", dim=None).state_dict()
    safetensors.torch.save_file(state, given, {METADATA: described(step="4", method='"moco"')})
    weights = load_weights(given)
    assert weights.temperature == 0.1 and weights.about["step"] == 4 and weights.about["method"] == "moco"
    assert weights.built == {"arch": "resnet18", "dim": None} and "seed" not in weights.about


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0", b"\xff" * 64, b"PK\3\4" + bytes(60)])
def test_damaged_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "given.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_weights(tmp_path / "given.safetensors")
