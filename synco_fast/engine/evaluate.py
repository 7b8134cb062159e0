"""Evaluations of a checkpoint on its own, without the run that wrote it."""

from pathlib import Path
from typing import Any

from synco_fast.config import Config, Knn
from synco_fast.data.index import scan
from synco_fast.engine import checkpoints, distributed
from synco_fast.engine.probe import KnnProbe, held_out_like
from synco_fast.errors import UserError
from synco_fast.models.encoders import Encoder


def knn(checkpoint: Path, data: Path, *, k: int, temperature: float) -> dict[str, float | int]:
    """kNN accuracy of a checkpoint's backbone: `train/` of the data is the bank, `val/` or `test/` is classified.

    Images are prepared as the run's configuration says.

    Raises:
        UserError: the checkpoint cannot be read, or the data has no classes or no held-out split.
    """
    state = checkpoints.load(checkpoint)
    config = checkpoints.saved_config(state, checkpoint)
    config = config.model_copy(update={"knn": Knn(k=k, temperature=temperature)})
    bank = scan(data)
    test = held_out_like(bank, data)
    try:
        encoder = query_encoder(state, config)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{checkpoint}: its weights do not fit its own configuration: {reason}") from error
    # Where the run was pretrained says nothing about where it is evaluated.
    processes = distributed.start(distributed.choose_device("auto"))
    try:
        return KnnProbe(config, processes, bank, test).measure(encoder.to(processes.device))
    finally:
        distributed.stop()


def query_encoder(state: dict[str, Any], config: Config) -> Encoder:
    """The query encoder of a checkpoint, on the CPU. In evaluation all batch norm modes are plain batch norm."""
    model = config.model
    encoder = Encoder(model.arch, stem=model.stem, dim=model.dim, mlp=model.mlp)
    prefix = "query_encoder."
    encoder.load_state_dict(
        {name.removeprefix(prefix): value for name, value in state["model"].items() if name.startswith(prefix)}
    )
    return encoder
