"""A run whose loss blows up stops by itself, or leaves out so many steps; it says where, and spoils nothing."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from synco_fast.engine import checkpoints
from synco_fast.engine.guard import NonFiniteGuard
from synco_fast.engine.step import TrainStep
from tests.command import call
from tests.engine.runs import differences, pretrain_command
from tests.engine.steps import build, model_state, small_config, views

FINE, NAN, INF = torch.tensor(1.0), torch.tensor(torch.nan), torch.tensor(torch.inf)


@pytest.mark.parametrize("limit", [0, 1, 2, 9])
def test_so_many_bad_steps_are_left_out(limit: int) -> None:
    """Bad ones are 1, 2 and 4, looked at twice; from the one that is too many on, nothing moves."""
    guard = NonFiniteGuard(1, limit, torch.device("cpu"))
    skipped, found = [], []
    for step, (loss, norm) in enumerate(
        [(FINE, FINE), (FINE, INF), (NAN, NAN), (FINE, FINE), (NAN, FINE), (FINE, FINE)]
    ):
        guard.watch(loss, norm, torch.tensor(step), torch.tensor([float(10 * step)]))
        skipped.append(float(guard.skip))
        if step in (2, 5):
            found.append(guard.found())
    bad = [1, 2, 4]
    last = bad[limit] if limit < 3 else 99
    assert skipped == [float(step in bad or step > last) for step in range(6)]
    assert guard.exhausted == (limit < 3)
    told = [(step, [10.0 * step]) for step in bad[: limit + 1]]
    assert found == [[row for row in told if row[0] <= 2], [row for row in told if row[0] > 2]]


def test_a_resumed_run_goes_on_counting() -> None:
    before, after = (NonFiniteGuard(1, 2, torch.device("cpu")) for _ in range(2))
    for step in range(2):
        before.watch(NAN, FINE, torch.tensor(step), torch.zeros(1))
    after.load_state_dict(before.state_dict())
    assert after.found() == [] and not after.exhausted
    after.watch(NAN, FINE, torch.tensor(7), torch.ones(1))
    assert after.found() == [(7, [1.0])] and after.exhausted


def bad_step(step: TrainStep, number: int) -> None:
    query, key = views(number)
    query[0, 0, 0, 0] = torch.inf
    step((query, key), step.config.negatives.hard(), number, 0.1)


def everything(step: TrainStep) -> dict[str, Any]:
    return {"model": model_state(step.contrast), "optimizer": step.optimizer.state_dict()}


def test_a_step_that_is_left_out_leaves_no_mark() -> None:
    """Weights, momentum, queue and batch norm's running statistics of both encoders are what they were; the next step
    is counted, and this one not. Only the key encoder's weights have followed the query encoder's once more."""
    step = build(small_config(trainer={"skip_nonfinite": 3}, model={"momentum": 0.5}))
    step(views(0), step.config.negatives.hard(), 0, 0.1)
    before = copy.deepcopy(everything(step))
    bad_step(step, 1)
    after = everything(step)
    followed = {name for name, value in after["model"].items() if not torch.equal(value, before["model"][name])}
    counters = {name for name in followed if name.endswith("num_batches_tracked")}
    assert followed - counters == {f"key_encoder.{name}" for name, _ in step.contrast.key_encoder.named_parameters()}
    assert differences(after["optimizer"], before["optimizer"]) == []
    step(views(2), step.config.negatives.hard(), 2, 0.1)
    row = step.meter.read()
    assert all(value is not None for value in row.values())
    alone = build(small_config(trainer={"skip_nonfinite": 3}, model={"momentum": 0.5}))
    alone(views(0), alone.config.negatives.hard(), 0, 0.1)
    first = alone.meter.read()["loss"]
    assert row["loss"] != first and step.guard.found()[0][0] == 1


def test_a_run_that_diverges(images: Path, tiny: Path, tmp_path: Path, synco_fast: Callable[..., Any]) -> None:
    """The rate overflows the weights at the first step; the host looks at the fifth."""
    output = tmp_path / "run"
    options = ["--set", "optim.lr=1e38", "--set", "trainer.log_every=5"]
    command = pretrain_command(tiny, images, output, *options)
    done = synco_fast(*command[3:])
    assert done.returncode == 1, done.stderr
    assert "not finite at step" in done.stderr and "Traceback" not in done.stderr
    (evidence_file,) = output.glob("nonfinite-step-*.json")
    evidence = json.loads(evidence_file.read_text())
    assert 0 < evidence["step"] < 5 and str(evidence["step"]) in evidence_file.name
    assert len(evidence["files"]) == 16 and (images / "train" / evidence["files"][0]).is_file()
    assert not (checkpoints.folder(output) / checkpoints.LATEST).exists()


def test_a_run_that_diverges_in_spite_of_a_limit(images: Path, tiny: Path, tmp_path: Path) -> None:
    """Weights that have overflowed make every step bad: evidence of each, and a stop at the limit's next."""
    options = ["optim.lr=1e38", "trainer.log_every=3", "trainer.skip_nonfinite=2"]
    words = [word for option in options for word in ("--set", option)]
    done = call(*pretrain_command(tiny, images, tmp_path / "run", *words)[3:])
    assert done.code == 1 and ", after 2 such steps that were left out" in done.err and "Traceback" not in done.err
    assert len(list((tmp_path / "run").glob("nonfinite-step-*.json"))) == 3


def test_a_first_step_that_is_left_out_leaves_momentum_at_0() -> None:
    """torch would make it of memory as it was, and go on from there."""
    step = build(small_config(trainer={"skip_nonfinite": 1}))
    bad_step(step, 0)
    kept = [state["momentum_buffer"] for state in step.optimizer.state.values()]
    assert len(kept) == len(list(step.contrast.query_encoder.parameters()))
    assert all(bool((momentum == 0).all()) for momentum in kept)


def test_a_lower_limit_than_there_were_bad_steps() -> None:
    """The next one is too many, and is told."""
    guard = NonFiniteGuard(1, 1, torch.device("cpu"))
    guard.load_state_dict({"count": 5})
    assert guard.found() == [] and not guard.exhausted
    guard.watch(NAN, FINE, torch.tensor(9), torch.ones(1))
    assert guard.found() == [(9, [1.0])] and guard.exhausted
