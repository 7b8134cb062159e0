"""Losses of the fast step beside those of the plain one.

A run is chaotic: what one rounding changes grows from step to step. So the yardstick of "the same up to rounding" is
what rounding itself does to the plain run: in fp32, first weights moved by one unit in their last place; in bf16, bf16
instead of fp32.
"""

from typing import Any

import torch
from torch import Tensor

from tests.engine.steps import build, move_first_weights, small_config, train

PLAIN = {"channels_last": False, "compile": False, "key_twin": False}
FAST = {"channels_last": True, "compile": True}
_WINDOW = 10
_EARLY = 10
_RATE = 0.03
_FACTOR = 2.0


def losses(method: str, steps: int, precision: str, speed: dict[str, Any], moved: int | None = None) -> Tensor:
    """(steps,) losses; `moved`: with first weights moved by a unit in their last place, up or down by this seed."""
    step = build(small_config(method, speed=speed, trainer={"precision": precision}))
    if moved is not None:
        move_first_weights(step, moved)
    return torch.tensor(train(step, steps, _RATE), dtype=torch.float64)


def distances(ours: Tensor, plain: Tensor) -> tuple[float, float]:
    """Of the first steps, before chaos: the largest. Of the whole: root mean square of means over windows."""
    difference = ours - plain
    windows = difference.unfold(0, _WINDOW, _WINDOW).mean(dim=1)
    return float(difference[:_EARLY].abs().max()), float(windows.square().mean().sqrt())


def compare(method: str, precision: str, steps: int) -> str:
    """One line of what was found.

    Raises:
        AssertionError: the fast step is farther from the plain one than rounding explains.
    """
    plain = losses(method, steps, "fp32", PLAIN)
    rounded = [losses(method, steps, precision, PLAIN, moved) for moved in range(3)]
    yardsticks = [max(found) for found in zip(*(distances(one, plain) for one in rounded), strict=True)]
    fast = losses(method, steps, precision, FAST | {"key_twin": precision == "bf16"})
    found = distances(fast, plain)
    line = (
        f"{method} {precision}: first {_EARLY} steps off by {found[0]:.2g} at most (rounding {yardsticks[0]:.2g}); "
        f"{steps} steps by {found[1]:.2g} (rounding {yardsticks[1]:.2g}); "
        f"loss {plain[0]:.3f} to {plain[-_WINDOW:].mean():.3f}"
    )
    assert all(ours <= _FACTOR * allowed for ours, allowed in zip(found, yardsticks, strict=True)), line
    return line
