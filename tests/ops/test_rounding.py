"""A coefficient, low + width * u, is rounded as in PyTorch, twice, also by compilers that fuse a product into a sum."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from synco_fast.ops.draws import draw
from tests.conftest import REPOSITORY
from tests.ops.recorded import DRAWN

HARD = DRAWN["odd lengths"]
"""Fusing, with this one, changes the last bit of many coefficients."""

INCLUDE = ["-std=c++17", "-I", str(REPOSITORY / "kernels/include")]
HOST = """
#include <cstdio>
#include "synco/negatives.h"
int main() {
  for (uint32_t i = 0; i < 300; ++i)
    std::printf("%.9g\\n", synco::draw(synco::kExtrapolated, {1.0f, WIDTH}, 37, 5, 6, i, 7).coefficient);
}
"""
DEVICE = """
#include "synco/negatives.h"
__global__ void draw(float* out, float low, float width, unsigned long seed) {
  out[threadIdx.x] = synco::draw(synco::kExtrapolated, {low, width}, 37, seed, blockIdx.x, threadIdx.x, 7).coefficient;
}
"""


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def assert_not_fused(code: Path) -> None:
    """The machine code has sums, and every fma of it is a product: its addend is RZ, the register that is 0."""
    triton = pytest.importorskip("triton").__path__[0]
    tool = shutil.which("cuobjdump") or f"{triton}/backends/nvidia/bin/cuobjdump"
    instructions = re.findall(r"(FFMA|FADD)\S* (.*?)\s*;", run(tool, "-sass", code))
    assert any(name == "FADD" for name, _ in instructions)
    assert all(operands.endswith(", RZ") for name, operands in instructions if name == "FFMA"), instructions


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("flags", [["-O0"], ["-O3", "-march=native", "-ffp-contract=fast"]], ids=["plain", "fused"])
def test_by_the_c_compiler(tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "draw.cpp").write_text(HOST)
    width = HARD.beta_max - 1
    run("g++", *flags, *INCLUDE, f"-DWIDTH={width!r}f", tmp_path / "draw.cpp", "-o", tmp_path / "draw")
    found = torch.tensor([float(line) for line in run(tmp_path / "draw").split()], dtype=torch.float32)
    like = torch.empty(1, 1)
    arguments = {"seed": 5, "step": torch.tensor(7), "rows": torch.tensor([6]), "n_hard": 37, "like": like}
    assert torch.equal(found, draw("extrapolated", HARD, **arguments).coefficients[0])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_by_nvcc(tmp_path: Path) -> None:
    (tmp_path / "draw.cu").write_text(DEVICE)
    run("nvcc", "-O3", "-arch=sm_90", "-cubin", *INCLUDE, tmp_path / "draw.cu", "-o", tmp_path / "draw.cubin")
    assert_not_fused(tmp_path / "draw.cubin")


def test_by_triton(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.ops.triton_draws import store_draws

    types = ("*i32", "*i32", "*fp32", "*i64", "*fp32", "i64", "i64", "i32", "i32", "constexpr")
    signature = dict(zip(store_draws.arg_names, types, strict=True))
    source = ASTSource(fn=store_draws, signature=signature, constexprs={"SAMPLES": 256})
    (tmp_path / "draw.cubin").write_bytes(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"])
    assert_not_fused(tmp_path / "draw.cubin")
