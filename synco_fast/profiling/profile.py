"""`synco-fast profile`: a run's step taken apart, and the report about it."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from synco_fast import __version__, stages
from synco_fast.config import Config
from synco_fast.data import operator
from synco_fast.data.index import Index
from synco_fast.engine.distributed import Processes
from synco_fast.engine.run import check, find_data, joined
from synco_fast.engine.speed import Speed, choose_algorithms
from synco_fast.errors import UserError
from synco_fast.evaluation.report import write_page
from synco_fast.files import check_folder, make_folder, write_atomically, write_text_atomically
from synco_fast.machine import device_name
from synco_fast.ops import HardNegatives
from synco_fast.profiling import op
from synco_fast.profiling.advice import Setting, advice
from synco_fast.profiling.estimates import difference, quantiles
from synco_fast.profiling.page import page
from synco_fast.profiling.peak import encoder_flops, product_peak
from synco_fast.profiling.recorder import StageRecorder, StepTimes
from synco_fast.profiling.rounds import interleaved, wall_clock
from synco_fast.profiling.subject import Batches, Subject, Views
from synco_fast.profiling.text import table
from synco_fast.profiling.trace import Traced, trace
from synco_fast.profiling.verdict import Numbers, judge

FILES = ("profile.json", "report.html", "trace.json.gz")
DATA_WAIT = "data wait"
STAGES = (DATA_WAIT, *stages.STAGES)

_WARM_UP = 3
_WARM_UP_GRAPH = 6  # eager steps, capture, and a first replay
_TRACED_STEPS = 3
_ENCODERS = ("query forward", "key forward", "backward")


def run(config: Config, *, source: str, output: Path, steps: int, rounds: int, synthetic: bool) -> None:
    """Profile the training step of a configuration; report on standard output and in a folder.

    Args:
        config: of a pretraining run, whose own output folder is left alone. source: where it came from.
        output: folder for `profile.json`, `report.html` and `trace.json.gz`; may hold an earlier profile.
        steps: steps timed stage by stage. rounds: of each comparison.
        synthetic: noise takes the place of the data, so there is no waiting for data.

    Raises:
        UserError: as for pretraining, or the output folder cannot be used; nothing has been written.
    """
    check_folder(output, FILES, "profile")
    if config.loss.class_oracle:
        raise UserError("loss.class_oracle = true: profile takes steps without labels; set it to false to profile")
    with joined(config) as processes:
        speed = check(config, processes)
        index = None if synthetic else find_data(config, processes)
        choose_algorithms(processes.device, config.trainer.deterministic)
        result, traced = measure(config, processes, speed, index, steps, rounds)
        result["about"]["source"] = source
        if processes.is_main:
            _write(output, result, traced)
            print(table(result))
            print(f"report: {output / 'report.html'}")


def measure(
    config: Config, processes: Processes, speed: Speed, index: Index | None, steps: int, rounds: int
) -> tuple[dict[str, Any], Traced]:
    """All of `profile.json`, and the trace. All processes call it and take the same steps."""
    # Inside a graph nothing can be timed, and stages on two streams have no times of their own.
    timed = dataclasses.replace(speed, cuda_graph=False, key_stream=False)
    say = _Say(processes)
    say("building the model")
    subject, batches = Subject(config, processes, timed), Batches(config, processes, index)
    try:
        say(f"{steps} steps, stage by stage")
        views = _warm_up(subject, batches)
        host, device = record_steps(subject, batches, steps, wait=index is not None)
    finally:
        batches.close()
    say(f"{_TRACED_STEPS} steps under torch.profiler")
    traced = trace(subject, views, _TRACED_STEPS)
    say(f"the op without each kind of negative, {rounds} rounds")
    operands = op.operands(subject, views)
    result: dict[str, Any] = {
        "about": _about(config, processes, index, steps, rounds),
        "speed": {"configured": dataclasses.asdict(speed), "profiled": dataclasses.asdict(timed)},
        "step": _summary(device, config.data.batch_size)
        | {"per_step": [_row(times) for times in device], "host_per_step": [_row(times) for times in host]},
        "op": op.measure(operands, subject.hard, rounds) | {"calls_a_step": config.trainer.accumulate},
        "operators": traced.operators,
        "memory": {"devices": traced.memory, "stages": traced.stages},
    }
    say(f"the step without synthetic negatives, {rounds} rounds")
    result["synthetic_negatives"] = _overhead(subject, views, rounds)
    say("the device's peak")
    result["encoders"] = _encoders(config, processes, device)
    if speed != timed:
        del subject, operands
        subject = Subject(config, processes, speed)
    result["configured_step"] = _configured(subject, views, steps)
    setting = Setting(
        config,
        speed,
        processes.device.type,
        processes.world_size,
        None if index is None else operator.resolve(config.data.augmentation, processes.device),
        bool(index and index.shards),
        result["op"]["backend"],
        result["op"]["fastest_backend"],
    )
    result["verdict"] = _verdict(numbers_of(config, result, traced), setting)
    return result, traced


def record_steps(
    subject: Subject, batches: Batches, steps: int, *, wait: bool
) -> tuple[list[StepTimes], list[StepTimes]]:
    """Take steps, each with its stages, by the host's clock and by the device's; with `wait` from the next batch on."""
    recorder = StageRecorder(subject.device)
    with stages.recorded(recorder):
        for _ in range(steps):
            views = None if wait else next(batches)
            with recorder.step():
                if views is None:
                    with recorder.stage(DATA_WAIT):
                        views = next(batches)
                subject.take(views)
    return recorder.host(), recorder.device()


def _warm_up(subject: Subject, batches: Batches) -> Views:
    for _ in range(_WARM_UP):
        views = next(batches)
        subject.take(views)
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
    return views


def _summary(steps: list[StepTimes], batch_size: int) -> dict[str, Any]:
    """Each stage that occurred, in order, then what is left: quantiles, and the share of all steps' time."""
    whole = sum(times.wall for times in steps)
    columns = {name: [times.stages.get(name, 0) for times in steps] for name in STAGES}
    columns = {name: column for name, column in columns.items() if any(name in times.stages for times in steps)}
    columns["unattributed"] = [times.unattributed for times in steps]
    return {
        "time": quantiles([times.wall for times in steps]),
        "images_per_second": len(steps) * batch_size / (whole / 1e9),
        "stages": {name: quantiles(column) | {"share": sum(column) / whole} for name, column in columns.items()},
    }


