"""The `triton` backend against eager and the float64 reference.

Where there is no CUDA device the tests run in Triton's interpreter. Triton reads TRITON_INTERPRET when it is imported,
and other tests in this process may have imported it, so `test_in_the_interpreter` runs this file and its neighbours
test_triton_*.py in a process of its own. With a CUDA device they run here, compiled.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synco_fast.ops import HardNegatives, infonce, triton_infonce
from synco_fast.ops.hard import pack
from synco_fast.ops.select import hardest
from tests.ops.cases import (
    SETTINGS,
    alone,
    batch,
    everything,
    exact_rows,
    unit_rows,
    with_n_hard,
)
from tests.ops.triton_runs import APART, DEVICE, check, run

every_setting = pytest.mark.parametrize("hard", SETTINGS.values(), ids=SETTINGS.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])

PLACE = {"seed": 2**40 + 5, "step": 7, "row_offset": 11}


@pytest.fixture(autouse=True)
def _here_or_apart(request: pytest.FixtureRequest) -> None:
    if (request.function is test_in_the_interpreter) != APART:
        pytest.skip("test_in_the_interpreter runs them" if APART else "the tests run in this process")


def test_in_the_interpreter() -> None:
    reason = triton_infonce.status()
    if reason == "triton is not installed":
        pytest.skip(reason)
    assert reason == "no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, for tests)"
    with pytest.raises(RuntimeError, match="backend triton cannot be used: no CUDA device"):
        infonce(*batch(dim=16), hard=HardNegatives.none(), backend="triton")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *Path(__file__).parent.glob("test_triton*.py"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def poisoned(rows: Tensor, columns: int = 5) -> Tensor:
    """The same rows as a part of a larger tensor that is NaN elsewhere; columns: how far apart the rows are."""
    larger = torch.full((len(rows) + 70, rows.shape[1] + columns), math.nan, dtype=rows.dtype, device=DEVICE)
    part = larger[3 : 3 + len(rows), : rows.shape[1]]
    part.copy_(rows)
    return part


# ---------------------------------------------------------------- precision


@every_setting
def test_as_exact_as_eager(hard: HardNegatives) -> None:
    q, k, queue = batch(2, 64, 96, seed=30)
    check(q.float(), k.float(), queue.half(), with_n_hard(hard, 96), **PLACE)


@every_dtype
@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_as_exact_as_eager_in_every_dtype(dtype: torch.dtype, temperature: float) -> None:
    q, k, queue = batch(2, 64, 96, seed=30)
    check(q.float(), k.float(), queue.to(dtype), with_n_hard(SETTINGS["all, strong"], 96), temperature)


@every_setting
def test_as_exact_on_a_selected_hard_set_at_the_least_temperature(hard: HardNegatives) -> None:
    q, queue = exact_rows(2, 64, seed=31), exact_rows(300, 64, seed=32)
    k = torch.nn.functional.normalize(q + 0.5 * unit_rows(2, 64, seed=33), dim=1)
    check(q.float(), k.float(), queue.half(), with_n_hard(hard, 50), 0.02, **PLACE)


@every_dtype
@pytest.mark.parametrize(("first", "last"), [(-0.5, 0.2), (-0.5, 0.98), (0.98, -0.5)])
def test_weights_of_any_size(dtype: torch.dtype, first: float, last: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At t = 0.02 a row's largest weight is e^-40 or e^-1 of e^(1 / t), its least e^35 or e^74 smaller. All count."""
    monkeypatch.setattr(triton_infonce, "_PROGRAMS", 2)  # Several tiles for each.
    q, _, _ = batch(2, 64, 1, seed=34)
    aside = unit_rows(600, 64, seed=35)
    aside = torch.nn.functional.normalize(aside - (aside @ q[:1].T) * q[:1], dim=1)
    x = torch.linspace(first, last, 600, dtype=torch.float64)[:, None]
    queue = x * q[:1] + (1 - x**2).sqrt() * aside
    k = torch.nn.functional.normalize(unit_rows(2, 64, seed=36) - 0.3 * q, dim=1)
    check(q.float(), k.float(), queue.to(dtype), HardNegatives.none(), 0.02)


@pytest.mark.parametrize("hard", [SETTINGS["all"], SETTINGS["all, strong"], alone("perturbed", 12, delta=1.0)])
def test_the_query_and_its_opposite_in_the_queue(hard: HardNegatives) -> None:
    """Vectors that all but cancel among them."""
    q, k, queue = batch(2, 64, 96, seed=37)
    queue[:48] = torch.cat([q, -q]).repeat(12, 1)
    check(q.float(), k.float(), queue.half(), with_n_hard(hard, 96), 0.07)


def test_vectors_shorter_than_the_least_length() -> None:
    """Mixed with its own opposite about half and half."""
    q, k, _ = batch(1, 64, 1, seed=55)
    check(q.float(), k.float(), -q.half(), alone("interpolated", 1, 1000, alpha_max=1.0))


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float16),
    ],
)
def test_the_query_is_rounded_once(given: torch.dtype, dtype: torch.dtype) -> None:
    q, k, queue = batch(2, 64, 40, seed=38)
    check(q.to(given), k.to(given), queue.to(dtype), everything(40))


