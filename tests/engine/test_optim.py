"""Optimizers against their formulas in float64, and masked steps."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from synco_fast.config import Optim
from synco_fast.engine import optim


def gradients(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, 3, generator=generator), torch.randn(5, generator=generator)


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(99)
    return (
        nn.Parameter(torch.randn(5, 3, generator=generator)),
        nn.Parameter(torch.randn(5, generator=generator)),
    )


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_five_steps_equal_the_formula(name: str) -> None:
    settings = Optim(name=name, lr=0.1, momentum=0.9, weight_decay=0.01, trust=0.02)  # type: ignore[arg-type]
    trained = parameters()
    expected = [p.detach().double().clone() for p in trained]
    momenta = [torch.zeros_like(p) for p in expected]
    optimizer = optim.build(settings, trained)
    keep = torch.zeros(())
    for step in range(5):
        for i, g in enumerate(gradients(step)):
            trained[i].grad = g.clone()
            w, g = expected[i], g.double()
            if name == "sgd":
                g = g + 0.01 * w
            elif w.dim() > 1:
                g = g + 0.01 * w
                g = g * 0.02 * w.norm() / g.norm()
            momenta[i] = 0.9 * momenta[i] + g
            expected[i] = w - 0.1 * momenta[i]
        optim.set_rate(optimizer, 0.1, None)
        optim.step(optimizer, keep)
    for p, w in zip(trained, expected, strict=True):
        assert torch.allclose(p.double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_a_masked_step_changes_nothing(name: str) -> None:
    settings = Optim(name=name)  # type: ignore[arg-type]
    trained = parameters()
    optimizer = optim.build(settings, trained)
    optim.set_rate(optimizer, 0.1, None)
    for p, g in zip(trained, gradients(0), strict=True):
        p.grad = g
    optim.step(optimizer, torch.zeros(()))
    before = [p.detach().clone() for p in trained]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in trained]
    for p in trained:
        p.grad = torch.full_like(p, torch.nan)
    optim.step(optimizer, torch.ones(()))
    for p, w, m in zip(trained, before, momenta, strict=True):
        assert torch.equal(p, w)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], m)


def test_lars_leaves_a_weight_of_zeros_to_plain_sgd() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = optim.build(Optim(name="lars", lr=0.5), [weight])
    optim.step(optimizer, torch.zeros(()))
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.5))


@pytest.mark.parametrize("name", ["sgd", "lars"])
@pytest.mark.parametrize(
    "layouts", list(itertools.permutations((torch.contiguous_format, torch.channels_last))), ids=str
)
def test_momentum_of_another_memory_layout(name: str, layouts: tuple[torch.memory_format, torch.memory_format]) -> None:
    """A state saved with one layout of weights goes on with another as if it had been its own."""
    settings = Optim(name=name, lr=0.1, momentum=0.9)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    start, *slopes = (torch.randn(4, 3, 3, 3, generator=generator) for _ in range(4))

    def trained(layout: torch.memory_format, value: Tensor) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        weight = nn.Parameter(value.contiguous(memory_format=layout))
        return weight, optim.build(settings, [weight])

    def step(weight: nn.Parameter, optimizer: torch.optim.Optimizer, slope: Tensor) -> None:
        weight.grad = torch.empty_like(weight).copy_(slope)
        optim.step(optimizer, torch.zeros(()))

    weight, optimizer = trained(layouts[0], start)
    step(weight, optimizer, slopes[0])
    other, moved = trained(layouts[1], weight.detach())
    moved.load_state_dict(optimizer.state_dict())
    optim.fit_momentum(moved)
    for slope in slopes[1:]:
        step(weight, optimizer, slope)
        step(other, moved, slope)
    torch.testing.assert_close(other.detach(), weight.detach(), rtol=1e-6, atol=1e-6)
