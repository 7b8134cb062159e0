"""The public op: `infonce`, `synthesize`, `enqueue`, and the table of backends.

`infonce` is a functional `torch.library` op with a fake implementation and autograd: its forward returns the finished
gradient, and its backward is one multiply. The `reference` backend alone stays outside, as ordinary autograd.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from synco_fast.ops import checks, compiled, eager, reference, triton_infonce
from synco_fast.ops.dispatch import choose
from synco_fast.ops.hard import HardNegatives, pack, unpack
from synco_fast.ops.numbers import compute_dtype, round_to
from synco_fast.ops.result import InfoNCE, SyntheticSet, stat_names


def infonce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    hard: HardNegatives,
    temperature: float = 0.2,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int = 0,
    backend: str = "auto",
    labels: Tensor | None = None,
    queue_labels: Tensor | None = None,
) -> InfoNCE:
    """InfoNCE over the positive, the queue and synthetic hard negatives (SynCo, arXiv 2410.02401, section 3).

    Draws are a function of (seed, step, row_offset + row) alone: the same on every backend, rank and resume. First
    derivatives only: but for `reference`, the gradient is finished in the forward pass and is a constant to autograd.

    Args:
        q: (B, D) queries, unit rows, float16, bfloat16, float32 or float64. Rounded once to the queue's dtype.
        k: (B, D) keys of the same images, unit rows; no gradient flows to them.
        queue: (K, D) past keys, unit rows, float16 (the usual one), bfloat16, float32 or float64.
        hard: which synthetic negatives; `HardNegatives.none()` is MoCo.
        temperature: t > 0.
        seed: key of the draws, 0 <= seed < 2^63.
        step: training step, an int or an int64 scalar tensor on q's device (CUDA graphs).
        row_offset: row of q[0] in the global batch.
        backend: "auto" or a name in `backends()`. A named backend works or raises.
        labels, queue_labels: (B,) and (K,) int64 classes: MoCHi's class oracle. Negatives of the query's class leave
            hard set, loss and rank.

    Returns:
        InfoNCE: loss, rank, rank_all and stats.

    Raises:
        TypeError, ValueError: a tensor's shape, dtype or device, or an argument, is not as stated; n_hard > K.
        RuntimeError: the named backend cannot be used here.
    """
    checks.tensors(q, k, queue, hard, labels, queue_labels)
    checks.arguments(temperature, seed, row_offset)
    temperature, step = float(temperature), checks.step_tensor(step, q)
    name = choose(backend, queue, hard, temperature, labels)
    if name == "reference":
        with torch.autocast(q.device.type, enabled=False):
            loss, rank, rank_all, stats = reference.infonce(
                q, k.detach(), queue, hard, temperature, seed, step, row_offset, _same_class(labels, queue_labels)
            )
    else:
        loss, _, rank, rank_all, stats = _infonce(
            q, k.detach(), queue, step, labels, queue_labels, *pack(hard), temperature, seed, row_offset, name
        )
    return InfoNCE(loss, rank, rank_all, dict(zip(stat_names(hard), stats.detach().unbind(), strict=True)))


def synthesize(
    q: Tensor,
    queue: Tensor,
    *,
    hard: HardNegatives,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int = 0,
) -> dict[str, SyntheticSet]:
    """The synthetic negatives themselves, by kind, materialised: to look at, not to train with.

    Arguments as in `infonce`. Returns the kinds in use, each with vectors (B, S, D), logits, parents, coefficients.
    """
    checks.tensors(q, q, queue, hard, None, None)
    checks.arguments(1.0, seed, row_offset)
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        negatives = queue.to(compute_dtype(queue))
        return reference.synthesize(
            round_to(q.detach(), queue), negatives, hard, seed, checks.step_tensor(step, q), row_offset
        )


def enqueue(queue: Tensor, pointer: Tensor, k: Tensor) -> None:
    """Write the keys over the oldest rows of the queue, in place, and move the pointer; both wrap.

    Args:
        queue: (K, D).
        pointer: int64 scalar tensor on the queue's device: the row that k[0] goes to. Never read by the host.
        k: (B, D), B <= K, on the queue's device; rounded to the queue's dtype.
    """
    checks.enqueue(queue, pointer, k)
    _enqueue(queue, pointer, k.detach())


@torch.library.custom_op("synco_fast::enqueue", mutates_args=("queue", "pointer"))
def _enqueue(queue: Tensor, pointer: Tensor, k: Tensor) -> None:
    rows = (pointer + torch.arange(len(k), device=k.device)) % len(queue)
    queue.index_copy_(0, rows, k.to(queue.dtype))
    pointer.add_(len(k)).remainder_(len(queue))


@torch.library.custom_op("synco_fast::infonce", mutates_args=())
def _infonce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    step: Tensor,
    labels: Tensor | None,
    queue_labels: Tensor | None,
    counts: Sequence[int],
    strengths: Sequence[float],
    extrapolate_from: str,
    temperature: float,
    seed: int,
    row_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hard = unpack(counts, strengths, extrapolate_from)
    with torch.autocast(q.device.type, enabled=False):
        if backend in ("cpu", "cuda"):
            return compiled.infonce(q, k, queue, hard, temperature, seed, step, row_offset)
        if backend == "triton":
            return triton_infonce.infonce(q, k, queue, hard, temperature, seed, step, row_offset)
        return eager.infonce(q, k, queue, hard, temperature, seed, step, row_offset, _same_class(labels, queue_labels))


@_infonce.register_fake
def _(q, k, queue, step, labels, queue_labels, counts, strengths, extrapolate_from, *rest):  # type: ignore[no-untyped-def]
    hard = unpack(counts, strengths, extrapolate_from)
    wide = compute_dtype(queue)
    rank = q.new_empty(q.shape[0], dtype=torch.int64)
    stats = q.new_empty(len(stat_names(hard)), dtype=torch.float32)
    return q.new_empty((), dtype=wide), q.new_empty(q.shape, dtype=wide), rank, torch.empty_like(rank), stats


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    (grad,) = ctx.saved_tensors
    return ((grad_loss * grad).to(ctx.dtype), *[None] * 12)


_infonce.register_autograd(_backward, setup_context=_setup_context)


def _same_class(labels: Tensor | None, queue_labels: Tensor | None) -> Tensor | None:
    if labels is None or queue_labels is None:
        return None
    return labels[:, None] == queue_labels[None, :]
