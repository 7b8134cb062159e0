"""Builds CUDA sources into programs that run on the CPU: g++ and the emulator beside this file.

As a command: python -m tests.simt.build plain|sanitized|threads SOURCE... -o PROGRAM. Headers are files named *.h.
"""

import argparse
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CACHE = REPOSITORY / "build" / "simt"
INCLUDE = ("kernels/augment", "kernels/cuda", "kernels/include", "tests/simt")
RUNTIME = ("fibers.cpp", "collectives.cpp", "memory.cpp", "cuda_on_cpu.cpp")
COMMON = ("-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DSYNCO_HOST_SIMT", "-fno-strict-aliasing")
JOBS = 2

# For each variant: flags of the kernels, of the runtime, and of the linker. The runtime has no sanitizer, which would
# watch the emulator instead of the kernels; it only tells the sanitizers when it switches fibers.
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "plain": (("-O2",), (), ()),
    "sanitized": (
        ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
        ("-DSIMT_ASAN",),
        ("-fsanitize=address,undefined",),
    ),
    "threads": (("-O1", "-g", "-fsanitize=thread"), ("-DSIMT_TSAN",), ("-fsanitize=thread",)),
}


def why_not() -> str | None:
    """The reason why nothing can be built on this machine, if there is one."""
    if platform.machine() != "x86_64":
        return f"the emulator switches fibers on x86_64 only, and this is {platform.machine()}"
    return None if shutil.which("g++") else "no g++"


def build(sources: Sequence[Path], variant: str, *, flags: Sequence[str] = (), cache: Path = CACHE) -> Path:
    """Compile and link what was not built before.

    Args:
        sources: .cu and .cpp files, one of them with a main.
        variant: "plain", "sanitized" (ASan and UBSan) or "threads" (TSan).
        flags: more flags for the sources, such as -D...
        cache: folder of objects and programs, each named by a hash of all that goes into it.

    Returns:
        The program.
    """
    kernel, runtime, link = VARIANTS[variant]
    cache.mkdir(parents=True, exist_ok=True)
    parts = [REPOSITORY / "tests/simt" / name for name in RUNTIME]
    with ThreadPoolExecutor(JOBS) as pool:
        jobs = _start(pool, sources, ["g++", *COMMON, *kernel, *flags, "-x", "c++"], cache)
        jobs += _start(pool, parts, ["g++", *COMMON, "-O3", "-g1", *runtime], cache)
        objects = [str(job.result()) for job in jobs]
    return _once(cache / f"{sources[0].stem}-{variant}-{_hash(*objects, *link)}", ["g++", *objects, *link])


def edited(name: str, files: Iterable[Path], edits: Mapping[str, Sequence[tuple[str, str]]]) -> Path:
    """A folder with copies of files, pieces of whose text are replaced. Each piece must be there, and only once.

    Args:
        name: of the folder.
        edits: for each file's name (old, new) texts, replaced in turn.
    """
    folder = CACHE / f"edited-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = list(files)
    assert edits.keys() <= {path.name for path in paths}
    for path in paths:
        text = path.read_text()
        for old, new in edits.get(path.name, ()):
            found = text.count(old)
            assert found == 1, f"{path.name} has this {found} times: {old}"
            text = text.replace(old, new)
        (folder / path.name).write_text(text)
    return folder


def compile_for_gpus(source: Path, architectures: Sequence[int], *, cache: Path = CACHE) -> Path:
    """The object that nvcc makes of a source, with code for sm_80 and so on. Warnings are errors here too."""
    codes = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in architectures]
    cache.mkdir(parents=True, exist_ok=True)
    return _compile(source, _digest(_headers([source])), ["nvcc", "-std=c++17", *codes], cache)


def _start(pool: Executor, sources: Sequence[Path], command: Sequence[str], cache: Path) -> list[Future[Path]]:
    headers = _digest(_headers(sources))
    return [pool.submit(_compile, source, headers, command, cache) for source in sources]


def _headers(sources: Iterable[Path]) -> list[Path]:
    ours = [path for folder in INCLUDE for path in (REPOSITORY / folder).rglob("*.h")]
    return sorted({*ours, *(path for source in sources for path in source.parent.glob("*.h"))})


def _digest(paths: Iterable[Path]) -> str:
    return _hash(*(part for path in paths for part in (str(path), path.read_text())))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(source: Path, headers: str, command: Sequence[str], cache: Path) -> Path:
    include = [part for folder in INCLUDE for part in ("-I", str(REPOSITORY / folder))]
    name = f"{source.stem}-{_hash(str(source), source.read_text(), headers, _version(command[0]), *command)}.o"
    return _once(cache / name, [*command, *include, "-c", str(source)])


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _once(output: Path, command: Sequence[str]) -> Path:
    """Run a compiler unless its output is there, which appears whole or not at all: several may build at once."""
    if output.exists():
        return output
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        unfinished = Path(folder) / output.name
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
        if done.returncode or done.stderr:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        os.replace(unfinished, output)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description="Build CUDA sources to run on the CPU.")
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    shutil.copy(build([source.resolve() for source in arguments.sources], arguments.variant), arguments.output)


if __name__ == "__main__":
    main()
