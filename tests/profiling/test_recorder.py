"""Own times of nested stages, by a clock that the test turns on."""

import pytest
import torch

from synco_fast import stages
from synco_fast.profiling.recorder import StageRecorder
from synco_fast.stages import stage


class Clock:
    """Shows `now`, nanoseconds."""

    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> int:
        return self.now

    def forward(self, nanoseconds: int) -> None:
        self.now += nanoseconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recorder(clock: Clock) -> StageRecorder:
    return StageRecorder(torch.device("cpu"), now=clock)


def test_a_nested_stage_is_taken_out_of_the_outer_one(clock: Clock, recorder: StageRecorder) -> None:
    with stages.recorded(recorder), recorder.step():
        clock.forward(1)
        with stage("enqueue"):
            clock.forward(10)
            with stage("gather"):
                clock.forward(100)
            clock.forward(1_000)
            with stage("gather"):
                clock.forward(10_000)
        clock.forward(100_000)
    (step,) = recorder.host()
    assert step.stages == {"enqueue": 1_010, "gather": 10_100}
    assert (step.wall, step.unattributed) == (111_111, 100_001)
    assert recorder.device() == recorder.host()


def test_steps_are_apart_and_what_lies_between_them_is_nobodys(clock: Clock, recorder: StageRecorder) -> None:
    with stages.recorded(recorder):
        for length in (3, 5):
            with recorder.step():
                for _ in range(2):  # micro-batches meet a stage again
                    with stage("op"):
                        clock.forward(length)
            clock.forward(1_000)
    assert [(step.wall, step.stages) for step in recorder.host()] == [(6, {"op": 6}), (10, {"op": 10})]


def test_a_stage_that_fails_is_left(clock: Clock, recorder: StageRecorder) -> None:
    with stages.recorded(recorder), recorder.step():
        with pytest.raises(ValueError), stage("op"):
            clock.forward(7)
            raise ValueError
        clock.forward(2)
    (step,) = recorder.host()
    assert (step.stages, step.unattributed) == ({"op": 7}, 2)


def test_nothing_of_cuda_on_a_cpu(recorder: StageRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("called on a CPU")

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", refuse)
    monkeypatch.setattr(torch.cuda, "Event", refuse)
    with recorder.step(), recorder.stage("op"):
        pass
