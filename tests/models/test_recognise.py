"""Encoders recognised by the names and shapes of their tensors, whatever stands before the names."""

import pytest
import torch
import torchvision

from synco_fast.errors import UserError
from synco_fast.models.encoders import NARROW, Encoder, architectures
from synco_fast.models.recognise import prefixes, recognise


@pytest.mark.parametrize("arch", [arch for arch in architectures() if arch != NARROW])
@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_each_architecture_is_itself(arch: str, prefix: str) -> None:
    with torch.device("meta"):
        state = torchvision.models.get_model(arch).state_dict()
    tensors = {prefix + name: value for name, value in state.items()} | {"module.queue": torch.empty(4, 2)}
    assert prefixes(tensors) == [prefix]
    found = recognise(tensors, prefix)
    assert (found.arch, found.stem) == (arch, "imagenet")
    assert found.backbone.keys() | {"fc.weight", "fc.bias"} == state.keys()
    assert found.rest.keys() >= {"fc.weight", "fc.bias"}


def test_the_stem_is_told_by_its_convolution() -> None:
    state = Encoder("resnet18", stem="cifar", dim=None).backbone.state_dict()
    assert recognise(state, "").stem == "cifar"


def test_counters_of_batches_may_be_missing() -> None:
    """Files older than PyTorch 0.4.1 have none."""
    state = torchvision.models.resnet18().state_dict()
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert recognise(old, "").arch == "resnet18"


@pytest.mark.parametrize("damage", ["lacks a tensor", "has another shape", "has a deeper layer", "is something else"])
def test_what_is_no_encoder_is_refused_with_the_nearest_one(damage: str) -> None:
    state = torchvision.models.resnet50().state_dict()
    if damage == "lacks a tensor":
        del state["layer3.4.bn2.running_var"]
    elif damage == "has another shape":
        state["layer2.0.conv1.weight"] = torch.zeros(128, 256, 3, 3)
    elif damage == "has a deeper layer":
        state["layer4.3.conv1.weight"] = torch.zeros(1)
    else:
        state = {"conv1.weight": torch.zeros(8, 3, 3, 3), "linear.weight": torch.zeros(1)}
    with pytest.raises(UserError, match="known here: the nearest, resnet") as error:
        recognise(state, "")
    if damage != "is something else":
        assert "resnet50, differs in 1 tensors" in str(error.value)
