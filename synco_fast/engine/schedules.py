"""Learning rate as a pure function of the place in the run, so that there is no schedule to save or restore."""

import math

from synco_fast.config import Optim


def scaled(optim: Optim, batch_size: int) -> Optim:
    """With the `lr` that `lr_scaling` gives batches of that size, over all processes."""
    power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[optim.lr_scaling]
    return optim.model_copy(update={"lr": optim.lr * (batch_size / 256) ** power, "lr_scaling": "none"})


def learning_rate(optim: Optim, epochs: int, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step.

    Args:
        optim: `schedule`, `update`, `milestones`, `decay`, `warmup_epochs`, `lr`.
        epochs: length of the run.
        epoch: from 0. step: within the epoch, from 0.
    """
    now = epoch + step / steps_per_epoch
    # The warm-up moves by steps even where the schedule moves by epochs: a whole first epoch at rate 0 is of no use.
    if now < optim.warmup_epochs:
        return optim.lr * (now + 1 / steps_per_epoch) / optim.warmup_epochs
    if optim.update == "epoch":
        now = epoch
    if optim.schedule == "step":
        return optim.lr * optim.decay ** sum(now >= milestone for milestone in optim.milestones)
    share = (now - optim.warmup_epochs) / (epochs - optim.warmup_epochs)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * share))
