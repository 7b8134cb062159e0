"""The linear probe on cached features is a logistic regression: scikit-learn's, fitted on its own, says the same."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from synco_fast.config import Data
from synco_fast.data.index import held_out, scan
from synco_fast.engine.distributed import Processes
from synco_fast.engine.features import extract
from synco_fast.engine.probe import evaluation_loader
from synco_fast.engine.weights import load_weights
from synco_fast.evaluation.cached import PENALTIES, Regression, Scaler
from synco_fast.evaluation.subset import hold_back
from tests.command import call, check_error
from tests.evaluation.probes import commanded, result_of, write_classes, write_weights

CPU = torch.device("cpu")


def overlapping(rows: int, width: int, classes: int, spread: float) -> tuple[Tensor, Tensor]:
    """Rectified features of very different sizes, of classes that overlap; one is constant, one nearly always 0."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=random)
    centres = spread * torch.randn(classes, width, generator=random)
    features = (torch.randn(rows, width, generator=random) + centres[labels]).relu()
    features *= 3 * torch.randn(width, generator=random).exp()
    features[:, 0], features[:, 1] = 0.1, features[:, 1] * (torch.rand(rows, generator=random) < 0.01)
    return features, labels


def fitted(features: Tensor, labels: Tensor, c: float) -> Pipeline:
    """scikit-learn's own standardisation and logistic regression, in float64 and to a tight tolerance."""
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-8, max_iter=100_000))
    return pipeline.fit(features.double().numpy(), labels.numpy())


@pytest.fixture(scope="module")
def synthetic() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features, labels = overlapping(6000, 96, 8, 0.2)
    return features[:4000], labels[:4000], features[4000:], labels[4000:]


