"""What a training step sends: bytes that each process puts on the wire, counted from what the step exchanges.

An all-reduce of N bytes is counted as a ring's, 2 (W - 1) / W N, an all-gather as (W - 1) N, an all-to-all as what goes
to others. Protocol overhead, and whatever else an implementation sends, is for a measurement to show.
"""

from collections.abc import Sequence

from torch import nn

from synco_fast.config import Config, parse
from synco_fast.models.encoders import Encoder
from synco_fast.models.shuffle import share

_FLOAT = 4


def sent(config: Config, processes: int) -> dict[str, float]:
    """Bytes of one step by what they are for, of each of `processes` processes on CPUs."""
    data, samples = config.data, config.data.batch_size // processes
    ring = 2 * (processes - 1) / processes
    bf16 = config.trainer.precision == "bf16"
    encoder = Encoder(config.model.arch, stem=config.model.stem, dim=config.model.dim, mlp=config.model.mlp)
    found = {
        "gradients": ring * _FLOAT * sum(parameter.numel() for parameter in encoder.parameters()),
        "keys": (processes - 1) * samples * config.model.dim * _FLOAT,
        # The guard's verdict, and whether to stop or to save.
        "control": ring * 3 * _FLOAT,
    }
    if config.bn.mode == "shuffle":
        pixel = 2 if bf16 else _FLOAT  # they are what the first convolution takes
        dealt = samples // config.trainer.accumulate
        moved = config.trainer.accumulate * (dealt - share(dealt, processes, 0, 0))
        found["images"] = moved * 3 * data.image_size**2 * pixel
        found["keys on their way back"] = moved * config.model.dim * (2 if bf16 else _FLOAT)
    if config.bn.mode == "sync":
        channels = sum(layer.num_features for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d))
        # Means and variances: forward of queries and of keys, and backward of queries.
        found["batch norm"] = 3 * config.trainer.accumulate * ring * 2 * channels * _FLOAT
    return found


def model(processes: Sequence[int], samples: int = 32, arch: str = "resnet50") -> str:
    """A table of MB that each process sends in a step of ImageNet pretraining in bf16, by mode of batch norm."""
    modes = ("split", "shuffle", "sync")
    lines = [f"| GPUs | {' | '.join(modes)} | of it gradients |", "| ---: |" + " ---: |" * (len(modes) + 1)]
    for number in processes:
        rows = {mode: sent(_published(mode, number, samples, arch), number) for mode in modes}
        cells = [f"{sum(row.values()) / 1e6:.1f}" for row in rows.values()]
        lines.append(f"| {number} | {' | '.join(cells)} | {rows['split']['gradients'] / 1e6:.1f} |")
    return "\n".join(lines)


def _published(mode: str, processes: int, samples: int, arch: str) -> Config:
    batch = samples * processes
    return parse(
        {
            "data": {"batch_size": batch},
            "model": {"arch": arch},
            "bn": {"mode": mode, "group_size": samples // 2},
            "queue": {"size": 4 * batch},
            "negatives": {"n_hard": min(1024, 4 * batch)},
        },
        "bench.traffic",
    )


if __name__ == "__main__":
    print(model([8, 16, 32, 64, 128, 256, 512]))
