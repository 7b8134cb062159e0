"""Weights of others: the encoder computes the bits of the torchvision network that the file was made from."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from synco_fast.engine.weights import METADATA, Weights, load_weights
from synco_fast.errors import UserError
from synco_fast.models.encoders import Encoder
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


DESCRIPTIONS = [
    "no JSON",
    "[1]",
    "{}",
    '{"built": {"arch": "resnet99", "dim": null}, "data": {}, "temperature": null}',
    '{"built": {"arch": "resnet18", "dim": 16}, "data": {}, "temperature": null}',
    '{"built": {"arch": "resnet18", "dim": null}, "data": {"image_size": 1}, "temperature": null}',
    '{"built": {"arch": "resnet18", "dim": null, "depth": 3}, "data": {}, "temperature": null}',
]


@pytest.mark.parametrize("described", DESCRIPTIONS)
def test_safetensors_whose_description_does_not_fit(described: str, tmp_path: Path) -> None:
    state = Encoder("resnet18", dim=None).state_dict()
    given = tmp_path / "given.safetensors"
    safetensors.torch.save_file(state, given, {METADATA: described})
    with pytest.raises(UserError, match=r"given\.safetensors: its weights do not fit its own description"):
        load_weights(given)
    good = '{"built": {"arch": "resnet18", "dim": null}, "data": {}, "temperature": 0.1}'
    safetensors.torch.save_file(state, given, {METADATA: good})
    assert load_weights(given).temperature == 0.1


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0", b"\xff" * 64, b"PK\3\4" + bytes(60)])
def test_damaged_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "given.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_weights(tmp_path / "given.safetensors")
