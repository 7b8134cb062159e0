"""Detection's configurations, and its script where there is no detectron2, which no test needs.

docs/transfer.md says what was checked with detectron2, by hand.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from synco_fast.errors import UserError
from synco_fast.evaluation.detection import check_filled, merge, metrics_of
from tests.conftest import REPOSITORY, environment

FOLDER = REPOSITORY / "configs" / "detection"

SHARED = {
    "VERSION": 2,
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "INPUT.FORMAT": "RGB",
    "INPUT.MIN_SIZE_TEST": 800,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02,
    "TEST.PRECISE_BN.ENABLED": True,
}
VOC = {
    "MODEL.MASK_ON": False,
    "MODEL.ROI_HEADS.NUM_CLASSES": 20,
    "INPUT.MIN_SIZE_TRAIN": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
    "DATASETS.TRAIN": ["voc_2007_trainval", "voc_2012_trainval"],
    "DATASETS.TEST": ["voc_2007_test"],
    "SOLVER.STEPS": [18000, 22000],
    "SOLVER.MAX_ITER": 24000,
    "SOLVER.WARMUP_ITERS": 100,
}
COCO = {
    "MODEL.MASK_ON": True,
    "MODEL.ROI_HEADS.NUM_CLASSES": 80,
    "INPUT.MIN_SIZE_TRAIN": [640, 672, 704, 736, 768, 800],
    "DATASETS.TRAIN": ["coco_2017_train"],
    "DATASETS.TEST": ["coco_2017_val"],
    "SOLVER.STEPS": [60000, 80000],
    "SOLVER.MAX_ITER": 90000,
}
VALUES = {
    "voc_r50_c4_24k": SHARED | VOC,
    "coco_r50_c4_1x": SHARED | COCO,
    "coco_r50_c4_2x": SHARED | COCO | {"SOLVER.STEPS": [120000, 160000], "SOLVER.MAX_ITER": 180000},
}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("name", VALUES)
def test_configurations_hold_the_published_values(name: str) -> None:
    values = flat(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))
    assert {key: values.get(key) for key in VALUES[name]} == VALUES[name]
    assert "_BASE_" not in values and {path.stem for path in FOLDER.iterdir()} == VALUES.keys()


def test_without_detectron2(tmp_path: Path) -> None:
    """A detectron2 that cannot be imported, whatever is installed; the module itself can."""
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("raise ImportError('not built for this torch')\n")
    done = subprocess.run(
        [sys.executable, "-m", "synco_fast.evaluation.detection", "--config-file", FOLDER / "voc_r50_c4_24k.yaml"],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: detectron2 cannot be imported (not built for this torch)")
    assert "docs/transfer.md" in done.stderr and "Traceback" not in done.stderr


def test_a_tensor_left_empty_is_refused() -> None:
    """Of the backbone and of res5; the norm that is added to res5 is filled by no file."""
    model = torch.nn.ModuleDict({"backbone": torch.nn.BatchNorm2d(2)})
    model["roi_heads"] = torch.nn.ModuleDict({"res5": torch.nn.ModuleDict({"norm": torch.nn.BatchNorm2d(2)})})
    check_filled(model, "out.pkl")
    torch.nn.init.constant_(model["roi_heads"]["res5"]["norm"].weight, torch.nan)
    check_filled(model, "out.pkl")
    torch.nn.init.constant_(model["backbone"].running_var, torch.nan)
    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS out\.pkl: 1 of 4 tensors .* backbone\.running_var among them"):
        check_filled(model, "out.pkl")


class Raising:
    """A configuration that raises what detectron2's and yacs' raise, which are no dependencies."""

    def __init__(self, error: Exception, *, of_settings: bool) -> None:
        self.error, self.of_settings = error, of_settings

    def merge_from_file(self, file: str, allow_unsafe: bool = True) -> None:
        assert file == "voc.yaml" and not allow_unsafe, "a configuration is read as plain values"
        if not self.of_settings:
            raise self.error

    def merge_from_list(self, settings: list[str]) -> None:
        assert settings == ["SOLVER.BASE_LR", "fast"]
        raise self.error


@pytest.mark.parametrize("of_settings", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        AssertionError("Non-existent key: SOLVER.BASE_RATE"),
        KeyError("Non-existent config key: MODEL.FOO"),
        ValueError("Type mismatch"),
        OSError(21, "Is a directory"),
        yaml.YAMLError("while parsing"),
        AttributeError("'list' object has no attribute 'items'"),
        AssertionError(),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_detectron2_cannot_use(error: Exception, of_settings: bool) -> None:
    source = "KEY VALUE SOLVER.BASE_LR fast" if of_settings else "--config-file voc.yaml"
    with pytest.raises(UserError) as raised:
        merge(Raising(error, of_settings=of_settings), "voc.yaml", ["SOLVER.BASE_LR", "fast"])
    reason = str(error) or "AssertionError"
    assert str(raised.value).startswith(f"{source}: detectron2 cannot use it: {reason}; expected one of configs/det")


def test_metrics_by_path() -> None:
    results = {"bbox": {"AP": 57.5, "AP-person": float("nan")}, "segm": {"AP": 34.0}}
    assert metrics_of(results) == {"bbox/AP": 57.5, "segm/AP": 34.0}