# ---------------------------------------------------------------- exact: hard sets, parents, ranks


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("n_hard", "dtype"),
    [(1, torch.float16), (37, torch.float16), (300, torch.float16), (37, torch.bfloat16), (37, torch.float32)],
)
def test_exact_arithmetic_is_identical(dim: int, n_hard: int, dtype: torch.dtype) -> None:
    """Ties at every threshold: another hard set would show in the gradient. Keys off the grid for rank_all."""
    q, queue = exact_rows(2, dim, seed=39), exact_rows(300, dim, seed=40)
    check(q.to(dtype), unit_rows(2, dim, seed=41).float(), queue.to(dtype), everything(n_hard), **PLACE)
    check(q.to(dtype), exact_rows(2, dim, seed=42).to(dtype), queue.to(dtype), HardNegatives.none())


def test_ranks_and_accuracies() -> None:
    """Ranks 0 to 7: q . k falls between the similarities 1/8, 1/4, ... of the queue's rows, or ties with one."""
    e = torch.eye(64)
    queue = torch.arange(1, 9)[:, None] / 8 * e[:1] + 1e-3 * e[1:9]
    for shift in (0, 1 / 16):
        k = torch.arange(1, 9)[:, None] / 8 * e[:1] + shift * e[:1]
        _, _, rank, _, stats = check(e[:1].expand(8, 64), k, queue.half(), HardNegatives.none())
        assert rank.tolist() == [8 - i - (shift > 0) for i in range(8)]
        assert stats[:2].tolist() == ([0.0, 0.5] if shift == 0 else [0.125, 0.625])


@pytest.mark.parametrize("n_hard", [1, 33, 100])
def test_collapsed_queue(n_hard: int) -> None:
    """All rows equal, and one row of memory."""
    k = unit_rows(2, 64, seed=43).float()
    queue = exact_rows(1, 64, seed=43).half().expand(100, 64)
    _, _, rank, _, _ = check(exact_rows(2, 64, seed=44).half(), k, queue, everything(n_hard))
    assert set(rank.tolist()) <= {0, 100}


