"""What the CUDA toolkit's cuobjdump, which comes inside Triton too, finds in a library."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ARCHITECTURES = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}


def need_cuda(reason: str) -> None:
    """Where there is an nvcc, a library without CUDA kernels is a failure and no reason to skip.

    Args:
        reason: why the library has no CUDA kernels; without the word "compiled", it has.
    """
    if "compiled" in reason and shutil.which("nvcc") is None:
        pytest.skip(reason)
    assert "compiled" not in reason, reason


def cuobjdump(library: Path, *options: str) -> str:
    triton = pytest.importorskip("triton").__path__[0]
    tool = shutil.which("cuobjdump") or f"{triton}/backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *options, str(library)], capture_output=True, text=True, check=True).stdout


def resources(library: Path, kernel: str) -> Iterator[tuple[str, str, str]]:
    """Architecture, template's arguments as mangled, and registers and stack of each instance of a kernel template."""
    for part in cuobjdump(library, "-res-usage").split("arch = ")[1:]:
        for argument, usage in re.findall(rf"{kernel}I(\w+?)EEv\S*\s+(REG:.*)", part):
            yield part.split()[0], argument, usage


def assert_no_spills(library: Path, kernel: str, arguments: set[str]) -> None:
    """On every architecture that setup.py builds for, each instance keeps all it has in registers."""
    found = set()
    for architecture, argument, usage in resources(library, kernel):
        found.add((architecture, argument))
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, (architecture, argument, usage)
    architectures = {architecture for architecture, _ in found}
    assert found == {(architecture, argument) for architecture in architectures for argument in arguments}
    assert architectures == ARCHITECTURES if "TORCH_CUDA_ARCH_LIST" not in os.environ else architectures
