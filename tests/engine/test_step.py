"""The step, computed in each of its ways, against the plain one."""

from typing import Any

import pytest
import torch

from synco_fast.engine.distributed import Processes
from synco_fast.engine.speed import resolve
from synco_fast.errors import UserError
from tests.engine.runs import differences
from tests.engine.steps import build, model_state, move_first_weights, small_config, train
from tests.engine.trajectories import FAST, PLAIN


def state_after(steps: int, **sections: dict[str, Any]) -> dict[str, Any]:
    step = build(small_config(**sections))
    losses = train(step, steps)
    return {"losses": losses, "model": model_state(step.contrast), "optimizer": step.optimizer.state_dict()}


def test_computing_activations_again_changes_no_bit() -> None:
    """Batch norm's running statistics and counters among them, which a second forward pass would move twice."""
    assert differences(state_after(3, speed={"recompute": True}), state_after(3)) == []


def test_computing_activations_again_keeps_fewer() -> None:
    """Bytes that autograd keeps for backward, as it is asked to pack them."""

    def kept(recompute: bool) -> int:
        encoder = build(small_config(speed={"recompute": recompute})).contrast.query_encoder
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoder(torch.randn(32, 3, 32, 32)).sum()
        return sum(sizes.values())

    assert kept(recompute=True) < 0.6 * kept(recompute=False)


def test_the_low_precision_twin_gives_the_keys_that_autocast_gives() -> None:
    """To the bit: what autocast rounds at each call is rounded once, and batch norm is the key encoder's own."""
    trainer = {"precision": "bf16"}
    twin = state_after(3, trainer=trainer, speed={"key_twin": True})
    assert differences(twin, state_after(3, trainer=trainer, speed={"key_twin": False})) == []


def test_the_twin_is_no_part_of_a_checkpoint_and_shares_batch_norm() -> None:
    step = build(small_config(trainer={"precision": "bf16"}, speed={"key_twin": True}))
    twin, keys = step.contrast.key_twin, step.contrast.key_encoder
    assert twin is not None and step.contrast.state_dict().keys() == build(small_config()).contrast.state_dict().keys()
    for name, module in keys.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            low = twin.get_parameter(f"{name}.{kind}")
            norm = isinstance(module, torch.nn.BatchNorm2d)
            assert (low is parameter) == norm and (low.dtype == torch.bfloat16) == (not norm)
    assert twin.get_buffer("backbone.1.running_mean") is keys.get_buffer("backbone.1.running_mean")


@pytest.mark.timeout(900)  # of which compiling takes the most
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_the_compiled_step_is_the_plain_one_but_for_rounding(precision: str) -> None:
    """Weights, momenta, running statistics and queue after three steps, beside those of the plain step in fp32: no
    farther than a plain step's of this precision whose first weights were off by a unit in their last place.
    200 steps: `make stress`, trajectories.py."""
    steps = 3
    plain = fast_state(PLAIN, steps, "fp32")
    moved = [fast_state(PLAIN, steps, precision, seed) for seed in range(3)]
    compiled = fast_state(FAST, steps, precision)
    for name, value in plain.items():
        yardstick = max(float((one[name] - value).abs().max()) for one in moved)
        assert float((compiled[name] - value).abs().max()) <= 4 * yardstick, name


def fast_state(speed: dict[str, bool], steps: int, precision: str, moved: int | None = None) -> dict[str, torch.Tensor]:
    """By what they are: all weights of an encoder together, all running means, and so on."""
    step = build(small_config(speed=speed, trainer={"precision": precision}))
    if moved is not None:
        move_first_weights(step, moved)
    train(step, steps)
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, value in step.contrast.state_dict().items():
        kinds.setdefault(f"{name.split('.')[0]} {name.split('.')[-1]}", []).append(value.double().flatten())
    kinds["momenta"] = [state["momentum_buffer"].flatten() for state in step.optimizer.state.values()]
    return {kind: torch.cat(values) for kind, values in kinds.items()}


@pytest.mark.parametrize("last", [False, True])
def test_both_encoders_take_images_as_configured(last: bool) -> None:
    step = build(small_config(speed={"channels_last": last}))
    seen = []
    for encoder in (step.contrast.query_encoder, step.contrast.key_encoder):
        for module in encoder.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    train(step, 1)
    large = [images for images in seen if min(images.shape[2:]) > 1]
    assert len(large) > 10
    assert {images.is_contiguous(memory_format=torch.channels_last) for images in large} == {last}


def test_a_graph_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cuda = small_config(speed={"cuda_graph": True}), torch.device("cuda")
    with pytest.raises(UserError, match="is for one process, and this run has 2"):
        resolve(config, Processes(0, 2, cuda))
    monkeypatch.setattr("synco_fast.engine.speed.DEBUG", True)
    with pytest.raises(UserError, match="SYNCO_FAST_DEBUG=1"):
        resolve(config, Processes(0, 1, cuda))


def test_auto_compiles_in_one_process_on_a_gpu_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Processes(0, 1, torch.device("cuda"))
    assert resolve(small_config(), one).compile
    assert not resolve(small_config(), Processes(0, 2, one.device)).compile
    assert not resolve(small_config(), Processes(0, 1, torch.device("cpu"))).compile
    assert not resolve(small_config(speed={"recompute": True}), one).compile
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not resolve(small_config(), one).compile
    with pytest.raises(UserError, match="there is no no-such-compiler"):
        resolve(small_config(speed={"compile": True}), one)
