"""The step on a GPU: as one CUDA graph, with keys on a stream of their own, with apex; and that it never waits."""

from typing import Any

import pytest
import torch

from synco_fast.engine.speed import choose_algorithms
from synco_fast.machine import apex_status
from synco_fast.ops import HardNegatives
from tests.engine.runs import differences
from tests.engine.steps import BATCH, build, model_state, small_config, train, views

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

EAGER = {"compile": False, "cuda_graph": False, "key_stream": False, "key_twin": False}


@pytest.fixture(autouse=True)
def _deterministic() -> Any:
    choose_algorithms(torch.device("cuda"), deterministic=True)
    yield
    choose_algorithms(torch.device("cuda"), deterministic=False)


def state_after(steps: int, speed: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """Half of them without synthetic negatives, then with them, each step at a rate of its own."""
    step = build(small_config(speed={**EAGER, **speed}, **sections), "cuda")
    for number in range(steps):
        hard = HardNegatives.none() if number < steps // 2 else step.config.negatives.hard()
        step(views(number, "cuda"), hard, number, 0.1 / (1 + number))
    return {"meter": step.meter.read(), "model": model_state(step.contrast)}


@pytest.mark.parametrize(
    "speed", [{"cuda_graph": True}, {"key_stream": True}, {"cuda_graph": True, "key_stream": True}]
)
def test_graph_and_key_stream_change_no_bit(speed: dict[str, bool]) -> None:
    assert differences(state_after(20, speed), state_after(20, {})) == []


def test_the_fastest_combination_changes_no_bit() -> None:
    """bf16, compiled and with a twin, as a graph with keys beside: what a run on a GPU may come to use."""
    fast = {"compile": True, "key_twin": True}
    together = {**fast, "cuda_graph": True, "key_stream": True}
    trainer: dict[str, Any] = {"precision": "bf16"}
    assert differences(state_after(12, together, trainer=trainer), state_after(12, fast, trainer=trainer)) == []


def test_a_graph_takes_micro_batches_and_clips() -> None:
    sections: dict[str, dict[str, Any]] = {"trainer": {"accumulate": 2}, "optim": {"clip_norm": 0.5}}
    assert differences(state_after(12, {"cuda_graph": True}, **sections), state_after(12, {}, **sections)) == []


def test_a_graph_takes_each_step_s_labels() -> None:
    """Labels that change from step to step: with those of the capture, the queue and the loss would be others."""

    def state(graph: bool) -> dict[str, Any]:
        step = build(small_config(speed={**EAGER, "cuda_graph": graph}, loss={"class_oracle": True}), "cuda")
        for number in range(12):
            labels = torch.randint(5, (BATCH,), generator=torch.Generator().manual_seed(number)).cuda()
            step(views(number, "cuda"), step.config.negatives.hard(), number, 0.1, labels)
        return {"meter": step.meter.read(), "model": model_state(step.contrast)}

    assert differences(state(graph=True), state(graph=False)) == []


@pytest.mark.parametrize("graph", [False, True])
def test_a_bad_step_is_masked_and_found(graph: bool) -> None:
    step = build(small_config(speed={**EAGER, "cuda_graph": graph}), "cuda")
    train(step, 8)
    before = model_state(step.contrast)
    step([view * torch.nan for view in views(8, "cuda")], step.config.negatives.hard(), 8, 0.1)
    assert [number for number, _ in step.guard.found()] == [8]
    after = model_state(step.contrast)
    for name, value in after.items():
        if (name.startswith("query_encoder") and "running" not in name and "tracked" not in name) or "queue" in name:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("speed", [{}, {"key_stream": True}, {"cuda_graph": True}, {"compile": True, "key_twin": True}])
@pytest.mark.parametrize("method", ["moco", "synco"])
def test_no_step_waits_for_the_device(speed: dict[str, bool], method: str) -> None:
    sections: dict[str, dict[str, Any]] = {"trainer": {"precision": "bf16", "accumulate": 2}}
    step = build(small_config(method, speed={**EAGER, **speed}, **sections), "cuda")
    train(step, 6)
    batch, hard = views(6, "cuda"), step.config.negatives.hard()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(6, 12):
            step(batch, hard, number, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.guard.found() == []


@pytest.mark.skipif(apex_status() != "ok", reason=f"NVIDIA apex: {apex_status()}")
def test_apex_steps_as_pytorch_does() -> None:
    apex = state_after(10, {"optimizer": "apex"})["model"]
    torch_ = state_after(10, {"optimizer": "torch"})["model"]
    for name, value in apex.items():
        assert torch.allclose(value.float(), torch_[name].float(), rtol=1e-4, atol=1e-5), name
