"""Spread and effective rank of keys of known geometry."""

import pytest
import torch
import torch.nn.functional as F

from synco_fast.engine.collapse import alarm, spread_and_rank

ZERO = torch.zeros((), dtype=torch.int64)


def rows(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=1)


def test_keys_everywhere_and_keys_in_one_place() -> None:
    found = spread_and_rank(rows(4096, 16).half(), ZERO, 4096)
    assert found["key_spread"] == pytest.approx(1, abs=0.01) and 15.5 < found["key_rank"] <= 16
    assert alarm(found) is None
    one = spread_and_rank(rows(1, 16).half().expand(512, 16), ZERO, 512)
    assert one["key_spread"] < 1e-6 and "have collapsed" in str(alarm(one))


def test_rank_counts_directions() -> None:
    """Keys on four axes, on both sides of each alike: four equal variances of 1/4. On one axis: rank 1, an alarm."""
    axes = torch.eye(8)[:4]
    found = spread_and_rank(torch.cat([axes, -axes]), ZERO, 8)
    assert found["key_rank"] == pytest.approx(4) and found["key_spread"] == pytest.approx(1)
    line = spread_and_rank(torch.cat([axes[:1], -axes[:1]]), ZERO, 2)
    assert line["key_rank"] == pytest.approx(1) and "effective rank 1.0" in str(alarm(line))


def test_only_keys_that_were_put_in_are_looked_at() -> None:
    """Those before the pointer, around the end; the start's random rows would hide a collapse for a while."""
    queue = rows(64, 8)
    newest = torch.tensor([62, 63, 0, 1])
    queue[newest] = queue[5].clone()
    assert spread_and_rank(queue, torch.tensor(2), 4)["key_spread"] < 1e-6
    assert spread_and_rank(queue, torch.tensor(2), 5)["key_spread"] > 0.1
