"""What setuptools builds; everything that can be said statically is in pyproject.toml.

Two libraries are compiled: the kernels of the op, synco_fast/_kernels*.so, against the torch that is installed, and
the augmentation, synco_fast/_augment*.so, against the DALI that is installed: install with `--no-build-isolation`.
With nvcc of torch's CUDA version they hold CUDA kernels too, on a machine with or without a GPU. What cannot be built
is said and left out; `synco-fast doctor` says it again.
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from typing import Any

from setuptools import Extension, find_packages, setup

# Without TORCH_CUDA_ARCH_LIST, whatever GPU is at hand: the library may be used on another.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def say(what: str) -> None:
    print(f"synco_fast: {what}", flush=True)


def find_cuda() -> None:
    """Set CUDA_HOME, unless it is set, to the toolkit of the nvcc on the path, which may be a link or a script."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME"):
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


def architectures(nvcc: str) -> str:
    """Those of ARCHITECTURES that this nvcc knows, and for later GPUs the PTX of the last, as torch writes a list."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return ";".join(name for name in ARCHITECTURES if "sm_" + name.replace(".", "") in known) + "+PTX"


def compiled_kernels() -> dict[str, Any]:
    """The extension's arguments to setup(), or none when it cannot be built here."""
    find_cuda()
    try:
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        say("torch is not installed here, so the kernels are left out (install torch, then use --no-build-isolation)")
        return {}
    compiler = os.environ.get("CXX", "").strip() or "c++"
    os.environ["CXX"] = compiler  # setuptools would take the one that made Python
    if shutil.which(shlex.split(compiler)[0]) is None:
        say(f"there is no C++ compiler ({compiler}), so the kernels are left out")
        return {}

    class BuildKernels(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception:
                say("the kernels did not compile: CUDA_HOME=none leaves out the CUDA kernel, CXX=none all of them")
                raise

    # As torch itself is compiled: libm calls that set errno, and comparisons that might trap, are not vectorised.
    flags = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
    nvcc_flags = ["-O3", "--threads", os.environ.get("MAX_JOBS", "0")]
    kernels: dict[str, Any] = {
        "sources": ["kernels/bindings.cpp", *sorted(glob.glob("kernels/cpu/*.cpp"))],
        "include_dirs": [os.path.abspath(folder) for folder in ("kernels", "kernels/include", "kernels/cuda")],
        "depends": sorted(glob.glob("kernels/**/*.h", recursive=True)),
        "extra_link_args": ["-fopenmp"],
    }
    obstacle = why_not_cuda()
    if obstacle:
        say(f"building the CPU kernels only: {obstacle}")
        extensions = [CppExtension("synco_fast._kernels", **kernels, extra_compile_args=flags)]
    else:
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures(os.path.join(CUDA_HOME, "bin", "nvcc"))
        os.environ["TORCH_CUDA_ARCH_LIST"] = wanted
        say(f"building the CPU and CUDA kernels for {wanted}")
        kernels["sources"].append("kernels/cuda/infonce.cu")
        extensions = [
            CUDAExtension(
                "synco_fast._kernels",
                **kernels,
                define_macros=[("SYNCO_WITH_CUDA", None)],
                extra_compile_args={"cxx": flags, "nvcc": nvcc_flags},
            )
        ]
    extensions += augmentation(flags, None if obstacle else nvcc_flags)
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildKernels.with_options(use_ninja=False)}}


def augmentation(flags: list[str], nvcc_flags: list[str] | None) -> list[Extension]:
    """The augmentation operator as a list of one extension, or of none when it cannot be built here.

    Args:
        flags: of the C++ compiler.
        nvcc_flags: of nvcc, or None where the operator is for the CPU only.
    """
    from torch.utils.cpp_extension import CUDA_HOME, library_paths

    try:
        import nvidia.dali
        import nvidia.dali.sysconfig as dali
    except ImportError:
        say("DALI is not installed here, so the augmentation is left out (install DALI first)")
        return []
    headers = cuda_headers(CUDA_HOME)
    if headers is None:
        say("no CUDA headers, so no augmentation (install the CUDA toolkit, or nvidia-cuda-crt and nvidia-cuda-cccl)")
        return []
    # No FMAs, which round once where Pillow rounds twice. DALI's headers are not ours to warn about.
    ours = ["-std=c++17", "-ffp-contract=off", "-Wno-free-nonheap-object"]
    ours += [flag.replace("-I", "-isystem", 1) for flag in dali.get_compile_flags()]
    ours.append(f'-DSYNCO_DALI_VERSION="{nvidia.dali.__version__}"')
    sources, macros, device_flags = sorted(glob.glob("kernels/augment/*.cpp")), [], []
    link = [*dali.get_link_flags(), "-ldali_core"]
    if nvcc_flags is not None:
        sources.append("kernels/augment/view.cu")
        macros.append(("SYNCO_WITH_CUDA", None))
        device_flags = ["-std=c++17", "--fmad=false", "-Xcompiler=-ffp-contract=off,-fvisibility=hidden", *nvcc_flags]
        # A CUDA runtime of its own, whose names nobody else sees: DALI has one inside, of its wheel's CUDA version, and
        # torch's may be of a third. Streams, pointers and contexts are the driver's, and so the same for all of them.
        link += [f"-L{folder}" for folder in library_paths(device_type="cuda")]
        link += ["-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,ALL"]
    return [
        Extension(
            "synco_fast._augment",
            sources=sources,
            include_dirs=[*(os.path.abspath(f"kernels/{folder}") for folder in ("include", "cuda")), headers],
            depends=sorted(glob.glob("kernels/**/*.h", recursive=True)),
            define_macros=macros,
            extra_compile_args={"cxx": [*flags, *ours], "nvcc": device_flags},
            extra_link_args=link,
        )
    ]


def cuda_headers(cuda_home: str | None) -> str | None:
    """A folder with CUDA's headers, the toolkit's or that of NVIDIA's packages; None if neither is whole."""
    packages = glob.glob(os.path.join(sysconfig.get_path("purelib"), "nvidia/cu1*"))
    folders = [os.path.join(home, "include") for home in (cuda_home, *packages) if home]
    needed = ("cuda_runtime.h", "crt/host_config.h", "nv/target")
    return next((folder for folder in folders if all(os.path.exists(os.path.join(folder, x)) for x in needed)), None)


setup(
    packages=[*find_packages(include=["synco_fast", "synco_fast.*"]), "synco_fast.configs"],
    package_dir={"synco_fast.configs": "configs"},
    package_data={"synco_fast.configs": ["**/*.yaml"]},
    **compiled_kernels(),
)
