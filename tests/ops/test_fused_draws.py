"""Hard sets, parents and coefficients inside the `cpu` backend, bit for bit those of every backend."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from synco_fast.ops import HardNegatives
from synco_fast.ops.hard import pack
from tests.conftest import REPOSITORY
from tests.ops.cases import exact_rows, tied_rows, with_n_hard
from tests.ops.recorded import DRAWN, PLACES, assert_same_draws

KERNELS = REPOSITORY / "kernels"

# The backend in a library of its own that keeps, of each query, what it has selected and drawn when it uses it.
RECORDING = {
    "cpu/row.h": (
        (
            "// gradient (dim) is that",
            "// Of each query, by its row: its hard set, then `first`, `second` and the bits of `coefficient`.\n"
            "extern std::map<uint32_t, std::vector<int32_t>> recorded;\n\n// gradient (dim) is that",
        ),
        ("#pragma once", "#pragma once\n\n#include <map>\n#include <mutex>\n#include <vector>"),
    ),
    "cpu/row.cpp": (
        ("namespace synco::cpu {\n", "namespace synco::cpu {\n\nstd::map<uint32_t, std::vector<int32_t>> recorded;\n"),
        (
            "  add_hard_rows(s, query, scratch);\n",
            "  static std::mutex one_at_a_time;\n"
            "  const std::lock_guard<std::mutex> lock(one_at_a_time);\n"
            "  std::vector<int32_t>& record = recorded[query.row];\n"
            "  const int total = s.hard.total();\n"
            "  const int32_t* bits = reinterpret_cast<const int32_t*>(scratch.draws.coefficient);\n"
            "  record.assign(query.hard_set.row, query.hard_set.row + query.hard_set.size);\n"
            "  record.insert(record.end(), scratch.draws.first, scratch.draws.first + total);\n"
            "  record.insert(record.end(), scratch.draws.second, scratch.draws.second + total);\n"
            "  record.insert(record.end(), bits, bits + total);\n"
            "  add_hard_rows(s, query, scratch);\n",
        ),
    ),
    "bindings.cpp": (
        ("TORCH_LIBRARY_FRAGMENT(synco_fast,", "TORCH_LIBRARY_FRAGMENT(synco_fast_recording,"),
        ("TORCH_LIBRARY_IMPL(synco_fast, CPU,", "TORCH_LIBRARY_IMPL(synco_fast_recording, CPU,"),
        ('#include "cpu/infonce.h"', '#include "cpu/infonce.h"\n#include "cpu/row.h"'),
        (
            '  library.def("compiled_with_cuda() -> bool", &compiled_with_cuda);\n',
            '  library.def("recorded(int row) -> int[]", +[](int64_t row) {\n'
            "    const auto& record = synco::cpu::recorded.at(static_cast<uint32_t>(row));\n"
            "    return std::vector<int64_t>(record.begin(), record.end());\n"
            "  });\n",
        ),
    ),
}


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """torch.ops of the library: infonce_compiled, and recorded."""
    compiler = shlex.split(os.environ.get("CXX", cpp_extension.get_cxx_compiler()))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"there is no C++ compiler ({compiler[0]})")
    folder = tmp_path_factory.mktemp("recording")
    shutil.copytree(KERNELS, folder / "kernels")
    for name, edits in RECORDING.items():
        path = folder / "kernels" / name
        text = path.read_text()
        for old, new in edits:
            assert text.count(old) == 1, f"{name}: {old}"
            text = text.replace(old, new)
        path.write_text(text)
    _compile(compiler, folder / "kernels", folder / "recording.so")
    torch.ops.load_library(folder / "recording.so")
    return torch.ops.synco_fast_recording


def _compile(compiler: list[str], kernels: Path, library: Path) -> None:
    include = [kernels, kernels / "include", *cpp_extension.include_paths()]
    command = [*compiler, "-shared", "-fPIC", "-fopenmp", "-std=c++20", "-w", "-o", library]
    command += ["-O3", "-fno-math-errno", "-fno-trapping-math"]  # as setup.py does: rounding may hang on them
    command += [part for folder in include for part in ("-I", folder)]
    command += [kernels / "bindings.cpp", *sorted((kernels / "cpu").glob("*.cpp"))]
    command += [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check(recording: Any, q: Tensor, queue: Tensor, hard: HardNegatives, place: dict[str, int]) -> None:
    counts, strengths, extrapolate_from = pack(hard)
    options = (counts, strengths, extrapolate_from == "negative", 0.2, place["seed"], place["row_offset"])
    recording.infonce_compiled(q, q, queue, torch.tensor(place["step"]), *options)
    rows = [recording.recorded((place["row_offset"] + b) % 2**32) for b in range(len(q))]
    total = hard.total
    hard_set, first, second, bits = torch.tensor(rows).split([hard.n_hard, total, total, total], dim=1)
    coefficients = bits.int().view(torch.float32)
    assert_same_draws(hard_set, first, second, coefficients, q, queue, hard=hard, **place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("n_hard", [1, 37, 300])
def test_exact_arithmetic(recording: Any, dim: int, n_hard: int, dtype: torch.dtype) -> None:
    """Full of ties at the threshold; n_hard = 300 is the whole queue."""
    q, queue = exact_rows(6, dim, seed=36).float(), exact_rows(300, dim, seed=37).to(dtype)
    for hard, place in zip(DRAWN.values(), PLACES, strict=True):
        check(recording, q, queue, with_n_hard(hard, n_hard), place)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n_hard", [1, 100, 3000])
def test_a_collapsed_queue(recording: Any, n_hard: int, threads: int) -> None:
    """Nearly all similarities tie; several parts of the queue, and buffers that fill up."""
    q, queue = tied_rows(5, 9000)
    torch.set_num_threads(threads)
    try:
        check(recording, q.float(), queue.float(), with_n_hard(DRAWN["odd lengths"], n_hard), PLACES[1])
    finally:
        torch.set_num_threads(1)
