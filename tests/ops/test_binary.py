"""The compiled CUDA kernel, looked at without a GPU: no spills, and tensor-core instructions on every architecture."""

import itertools
import re

import pytest

from synco_fast.ops import backends
from synco_fast.ops.compiled import LIBRARY
from tests.cubins import assert_no_spills, cuobjdump, need_cuda

DIMS = {"64", "128", "256"}
CLOCKED = ("0", "1")


@pytest.fixture(scope="module", autouse=True)
def _built_with_cuda() -> None:
    need_cuda(backends()["cuda"])


def test_no_kernel_spills_on_any_architecture() -> None:
    assert_no_spills(LIBRARY, "infonce_kernel", {f"Li{dim}ELb{clocked}E" for dim in DIMS for clocked in CLOCKED})


def test_products_are_on_the_tensor_cores() -> None:
    found = set()
    functions = re.split(r"arch = (sm_\d+)", cuobjdump(LIBRARY, "-sass"))[1:]
    for architecture, body in zip(functions[::2], functions[1::2], strict=True):
        kernels = re.split(r"Function : \S*infonce_kernelILi(\d+)ELb([01])E", body)[1:]
        for dim, clocked, instructions in zip(kernels[::3], kernels[1::3], kernels[2::3], strict=True):
            found.add((architecture, dim, clocked))
            # A tile takes columns / 8 x dim / 16 products of S, and as many of O: 64 columns, for 256 coordinates 16.
            expected = 2 * (2 if dim == "256" else 8) * int(dim) // 16
            assert len(re.findall(r"\bHMMA\.16816\.F32", instructions)) == expected, (architecture, dim)
    architectures = {architecture for architecture, *_ in found}
    assert found and found == set(itertools.product(architectures, DIMS, CLOCKED))
