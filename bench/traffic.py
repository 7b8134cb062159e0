"""What a training step sends: bytes that each process puts on the wire, counted from what the step exchanges.

An all-reduce of N bytes is counted as a ring's, 2 (W - 1) / W N, an all-gather as (W - 1) N, an all-to-all as what goes
to others. Protocol overhead, and whatever else an implementation sends, is for a measurement to show.
"""

from torch import nn

from synco_fast.config import DTYPES, Config
from synco_fast.models.encoders import Encoder

_FLOAT = 4


def sent(config: Config, processes: int) -> dict[str, float]:
    """Bytes of one step by what they are for, of each of `processes` processes on CPUs."""
    data, share = config.data, (processes - 1) / processes
    samples, ring = data.batch_size / processes, 2 * share
    bf16 = config.trainer.precision == "bf16"
    encoder = Encoder(config.model.arch, stem=config.model.stem, dim=config.model.dim, mlp=config.model.mlp)
    found = {
        "gradients": ring * _FLOAT * sum(parameter.numel() for parameter in encoder.parameters()),
        "keys": (processes - 1) * samples * config.model.dim * _FLOAT,
        # The guard's verdict, and whether to stop or to save.
        "control": ring * 3 * _FLOAT,
    }
    if config.bn.mode == "shuffle":
        pixel = 2 if bf16 else DTYPES[data.dtype].itemsize
        found["images"] = share * samples * 3 * data.image_size**2 * pixel
        found["keys on their way back"] = share * samples * config.model.dim * (2 if bf16 else _FLOAT)
    if config.bn.mode == "sync":
        channels = sum(layer.num_features for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d))
        # Means and variances: forward of queries and of keys, and backward of queries.
        found["batch norm"] = 3 * config.trainer.accumulate * ring * 2 * channels * _FLOAT
    return found
