"""Detection with an exported ResNet, in detectron2, as MoCo measures it. detectron2 is imported when it is needed only.

    python -m synco_fast.evaluation.detection --config-file configs/detection/voc_r50_c4_24k.yaml --num-gpus 8 \
        MODEL.WEIGHTS OUT.pkl OUTPUT_DIR runs/voc
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.multiprocessing.spawn import ProcessExitedException

from synco_fast import __version__
from synco_fast.errors import EXIT_ERROR, UserError
from synco_fast.evaluation.session import RESULT, write_result
from synco_fast.files import sha256

_FILLED = ("backbone.", "roi_heads.res5.")
_HEAD = "Res5ROIHeadsExtraNorm"


def main() -> None:
    """Entry point: detectron2's own options; settings of its configuration follow, as KEY VALUE."""
    try:
        _require_detectron2()
        from detectron2.engine import default_argument_parser, launch

        args = default_argument_parser(epilog=__doc__).parse_args()
        _check_output(_configured(args), args)  # errors of which each process would tell with a traceback of its own
        launch(
            _run_or_tell,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except (UserError, ProcessExitedException) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)


def _run_or_tell(args: argparse.Namespace) -> None:
    """`run` in one of the processes, where an error of the user's is told by the first of them, without a traceback."""
    from detectron2.utils import comm

    try:
        run(args)
    except UserError as error:
        if comm.is_main_process():
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_ERROR)


def run(args: argparse.Namespace) -> None:
    """Train (or with --eval-only measure) one process's share, and write OUTPUT_DIR/result.json from the main one."""
    from detectron2.engine import default_setup
    from detectron2.utils import comm

    started = time.time()
    _register_head()
    cfg = _configured(args)
    default_setup(cfg, args)
    trainer = _trainer_class()(cfg)
    resumes = args.resume and trainer.checkpointer.has_checkpoint()
    if not resumes:
        _empty(trainer.model)
    trainer.resume_or_load(resume=args.resume)
    check_filled(trainer.model, cfg.MODEL.WEIGHTS)
    if args.eval_only:
        results = trainer.test(cfg, trainer.model)
    else:
        trainer.train()
        results = getattr(trainer, "_last_eval_results", None) or {}
    if comm.is_main_process():
        write_result(Path(cfg.OUTPUT_DIR), _result(cfg, args, results, started))


def check_filled(model: torch.nn.Module, source: str) -> None:
    """Refuse to go on with a backbone that a file did not fill: detectron2 only logs what did not fit.

    Args:
        model: whose backbone and res5 held NaN before the file was loaded. source: the file.

    Raises:
        UserError: naming the first of the tensors left, or that the file itself holds what is not finite.
    """
    tensors = _to_be_filled(model)
    left = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if left:
        raise UserError(
            f"MODEL.WEIGHTS {source}: {len(left)} of {len(tensors)} tensors of the backbone are missing in it, have "
            f"another shape or are not finite, {left[0]} among them; expected what `synco-fast export --format "
            f"detectron2` writes of a network of MODEL.RESNETS.DEPTH layers"
        )


def _empty(model: torch.nn.Module) -> None:
    for value in _to_be_filled(model).values():
        value.fill_(math.nan)


