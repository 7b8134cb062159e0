"""What setuptools builds; everything that can be said statically is in pyproject.toml.

The compiled kernels are one library, synco_fast/_kernels*.so, built against the torch that is installed: install with
`--no-build-isolation`. With nvcc of torch's CUDA version it holds the CUDA kernel too, on a machine with or without a
GPU. What cannot be built is said and left out; `synco-fast doctor` says it again.
"""

import glob
import os
import re
import shutil
import subprocess
from typing import Any

from setuptools import find_packages, setup

# Without TORCH_CUDA_ARCH_LIST and without a GPU to look at: every architecture the kernel is checked on.
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def say(what: str) -> None:
    print(f"synco_fast: {what}", flush=True)


def find_cuda() -> None:
    """Set CUDA_HOME, unless it is set, to the toolkit of the nvcc on the path, which may be a link or a script."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or "CUDA_HOME" in os.environ:
        return
    output = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)
    if found:
        os.environ["CUDA_HOME"] = os.path.realpath(found[1])


def why_not_cuda() -> str | None:
    """The reason why the CUDA kernel cannot be built here, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if CUDA_HOME is None:
        return "there is no nvcc"
    for part in ("bin/nvcc", "include/cuda_runtime.h"):
        if not os.path.exists(os.path.join(CUDA_HOME, part)):
            return f"the CUDA toolkit in {CUDA_HOME} has no {part} (CUDA_HOME names another)"
    nvcc = os.path.join(CUDA_HOME, "bin", "nvcc")
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.", output)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release[1] if release else '?'}, and torch of CUDA {torch.version.cuda}"
    return None


def compiled_kernels() -> dict[str, Any]:
    """The extension's arguments to setup(), or none when it cannot be built here."""
    find_cuda()
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler
    except ImportError:
        say("torch is not installed here, so the kernels are left out (install torch, then use --no-build-isolation)")
        return {}
    if shutil.which(get_cxx_compiler()) is None:
        say(f"there is no C++ compiler ({get_cxx_compiler()}), so the kernels are left out")
        return {}
    # As torch itself is compiled: libm calls that set errno, and comparisons that might trap, are not vectorised.
    flags = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
    settings: dict[str, Any] = {
        "sources": ["kernels/bindings.cpp", *sorted(glob.glob("kernels/cpu/*.cpp"))],
        "include_dirs": [os.path.abspath(folder) for folder in ("kernels", "kernels/include", "kernels/cuda")],
        "depends": sorted(glob.glob("kernels/**/*.h", recursive=True)),
        "extra_link_args": ["-fopenmp"],
    }
    obstacle = why_not_cuda()
    if obstacle:
        say(f"building the CPU kernels only: {obstacle}")
        extension = CppExtension("synco_fast._kernels", **settings, extra_compile_args=flags)
    else:
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        say(f"building the CPU and CUDA kernels for {os.environ.get('TORCH_CUDA_ARCH_LIST', 'the GPU at hand')}")
        settings["sources"].append("kernels/cuda/infonce.cu")
        extension = CUDAExtension(
            "synco_fast._kernels",
            **settings,
            define_macros=[("SYNCO_WITH_CUDA", None)],
            extra_compile_args={"cxx": flags, "nvcc": ["-O3", "--threads", "2"]},
        )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)}}


setup(
    packages=[*find_packages(include=["synco_fast", "synco_fast.*"]), "synco_fast.configs"],
    package_dir={"synco_fast.configs": "configs"},
    package_data={"synco_fast.configs": ["*.yaml"]},
    **compiled_kernels(),
)
