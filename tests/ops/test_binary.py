"""The compiled CUDA kernel, looked at without a GPU: no spills, and tensor-core instructions on every architecture."""

import os
import re
import shutil
import subprocess

import pytest

from synco_fast.ops import backends
from synco_fast.ops.compiled import LIBRARY

ARCHITECTURES = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
DIMS = {"64", "128", "256"}


def cuobjdump(*options: str) -> str:
    """What NVIDIA's tool, which comes with the CUDA toolkit and inside Triton, says of the library."""
    triton = pytest.importorskip("triton").__path__[0]
    tool = shutil.which("cuobjdump") or f"{triton}/backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *options, str(LIBRARY)], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", autouse=True)
def _built_with_cuda() -> None:
    """Where there is an nvcc, a library without the CUDA kernel is a failure and no reason to skip."""
    reason = backends()["cuda"]
    if "compiled" in reason and shutil.which("nvcc") is None:
        pytest.skip(reason)
    assert "compiled" not in reason, reason


def test_no_kernel_spills_on_any_architecture() -> None:
    found = set()
    for part in cuobjdump("-res-usage").split("arch = ")[1:]:
        for dim, usage in re.findall(r"infonce_kernelILi(\d+)E\S*\s+(REG:.*)", part):
            found.add((part.split()[0], dim))
            assert "STACK:0 " in usage and "LOCAL:0 " in usage, (part.split()[0], dim, usage)
    architectures = {architecture for architecture, _ in found}
    assert found == {(architecture, dim) for architecture in architectures for dim in DIMS}
    assert architectures == ARCHITECTURES if "TORCH_CUDA_ARCH_LIST" not in os.environ else architectures


def test_products_are_on_the_tensor_cores() -> None:
    found = set()
    functions = re.split(r"arch = (sm_\d+)", cuobjdump("-sass"))[1:]
    for architecture, body in zip(functions[::2], functions[1::2], strict=True):
        kernels = re.split(r"Function : \S*infonce_kernelILi(\d+)E", body)[1:]
        for dim, instructions in zip(kernels[::2], kernels[1::2], strict=True):
            found.add((architecture, dim))
            # A tile takes columns / 8 x dim / 16 products of S, and as many of O: 64 columns, for 256 coordinates 16.
            expected = 2 * (2 if dim == "256" else 8) * int(dim) // 16
            assert len(re.findall(r"\bHMMA\.16816\.F32", instructions)) == expected, (architecture, dim)
    assert found and found == {(architecture, dim) for architecture, _ in found for dim in DIMS}