def _to_be_filled(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The numbers of the backbone and of res5, which share memory with the model; the norm that is added is new."""
    names = {name: name.removeprefix("module.") for name in model.state_dict()}
    return {
        name: value
        for name, value in model.state_dict().items()
        if names[name].startswith(_FILLED)
        and not names[name].startswith("roi_heads.res5.norm.")
        and value.is_floating_point()
    }


def _require_detectron2() -> None:
    try:
        import detectron2.engine  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"detectron2 cannot be imported ({error}): detection runs in it, and it is no dependency of synco-fast. "
            f"Build it from source for this torch, as in docs/transfer.md: "
            f"https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
        ) from error


def _register_head() -> None:
    """Res5ROIHeads with one more norm behind res5, which C4 lacks and weights that are no supervised ones need."""
    from detectron2.layers import get_norm
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads

    def build_res5_block(cls: Any, cfg: Any) -> tuple[Any, int]:
        res5, channels = Res5ROIHeads._build_res5_block.__func__(cls, cfg)
        res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return res5, channels

    if _HEAD not in ROI_HEADS_REGISTRY:
        head = type(_HEAD, (Res5ROIHeads,), {"_build_res5_block": classmethod(build_res5_block)})
        ROI_HEADS_REGISTRY.register(head)


def _trainer_class() -> Any:
    from detectron2.data import MetadataCatalog
    from detectron2.engine import DefaultTrainer
    from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

    def build_evaluator(cls: Any, cfg: Any, dataset: str) -> Any:
        kind = MetadataCatalog.get(dataset).evaluator_type
        if kind == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset)
        if kind == "coco":
            return COCOEvaluator(dataset, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))
        raise UserError(f"DATASETS.TEST {dataset}: its evaluator is {kind}, expected pascal_voc or coco")

    return type("Trainer", (DefaultTrainer,), {"build_evaluator": classmethod(build_evaluator)})


def _configured(args: argparse.Namespace) -> Any:
    from detectron2.config import get_cfg

    if not args.config_file:
        raise UserError("--config-file is not given: name one of configs/detection/*.yaml")
    cfg = get_cfg()
    merge(cfg, args.config_file, args.opts)
    cfg.freeze()
    if not Path(cfg.MODEL.WEIGHTS).is_file():
        raise UserError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r}: no such file; make one with `synco-fast export CHECKPOINT OUT.pkl "
            f"--format detectron2` and give MODEL.WEIGHTS OUT.pkl"
        )
    return cfg


def _check_output(cfg: Any, args: argparse.Namespace) -> None:
    """Refuse to replace another run's result."""
    result = Path(cfg.OUTPUT_DIR) / RESULT
    if result.exists() and not (args.resume or args.eval_only):
        raise UserError(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: holds a {RESULT} already; give OUTPUT_DIR another folder")


def merge(cfg: Any, file: str, settings: Sequence[str]) -> None:
    """Merge a file, then settings (KEY VALUE, and so on), into a configuration of detectron2's.

    Raises:
        UserError: either cannot be merged. detectron2 raises almost anything.
    """
    sources = {
        f"--config-file {file}": (lambda: cfg.merge_from_file(file, allow_unsafe=False)),
        f"KEY VALUE {shlex.join(settings)}": (lambda: cfg.merge_from_list(list(settings))),
    }
    for source, merged in sources.items():
        try:
            merged()
        except (AssertionError, AttributeError, LookupError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"{source}: detectron2 cannot use it: {reason}; expected one of configs/detection/*.yaml, and keys of "
                f"https://detectron2.readthedocs.io/en/latest/modules/config.html with their values"
            ) from error


def metrics_of(results: Mapping[str, Any]) -> dict[str, float]:
    """detectron2's nested results by path, as in bbox/AP50, without what has no number: a class without objects."""
    flat: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": number for inner, number in metrics_of(value).items()}
        elif math.isfinite(value):
            flat[name] = float(value)
    return flat


def _result(cfg: Any, args: argparse.Namespace, results: Mapping[str, Any], started: float) -> dict[str, Any]:
    import detectron2

    weights = Path(cfg.MODEL.WEIGHTS)
    return {
        "command": "detection",
        "metrics": metrics_of(results),
        "settings": {"config_file": args.config_file, "opts": args.opts, "iterations": cfg.SOLVER.MAX_ITER},
        "weights": {"path": str(weights), "sha256": sha256(weights)},
        "data": {"train": list(cfg.DATASETS.TRAIN), "held_out": list(cfg.DATASETS.TEST)},
        "about": {
            "command": shlex.join(["python", "-m", "synco_fast.evaluation.detection", *sys.argv[1:]]),
            "synco_fast": __version__,
            "torch": torch.__version__,
            "detectron2": detectron2.__version__,
            "device": cfg.MODEL.DEVICE,
            "processes": max(1, args.num_gpus) * args.num_machines,
            "started": time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(started)),
            "seconds": round(time.time() - started, 3),
        },
    }


if __name__ == "__main__":
    main()
