"""A few steps under torch.profiler: a trace for Perfetto, the operators that take longest, memory over a step."""

import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from synco_fast import stages
from synco_fast.profiling.recorder import RangeRecorder
from synco_fast.profiling.subject import Subject, Views

STEP = "step"
_TOP = 15
_POINTS = 1500
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_CUDA = 1  # in the field "Device Type" of the trace


class Traced(NamedTuple):
    """What the profiler saw, times a step. No loader was at work.

    Attributes:
        file: the trace, gzipped JSON. operators: the longest by their own time. memory: by device, [ms, bytes] over the
            last step. stages: the last step's ranges. device_ms: in which any CUDA kernel or copy ran, None on a CPU;
            nccl_ms: in which NCCL's did and no other.
    """

    file: bytes
    operators: list[dict[str, Any]]
    memory: dict[str, list[list[float]]]
    stages: list[dict[str, Any]]
    device_ms: float | None
    nccl_ms: float


def trace(subject: Subject, views: Views, steps: int) -> Traced:
    """Take steps on a batch under the profiler. A loader at work beside them would count as the step's."""
    cuda = subject.device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it speaks of a missing GPU as an error
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, profile_memory=True) as profiler, stages.recorded(RangeRecorder()):
        for _ in range(steps):
            with record_function(STEP):
                subject.take(views)
            if cuda:
                torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        profiler.export_chrome_trace(str(path))
        file = path.read_bytes()
    events = json.loads(gzip.decompress(file))["traceEvents"]
    kernels = [event for event in events if event.get("cat") in _ON_DEVICE]
    start, end = _last_step(events)
    others = [event for event in kernels if "nccl" not in event["name"].lower()]
    return Traced(
        file,
        operators(profiler, steps, cuda),
        memory(events, start, end),
        _stages(events, start, end),
        covered_ms(kernels) / steps if cuda else None,
        (covered_ms(kernels) - covered_ms(others)) / steps,
    )


def operators(profiler: Any, steps: int, cuda: bool) -> list[dict[str, Any]]:
    """What has most time of its own: name, calls and milliseconds a step, share of all. On CUDA these are kernels."""
    rows = [
        (row.self_device_time_total if cuda else row.self_cpu_time_total, row)
        for row in profiler.key_averages()
        if not row.is_user_annotation and row.key != "[memory]" and (row.device_type != DeviceType.CPU) == cuda
    ]
    total = sum(time for time, _ in rows) or 1
    top = sorted(rows, key=lambda pair: pair[0], reverse=True)[:_TOP]
    return [
        {"name": row.key, "calls": row.count / steps, "ms": time / 1e3 / steps, "share": time / total}
        for time, row in top
        if time
    ]


def memory(events: list[dict[str, Any]], start: float, end: float) -> dict[str, list[list[float]]]:
    """Allocated bytes from start to end (microseconds of the trace) by device, as [milliseconds since start, bytes].

    A CUDA device's are all of PyTorch's; a CPU's are those allocated since the profiler began, less those freed.
    """
    found: dict[str, list[list[float]]] = {}
    marks = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    for event in marks:
        args = event["args"]
        device = f"cuda:{args['Device Id']}" if args["Device Type"] == _CUDA else "cpu"
        points = found.setdefault(device, [[0.0, max(0, args["Total Allocated"] - args["Bytes"])]])
        if event["ts"] < start:
            points[0][1] = args["Total Allocated"]
        elif event["ts"] <= end:
            points.append([(event["ts"] - start) / 1e3, args["Total Allocated"]])
    return {device: [*_thinned(points), [(end - start) / 1e3, points[-1][1]]] for device, points in found.items()}


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """Of each few in a row the highest, so that a peak stays."""
    n = -(-len(points) // _POINTS)
    return [max(points[i : i + n], key=lambda point: point[1]) for i in range(0, len(points), n)]


def _last_step(events: list[dict[str, Any]]) -> tuple[float, float]:
    last = max((event for event in _ranges(events) if event["name"] == STEP), key=lambda event: event["ts"])
    return last["ts"], last["ts"] + last["dur"]


def _stages(events: list[dict[str, Any]], start: float, end: float) -> list[dict[str, Any]]:
    """The stages from start to end on the host, in order."""
    inside = [event for event in _ranges(events) if event["name"] in stages.STAGES and start <= event["ts"] <= end]
    return [
        {
            "name": event["name"],
            "start_ms": (event["ts"] - start) / 1e3,
            "end_ms": (event["ts"] + event["dur"] - start) / 1e3,
        }
        for event in sorted(inside, key=lambda event: event["ts"])
    ]


def _ranges(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event.get("cat") == "user_annotation"]


def covered_ms(events: list[dict[str, Any]]) -> float:
    """Milliseconds in which at least one of them was going on."""
    covered, reached = 0.0, 0.0
    for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered / 1e3
