"""The README's code runs, and its links lead somewhere."""

import re

import torch
from torch import nn

from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_op_in_an_ordinary_loop() -> None:
    """The README's loop learns: its loss on a repeated batch falls."""
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    torch.manual_seed(0)
    encoder, key_encoder = nn.Linear(48, 128), nn.Linear(48, 128)
    views = torch.randn(16, 48)
    scope = {
        "encoder": encoder,
        "key_encoder": key_encoder,
        "optimizer": torch.optim.SGD(encoder.parameters(), lr=0.5),
        "loader": [(views, views)] * 10,
    }
    losses = []
    watched = code.replace("result.loss.backward()", "result.loss.backward(); losses.append(result.loss.item())")
    assert watched != code
    exec(compile(watched, "README.md", "exec"), scope | {"losses": losses})
    assert len(losses) == 10 and losses[-1] < losses[0] - 1


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://arxiv.org/") or (REPOSITORY / target).exists(), target
