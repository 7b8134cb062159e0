"""Peak memory of one step beyond what was there before it.

On a GPU: PyTorch's allocator knows. (Native code that calls cudaMalloc itself would go unseen; ours does not.)

On a CPU: what the kernel says the process held at most, VmHWM, minus what it held before, VmRSS: PyTorch's profiler
sees only PyTorch's own tensors, and native code calls malloc. Each case runs in a fresh process (`python -m
bench.memory`), as memory that an earlier one freed and the allocator kept would hide a later one's need. That process
runs the contender once on a few rows, so that libraries and threads are there; hands freed memory back (malloc_trim);
sets VmHWM back to VmRSS (5 to /proc/self/clear_refs, Linux only); and runs one step. Inputs are there before, and not
counted; scratch memory that the contender keeps for its next step is. Exact to about a megabyte.
"""

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from bench.case import Case, inputs
from bench.contenders import CONTENDERS, Step

_REPOSITORY = Path(__file__).parent.parent
_TIMEOUT = 1800


class Failed(Exception):
    """A case did not run; the message says why."""


def of_step_on_gpu(step: Step) -> int:
    """Bytes of PyTorch's allocator at the peak of a step, minus those before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def of_case_on_cpu(case: Case, threads: int) -> int | None:
    """Bytes, measured in a fresh process; None where the system does not say.

    Raises:
        Failed: the process did not end well, with its last words.
    """
    command = [sys.executable, "-m", "bench.memory", case.to_json(), str(threads)]
    try:
        child = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise Failed(f"one step took more than {_TIMEOUT} s") from None
    if child.returncode < 0:
        raise Failed(f"killed by signal {-child.returncode} when its memory was measured; most likely out of memory")
    if child.returncode:
        raise Failed((child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1])
    return json.loads(child.stdout.splitlines()[-1])


def _in_child(case: Case, threads: int) -> int | None:
    torch.set_num_threads(threads)
    _first_victim()
    contender = CONTENDERS[case.contender]
    # A compiled step is compiled for its sizes, and the compiler's memory is not the step's.
    warm_up = case if case.contender == "compiled" else case.small()
    contender.build(warm_up, inputs(warm_up))()
    step = contender.build(case, inputs(case))
    if case.contender == "compiled":
        step()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _first_victim() -> None:
    """Should memory run out, the kernel is to end this process and not its neighbours."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        return


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(json.dumps(_in_child(Case.from_json(sys.argv[1]), int(sys.argv[2]))))