@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 1000])
def test_selection(columns: int) -> None:
    """Of similarities full of ties, zeros of both signs and neighbouring floats, against select.hardest."""
    generator = torch.Generator().manual_seed(columns)
    values = torch.tensor([-1.0, -0.5, -0.0, 0.0, 0.25, 0.5, math.nextafter(0.5, 1.0), 1.0]).float()
    similarity = values[torch.randint(8, (2, columns), generator=generator)]
    similarity[1] = torch.randn(columns, generator=generator)
    for n in sorted({1, (columns + 1) // 2, columns - 1, columns} - {0}):
        assert torch.equal(selected(similarity, n), hardest(similarity, n)[0]), n


def selected(similarity: Tensor, n: int) -> Tensor:
    """As the op calls it: padded with -inf, with the maxima of the groups."""
    rows, columns = similarity.shape
    group = triton_infonce._group(columns, n)
    padded = torch.nn.functional.pad(similarity, (0, -columns % 64), value=-math.inf).to(DEVICE)
    peaks = padded.view(rows, -1, group).amax(dim=2)
    mean = torch.empty(rows, device=DEVICE)
    chosen = triton_infonce._select(padded, peaks, group, columns, n, mean).long().cpu()
    torch.testing.assert_close(mean.cpu(), similarity.gather(1, chosen).mean(dim=1))
    return chosen


def test_selection_from_more_than_a_tile() -> None:
    """Lists too long for registers, of candidates in groups of 2 to 32."""
    for columns, n in ((20000, 4096), (70000, 300), (2**17, 100)):
        similarity = (torch.randn(1, columns, generator=torch.Generator().manual_seed(n)) * 256).round() / 256
        assert torch.equal(selected(similarity, n), hardest(similarity, n)[0])


# ---------------------------------------------------------------- shapes, settings, draws


@pytest.mark.parametrize(
    ("rows", "dim", "queue_rows"), [(1, 16, 1), (3, 32, 7), (2, 64, 65), (1, 128, 129), (17, 16, 9), (2, 256, 33)]
)
@pytest.mark.parametrize("hard", [SETTINGS["none"], SETTINGS["all, strong"]], ids=["none", "strong"])
def test_odd_shapes_and_poisoned_padding(rows: int, dim: int, queue_rows: int, hard: HardNegatives) -> None:
    """What lies between, before and behind the rows is never used."""
    q, k, queue = batch(rows, dim, queue_rows, seed=45)
    hard = with_n_hard(hard, queue_rows)
    check(poisoned(q.float(), 5), poisoned(k.half(), 5), poisoned(queue.half(), 8), hard)


def test_rows_that_are_not_dense() -> None:
    q, k, queue = batch(2, 64, 40, seed=46)
    check(*(tensor.float().T.contiguous().T for tensor in (q, k, queue)), everything(40))


@pytest.mark.parametrize("count", [1, 70, 200])
def test_counts(count: int) -> None:
    """One sample, and more than a program makes."""
    q, k, queue = batch(1, 64, 40, seed=47)
    hard = replace(everything(40), mixed=count, noisy=count // 2, perturbed=0)
    check(q.half(), k.half(), queue.half(), hard, **PLACE)


def test_a_hard_set_without_synthetic_negatives_is_not_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_infonce, "_select", None)
    q, k, queue = batch(2, 64, 40, seed=48)
    check(q.half(), k.half(), queue.half(), HardNegatives(4, 0, 0, 0, 0, 0, 0))


def test_more_rows_than_the_workspace_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of two rows: the draws and the mean go on over them."""
    monkeypatch.setattr(triton_infonce, "WORKSPACE", 2 * 4 * 64)
    q, k, queue = batch(5, 64, 40, seed=49)
    check(q.half(), k.half(), queue.half(), everything(40), **PLACE)


@pytest.mark.parametrize(
    "place",
    [
        {"seed": 2**63 - 1, "step": 2**32 + 3, "row_offset": 2**32 - 1},
        {"seed": 1, "step": -1, "row_offset": 2**31 - 1},
    ],
    ids=["large", "wrapping"],
)
@pytest.mark.parametrize("kind", ["mixed", "noisy"])
def test_draws_anywhere(kind: str, place: dict[str, int]) -> None:
    """Another word would be another parent, coefficient or noise."""
    q, k, queue = batch(2, 16, 40, seed=50)
    check(q.float(), k.float(), queue.float(), alone(kind, 40, sigma=0.5), **place)


def test_zeros_in_the_query() -> None:
    """sign(0) = 0, and a number that rounds to 0 has that sign too."""
    q, k, queue = batch(2, 64, 40, seed=51)
    q[:, ::3], q[:, 1::3] = 0, 1e-9
    check(q.float(), k.float(), queue.half(), alone("adversarial", 40, eta=0.3))


def test_runs_are_identical() -> None:
    tensors = [tensor.half().to(DEVICE) for tensor in batch(2, 64, 300, seed=52)]
    first, second = (run(triton_infonce, *tensors, hard=everything(40)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("name", ["q", "k", "queue"])
def test_nan_comes_out(name: str) -> None:
    tensors = {n: x.half().to(DEVICE) for n, x in zip(("q", "k", "queue"), batch(2, 64, 40, seed=53), strict=True)}
    tensors[name][1, 3] = math.nan
    for hard in (HardNegatives.none(), everything(12)):
        assert run(triton_infonce, **tensors, hard=hard)[0].isnan()


# ---------------------------------------------------------------- the op around it


@pytest.mark.parametrize("hard", [HardNegatives.none(), everything(12)], ids=["none", "all"])
def test_through_the_op(hard: HardNegatives) -> None:
    """torch.library's checks, and torch.compile without a break in the graph."""
    q, k, queue = (tensor.float().to(DEVICE) for tensor in batch(2, 64, 40, seed=56))
    place = (torch.tensor(3, device=DEVICE), None, None, *pack(hard), 0.2, 4, 5, "triton")
    torch.library.opcheck(
        torch.ops.synco_fast.infonce.default, (q.requires_grad_(), k, queue, *place), atol=1e-6, rtol=1e-5
    )

    def loss(q: Tensor) -> Tensor:
        return infonce(q, k, queue, hard=hard, backend="triton").loss * 2

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(function(q), q)[0] for function in (loss, compiled)]
    assert torch.equal(*gradients)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queue": torch.zeros(40, 64).double()}, "queue must be float16.*got torch.float64; use eager"),
        ({"queue": torch.zeros(40, 48), "q": torch.zeros(2, 48)}, "queue must have 16, .* columns, got 48"),
        ({"queue": torch.zeros(1, 64).expand(2**20 + 1, 64)}, "queue must have at most 1048576 rows"),
        ({"queue": torch.zeros(4097, 64), "hard": alone("mixed", 4097)}, "n_hard must be at most 4096, got 4097"),
        ({"hard": alone("mixed", 12, 16385)}, "at most 16384 synthetic negatives, got 16385"),
        ({"temperature": 0.019}, "temperature must be at least 0.02, got 0.019"),
    ],
    ids=["float64", "columns", "rows", "n_hard", "synthetic", "temperature"],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], message: str) -> None:
    q, k, queue = (x.float() for x in batch(2, 64, 40, seed=54))
    arguments = {"q": q, "k": k, "queue": queue, "hard": HardNegatives.none(), **changes}
    arguments = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    arguments["k"] = arguments["q"]
    with pytest.raises(ValueError, match=f"backend triton does not take this call: .*{message}"):
        infonce(**arguments, backend="triton")
