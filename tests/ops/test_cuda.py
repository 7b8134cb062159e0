"""The `cuda` and `triton` backends on a GPU.

Of `cuda`, what tests/simt shows of the same sources in the emulator; of both, what an emulator cannot show.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from synco_fast.ops import HardNegatives, backends, compiled, enqueue, infonce, stat_names
from synco_fast.ops.hard import pack
from tests.ops.cases import (
    SETTINGS,
    everything,
    exact_rows,
    grid_rows,
    near,
    rounding_floor,
    run,
    tied_rows,
    with_n_hard,
)
from tests.ops.random_calls import FULL, Case, calls, cases
from tests.simt.infonce import Launch, assert_right

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

every_setting = pytest.mark.parametrize("hard", SETTINGS.values(), ids=SETTINGS.keys())
every_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])
PLACE = {"seed": 2**40 + 5, "step": 7, "row_offset": 11}


def launch(q: Tensor, k: Tensor, queue: Tensor, *, hard: HardNegatives, temperature: float, **place: int) -> Launch:
    """What the kernel returns, on the CPU; the gradient in float32 whatever q is."""
    step = torch.tensor(place["step"], device=DEVICE)
    on_device = [tensor.to(DEVICE) for tensor in (q, k, queue)]
    loss, gradient, *ranks, stats = compiled.infonce(
        *on_device, hard, temperature, place["seed"], step, place["row_offset"]
    )
    named = dict(zip(stat_names(hard), stats.cpu(), strict=True))
    return Launch(loss.cpu(), gradient.cpu(), *(rank.cpu() for rank in ranks), named, {})


def check(q: Tensor, k: Tensor, queue: Tensor, *, exact: bool = False, **arguments: Any) -> Launch:
    arguments = {"temperature": 0.2, **PLACE, **arguments}
    out = launch(q, k, queue, **arguments)
    assert_right(out, q, k, queue, exact=exact, **arguments)
    return out


def grid_batch(batch: int, queue_rows: int, dim: int, seed: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    q = grid_rows(batch, dim, seed)
    return q.float(), near(q, seed + 1).float(), grid_rows(queue_rows, dim, seed + 2).half()


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


@every_backend
def test_the_backend_is_there(backend: str) -> None:
    assert backends()[backend] == "ok"


@every_setting
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("n_hard", [1, 37, 300])
def test_exact_arithmetic(hard: HardNegatives, dim: int, n_hard: int) -> None:
    """Full of ties, at the threshold and with the positive; n_hard = 300 is the whole queue."""
    q, queue, k = exact_rows(6, dim, seed=36), exact_rows(300, dim, seed=37), exact_rows(6, dim, seed=38)
    check(q.float(), k.float(), queue.half(), hard=with_n_hard(hard, n_hard), exact=True)


@settings(max_examples=cases(100), deadline=None, derandomize=not FULL)
@given(case=calls(queue_dtypes=st.just(torch.float16)))
def test_random_calls(case: Case) -> None:
    check(*case.operands(), **case.arguments)


@pytest.mark.parametrize("n_hard", [1, 100, 1700, 3199])
def test_a_collapsed_queue(n_hard: int) -> None:
    q, queue = tied_rows(5, 3200)
    check(q.float(), near(q, 61).float(), queue.half(), hard=everything(n_hard))


@every_backend
@pytest.mark.parametrize(
    ("batch", "queue_rows", "dim", "hard"),
    [
        (256, 65536, 128, HardNegatives.synco()),
        (256, 65536, 128, HardNegatives.none()),
        (4096, 65536, 128, HardNegatives.synco()),  # several passes
        (70, 2**20, 128, HardNegatives.synco()),  # a row of similarities is larger than shared memory
        (33, 2**17, 256, HardNegatives.synco(n_hard=4096)),
    ],
)
def test_large(backend: str, batch: int, queue_rows: int, dim: int, hard: HardNegatives) -> None:
    """Against eager on the GPU, some queries at a time in float64: ranks identical, loss and gradient to rounding."""
    q, k, queue = on_device(*grid_batch(batch, queue_rows, dim))
    out, gradient = run(backend, q, k, queue, hard=hard, step=3)
    loss, loss_floor, gradient_floor = 0.0, *rounding_floor(0.2, batch)
    at_once = 2**24 // queue_rows
    for i in range(0, batch, at_once):
        rows = slice(i, i + at_once)
        operands = q[rows].double(), k[rows].double(), queue.double()
        truth, true_gradient = run("eager", *operands, hard=hard, step=3, row_offset=i)
        share = len(operands[0]) / batch
        loss += truth.loss.item() * share
        assert torch.equal(out.rank[rows], truth.rank)
        assert (out.rank_all[rows] - truth.rank_all).abs().max() <= 1
        # A weight of the queue is rounded to float16 before the second product: half a unit of its 11 bits each, over
        # weights whose shares sum to 1, in a gradient that is 1 / (B t) times their sum; the rest is float32.
        error = (gradient[rows] - true_gradient * share).norm(dim=1).max()
        assert error <= 2.0**-12 / (batch * 0.2) + gradient_floor
    assert abs(out.loss.item() - loss) <= 4 * loss_floor


@pytest.mark.parametrize("hard", [SETTINGS["none"], HardNegatives.synco()], ids=["moco", "synco"])
def test_two_runs_give_the_same_bits_on_any_stream(hard: HardNegatives) -> None:
    operands = on_device(*grid_batch(256, 65536, 128))
    step, other = torch.tensor(5, device=DEVICE), torch.cuda.Stream()
    first = compiled.infonce(*operands, hard, 0.07, 3, step, 0)
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        second = compiled.infonce(*operands, hard, 0.07, 3, step, 0)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_backend
def test_what_lies_around_the_rows_never_leaks(backend: str) -> None:
    """The operands as views into NaN: strided, unaligned, and with rows before and after."""
    tensors, views = on_device(*grid_batch(130, 3000, 64)), []
    for tensor in tensors:
        rows, dim = tensor.shape
        poisoned = torch.full((rows + 7, dim + 9), torch.nan, dtype=tensor.dtype, device=DEVICE)
        poisoned[3 : rows + 3, 5 : dim + 5] = tensor
        views.append(poisoned[3 : rows + 3, 5 : dim + 5])
    plain, poisoned_result = (infonce(*x, hard=everything(40), backend=backend) for x in (tensors, views))
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], poisoned_result[:3], strict=True))


@every_backend
def test_nan_in_the_queue_is_a_nan_loss_and_no_crash(backend: str) -> None:
    q, k, queue = on_device(*grid_batch(5, 3000, 64))
    for rows in (slice(17, 18), slice(None)):
        queue[rows] = torch.nan
        for hard in (HardNegatives.none(), everything(50)):
            assert infonce(q, k, queue, hard=hard, backend=backend).loss.isnan()
    torch.cuda.synchronize()


@every_backend
@pytest.mark.parametrize("hard", [SETTINGS["none"], everything(50)], ids=["none", "all"])
def test_a_captured_graph_reads_step_queue_and_pointer_anew(backend: str, hard: HardNegatives) -> None:
    q, k, queue = on_device(*grid_batch(20, 1000, 64))
    step, pointer = (torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2))
    leaf = q.clone().requires_grad_()

    def training_step() -> tuple[Tensor, ...]:
        out = infonce(leaf, k, queue, hard=hard, step=step, backend=backend)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        enqueue(queue, pointer, k)
        step.add_(1)
        return out.loss.detach(), gradient, out.rank, out.rank_all

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training_step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step()

    start = grid_rows(1000, 64, seed=80).half().to(DEVICE)
    found = []
    for replay in (True, False):
        queue.copy_(start)
        step.fill_(40)
        pointer.fill_(970)  # wraps in the second step
        results = []
        for _ in range(3):
            if replay:
                graph.replay()
            results.append([x.clone() for x in (captured if replay else training_step())])
        found.append([*results, [queue.clone(), step.clone(), pointer.clone()]])
    for a, b in zip(*found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(found[0][0][1], found[0][1][1]), "a step like another"


@every_backend
@pytest.mark.parametrize("hard", [SETTINGS["none"], everything(50)], ids=["none", "all"])
def test_the_host_never_waits(backend: str, hard: HardNegatives) -> None:
    q, k, queue = on_device(*grid_batch(20, 1000, 64))
    step, pointer = (torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2))
    leaf = q.requires_grad_()

    def training_step() -> None:
        infonce(leaf, k, queue, hard=hard, step=step, backend=backend).loss.backward()
        enqueue(queue, pointer, k)

    training_step()  # what is compiled or put into tables once, is now
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_backend
@pytest.mark.parametrize("name", ["none", "all", "no gradient"])
def test_opcheck(backend: str, name: str) -> None:
    q, k, queue = on_device(*grid_batch(5, 300, 64))
    hard = HardNegatives.none() if name == "none" else everything()
    step = torch.tensor(3, device=DEVICE)
    arguments = (q.requires_grad_(name != "no gradient"), k, queue, step, None, None, *pack(hard), 0.2, 4, 5, backend)
    torch.library.opcheck(torch.ops.synco_fast.infonce.default, arguments, atol=1e-6, rtol=1e-5)


@every_backend
@pytest.mark.parametrize("hard", [SETTINGS["none"], everything(50)], ids=["none", "all"])
def test_compiles_to_the_same_answer(backend: str, hard: HardNegatives) -> None:
    q, k, queue = on_device(*grid_batch(20, 1000, 64))

    def loss(q: Tensor) -> Tensor:
        return infonce(q, k, queue, hard=hard, backend=backend).loss * 2

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = q.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
