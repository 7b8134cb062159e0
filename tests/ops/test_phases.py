"""The clocks inside the compiled op: they change nothing, leave nothing out, and tell phases apart."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from synco_fast.ops import KINDS, HardNegatives, InfoNCE, backends, infonce
from synco_fast.ops.phases import PHASES, record
from tests.ops.cases import alone, batch, run

CPU = torch.device("cpu")
MATRIX = ("similarity", "weights", "gradient")
SELECTED = ("selection", "draws", "parents")

needs_gpu = pytest.mark.skipif(backends()["cuda"] != "ok", reason=f"cuda: {backends()['cuda']}")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def operands(dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    """Milliseconds of work, on more than one row tile and split."""
    q, k, queue = (x.float() for x in batch(200, 64, 6000, seed=70))
    return q, k, queue.to(dtype)


def ticks(hard: HardNegatives, calls: int = 1) -> dict[str, int]:
    """Nanoseconds of each phase."""
    with record(CPU) as clock:
        for _ in range(calls):
            infonce(*operands(), hard=hard, backend="cpu")
    return dict(zip(PHASES, clock._ticks.sum(0).tolist(), strict=True))


def assert_identical(one: tuple[InfoNCE, Tensor], other: tuple[InfoNCE, Tensor]) -> None:
    (out, gradient), (other_out, other_gradient) = one, other
    assert torch.equal(gradient, other_gradient)
    assert all(torch.equal(getattr(out, name), getattr(other_out, name)) for name in ("loss", "rank", "rank_all"))
    assert out.stats == other_out.stats


def test_phases_are_those_of_the_header() -> None:
    header = (Path(__file__).parents[2] / "kernels/include/synco/phases.h").read_text()
    names = re.findall(r"^  k(\w+)", header[header.index("enum Phase") :], re.MULTILINE)
    place = names.index("Syntheses")
    assert (
        *(name.lower() for name in names[:place]),
        *KINDS,
        *(name.lower() for name in names[place + 1 : -1]),
    ) == PHASES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hard", [HardNegatives.none(), HardNegatives.synco()], ids=["moco", "synco"])
def test_clocks_change_no_bit(threads: int, hard: HardNegatives, dtype: torch.dtype) -> None:
    arguments = {"hard": hard, "temperature": 0.07, "seed": 3, "step": 4}
    without = run("cpu", *operands(dtype), **arguments)
    with record(CPU) as clock:
        clocked = run("cpu", *operands(dtype), **arguments)
    assert sum(clock.shares().values()) == pytest.approx(1)
    assert_identical(clocked, without)


def test_phases_that_must_be_are_there_and_no_others(threads: int) -> None:
    needed = {*MATRIX, "finish", "waiting"}
    settings = {(): HardNegatives.none(), KINDS: HardNegatives.synco(), **{(kind,): alone(kind) for kind in KINDS}}
    for kinds, hard in settings.items():
        found = {name for name, time in ticks(hard).items() if time}
        assert found == needed | {*(SELECTED if kinds else ()), *kinds}


@pytest.mark.parametrize("hard", [HardNegatives.none(), HardNegatives.synco()], ids=["moco", "synco"])
def test_nothing_is_left_out(threads: int, hard: HardNegatives) -> None:
    """All threads are on some phase from the call's begin to its end, which Python sees a little longer.

    A call takes some 10 ms, of which Python's part is well under 1. What else the machine does may fall into that: the
    best of several calls has 15 % for it.
    """
    arguments = operands()
    seen, waiting = [], []
    for _ in range(10):
        with record(CPU) as clock:
            begin = time.perf_counter_ns()
            infonce(*arguments, hard=hard, backend="cpu")
            passed = threads * (time.perf_counter_ns() - begin)
        seen.append(clock._ticks.sum().item() / passed)
        waiting.append(clock.shares()["waiting"])
    assert 0.85 <= max(seen) <= 1
    assert threads > 1 or min(waiting) < 0.02  # a single thread has always a task left


def test_four_times_the_work_takes_its_phase_longer() -> None:
    """At least twice. The least of several calls, as what else the machine does only adds to it."""
    few, many = (alone("mixed", n_hard=512, count=count) for count in (256, 1024))
    least = [min(ticks(hard)["mixed"] for _ in range(20)) for hard in (few, many)]
    assert 2 * least[0] < least[1]


def test_only_calls_inside_count() -> None:
    with record(CPU) as clock:
        infonce(*operands(), hard=HardNegatives.none(), backend="eager")
    with pytest.raises(RuntimeError, match="nothing called infonce's cpu backend"):
        clock.shares()
    infonce(*operands(), hard=HardNegatives.none(), backend="cpu")
    assert not clock._ticks.any()


def test_a_compiled_function_is_recorded_too() -> None:
    arguments = operands()
    compiled = torch.compile(
        lambda q: infonce(q, *arguments[1:], hard=alone("noisy"), backend="cpu").loss, backend="eager"
    )
    with record(CPU) as clock:
        compiled(arguments[0])
    assert clock.shares()["noisy"] > 0


def test_one_at_a_time_and_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), record(CPU):
        with pytest.raises(RuntimeError, match="one record"), record(CPU):
            pass
        raise ZeroDivisionError
    assert sum(ticks(HardNegatives.none()).values())


def test_what_has_no_clocks_is_refused() -> None:
    with pytest.raises(ValueError, match="got meta"), record(torch.device("meta")):
        pass
    if backends()["cuda"] != "ok":
        with pytest.raises(RuntimeError, match=re.escape(backends()["cuda"])), record(torch.device("cuda")):
            pass


@needs_gpu
@pytest.mark.parametrize("hard", [HardNegatives.none(), HardNegatives.synco()], ids=["moco", "synco"])
def test_cuda_clocks_change_no_bit(hard: HardNegatives) -> None:
    arguments = {"hard": hard, "temperature": 0.07, "seed": 3, "step": 4}
    on_gpu = [x.cuda() for x in operands()]
    without = run("cuda", *on_gpu, **arguments)
    with record(torch.device("cuda")) as clock:
        clocked = run("cuda", *on_gpu, **arguments)
    assert_identical(clocked, without)
    found = {name for name, share in clock.shares().items() if share}
    assert found == {*MATRIX, "finish", "waiting"} | ({"selection", "draws", *KINDS} if hard.total else set())
    assert (clock._ticks >= 0).all()


@needs_gpu
def test_a_cuda_graph_is_not_recorded() -> None:
    on_gpu = [x.cuda() for x in operands()]
    arguments = {"hard": HardNegatives.none(), "step": torch.tensor(0, device="cuda"), "backend": "cuda"}
    infonce(*on_gpu, **arguments)
    refused = pytest.raises(RuntimeError, match="outside of record")
    with record(torch.device("cuda")), refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        infonce(*on_gpu, **arguments)
