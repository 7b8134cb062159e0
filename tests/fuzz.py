"""Random cases by number, so that a failure names the one case that repeats it."""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from synco_fast import config, config_text
from synco_fast.errors import UserError
from synco_fast.ops import KINDS, HardNegatives, infonce

_CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
_VALUES = [None, True, -1, 0, 1, 3, 10**30, 0.5, -0.5, float("nan"), float("inf"), "", "synco", "../x", "1e-3"]
_VALUES += [[], [1, 2], {}, {"a": 1}, "\u0000", "é" * 300]


def op_case(number: int) -> None:
    """One random problem in float64: loss, gradient, ranks and statistics of `eager` equal those of `reference`."""
    pick = random.Random(number)
    torch.manual_seed(number)
    batch, size, dim = pick.randint(1, 24), pick.randint(1, 400), pick.choice([2, 3, 16, 64, 100])
    counts = {kind: pick.choice([0, 1, pick.randint(2, 40)]) for kind in KINDS}
    hard = HardNegatives(
        n_hard=pick.randint(1, size),
        **counts,
        alpha_max=pick.random(),
        beta_max=1 + 2 * pick.random(),
        gamma_max=pick.random(),
        sigma=pick.choice([0.0, 0.01, 1.0]),
        delta=pick.choice([0.0, 0.01, 1.0]),
        eta=pick.choice([0.0, 0.01, 1.0]),
        extrapolate_from=pick.choice(["query", "negative"]),  # type: ignore[arg-type]
    )
    q, k, queue = (F.normalize(torch.randn(n, dim, dtype=torch.float64), dim=1) for n in (batch, batch, size))
    if pick.random() < 0.2:  # a collapsed queue: ties everywhere
        queue = queue[:1].expand(size, dim).clone()
    labels = {}
    if pick.random() < 0.3:
        labels = {"labels": torch.randint(0, 3, (batch,)), "queue_labels": torch.randint(0, 3, (size,))}
    temperature = pick.choice([0.02, 0.07, 0.2, 1.0])
    found = []
    for backend in ("reference", "eager"):
        leaf = q.clone().requires_grad_()
        result = infonce(
            leaf,
            k,
            queue,
            hard=hard,
            temperature=temperature,
            seed=number,
            step=number % 97,
            row_offset=number % 13,
            backend=backend,
            **labels,
        )
        found.append((result, *torch.autograd.grad(result.loss, leaf)))
    (expected, expected_gradient), (result, gradient) = found
    assert abs(float(result.loss.detach() - expected.loss.detach())) <= 1e-12 * max(1.0, float(expected.loss.detach()))
    scale = max(1.0, float(expected_gradient.abs().max()))
    assert float((gradient - expected_gradient).abs().max()) <= 1e-12 * scale
    assert torch.equal(result.rank, expected.rank)
    for name, value in expected.stats.items():
        assert abs(float(result.stats[name] - value)) <= 1e-6, name


def config_case(number: int) -> bool:
    """One mutated configuration: it loads, or it is refused by a UserError of one screen. Says whether it loaded."""
    pick = random.Random(number)
    values = config_text.read_yaml(pick.choice(_CONFIGS))  # for which 1e-4 is a number
    for _ in range(pick.randint(1, 4)):
        _mutate(values, pick)
    try:
        config.parse(values, "fuzz")
    except UserError as error:
        message = str(error)
        assert message.startswith("fuzz: ") and len(message.splitlines()) <= 40, message
        return False
    return True


def _mutate(values: dict[str, Any], pick: random.Random) -> None:
    """Change, add or drop one key, at the top or in a section."""
    sections = [value for value in values.values() if isinstance(value, dict)]
    target = pick.choice([values, *sections])
    keys = [*target, pick.choice(list(config.key_paths())).rpartition(".")[2], "nonsense"]
    key = pick.choice(keys)
    if pick.random() < 0.2:
        target.pop(key, None)
    else:
        target[key] = pick.choice(_VALUES)
