"""Philox: known answers, an independent implementation in Python's integers, and what is made of the words."""

import random

import pytest
import torch

from synco_fast.ops.philox import integers, normals, philox, uniform
from tests.ops import oracle

ONES = 2**32 - 1


# Published with the generator (Random123, kat_vectors): counter, key words, answer.
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, int, int, int]) -> None:
    seed = key[0] | key[1] << 32
    assert tuple(int(word) for word in philox(seed, *counter)) == answer
    assert tuple(int(word) for word in philox(seed, *(torch.tensor([c]) for c in counter))) == answer
    assert oracle.philox(seed, counter) == answer


def test_agrees_with_python_integers() -> None:
    rng = random.Random(0)
    extremes = [0, 1, 2**31 - 1, 2**31, ONES]
    counters = [
        [rng.choice(extremes) if rng.random() < 0.2 else rng.randrange(2**32) for _ in range(4)] for _ in range(300)
    ]
    for seed in (0, 1, ONES, 2**32, 2**63 - 1, rng.randrange(2**63)):
        words = philox(seed, *torch.tensor(counters).unbind(1))
        assert torch.stack(words, dim=1).tolist() == [list(oracle.philox(seed, c)) for c in counters]


def test_counter_words_broadcast() -> None:
    rows, samples = torch.arange(3)[:, None], torch.arange(4)
    words = philox(7, rows, samples, 2, torch.tensor(9))
    assert [word.shape for word in words] == [(3, 4)] * 4
    for row in range(3):
        for sample in range(4):
            assert tuple(int(w[row, sample]) for w in words) == oracle.philox(7, (row, sample, 2, 9))


def test_only_the_low_32_bits_of_a_counter_word_count() -> None:
    assert [w.item() for w in philox(3, -1, 2**32 + 5, torch.tensor(-2), 2**40)] == list(
        oracle.philox(3, (ONES, 5, ONES - 1, 0))
    )


def test_counter_inputs_are_left_alone() -> None:
    """The rounds work in place: on copies, also where a counter word needs neither broadcasting nor masking."""
    counter = [torch.arange(5) + 10 * i for i in range(4)]
    before = [word.clone() for word in counter]
    first = philox(1, *counter)
    assert all(torch.equal(a, b) for a, b in zip(counter, before, strict=True))
    shared = torch.arange(5)
    assert all(torch.equal(a, b) for a, b in zip(philox(1, *counter), first, strict=True))
    philox(1, shared, shared, shared, shared)
    assert torch.equal(shared, torch.arange(5))


def test_the_four_words_do_not_share_memory() -> None:
    words = philox(1, torch.arange(5), 0, 0, 0)
    assert len({word.data_ptr() for word in words}) == 4


@pytest.mark.parametrize("counter", [(), (1, 2, 3), (1, 2, 3, 4, 5)])
def test_four_counter_words_or_none(counter: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"4 counter words, got {len(counter)}"):
        philox(0, *counter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_exact_and_below_one(dtype: torch.dtype) -> None:
    words = torch.tensor([0, 255, 256, 2**31, ONES])
    assert uniform(words, dtype).tolist() == [0.0, 0.0, 2.0**-24, 0.5, 1 - 2.0**-24]


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 1024, 65536, 2**31 - 1])
def test_integers_cover_their_range(n: int) -> None:
    words = [0, 1, 2**31, ONES - 1, ONES, *random.Random(n).sample(range(2**32), 200)]
    drawn = integers(torch.tensor(words), n).tolist()
    assert drawn == [word * n // 2**32 for word in words]
    assert min(drawn) == 0 and max(drawn) == n - 1


def test_integers_take_a_range_for_each_row() -> None:
    words = torch.tensor([[ONES, 2**31], [ONES, 2**31]])
    assert integers(words, torch.tensor([[10], [4]])).tolist() == [[9, 5], [3, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_are_finite_at_the_extremes(dtype: torch.dtype) -> None:
    words = torch.tensor([[a, b, c, d] for a in (0, ONES) for b in (0, ONES) for c in (0, ONES) for d in (0, ONES)])
    drawn = normals(tuple(words.unbind(1)), dtype)
    assert drawn.shape == (16, 4) and drawn.dtype == dtype
    assert drawn.abs().max().item() == pytest.approx((2 * 24 * 0.6931471805599453) ** 0.5, rel=1e-6)
    assert drawn[torch.tensor([w == ONES for w in words[:, 0].tolist()]), :2].abs().max() == 0
