"""What setuptools builds; everything that can be said statically is in pyproject.toml.

The compiled kernels are one library, synco_fast/_kernels*.so, built against the torch that is installed: install with
`--no-build-isolation`. What cannot be built is said and left out; `synco-fast doctor` says it again.
"""

import glob
import shutil
from typing import Any

from setuptools import find_packages, setup


def compiled_kernels() -> dict[str, Any]:
    """The extension's arguments to setup(), or none when it cannot be built here."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
    except ImportError:
        print(
            "synco_fast: torch is not installed here, so the kernels are left out (install torch first, then "
            "build with --no-build-isolation)"
        )
        return {}
    if shutil.which(get_cxx_compiler()) is None:
        print(f"synco_fast: no C++ compiler ({get_cxx_compiler()}), so the kernels are left out")
        return {}
    print("synco_fast: building the CPU kernels")
    extension = CppExtension(
        "synco_fast._kernels",
        ["kernels/bindings.cpp", *sorted(glob.glob("kernels/cpu/*.cpp"))],
        include_dirs=["kernels", "kernels/include"],
        depends=sorted(glob.glob("kernels/**/*.h", recursive=True)),
        # As torch itself is compiled: libm calls that set errno, and comparisons that might trap, are not vectorised.
        extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"],
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)}}


setup(
    packages=[*find_packages(include=["synco_fast", "synco_fast.*"]), "synco_fast.configs"],
    package_dir={"synco_fast.configs": "configs"},
    package_data={"synco_fast.configs": ["*.yaml"]},
    **compiled_kernels(),
)
