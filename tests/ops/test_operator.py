"""The op as torch.library sees it: opcheck, fake shapes, torch.compile, autocast, and no read-back by the host."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from synco_fast.ops import HardNegatives, infonce, synthesize
from synco_fast.ops.hard import pack
from tests.ops.cases import BACKENDS, SETTINGS, alone, batch, everything, run

both = pytest.mark.parametrize("backend", BACKENDS)


def operator_arguments(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    hard: HardNegatives,
    labels: Tensor | None = None,
    queue_labels: Tensor | None = None,
    backend: str = "eager",
) -> tuple[Any, ...]:
    return (q, k, queue, torch.tensor(3), labels, queue_labels, *pack(hard), 0.2, 2**40, 5, backend)


@pytest.mark.parametrize(
    ("backend", "name"),
    [("eager", "class oracle")]
    + [
        (backend, name)
        for backend in ("eager", "cpu")
        for name in ("none", "all", "float16 queue", "no gradient", "columns first")
    ],
)
def test_opcheck_infonce(backend: str, name: str) -> None:
    q, k, queue = (x.float() for x in batch(seed=60))
    hard = HardNegatives.none() if name == "none" else everything()
    labels = (torch.arange(5), torch.arange(40) % 5) if name == "class oracle" else (None, None)
    arguments = operator_arguments(
        q.requires_grad_(name != "no gradient"),
        k.T.contiguous().T if name == "columns first" else k,
        queue.half() if name == "float16 queue" else queue,
        hard,
        *labels,
        backend,
    )
    torch.library.opcheck(torch.ops.synco_fast.infonce.default, arguments, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_opcheck_enqueue(dtype: torch.dtype) -> None:
    arguments = (torch.zeros(7, 3, dtype=dtype), torch.tensor(5), torch.ones(4, 3))
    torch.library.opcheck(torch.ops.synco_fast.enqueue.default, arguments)


@pytest.mark.parametrize("queue_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("hard", [SETTINGS["none"], everything()], ids=["none", "all"])
def test_fake_outputs_are_like_the_real_ones(
    hard: HardNegatives, q_dtype: torch.dtype, queue_dtype: torch.dtype
) -> None:
    q, k, queue = batch(seed=61)
    arguments = operator_arguments(q.to(q_dtype), k, queue.to(queue_dtype), hard)
    on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    real, fake = (torch.ops.synco_fast.infonce(*a) for a in (arguments, on_meta))
    assert [(x.shape, x.dtype) for x in real] == [(x.shape, x.dtype) for x in fake]


def loss_of(q: Tensor, k: Tensor, queue: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A function around the op, as a training step has one."""
    out = infonce(torch.nn.functional.normalize(q, dim=1), k, queue, hard=everything(), step=step, seed=7)
    return 2 * out.loss, out.rank, out.stats["synthetic_share"]


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("as_tensor", [False, True])
def test_compiled_is_the_same(as_tensor: bool) -> None:
    """Without inductor, which takes 20 to 30 s here to compile what surrounds the op, and nothing inside it."""
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for step in (0, 1, 9):
        q, k, queue = (x.float() for x in batch(seed=62 + step))
        at = torch.tensor(step) if as_tensor else step
        found = []
        for function in (loss_of, compiled):
            leaf = q.clone().requires_grad_()
            loss, rank, share = function(leaf, k, queue, at)
            loss.backward()
            found.append((loss.detach(), rank, share, leaf.grad))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_inductor_is_the_same(backend: str) -> None:
    """What torch.compile uses by itself; a key whose columns come first, as a view may have them."""
    q, k, queue = (x.float() for x in batch(seed=63))

    def loss(q: Tensor) -> Tensor:
        return 2 * infonce(q, k.T.contiguous().T, queue, hard=everything(), backend=backend).loss

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = q.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_once_for_every_step_and_batch_size() -> None:
    """The fake implementation keeps the batch size symbolic; a step in a tensor is data."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for rows in (4, 5, 6, 9):
        q, k, queue = (x.float() for x in batch(rows, seed=63))
        loss, rank, _ = compiled(q.requires_grad_(), k, queue, torch.tensor(rows))
        loss.backward()
        assert rank.shape == (rows,)
        assert torch.equal(loss, loss_of(q, k, queue, rows)[0])
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 4


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_inside_is_downcast_under_autocast(backend: str, dtype: torch.dtype) -> None:
    q, k, queue = batch(seed=64)
    q, k, queue = q.float(), k.float(), queue.to(dtype)
    outside, gradient = run(backend, q, k, queue, hard=everything())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (q @ q.T).dtype == torch.bfloat16, "autocast is on"
        leaf = q.clone().requires_grad_()
        inside = infonce(leaf, k, queue, hard=everything(), backend=backend)
        sets_inside = synthesize(q, queue, hard=everything())
    (gradient_inside,) = torch.autograd.grad(inside.loss, leaf)
    assert inside.loss.dtype == torch.float32
    assert torch.equal(inside.loss, outside.loss) and torch.equal(gradient_inside, gradient)
    assert torch.equal(inside.rank_all, outside.rank_all)
    for name, value in outside.stats.items():
        assert torch.equal(inside.stats[name], value), name
    for kind, made in synthesize(q, queue, hard=everything()).items():
        assert torch.equal(sets_inside[kind].vectors, made.vectors)
        assert torch.equal(sets_inside[kind].logits, made.logits)


@pytest.mark.parametrize("classes", [False, True])
def test_nothing_is_read_by_the_host(classes: bool) -> None:
    """By `eager`, which a GPU may run: a value read on the host would stall the device at every step."""
    q, k, queue = (x.float() for x in batch(seed=65))
    labels = {"labels": torch.arange(5), "queue_labels": torch.arange(40) % 5} if classes else {}
    with torch.profiler.profile() as profile:
        out = infonce(q.requires_grad_(), k, queue, hard=everything(), step=torch.tensor(1), backend="eager", **labels)
        out.loss.backward()
    called = {event.name for event in profile.events()}
    assert "aten::topk" in called
    assert not called & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


def test_forward_materialises_no_vectors_of_the_two_term_kinds() -> None:
    """Closed forms: with one of these kinds alone, nothing of B x S x D elements is made."""
    q, k, queue = (x.float() for x in batch(4, 32, 64, seed=66))
    for kind in ("interpolated", "extrapolated", "perturbed"):
        with torch.profiler.profile(record_shapes=True) as profile:
            infonce(q, k, queue, hard=alone(kind, n_hard=16, count=50), backend="eager")
        shapes = [shape for event in profile.events() for shape in event.input_shapes]
        assert [4, 50] in shapes and [4, 50, 32] not in shapes
