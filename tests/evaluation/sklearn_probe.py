"""What others make of a probed checkpoint: torchvision's network and transforms, PIL, and scikit-learn's solver.

    python -m tests.evaluation.sklearn_probe WEIGHTS.pth --data DIR --result runs/linear/result.json

Nothing of synco_fast is used, but for the result of `synco-fast linear --cached` that it is compared with.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torchvision
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def features(model: torch.nn.Module, folder: Path, resize: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, F) and labels (n,) of a folder of classes."""
    steps = [v2.Resize(resize), v2.CenterCrop(size), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    images = torchvision.datasets.ImageFolder(str(folder), v2.Compose([*steps, v2.Normalize(MEAN, STD)]))
    found, labels = [], []
    for batch, truth in torch.utils.data.DataLoader(images, batch_size=256):
        found.append(model(batch).numpy())
        labels.append(truth.numpy())
    return np.concatenate(found), np.concatenate(labels)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="torchvision's names, fc left out or not")
    parser.add_argument("--data", type=Path, required=True, help="train/<class>/* and test/ or val/")
    parser.add_argument("--result", type=Path, required=True, help="of synco-fast linear --cached")
    options = parser.parse_args()
    ours = json.loads(options.result.read_text())
    model = torchvision.models.get_model(ours["weights"]["arch"])
    model.load_state_dict(torch.load(options.weights, weights_only=True), strict=False)
    model.fc = torch.nn.Identity()
    model.eval()
    sizes = ours["data"]["eval_resize"], ours["data"]["image_size"]
    train, labels = features(model, options.data / "train", *sizes)
    held_out = next(folder for name in ("val", "test") if (folder := options.data / name).is_dir())
    test, truth = features(model, held_out, *sizes)
    scaler = StandardScaler().fit(train)
    solver = LogisticRegression(C=1 / (ours["l2"] * len(train)), max_iter=2000, tol=1e-6)
    solver.fit(scaler.transform(train), labels)
    theirs = float(solver.score(scaler.transform(test), truth))
    top1 = ours["metrics"]["cached_top1"]
    print(f"scikit-learn {theirs:.2%}, synco-fast {top1:.2%}, {100 * (top1 - theirs):+.2f} points")


if __name__ == "__main__":
    main()
