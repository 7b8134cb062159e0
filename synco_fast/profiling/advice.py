"""The keys to turn for each limit, less those that are set already, cannot be set or would make the step slower."""

from typing import NamedTuple

from synco_fast.config import Config
from synco_fast.engine.speed import Speed
from synco_fast.models.encoders import NARROW


class Setting(NamedTuple):
    """What a run has already.

    Attributes:
        config: of the run. speed: as resolved. device: "cpu" or "cuda". processes: how many.
        augmentation: "compiled" or "plain"; None without data. shards: the data lies in some.
        backend: of the op, in use. fastest: of those that can take its calls.
    """

    config: Config
    speed: Speed
    device: str
    processes: int
    augmentation: str | None
    shards: bool
    backend: str
    fastest: str


def advice(limit: str, setting: Setting) -> dict[str, str]:
    """For each key that helps against a limit of `judge`, how to set it. May be empty."""
    config, speed, cuda = setting.config, setting.speed, setting.device == "cuda"
    helps = {
        "data.root": not setting.shards,
        "data.augmentation": setting.augmentation == "plain",
        "speed.cuda_graph": cuda and setting.processes == 1 and not (speed.cuda_graph or speed.apex),
        "speed.compile": cuda and not (speed.compile or speed.recompute),  # on a CPU it is the slower
        "speed.channels_last": not speed.channels_last,
        "trainer.precision": config.trainer.precision == "fp32",
        "trainer.device": not speed.cuda_graph,
        "bn.mode": config.bn.mode in ("shuffle", "sync"),
        "loss.backend": setting.backend != setting.fastest,
        "queue.dtype": config.queue.dtype == "fp32" or (config.queue.dtype == "fp16" and not cuda),
        "negatives.n_hard": config.negatives.hard().total > 0,
        "model.arch": config.model.arch != NARROW,
    }
    return {key: how for key, how in _ADVICE[limit].items() if helps.get(key, True)}


_ADVICE = {
    "input-bound": {
        "data.threads": "more, up to the CPU cores that each process has",
        "data.prefetch": "more, where the wait comes in bursts",
        "data.root": "shards, which `synco-fast data pack` makes, where files are small and storage is slow",
        "data.augmentation": "compiled, which `synco-fast doctor` must call ok; plain is many times slower",
    },
    "launch-bound": {
        "speed.cuda_graph": "true: the whole step is launched at once",
        "speed.compile": "true, which needs Triton: fewer and longer kernels",
    },
    "communication-bound": {
        "trainer.accumulate": "more, with a larger data.batch_size: gradients are averaged once a step",
        "bn.mode": "split, in two or more groups: statistics and shuffling stay within each process",
    },
    "op-bound": {
        "loss.backend": "auto: the fastest that can be used",
        "queue.dtype": "bf16 where the device has instructions for it, else fp16",
        "negatives.n_hard": "less, which makes selection and parents cheaper, or fewer vectors of the costliest kind",
        "queue.size": "less: the op's products are linear in it",
    },
    "memory-bound": {
        "trainer.precision": "bf16, where the device has instructions for it: half the bytes",
        "speed.channels_last": "true, the default",
        "speed.compile": "true, which needs Triton: fused kernels pass over activations fewer times",
    },
    "compute-bound": {
        "data.image_size": "less: convolutions are linear in the pixels",
        "model.arch": "a smaller one",
        "trainer.device": "more of them, under torchrun",
    },
}
