# mypy: allow-untyped-defs, allow-incomplete-defs
"""Philox4x32-10 and the numbers drawn from it, inside a Triton kernel: the words of philox.py, bit for bit."""

import triton
import triton.language as tl

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)
_MASK = tl.constexpr(0xFFFFFFFF)
_UNIT = tl.constexpr(2.0**-24)
_TURN = tl.constexpr(6.283185307179586)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four random words for each counter.

    Args:
        seed: int64 scalar, the key.
        c0, c1, c2, c3: the counter's uint32 words; they broadcast.

    Returns:
        Four uint32 tensors of the broadcast shape.
    """
    # The key's words are kept wide and masked, so that no 32-bit sum overflows where overflow is checked.
    key0, key1 = seed.to(tl.uint64) & _MASK, seed.to(tl.uint64) >> 32
    for _ in tl.static_range(10):
        product0, product1 = c0.to(tl.uint64) * _MULTIPLIER_0, c2.to(tl.uint64) * _MULTIPLIER_1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0.to(tl.uint32)
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        key0, key1 = (key0 + _WEYL_0) & _MASK, (key1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


@triton.jit
def uniform(words):
    """uint32 words to float32 in [0, 1) with 24 random bits."""
    return (words >> 8).to(tl.float32) * _UNIT


@triton.jit
def integers(words, n):
    """uint32 words to int32 in [0, n) by multiply-shift, n < 2^31."""
    return ((words.to(tl.uint64) * n) >> 32).to(tl.int32)


@triton.jit
def draw(seed, c0, c1, c2, c3, n_hard, low, width):
    """Block 0 of draws.py, bit for bit: two positions in the hard set, and a coefficient in [low, low + width).

    Args:
        seed, c0, c1, c2, c3: as in philox().
        n_hard: size of the hard set.
        low, width: float32 scalars.

    Returns:
        (first, second, coefficient): int32, int32 and float32 tensors of the words' shape.
    """
    word0, word1, word2, _ = philox(seed, c0, c1, c2, c3)
    # The product is rounded before it is added, as in PyTorch. Written as a product, it would be fused into the sum on
    # a GPU, also where the sum is made in float64: LLVM makes a float32 sum of that. An fma cannot be fused once more.
    part = tl.fma(width, uniform(word2), 0.0)
    return integers(word0, n_hard), integers(word1, n_hard), low + part


@triton.jit
def _normal_pair(radius_word, angle_word):
    radius = tl.sqrt(-2.0 * tl.log(uniform(radius_word) + _UNIT))
    angle = _TURN * uniform(angle_word)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normals(w0, w1, w2, w3):
    """Box-Muller: four (S, N) tensors of words to (S, 4 N) standard normals, those of one counter side by side."""
    z0, z1 = _normal_pair(w0, w1)
    z2, z3 = _normal_pair(w2, w3)
    # join() adds a last dimension of two: (z0, z2) and (z1, z3) become ((z0, z1), (z2, z3)), which is z0, z1, z2, z3.
    blocks = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    return tl.reshape(blocks, (w0.shape[0], 4 * w0.shape[1]))
