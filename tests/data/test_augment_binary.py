"""The augmentation's compiled CUDA kernel, looked at without a GPU: no spills, and no FMA where Pillow rounds twice."""

import re

import pytest
import torch

from synco_fast.data.operator import LIBRARY, status
from tests.cubins import assert_no_spills, cuobjdump, need_cuda


@pytest.fixture(scope="module", autouse=True)
def _built_with_cuda() -> None:
    need_cuda(status(torch.device("cuda")))


def test_no_kernel_spills_on_any_architecture() -> None:
    assert_no_spills(LIBRARY, "view_kernel", {"f", "t"})


def test_products_and_sums_are_rounded_one_by_one() -> None:
    """In PTX, a product without .rn may be fused with a sum; division brings its own FMAs, behind PTX."""
    ptx = cuobjdump(LIBRARY, "-ptx")
    operations = set(re.findall(r"\b(?:fma|mul|add|sub|mad)[.\w]*\.f(?:32|64)\b", ptx))
    assert {"mul.rn.f32", "add.rn.f32", "mul.rn.f64", "add.rn.f64"} <= operations
    assert all(operation.startswith(("mul.rn.", "add.rn.", "sub.rn.")) for operation in operations), operations
