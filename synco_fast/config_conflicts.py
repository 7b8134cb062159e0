"""Values of a configuration that cannot work together, and what to do about it.

The schema judges each key by itself (`config.py`); here are combinations, and what depends on the number of processes.
"""

import difflib
from typing import TYPE_CHECKING

from synco_fast import config_text
from synco_fast.ops import KINDS

if TYPE_CHECKING:
    from synco_fast.config import Config, Data, Model

ORACLE_BACKENDS = ("eager", "reference")
_METHOD_KINDS = {"moco": (), "mochi": ("interpolated", "mixed"), "synco": KINDS}


def conflicts(config: "Config") -> list[str]:
    """Combinations that cannot work, whatever the number of processes."""
    data, queue, negatives = config.data, config.queue, config.negatives
    problems = _architecture_conflicts(config.model)
    for kind in KINDS:
        count = getattr(negatives, kind)
        if count and kind not in _METHOD_KINDS[config.method]:
            problems.append(
                f"negatives.{kind} = {count}: method {config.method} makes no {kind} negatives; "
                f"set it to 0, or method to synco"
            )
    if problems:
        return problems
    try:
        hard = negatives.hard()
    except ValueError as error:
        return [f"negatives.{error}"]
    if config.method != "moco" and not hard.total:
        problems.append(
            f"negatives: method {config.method} needs at least one synthetic negative; set method to moco to have none"
        )
    if hard.n_hard > queue.size:
        problems.append(f"negatives.n_hard = {hard.n_hard}: must be at most queue.size = {queue.size}")
    if config.loss.class_oracle and config.loss.backend not in ("auto", *ORACLE_BACKENDS):
        problems.append(
            f"loss.class_oracle = true: loss.backend = {config.loss.backend} has no class oracle; "
            f"set it to auto, {' or '.join(ORACLE_BACKENDS)}"
        )
    if queue.size % data.batch_size:
        problems.append(f"queue.size = {queue.size}: must be a multiple of data.batch_size = {data.batch_size}")
    if data.batch_size % config.trainer.accumulate:
        problems.append(
            f"trainer.accumulate = {config.trainer.accumulate}: must divide data.batch_size = {data.batch_size}"
        )
    problems += filter(None, [resize_conflict(data)])
    if config.optim.milestones != sorted(set(config.optim.milestones)):
        problems.append(f"optim.milestones = {config.optim.milestones}: must ascend without repeats")
    if hard.total and negatives.warmup_epochs >= config.trainer.epochs:
        problems.append(
            f"negatives.warmup_epochs = {negatives.warmup_epochs}: must be below trainer.epochs = "
            f"{config.trainer.epochs}, or no synthetic negative is ever made"
        )
    if config.optim.schedule == "step" and config.optim.milestones[-1:] >= [config.trainer.epochs]:
        problems.append(
            f"optim.milestones = {config.optim.milestones}: must be below trainer.epochs = {config.trainer.epochs}"
        )
    if config.optim.warmup_epochs >= config.trainer.epochs:
        problems.append(
            f"optim.warmup_epochs = {config.optim.warmup_epochs}: "
            f"must be below trainer.epochs = {config.trainer.epochs}"
        )
    return problems + _speed_conflicts(config) or _group_conflicts(config, processes=1)


def resize_conflict(data: "Data") -> str | None:
    if data.eval_resize >= data.image_size:
        return None
    return f"data.eval_resize = {data.eval_resize}: must be at least data.image_size = {data.image_size}"


def _speed_conflicts(config: "Config") -> list[str]:
    speed, problems = config.speed, []
    if speed.key_twin and config.trainer.precision != "bf16":
        problems.append(f"speed.key_twin = true: needs trainer.precision = bf16, not {config.trainer.precision}")
    if speed.recompute and speed.compile is True:
        problems.append("speed.recompute = true: cannot be compiled; set speed.compile to false")
    if speed.optimizer == "apex" and config.optim.name != "sgd":
        problems.append(f"speed.optimizer = apex: is for optim.name = sgd, not {config.optim.name}")
    if speed.optimizer == "apex" and speed.cuda_graph:
        problems.append("speed.optimizer = apex: a CUDA graph would keep its first learning rate; choose one")
    return problems


def _architecture_conflicts(model: "Model") -> list[str]:
    from synco_fast.models.encoders import NARROW, architectures  # torchvision takes a second to import

    if model.arch not in architectures():
        nearest = difflib.get_close_matches(model.arch, architectures(), n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(architectures())}"
        return [f"model.arch = {model.arch!r}: no such encoder; {hint}"]
    if model.arch == NARROW and model.stem != "imagenet":
        return [f"model.stem = {model.stem}: {NARROW} has one stem of its own; leave model.stem at imagenet"]
    return []


def check_processes(config: "Config", processes: int) -> None:
    """Refuse what cannot work with this number of processes.

    Raises:
        UserError: the batch does not divide, or batch norm would leak or cannot do what its mode says.
    """
    problems = []
    if config.data.batch_size % (processes * config.trainer.accumulate):
        problems = [
            f"data.batch_size = {config.data.batch_size}: must be a multiple of {processes} processes x "
            f"trainer.accumulate = {config.trainer.accumulate}"
        ]
    elif config.bn.mode in ("shuffle", "sync") and processes == 1:
        problems = [f"bn.mode = {config.bn.mode}: needs 2 or more processes; use split on one"]
    problems = problems or _group_conflicts(config, processes)
    if problems:
        plural = "" if processes == 1 else "es"
        raise config_text.listing(f"the configuration cannot be used with {processes} process{plural}", problems)


def _group_conflicts(config: "Config", processes: int) -> list[str]:
    """Mode split must have whole groups, and 2 or more of them: with one, the keys have nowhere to be shuffled to."""
    samples = config.data.batch_size // (processes * config.trainer.accumulate)
    groups, rest = divmod(samples, config.bn.group_size)
    if config.bn.mode != "split" or (groups >= 2 and not rest):
        return []
    return [
        f"bn.group_size = {config.bn.group_size}: a process's {samples} samples must divide into 2 or more whole "
        f"groups; choose a divisor of {samples}"
        + (", or bn.mode = shuffle" if processes > 1 else ", or a larger data.batch_size")
    ]
