"""Learning rates at known places."""

import math

import pytest

from synco_fast.config import Optim
from synco_fast.engine.schedules import learning_rate, scaled


def rate(optim: Optim, epoch: int, step: int = 0) -> float:
    return learning_rate(optim, 200, epoch, step, steps_per_epoch=10)


def test_cosine_moves_by_epochs_or_by_steps() -> None:
    by_epoch, by_step = Optim(lr=0.03), Optim(lr=0.03, update="step")
    assert rate(by_epoch, 0) == 0.03
    assert rate(by_epoch, 100, 7) == rate(by_epoch, 100) == pytest.approx(0.015)
    assert rate(by_step, 100, 7) == pytest.approx(0.015 * (1 + math.cos(math.pi * 100.7 / 200)))
    assert rate(by_step, 199, 9) < rate(by_step, 199) < 1e-5


def test_step_schedule_decays_at_its_milestones() -> None:
    optim = Optim(lr=1.0, schedule="step", milestones=[120, 160], decay=0.1)
    rates = [rate(optim, epoch, 9) for epoch in (0, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warm_up_rises_by_steps_to_the_full_rate() -> None:
    optim = Optim(lr=1.0, warmup_epochs=10)
    assert rate(optim, 0) == pytest.approx(0.01)
    assert rate(optim, 4, 9) == pytest.approx(0.5)
    assert rate(optim, 9, 9) == pytest.approx(1.0)
    assert rate(optim, 10) == pytest.approx(1.0)
    assert rate(optim, 105) == pytest.approx(0.5)


def test_rates_scale_with_the_batch_as_asked() -> None:
    """A rate is for 256 images: a quarter and four times as many."""
    for scaling, quarter, fourfold in (("none", 1, 1), ("linear", 1 / 4, 4), ("sqrt", 1 / 2, 2)):
        optim = Optim(lr=0.03, lr_scaling=scaling)  # type: ignore[arg-type]
        assert scaled(optim, 64).lr == pytest.approx(0.03 * quarter)
        assert scaled(optim, 1024).lr == pytest.approx(0.03 * fourfold)
        assert scaled(optim, 256).lr == 0.03 and scaled(scaled(optim, 64), 64) == scaled(optim, 64)
