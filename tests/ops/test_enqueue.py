"""The queue: oldest rows overwritten in order, wrapping, in place, with the pointer on the device."""

import pytest
import torch

from synco_fast.ops import enqueue
from tests.ops.cases import unit_rows


@pytest.mark.parametrize(
    ("rows", "sizes"), [(10, [4] * 7), (8, [4] * 5), (7, [7, 7]), (9, [1, 8, 9, 2, 5]), (3, [0, 1])]
)
@pytest.mark.parametrize("start", [0, 2])
def test_against_a_list(rows: int, sizes: list[int], start: int) -> None:
    queue, pointer = unit_rows(rows, 3, seed=0), torch.tensor(start)
    expected, place = queue.tolist(), start
    where = queue.data_ptr(), pointer.data_ptr()
    for number, size in enumerate(sizes):
        k = unit_rows(size, 3, seed=number + 1)
        enqueue(queue, pointer, k)
        for row in k.tolist():
            expected[place] = row
            place = (place + 1) % rows
        assert queue.tolist() == expected
        assert pointer.dtype == torch.int64 and pointer.shape == () and pointer.item() == place
    assert (queue.data_ptr(), pointer.data_ptr()) == where, "in place"


@pytest.mark.parametrize("start", [0, 1, 5])
def test_as_many_keys_as_rows(start: int) -> None:
    queue, pointer, k = torch.zeros(6, 4), torch.tensor(start), unit_rows(6, 4, seed=0).float()
    enqueue(queue, pointer, k)
    assert torch.equal(queue, k.roll(start, dims=0)) and pointer.item() == start


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("keys", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keys_are_rounded_to_the_dtype_of_the_queue(dtype: torch.dtype, keys: torch.dtype) -> None:
    queue, k = torch.zeros(5, 8, dtype=dtype), unit_rows(3, 8, seed=0).to(keys)
    enqueue(queue, torch.tensor(4), k)
    assert queue.dtype == dtype
    assert torch.equal(queue[[4, 0, 1]], k.to(dtype)) and not queue[2:4].any()


def test_keys_are_left_alone_and_no_gradient_is_kept() -> None:
    queue, pointer, k = torch.zeros(5, 3), torch.tensor(0), unit_rows(2, 3, seed=0).float().requires_grad_()
    before = k.detach().clone()
    enqueue(queue, pointer, k)
    assert not queue.requires_grad and torch.equal(k, before)
    k.detach().zero_()
    assert torch.equal(queue[:2], before), "a copy"


def test_a_pointer_of_one_element() -> None:
    queue, pointer, k = torch.zeros(3, 2), torch.tensor([2]), unit_rows(2, 2, seed=0).float()
    enqueue(queue, pointer, k)
    assert pointer.tolist() == [1] and torch.equal(queue[[2, 0]], k)


def test_nothing_is_read_by_the_host() -> None:
    """A value read on the host would stall the device at every step, and cannot be captured in a CUDA graph."""
    queue, pointer, k = torch.zeros(5, 3), torch.tensor(3), torch.ones(4, 3)
    with torch.profiler.profile() as profile:
        enqueue(queue, pointer, k)
    called = {event.name for event in profile.events()}
    assert "aten::index_copy_" in called
    assert not called & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"}


def test_more_keys_than_rows_are_refused() -> None:
    queue, pointer = torch.zeros(3, 2), torch.tensor(1)
    with pytest.raises(ValueError, match=r"^k must have at most the queue's 3 rows, got 4"):
        enqueue(queue, pointer, torch.ones(4, 2))
    assert not queue.any() and pointer.item() == 1, "refused before anything is written"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", {"k": torch.ones(2, 3)}),
        ("k", {"k": torch.ones(2)}),
        ("k", {"queue": torch.ones(2, 2, 2)}),
        ("k", {"k": torch.ones(2, 2, device="meta")}),
        ("pointer", {"pointer": torch.tensor(0, dtype=torch.int32)}),
        ("pointer", {"pointer": torch.tensor(0.0)}),
        ("pointer", {"pointer": torch.tensor([0, 1])}),
        ("pointer", {"pointer": torch.tensor(0, device="meta")}),
        ("queue", {"queue": torch.zeros(4, 2, dtype=torch.int64)}),
        ("k", {"k": torch.ones(2, 2, dtype=torch.int64)}),
        ("pointer", {"pointer": torch.tensor([[0]])}),
    ],
    ids=[
        *("columns", "1-d keys", "3-d queue", "device of the keys"),
        *("int32 pointer", "float pointer", "two pointers", "device of the pointer"),
        *("integer queue", "integer keys", "2-d pointer"),
    ],
)
def test_a_wrong_argument_is_named(name: str, change: dict[str, torch.Tensor]) -> None:
    arguments = {"queue": torch.zeros(4, 2), "pointer": torch.tensor(0), "k": torch.ones(2, 2)} | change
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must "):
        enqueue(**arguments)
