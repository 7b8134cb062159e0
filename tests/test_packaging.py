"""What the package builds into, from its sdist, with and without a C++ compiler; used from outside the checkout.

CUDA_HOME=none leaves out the CUDA kernel, which takes minutes: tests/ops/test_binary.py looks at one that is there.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from synco_fast.data import operator
from synco_fast.ops.compiled import LIBRARY
from tests.conftest import REPOSITORY, TINY, environment

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
PIP_INSTALL = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index"]

USE = """
import logging, sys
from importlib.resources import files
import torch
import synco_fast
from synco_fast.ops import HardNegatives, infonce

print("from", synco_fast.__file__)
configs = files("synco_fast.configs")
print("configs", sorted(str(file.relative_to(configs)) for file in configs.rglob("*.yaml")))
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
q, k, queue = (torch.nn.functional.normalize(torch.randn(rows, 16), dim=1) for rows in (4, 4, 32))
for name in sys.argv[1:]:
    try:
        result = infonce(q, k, queue, hard=HardNegatives(n_hard=8, mixed=4), backend=name)
        print(name, "finite" if result.loss.isfinite() else result.loss)
    except RuntimeError as error:
        print(error)
"""
"""Says where the package is, and calls the op with the backends named on the command line."""


def run(*command: object, cwd: Path, **variables: str) -> tuple[int, str]:
    """Exit status and everything that was said: pip passes on to stderr what a build says."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def succeed(*command: object, cwd: Path, **variables: str) -> str:
    status, said = run(*command, cwd=cwd, **variables)
    assert status == 0, said[-8000:]
    return said


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is made of, without what was built from it."""
    copy = tmp_path_factory.mktemp("source")
    for folder in ("kernels", "configs", "synco_fast"):
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    succeed(sys.executable, "-c", build, folder, cwd=source)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def without_compiler(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as installed where no program is on the path."""
    folder = tmp_path_factory.mktemp("without-compiler")
    (folder / "bin").mkdir()
    said = succeed(*PIP_INSTALL, "--target", folder / "package", sdist, cwd=folder, PATH=str(folder / "bin"), CXX="c++")
    assert "synco_fast: there is no C++ compiler (c++), so the kernels are left out" in said
    return folder / "package"


def test_sdist_is_whole(source: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    there = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {name for name in there if ".egg-info" not in name} - packed == set()


@needs_compiler
def test_wheel_from_the_sdist(sdist: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    said = succeed(*PIP_INSTALL, "--target", package, sdist, cwd=tmp_path, CUDA_HOME="none")
    assert "synco_fast: building the CPU kernels only: " in said
    for library in (LIBRARY, operator.LIBRARY):
        assert (package / "synco_fast" / library.name).is_file()

    said = succeed(sys.executable, "-c", USE, "cpu", "auto", cwd=tmp_path, PYTHONPATH=str(package))
    assert f"from {package}" in said
    configs = REPOSITORY / "configs"
    assert f"configs {sorted(str(file.relative_to(configs)) for file in configs.rglob('*.yaml'))}\n" in said
    assert "cpu finite\nbackend auto on cpu: cpu\nauto finite\n" in said
    said = succeed(package / "bin" / "synco-fast", "doctor", cwd=tmp_path, PYTHONPATH=str(package))
    assert "  cpu        ok\n" in said
    assert "  cuda       the kernels were compiled without nvcc: with the CUDA toolkit of torch's version" in said
    assert "  compiled, cpu  ok\n" in said


def test_without_a_compiler(without_compiler: Path, tmp_path: Path) -> None:
    backends = ("reference", "eager", "auto", "cpu", "cuda")
    said = succeed(sys.executable, "-c", USE, *backends, cwd=tmp_path, PYTHONPATH=str(without_compiler))
    reason = "the kernels are not compiled: with a C++ compiler (g++) installed, pip install --no-build-isolation"
    assert f"reference finite\neager finite\nbackend auto on cpu: eager; not cpu: {reason}" in said
    assert "\nauto finite\n" in said
    assert f"backend cpu cannot be used: {reason}" in said
    assert f"backend cuda cannot be used: {reason}" in said
    doctor = (without_compiler / "bin" / "synco-fast", "doctor")
    said = succeed(*doctor, cwd=tmp_path, PYTHONPATH=str(without_compiler), CXX="no-c++")
    assert f"  cpu        {reason}" in said and f"  cuda       {reason}" in said
    assert "  C++ compiler   no-c++ not found: the kernels need it; install g++\n" in said
    missing = "the augmentation is not compiled: with a C++ compiler (g++) and DALI installed, pip install"
    assert f"  compiled, cpu  {missing}" in said


def test_views_without_a_compiler(without_compiler: Path, images: Path, tmp_path: Path) -> None:
    """The same picture as with one, and a warning."""
    pictures = []
    for package in (without_compiler, REPOSITORY):
        pictures.append(tmp_path / f"{len(pictures)}.png")
        view = ("data", "view", images, "--output", pictures[-1], "--image-size", "48")
        said = succeed(sys.executable, "-m", "synco_fast", *view, cwd=tmp_path, PYTHONPATH=str(package))
        warning = "data.augmentation = auto: plain torch makes the views, slowly: the augmentation is not compiled"
        assert (warning in said) == (package == without_compiler)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("older", f"{LIBRARY.name} was built from older sources; pip install --no-build-isolation"),
        ("damaged", f"{LIBRARY.name} does not fit this torch"),
        ("of another Python", "the kernels are not compiled: with a C++ compiler"),
    ],
    ids=["older", "damaged", "of another Python"],
)
@needs_compiler
def test_library_that_cannot_be_used(kind: str, reason: str, without_compiler: Path, tmp_path: Path) -> None:
    """Without this version's ops; no library; and one that a build for this Python would not replace."""
    package = shutil.copytree(without_compiler, tmp_path / "package")
    library = package / "synco_fast" / ("_kernels.cpython-00.so" if kind == "of another Python" else LIBRARY.name)
    if kind == "older":
        succeed("c++", "-shared", "-x", "c++", os.devnull, "-o", library, cwd=tmp_path)
    else:
        library.write_text("no library\n")
    ask = "from synco_fast.ops import backends; print(backends()['cpu'])"
    assert succeed(sys.executable, "-c", ask, cwd=tmp_path, PYTHONPATH=str(package)).startswith(reason)


def test_compiler_that_fails(source: Path) -> None:
    """The build fails, and says how to do without."""
    status, said = run(sys.executable, "setup.py", "-q", "build_ext", cwd=source, CUDA_HOME="none", CXX="false")
    assert status != 0
    assert "synco_fast: the kernels did not compile: CUDA_HOME=none leaves out the CUDA kernel, CXX=none all" in said


def test_augmentation_that_cannot_be_used_is_refused_first(
    without_compiler: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = ("-m", "synco_fast", "pretrain", "tiny.yaml", "--data", images, "--set", "output=run")
    asked = ("--set", "data.augmentation=compiled")
    status, said = run(sys.executable, *command, *asked, cwd=tmp_path, PYTHONPATH=str(without_compiler))
    assert status == 1 and "data.augmentation = compiled: cannot be used here: the augmentation is not compiled" in said
    assert not (tmp_path / "run").exists()
