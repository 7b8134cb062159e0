"""Philox4x32-10: random words as a pure function of (seed, counter).

There is no generator state, so the same draws come out on every backend, on any number of ranks, inside a
CUDA graph and after a resume. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

Words are 32-bit unsigned values held in int64 tensors. An int64 product wraps modulo 2^64, which leaves its
bits right, so masking after an arithmetic shift gives the exact high word.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(seed: int, *counter: Tensor | int, device: torch.device | None = None) -> Words:
    """Four random 32-bit words for each counter.

    Args:
        seed: 64-bit key.
        counter: four counter words, each an int or an int64 tensor; they broadcast. Only the low 32 bits count.
        device: where the words are made; by default where the tensors among the counter words are.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    if len(counter) != 4:
        raise ValueError(f"philox takes 4 counter words, got {len(counter)}")
    if device is None:
        device = next((c.device for c in counter if isinstance(c, Tensor)), torch.device("cpu"))
    words = torch.broadcast_tensors(*(_word(c, device) for c in counter))
    # In place on four buffers and a spare one: a fresh allocation for each of a round's steps costs more than the
    # step. The multiplied words need clean high bits; the others are only xor-ed, and masked when their turn comes.
    c0, c1, c2, c3 = (word.clone(memory_format=torch.contiguous_format) for word in words)
    spare = torch.empty_like(c0)
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        product0, product1 = c0.mul_(_MULTIPLIERS[0]), c2.mul_(_MULTIPLIERS[1])
        next0 = c1.bitwise_xor_(key0).bitwise_xor_(_high_word(product1, spare)).bitwise_and_(_MASK)
        next2 = c3.bitwise_xor_(key1).bitwise_xor_(_high_word(product0, spare)).bitwise_and_(_MASK)
        c0, c1, c2, c3 = next0, product1, next2, product0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def _word(value: Tensor | int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=torch.int64) & _MASK
    # Filled on the device: a copy of a host's number would make the host wait.
    return torch.full((), value & _MASK, dtype=torch.int64, device=device)


def _high_word(product: Tensor, out: Tensor) -> Tensor:
    return torch.bitwise_right_shift(product, 32, out=out)


def uniform(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Words to floats in [0, 1) with 24 random bits, exact in float32."""
    return (words >> 8).to(dtype) * 2.0**-24


def integers(words: Tensor, n: Tensor | int) -> Tensor:
    """Words to integers in [0, n) by multiply-shift, n < 2^31."""
    return (words * n) >> 32


def normals(words: Words, dtype: torch.dtype = torch.float32) -> Tensor:
    """Box-Muller: four words of shape (...) to four standard normals, shape (..., 4).

    The radius takes its uniform from (0, 1], so that the logarithm is finite: |z| <= 5.77.
    """
    w0, w1, w2, w3 = words
    pairs = []
    for radius_word, angle_word in ((w0, w1), (w2, w3)):
        radius = torch.sqrt(-2.0 * torch.log(uniform(radius_word, dtype) + 2.0**-24))
        angle = (2.0 * torch.pi) * uniform(angle_word, dtype)
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1)
