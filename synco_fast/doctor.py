"""What can be used on this machine and, for what cannot, why and how to get it."""

import os
import platform
import shlex
import shutil
import subprocess

import torch

from synco_fast import __version__
from synco_fast.data import operator
from synco_fast.data.operator import dali
from synco_fast.errors import UserError
from synco_fast.machine import apex_status, cpu_name, version
from synco_fast.ops import backends

_DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
_PACKAGES = ("torch", "torchvision", *_DALI, "triton", "numpy", "pydantic", "PyYAML", "apex")


def text() -> str:
    """The report, one aligned line for each thing looked at."""
    sections = {
        "versions": [
            ("synco_fast", __version__),
            ("python", platform.python_version()),
            *_versions(),
            ("CUDA of torch", torch.version.cuda or "none"),
        ],
        "devices": _devices(),
        "data": [("DALI", _dali())],
        "backends of the op": list(backends().items()),
        "augmentation": _augmentation(),
        "accelerators": [
            ("C++ compiler", _compiler(_cxx(), "the kernels need it; install g++")),
            (
                "CUDA compiler",
                _compiler([_nvcc()], "the CUDA kernel needs it; install the toolkit of torch's CUDA version"),
            ),
            ("NVIDIA apex", apex_status()),
        ],
        "distributed": _distributed(),
    }
    lines = []
    for title, rows in sections.items():
        width = max(len(name) for name, _ in rows)
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
    return "\n".join(lines[:-1])


def _versions() -> list[tuple[str, str]]:
    return [(package, version(package) or "not installed") for package in _PACKAGES]


def _devices() -> list[tuple[str, str]]:
    rows = [
        ("CPU", f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in PyTorch"),
        ("CPU bf16", _cpu_bf16()),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            rows.append((f"GPU {i}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"))
    elif torch.version.cuda is None:
        rows.append(("GPU", "none: this PyTorch was built without CUDA; install a CUDA build of torch"))
    else:
        rows.append(
            ("GPU", f"none: PyTorch (CUDA {torch.version.cuda}) finds no device; check the driver with nvidia-smi")
        )
    return rows


def _augmentation() -> list[tuple[str, str]]:
    try:
        dali()
    except UserError:
        return [("compiled", "DALI is missing")]
    devices = {"cpu": torch.device("cpu")} | ({"cuda": torch.device("cuda")} if torch.cuda.is_available() else {})
    return [(f"compiled, {name}", operator.status(device)) for name, device in devices.items()] + [("plain", "ok")]


def _cpu_bf16() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return f"ok ({capability})"
    return f"slow: no bf16 instructions ({capability}); --set trainer.precision=fp32 is faster here"


def _dali() -> str:
    installed = [package for package in _DALI if version(package)]
    if not installed:
        return "not installed: pip install -e '.[cuda12]' (or '.[cuda13]', never both)"
    if len(installed) == 2:
        return "broken: both wheels own the same files; pip uninstall both, then install one extra"
    try:
        dali()
    except UserError as error:
        return f"broken: {error}"
    place = "decodes on the GPU" if torch.cuda.is_available() else "decodes on the CPU: no GPU here"
    return f"ok: {installed[0]}, {place}"


def _cxx() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _nvcc() -> str:
    """Where setup.py and PyTorch look: the toolkit of CUDA_HOME, the path, the usual folder."""
    home = os.environ.get("CUDA_HOME")
    if not home and shutil.which("nvcc"):
        return "nvcc"
    return os.path.join(home or "/usr/local/cuda", "bin", "nvcc")


def _compiler(words: list[str], advice: str) -> str:
    command = shlex.join(words)
    if shutil.which(words[0]) is None:
        return f"{command} not found: {advice}"
    output = subprocess.run([*words, "--version"], capture_output=True, text=True, check=False).stdout
    lines = [line for line in output.splitlines() if line.strip()]
    return (
        next((line for line in lines if "release" in line), lines[0]) if lines else f"{command} is of unknown version"
    )


def _distributed() -> list[tuple[str, str]]:
    if not torch.distributed.is_available():
        return [("torch.distributed", "not in this build of PyTorch")]
    nccl = "ok" if torch.distributed.is_nccl_available() else "not in this build of PyTorch"
    if nccl == "ok" and not torch.cuda.is_available():
        nccl = "needs a GPU"
    gloo = "ok" if torch.distributed.is_gloo_available() else "not in this build of PyTorch"
    return [("gloo (CPU)", gloo), ("NCCL (GPU)", nccl)]