@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-6])
def test_equals_scikit_learn(l2: float, synthetic: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Both stop near the minimum, at gradients of at most 1e-6. The loss's curvature along a feature is some 0.1, from
    p (1 - p), but 1e-3 along the one that is nearly always 0, whose coefficients are the largest: they are within 1e-3.
    """
    train, labels, test, truth = synthetic
    expected = fitted(train, labels, c=1 / (l2 * len(train)))
    train, test = train.clone(), test.clone()
    scaler = Scaler.of(train)
    raw = test.clone()
    for features in (train, test):
        scaler.apply(features)
    regression = Regression(train, labels, 8, CPU)
    solved = regression.fit(l2, torch.ones(len(train)))
    assert solved["converged"] and solved["gradient"] <= 1e-6
    ours = expected[-1]
    near = 1e-3 * max(1.0, np.abs(ours.coef_).max())
    np.testing.assert_allclose(regression.weight.detach().numpy(), ours.coef_, rtol=0, atol=near)
    np.testing.assert_allclose(regression.bias.detach().numpy(), ours.intercept_, rtol=0, atol=near)
    predicted = torch.from_numpy(expected.predict(raw.double().numpy()))
    accuracy = float((predicted == truth).double().mean())
    right = regression.right(test, truth) / len(truth)
    assert 0.3 < accuracy < 0.9 and float(right[0]) == pytest.approx(accuracy, abs=0.002)
    scores = torch.from_numpy(expected.predict_log_proba(raw.double().numpy()))
    fifth = (scores > scores.gather(1, truth[:, None])).sum(dim=1) < 5
    assert float(right[1]) == pytest.approx(float(fifth.double().mean()), abs=0.002)
    # The layer that is written takes features as they are.
    weight, bias = scaler.folded(regression.weight, regression.bias)
    assert float(((raw @ weight.T + bias).argmax(dim=1) == predicted).double().mean()) >= 0.998


def test_standardisation_is_scikit_learns(synthetic: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """A constant feature among them becomes 0, not noise divided by nothing."""
    train, _, test, _ = synthetic
    theirs = StandardScaler().fit(train.double().numpy())
    scaler, scaled = Scaler.of(train), test.clone()
    scaler.apply(scaled)
    np.testing.assert_allclose(scaler.mean.numpy(), theirs.mean_, rtol=1e-12)
    np.testing.assert_allclose(scaler.std.numpy(), theirs.scale_, rtol=1e-12)
    # float32: what is subtracted is rounded to 2^-24 of itself, and divided by the deviation.
    np.testing.assert_allclose(scaled.double().numpy(), theirs.transform(test.double().numpy()), rtol=1e-5, atol=1e-5)
    assert scaler.std[0] == 1 and scaled[:, 0].abs().max() < 1e-6


def test_penalty_is_chosen_on_what_is_held_back() -> None:
    """Each accuracy of the sweep is that of scikit-learn, fitted to the rows kept; the sweep ends at the best one."""
    features, labels = overlapping(700, 40, 5, 0.35)
    kept = hold_back(labels, 0.3, seed=0)
    Scaler.of(features).apply(features)
    regression = Regression(features, labels, 5, CPU)
    rows = regression.sweep(kept)
    assert [row["l2"] for row in rows] == list(PENALTIES) and all(row["converged"] for row in rows)
    for row in rows:
        theirs = LogisticRegression(C=1 / (row["l2"] * int(kept.sum())), tol=1e-8, max_iter=100_000)
        theirs.fit(features[kept].double().numpy(), labels[kept].numpy())
        accuracy = theirs.score(features[~kept].double().numpy(), labels[~kept].numpy())
        assert row["accuracy"] == pytest.approx(accuracy, abs=0.01)
    assert len({row["accuracy"] for row in rows}) > 1
    held_back = regression.right(features[~kept], labels[~kept])[0] / int((~kept).sum())
    assert float(held_back) == max(row["accuracy"] for row in rows)


def test_rows_in_parts_are_the_rows() -> None:
    """40,000 rows are more than pass through the device at once: the last ones count as the first do."""
    features, labels = overlapping(40_000, 8, 3, 0.5)
    Scaler.of(features).apply(features)
    whole = Regression(features, labels, 3, CPU)
    whole.fit(1e-3, torch.ones(40_000))
    some = Regression(features[:30_000], labels[:30_000], 3, CPU)
    some.fit(1e-3, torch.ones(30_000))
    shares = (torch.arange(40_000) < 30_000).float()
    whole_of_some = Regression(features, labels, 3, CPU)
    whole_of_some.fit(1e-3, shares)
    torch.testing.assert_close(whole_of_some.weight, some.weight, rtol=0, atol=1e-4)
    assert (whole.weight - some.weight).abs().max() > 1e-3
    assert float(whole.right(features, labels)[0]) > float(whole.right(features, labels, shares)[0])


@pytest.mark.parametrize("kind", ["random", "supervised"])
def test_on_images(kind: str, images: Path, tmp_path: Path) -> None:
    """The command against scikit-learn on features that are taken with `engine.features`.

    With two classes scikit-learn fits one vector w where softmax has w / 2 and -w / 2. Their penalty, l2 / 2 times
    2 |w / 2|^2, is half of l2 / 2 |w|^2, so C = 2 / (l2 n).
    """
    weights = write_weights(tmp_path / "random.pth")
    if kind == "supervised":
        options = ["--fraction", 1, "--epochs", 2, "--batch-size", 25, "--lr-backbone", 0.01, "--lr-head", 0.01]
        done = call(*commanded("semisup", weights, images, tmp_path / "supervised", *options))
        assert done.code == 0, done.err
        weights = tmp_path / "supervised" / "finetuned.pth"
    done = call(*commanded("linear", weights, images, tmp_path / "run", "--cached"))
    assert done.code == 0, done.err
    result = result_of(tmp_path / "run")
    label = "logistic regression on centre-crop features: approximates the probe, no augmentation"
    assert result["protocol"] == "cached" and result["label"] == label and label in done.out
    assert result["used"] == {"train": 100, "held_back": 10, "held_out": 20} and result["solver"]["converged"]

    test = held_out(images)
    assert test is not None
    data, backbone = Data(image_size=32, eval_resize=32, threads=1), load_weights(weights).encoder.backbone
    processes = Processes(0, 1, CPU)
    (train, labels), (queries, truth) = (
        extract(backbone, evaluation_loader(data, processes, index), device=CPU, bf16=False)
        for index in (scan(images), test)
    )
    theirs = fitted(train, labels, c=2 / (result["l2"] * len(train)))
    predicted = torch.from_numpy(theirs.predict(queries.double().numpy()))
    head = load_file(tmp_path / "run" / "head.safetensors")
    both = torch.cat([train, queries])
    ours = (both @ head["weight"].T + head["bias"]).argmax(dim=1)
    assert float((ours == torch.from_numpy(theirs.predict(both.double().numpy()))).double().mean()) >= 0.99
    assert result["metrics"]["cached_top1"] == float((predicted == truth).double().mean())
    assert result["metrics"]["cached_top5"] == 1.0
    best = max(row["accuracy"] for row in result["penalties"])
    assert result["l2"] == next(row["l2"] for row in result["penalties"] if row["accuracy"] == best)

    again = call(*commanded("linear", weights, images, tmp_path / "again", "--cached"))
    assert again.code == 0 and result_of(tmp_path / "again") == result
    head_again = tmp_path / "again" / "head.safetensors"
    assert head_again.read_bytes() == (tmp_path / "run" / "head.safetensors").read_bytes()


def test_what_cannot_be(tmp_path: Path) -> None:
    """One image a class; features that are not finite."""
    weights = write_weights(tmp_path / "random.pth")
    data = write_classes(tmp_path / "data", 2, 1, 1)
    done = call(*commanded("linear", weights, data, tmp_path / "run", "--cached"))
    check_error(done.code, done.err, ("--cached", str(data), "2 images"))
    state = torch.load(weights, weights_only=True)
    state["bn1.weight"][0] = math.nan
    torch.save(state, weights)
    done = call(*commanded("linear", weights, data, tmp_path / "run", "--cached"))
    check_error(done.code, done.err, (str(weights), "not finite"))
    assert not (tmp_path / "run").exists()
