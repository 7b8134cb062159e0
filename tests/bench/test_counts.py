"""What bench/contenders.py and bench/published.py count beside each contender is what the contender does."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import contenders
from bench.case import Case, inputs
from synco_fast.ops import HardNegatives, eager, triton_infonce
from tests.conftest import REPOSITORY

NONE, SYNCO, MOCHI = HardNegatives.none(), HardNegatives.synco(), HardNegatives.mochi()


def case(contender: str, hard: HardNegatives, dtype: str = "float16", **sizes: int) -> Case:
    return Case(contender, "", sizes.get("batch", 256), sizes.get("queue", 65536), 128, hard, 0.2, dtype, "cpu")


def counted(contender: str, hard: HardNegatives, dtype: str = "float16", **sizes: int) -> tuple[int, int]:
    """Operations, and bytes but for q, k and the gradient."""
    made = case(contender, hard, dtype, **sizes)
    counts = contenders.CONTENDERS[contender]
    return counts.flops(made), counts.bytes(made) - 3 * 4 * made.batch * made.dim


class Traffic(TorchDispatchMode):
    """Bytes that operations of PyTorch read and write: each its inputs once and its results once."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        if view or name.startswith(("empty", "new_empty")):
            return out
        read = tensors((args, {key: value for key, value in kwargs.items() if key != "out"}))
        written = tensors(out)
        if name in ("gather", "index"):  # of the first input, as much as is taken
            read[0] = written[0]
        elif name == "scatter_add_":
            read[0] = written[0] = read[-1]
        elif name.startswith("nll_loss"):  # one logit of each row
            read = []
        self.bytes += sum(map(size, [*read, *written]))
        return out


def tensors(tree: Any) -> list[Tensor]:
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def size(tensor: Tensor) -> int:
    """Bytes of what is stored: an expanded dimension is one long."""
    lengths = [length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return tensor.element_size() * torch.Size(lengths).numel()


def seen(run: Callable[[], Any]) -> int:
    with Traffic() as traffic:
        run()
    return traffic.bytes


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize(
    "hard", (NONE, replace(NONE, n_hard=64, interpolated=1), SYNCO, MOCHI), ids=("none", "selection", "synco", "mochi")
)
def test_eager_moves_what_is_counted(hard: HardNegatives, dtype: str) -> None:
    made = case("eager", hard, dtype, batch=64, queue=8192)
    q, k, queue = inputs(made)
    with torch.no_grad():
        moved = seen(lambda: eager.infonce(q, k, queue, hard, 0.2, 0, torch.tensor(0), 0, None))
    # What is not counted, numbers of (B, N) and (B, D), is about 2 % here. One more pass over the similarities, 4 bytes
    # of 80, is 4 % of "selection".
    assert 0.97 * moved <= contenders.eager_bytes(made) <= moved


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("name", ("moco_eager", "published", "published_vectorised"))
def test_the_losses_in_pytorch_move_what_is_counted(name: str, dtype: str) -> None:
    made = case(name, NONE if name == "moco_eager" else SYNCO, dtype, batch=64, queue=8192)
    moved = seen(contenders.CONTENDERS[name].build(made, inputs(made)))
    # The draws, and numbers of (B, S) and (B, D), are not counted: up to 4 % here.
    assert 0.95 * moved <= contenders.CONTENDERS[name].bytes(made) <= moved


def test_the_kernels_counts_at_the_published_sizes() -> None:
    products, queue = 2 * 256 * 65536 * 128, 65536 * 128 * 2
    assert products == 4_294_967_296 and queue == 2**24
    assert counted("cuda", NONE) == (2 * products, 2 * queue)  # two row tiles
    assert counted("triton", NONE) == (3 * products, 4 * queue)  # a weight is two float16, or three bfloat16
    assert counted("triton", NONE, "bfloat16") == (4 * products, 4 * queue)
    assert counted("triton", NONE, "float32") == (2 * products, 16 * 2 * queue)
    assert counted("cpu", NONE) == (2 * products, 2 * queue + 8 * 256 * 2 * 4 * 128)  # and eight splits

    # 33.5 MB of float16 similarities each way; nearly all of the queue is somebody's parent.
    assert counted("cuda", SYNCO)[1] == 2 * queue + 2 * 33_554_432 + queue
    # 67 MB in float32; K / 8 maxima, and the members of as many groups.
    assert counted("triton", SYNCO)[1] == 4 * queue + 4 * 256 * (65536 + 3 * 8192) + queue
    assert counted("cpu", SYNCO)[1] == 2 * queue + 8 * 256 * 2 * (4 * 128 + 8 * 1024) + queue
    # 64 MiB hold the similarities of 32 queries (16 in float32) with a queue of 2^20: the tiles are as short.
    assert counted("cuda", SYNCO, queue=2**20)[1] - counted("cuda", NONE, queue=2**20)[1] > (8 - 2) * 16 * queue
    assert counted("triton", SYNCO, queue=2**20)[1] - counted("triton", NONE, queue=2**20)[1] > (16 - 4) * 16 * queue


def test_constants_are_those_of_the_kernels() -> None:
    cpu = constants("kernels/cpu/infonce.cpp")
    assert int(cpu["kTileRows"]) == contenders._CPU_TILE
    assert int(cpu["kTileColumns"]) == contenders._CPU_TILE_COLUMNS
    assert int(cpu["kTasks"]) == contenders._CPU_TASKS
    cuda = constants("kernels/cuda/infonce.h")
    assert (cuda["kThreads"], cuda["kWarps"], cuda["kTileRows"]) == ("256", "kThreads / 32", "16 * kWarps")
    assert contenders._CUDA_TILE == 16 * 256 // 32
    assert cuda["kWorkspaceLimit"] == "size_t{64} << 20"
    assert contenders._WORKSPACE == triton_infonce.WORKSPACE == 64 << 20
    for name in contenders._TRITON_TERMS:
        queue = torch.empty(0, 128, dtype=getattr(torch, name))
        assert contenders._TRITON_TILES[name] == triton_infonce._tile(queue).rows
        assert contenders._TRITON_TERMS[name] == triton_infonce._TERMS[queue.dtype]


def constants(path: str) -> dict[str, str]:
    """`constexpr` numbers of a C++ file, as they are written."""
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    return dict(re.findall(r"constexpr \w+ (k\w+) = ([^;]+);", text))


def test_rows_that_are_drawn() -> None:
    hard = replace(NONE, n_hard=4, mixed=3)
    draws = torch.randint(4, (100_000, 6), generator=torch.Generator().manual_seed(0))
    distinct = torch.stack([(draws == row).any(dim=1) for row in range(4)]).sum(dim=0).double().mean()
    assert contenders._drawn(case("cpu", hard)) == round(float(distinct)) == 3
    assert contenders._drawn(case("cpu", NONE)) == 0


def test_every_published_byte_count_falls_with_what_is_left_out() -> None:
    counts = [contenders.CONTENDERS[name].bytes(case(name, SYNCO)) for name in contenders.BASELINES]
    of_moco, of_published, of_vectorised, of_compiled = counts
    assert of_published > of_vectorised > max(of_moco, of_compiled)
