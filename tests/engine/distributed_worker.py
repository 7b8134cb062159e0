"""Run by torchrun in tests: one gradient of one global batch, an epoch's samples, what 20 steps leave on each rank."""

import sys
from pathlib import Path

import torch

from synco_fast.config import load
from synco_fast.engine import distributed
from synco_fast.engine.output import claimed
from synco_fast.engine.run import build


def freeze_batch_norm(module: torch.nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, torch.nn.BatchNorm2d):
            child.eval()


def main(config_file: str, folder: str, mode: str, *overrides: str) -> None:
    """`gradient`: of the first step, batch norm frozen, and its loss. `loader`: an epoch's samples. `steps`: train."""
    config = load(Path(config_file), [*overrides, f"output={folder}/run"])
    processes = distributed.start(torch.device("cpu"))
    trainer = build(config, processes, None)
    saved: dict[str, object] = {}
    if mode == "gradient":
        freeze_batch_norm(trainer.contrast)
        gradients: dict[str, torch.Tensor] = {}
        optimizer = trainer.train_step.optimizer
        step = optimizer.step

        def keep_gradients() -> None:
            for name, parameter in trainer.contrast.query_encoder.named_parameters():
                assert parameter.grad is not None
                gradients[name] = parameter.grad.clone()
            step()

        optimizer.step = keep_gradients  # type: ignore[assignment, method-assign]
        trainer.take_step(next(trainer.loader))
        saved = {"loss": trainer.train_step.meter.read()["loss"], "gradients": gradients}
    elif mode == "loader":
        steps = trainer.steps_per_epoch
        samples = torch.cat([next(trainer.loader).samples for _ in range(steps)])
        trainer.loader.close()
        saved = {"samples": samples, "steps": steps, "skipped": trainer.loader.bad.found}
        saved["state"] = trainer.state()["loader"]
    else:
        trainer.run(claimed(trainer.output, processes, "output", lambda: None))
    saved |= {"model": trainer.contrast.state_dict()}
    torch.save(saved, f"{folder}/rank-{processes.rank}-of-{processes.world_size}.pt")
    processes.barrier()
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
