"""What the machine calls itself: for reports and rows of results."""

import importlib.metadata
import importlib.util
import os
import platform

import torch


def cpu_name() -> str:
    """The processor's name, or its architecture where it has none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def version(package: str) -> str | None:
    """An installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def apex_status() -> str:
    """ "ok" where NVIDIA apex's fused SGD is there, or why not. Looked for, not imported: PyPI's apex fails at that."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed: optional, built from NVIDIA's source (PyPI's apex is another project)"
    if not any(os.path.isdir(os.path.join(folder, "optimizers")) for folder in spec.submodule_search_locations or []):
        return "not NVIDIA's: PyPI's apex is an unrelated project; pip uninstall apex"
    if importlib.util.find_spec("amp_C") is None:
        return "built without its CUDA extensions: build it anew with --cpp_ext --cuda_ext"
    return "ok"


def memory_beside_pytorch(device: torch.device) -> str:
    """How much of a GPU's memory is in use and not PyTorch's: a pipeline's, CUDA's own and other processes'."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    used = total - free - reserved
    return f"{used / 2**30:.2f} GiB with the first batch, and {reserved / 2**30:.2f} PyTorch's, of {total / 2**30:.0f}"