def _row(times: StepTimes) -> dict[str, Any]:
    return {"step_ns": times.wall, "stages_ns": times.stages, "unattributed_ns": times.unattributed}


def _overhead(subject: Subject, views: Views, rounds: int) -> dict[str, Any] | None:
    """What the synthetic negatives add to a step, data wait aside; None where there are none."""
    if not subject.hard.total:
        return None
    choices = {"with": subject.hard, "without": HardNegatives.none()}
    steps = {name: _step(subject, views, hard) for name, hard in choices.items()}
    times = interleaved(steps, wall_clock, subject.device, rounds)
    added, without = difference(times["with"], times["without"]), quantiles(times["without"])
    return {
        "with": quantiles(times["with"]),
        "without": without,
        "added": added,
        "share_of_without": added["median_ms"] / without["median_ms"],
        "rounds_ns": times,
    }


def _step(subject: Subject, views: Views, hard: HardNegatives) -> Any:
    return lambda: subject.take(views, hard)


def _configured(subject: Subject, views: Views, steps: int) -> dict[str, Any] | None:
    """On a GPU, the whole step as it is configured, with no loader beside it."""
    if subject.device.type != "cuda":
        return None
    for _ in range(_WARM_UP_GRAPH):
        subject.take(views)
    recorder = StageRecorder(subject.device)
    for _ in range(steps):
        with recorder.step():
            subject.take(views)
    times = [step.wall for step in recorder.device()]
    return {"time": quantiles(times), "steps_ns": times}


def _encoders(config: Config, processes: Processes, steps: list[StepTimes]) -> dict[str, Any]:
    """FLOP/s of the encoders in their stages, beside those of a matrix product."""
    flops = encoder_flops(config, config.data.batch_size // processes.world_size)
    seconds = sum(times.stages[name] for times in steps for name in _ENCODERS) / len(steps) / 1e9
    precision = config.trainer.precision
    peak = product_peak(processes.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    achieved = flops / seconds
    return {"flops_a_step": flops, "flops": achieved, "product_flops": peak, "share": achieved / peak}


def numbers_of(config: Config, result: dict[str, Any], traced: Traced) -> Numbers:
    """What the verdict is judged by."""
    step, configured = result["step"], result["configured_step"]
    shares = {name: row["share"] for name, row in step["stages"].items()}
    gpu_busy = None
    if traced.device_ms is not None and configured is not None:
        gpu_busy = min(1.0, traced.device_ms / configured["time"]["median_ms"])
    return Numbers(
        data_wait=shares.get(DATA_WAIT),
        gpu_busy=gpu_busy,
        communication=max(shares.get("gather", 0.0), traced.nccl_ms / step["time"]["median_ms"]),
        op=shares["op"],
        peak=result["encoders"]["share"],
        precision=config.trainer.precision,
    )


def _verdict(numbers: Numbers, setting: Setting) -> dict[str, Any]:
    verdict, values = judge(numbers), setting.config.model_dump()
    rows = [
        {"key": key, "now": values[key.partition(".")[0]][key.partition(".")[2]], "set": how}
        for key, how in advice(verdict.limit, setting).items()
    ]
    return {
        "limit": verdict.limit,
        "evidence": verdict.evidence,
        "advice": rows,
        "numbers": dataclasses.asdict(numbers),
    }


def _about(config: Config, processes: Processes, index: Index | None, steps: int, rounds: int) -> dict[str, Any]:
    cuda = processes.device.type == "cuda"
    return {
        "synco_fast": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "device": device_name(processes.device),
        "device_type": processes.device.type,
        "threads": torch.get_num_threads(),
        "processes": processes.world_size,
        "started": time.strftime("%Y-%m-%d %H:%M %Z"),
        "steps": steps,
        "rounds": rounds,
        "images": None if index is None else len(index),
        "config": config.model_dump(),
    }


def _write(output: Path, result: dict[str, Any], traced: Traced) -> None:
    make_folder(output)
    write_atomically(output / "trace.json.gz", lambda file: file.write(traced.file))
    write_text_atomically(output / "profile.json", json.dumps(result, indent=1, allow_nan=False))
    write_page(output / "report.html", page(result, output))


class _Say:
    """Progress on standard error, by the main process."""

    def __init__(self, processes: Processes) -> None:
        self._quiet = not processes.is_main

    def __call__(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)
