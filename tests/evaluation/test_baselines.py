"""Baselines: the same images and the same vote as in training, and nothing learnt."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from synco_fast.config import Config, load
from synco_fast.data.index import Index, held_out, scan
from synco_fast.data.loader import EvalLoader
from synco_fast.engine.distributed import Processes
from synco_fast.engine.features import extract
from synco_fast.engine.knn import knn_accuracy
from synco_fast.engine.probe import KnnProbe
from synco_fast.engine.run import build_contrast
from synco_fast.engine.weights import query_encoder
from synco_fast.evaluation.baselines import calibrated, knn_baselines
from synco_fast.models.encoders import Encoder
from tests.conftest import RESNET18

CPU = torch.device("cpu")


def loader(index: Index) -> EvalLoader:
    return EvalLoader(
        index, batch_size=16, image_size=32, resize=32, dtype=torch.float32, device=CPU, threads=1, prefetch=1
    )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "resnet18.yaml").write_text(RESNET18)
    return load(tmp_path / "resnet18.yaml", ["knn.k=5"])


@pytest.fixture
def splits(images: Path) -> tuple[Index, Index]:
    test = held_out(images)
    assert test is not None
    return scan(images), test


@pytest.fixture
def backbone(config: Config) -> nn.Module:
    state = build_contrast(config, Processes(0, 1, CPU)).state_dict()
    return query_encoder({"model": state}, config).backbone


def test_they_are_what_they_say(config: Config, splits: tuple[Index, Index], backbone: nn.Module) -> None:
    bank, test = splits
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    found = knn_baselines(
        backbone, loader(bank), loader(test), loader(bank), k=5, temperature=0.07, device=CPU, bf16=False
    )
    # The random start is the very network that training starts from, seen by training's own evaluation.
    processes = Processes(0, 1, CPU)
    start = build_contrast(config, processes).query_encoder
    assert isinstance(start, Encoder)
    probe = KnnProbe(config.data, processes, bank, test, bf16=False)
    assert probe.measure(start, [(5, 0.07)]) == ([found["random_initialisation"]], {"bank": 100, "held_out": 20})
    assert found["raw_pixels"] == pixel_accuracy(bank, test, k=5, temperature=0.07)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    other = calibrated(backbone, loader(bank), device=CPU, bf16=False)
    features = [extract(other, loader(split), device=CPU, bf16=False) for split in (bank, test)]
    accuracy = knn_accuracy(*features[0], *features[1], k=5, temperature=0.07)
    assert found["random_initialisation_calibrated"] == accuracy


def pixel_accuracy(bank: Index, test: Index, *, k: int, temperature: float) -> float:
    """The same in NumPy and float64, from the crops on."""
    rows, bank_labels = pixels(bank)
    queries, labels = pixels(test)
    mean = rows.mean(axis=0)
    rows, queries = rows - mean, queries - mean
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    right = 0
    for query, label in zip(queries, labels, strict=True):
        similarity = rows @ query
        nearest = np.argsort(-similarity)[:k]
        votes = np.bincount(bank_labels[nearest], np.exp(similarity[nearest] / temperature))
        right += votes.argmax() == label
    return right / len(labels)


def pixels(index: Index) -> tuple[np.ndarray, np.ndarray]:
    batches = list(loader(index))
    labels = [truth.numpy() for _, truth in batches if truth is not None]
    return np.concatenate([i.double().numpy().reshape(len(i), -1) for i, _ in batches]), np.concatenate(labels)


def test_raw_pixels_are_centred() -> None:
    """About the bank's mean (10, 0, 0), not the queries'; the directions of uncentred pixels say the wrong class."""

    def batch(*rows: list[float], labels: list[int]) -> list[tuple[Tensor, Tensor | None]]:
        return [(torch.tensor(rows).view(-1, 3, 1, 1), torch.tensor(labels))]

    bank = batch([13.0, 0.1, 0.0], [7.0, -0.1, 0.0], labels=[0, 1])
    queries = batch([16.0, -0.16, 0.0], [11.0, -0.11, 0.0], [8.0, 0.1, 0.0], labels=[0, 0, 1])
    found = knn_baselines(nn.Flatten(), bank, queries, bank, k=1, temperature=0.07, device=CPU, bf16=False)
    assert found["raw_pixels"] == 1.0
    assert found["random_initialisation"] == 0.0  # the same features, uncentred


def test_calibration_is_the_mean_over_batches(splits: tuple[Index, Index], backbone: nn.Module) -> None:
    """The first layer's statistics, from its definition in float64; the weights are the same."""
    bank, _ = splits
    found = calibrated(backbone, loader(bank), device=CPU, bf16=False)
    inputs = [
        nn.functional.conv2d(images.double(), backbone.conv1.weight.double(), stride=2, padding=3)
        for images, _ in loader(bank)
    ]
    mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs]).mean(dim=0)
    variance = torch.stack([x.var(dim=(0, 2, 3)) for x in inputs]).mean(dim=0)
    # float32 sums over 4,096 values: far below 1e-4 of the spread.
    torch.testing.assert_close(found.bn1.running_mean.double(), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.bn1.running_var.double(), variance, rtol=1e-4, atol=0)
    assert not found.training
    for (name, weight), (_, other) in zip(found.named_parameters(), backbone.named_parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_calibration_matters(splits: tuple[Index, Index], backbone: nn.Module) -> None:
    """A calibrated layer's outputs have mean 0 and variance 1 over the bank; an uncalibrated one's do not."""
    bank, _ = splits
    images = torch.cat([batch for batch, _ in loader(bank)])
    with torch.no_grad():
        outputs = {
            name: module.bn1(module.conv1(images))
            for name, module in (
                ("before", backbone.eval()),
                ("after", calibrated(backbone, loader(bank), device=CPU, bf16=False)),
            )
        }
    spread = {name: output.var(dim=(0, 2, 3)) for name, output in outputs.items()}
    # The batches go through class by class here, so their own variances are below the bank's.
    assert ((spread["after"] - 1).abs() < 0.5).all()
    assert ((spread["before"] - 1).abs() > 0.5).any()
