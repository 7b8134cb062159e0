"""`synco-fast analyze` on real JPEGs, against the same numbers computed here from the views, in float64."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from synco_fast.config import parse
from synco_fast.data.index import held_out, scan
from synco_fast.data.loader import EvalLoader, TrainLoader
from synco_fast.data.recipes import RECIPES
from synco_fast.evaluation import analyze
from synco_fast.models.encoders import Encoder
from synco_fast.ops import KINDS, HardNegatives
from tests.command import call, check_error
from tests.conftest import TINY
from tests.ops import oracle
from tests.page import check_self_contained, read

QUERIES, QUEUE, SEED = 20, 60, 3
LOADING: dict[str, Any] = {"device": torch.device("cpu"), "threads": 1, "prefetch": 1}


@pytest.fixture(scope="module")
def checkpoint(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of two steps, after which key and query encoder differ, its batch norm calibrated on training views
    and its embeddings centred: as they are after so few steps they nearly coincide, and nothing of them could be wrong.
    """
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(TINY)
    settings = [f"output={folder / 'out'}", "trainer.max_steps=2", "model.momentum=0.2"]
    options = [part for setting in settings for part in ("--set", setting)]
    done = call("pretrain", folder / "tiny.yaml", "--data", images, *options)
    assert done.code == 0, done.err
    path = folder / "out" / "checkpoints" / "latest.pt"
    state = torch.load(path, weights_only=True)
    loader = TrainLoader(scan(images), batch_size=50, image_size=32, recipe=RECIPES["moco_v2"], seed=9, **LOADING)
    views = next(loader).views
    loader.close()
    for name in ("query_encoder.", "key_encoder."):
        encoder = encoder_of(state["model"], name).train()
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the mean over what follows
                module.reset_running_stats()
        with torch.no_grad():
            encoder.head[2].bias -= encoder(torch.cat(views).float()).mean(dim=0)
        state["model"] |= {f"{name}{key}": value for key, value in encoder.state_dict().items()}
    torch.save(state, folder / "calibrated.pt")
    return folder / "calibrated.pt"


def encoder_of(model: dict[str, Tensor], prefix: str) -> Encoder:
    """An encoder of the run's state."""
    encoder = Encoder("resnet10_narrow", dim=16)
    encoder.load_state_dict(
        {name.removeprefix(prefix): value for name, value in model.items() if name.startswith(prefix)}
    )
    return encoder


@pytest.fixture(scope="module")
def analysis(checkpoint: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What a whole analysis wrote: result.json, and its folder."""
    output = tmp_path_factory.mktemp("analysis") / "out"
    options = ["--queries", QUERIES, "--queue", QUEUE, "--seed", SEED, "--tsne", "--output", output]
    done = call("analyze", checkpoint, "--data", images, *options)
    assert done.code == 0, done.err
    assert "analyze, images: 100/100" in done.err and str(output / "report.html") in done.out
    return json.loads((output / "result.json").read_text()), output


class Expected:
    """The same, written a second time: encoders and all that follows in float64, each pair and vector by itself."""

    def __init__(self, checkpoint: Path, images: Path) -> None:
        state = torch.load(checkpoint, weights_only=True)
        self.hard = parse(state["config"], "the run").negatives.hard()
        self.query, self.key = (
            encoder_of(state["model"], f"{name}_encoder.").double().eval() for name in ("query", "key")
        )
        index = scan(images)
        assert index.labels is not None
        # Batches of another size than the command's: order and views do not depend on it.
        loader = TrainLoader(index, batch_size=10, image_size=32, recipe=RECIPES["moco_v2"], seed=SEED, **LOADING)
        batches = [next(loader) for _ in range((QUERIES + QUEUE) // 10)]
        loader.close()
        first, second = (torch.cat([batch.views[i] for batch in batches]).double() for i in range(2))
        self.labels = index.labels[torch.cat([batch.samples for batch in batches])].tolist()
        with torch.no_grad():
            keys = F.normalize(self.key(second), dim=1)
            self.views = [F.normalize(self.query(view[QUEUE:]), dim=1) for view in (first, second)]
            self.wide = [F.normalize(self.query.backbone(view[QUEUE:]), dim=1) for view in (first, second)]
        self.q, self.k, self.queue = self.views[0].tolist(), keys[QUEUE:].tolist(), keys[:QUEUE].tolist()

    def query_row(self, i: int) -> dict[str, Any]:
        """Of one query: similarities by group, and same-class rows among the hardest and among parents by kind."""
        q, own = self.q[i], self.labels[QUEUE + i]
        similarity = [oracle.dot(q, n) for n in self.queue]
        hardest = sorted(range(QUEUE), key=lambda j: -similarity[j])[: self.hard.n_hard]
        row: dict[str, Any] = {"positive": [oracle.dot(q, self.k[i])], "queue": similarity}
        row["hard set"] = [similarity[j] for j in hardest]
        row["same class"] = [self.labels[j] == own for j in hardest]
        row["same class in queue"] = [label == own for label in self.labels[:QUEUE]]
        chosen, row["parents"] = sorted(hardest), {}
        for kind in KINDS:
            row[kind], row["parents"][kind] = [], []
            for sample in range(self.hard.count(kind)):
                positions, c, noise = oracle.draw(
                    kind, self.hard, seed=SEED, step=0, row=i, sample=sample, n_hard=len(chosen), dim=16
                )
                parents = [chosen[position] for position in positions]
                vector = oracle.build(kind, q, [self.queue[j] for j in parents], c, noise, "query")
                row[kind].append(oracle.dot(q, vector))
                row["parents"][kind].append(any(self.labels[j] == own for j in parents))
        return row


@pytest.fixture(scope="module")
def expected(checkpoint: Path, images: Path) -> Expected:
    return Expected(checkpoint, images)


@pytest.fixture(scope="module")
def by_query(expected: Expected) -> list[dict[str, Any]]:
    return [expected.query_row(i) for i in range(QUERIES)]


# Embeddings are taken in float32 there: after 18 layers some 100 roundings of 6e-8 on entries below 1.
CLOSE = 1e-5


def test_alignment_and_uniformity(analysis: tuple[dict[str, Any], Path], expected: Expected) -> None:
    def brute(x: Tensor, y: Tensor) -> dict[str, float]:
        pairs = [(view[i] - view[j]).square().sum() for view in (x, y) for i in range(QUERIES) for j in range(i)]
        half = len(pairs) // 2
        logs = [torch.stack(part).mul(-2).exp().mean().log() for part in (pairs[:half], pairs[half:])]
        return {"alignment": float((x - y).square().sum(dim=1).mean()), "uniformity": float(sum(logs)) / 2}

    result, _ = analysis
    assert result["geometry"]["embeddings"] == pytest.approx(brute(*expected.views), abs=CLOSE)
    assert result["geometry"]["features"] == pytest.approx(brute(*expected.wide), abs=CLOSE)
    assert result["metrics"]["alignment"] == result["geometry"]["embeddings"]["alignment"] > 0.2
    assert result["metrics"]["uniformity"] == result["geometry"]["embeddings"]["uniformity"] < -1


def test_proxy_task(analysis: tuple[dict[str, Any], Path], expected: Expected, by_query: list[dict[str, Any]]) -> None:
    result, _ = analysis
    found = oracle.infonce(
        expected.q, expected.k, expected.queue, expected.hard, result["settings"]["temperature"], seed=SEED, step=0
    )
    for name, ranks in (("without_synthetic", found.rank), ("with_synthetic", found.rank_all)):
        accuracies = {f"acc{n}": sum(rank < n for rank in ranks) / QUERIES for n in (1, 5)}
        assert result["proxy"][name] == pytest.approx(accuracies), name
    kinds = ("queue", *KINDS)
    above = [sum(s >= row["positive"][0] for kind in kinds for s in row[kind]) for row in by_query]
    assert found.rank_all == above and len(set(above)) > 3
    assert result["proxy"]["loss"] == pytest.approx(found.loss, abs=10 * CLOSE)
    for kind, share in result["proxy"]["mass"].items():
        assert share == pytest.approx(found.stats[f"mass_{kind}"], abs=10 * CLOSE)
    metrics = result["metrics"]
    assert metrics["proxy_acc1"] == result["proxy"]["without_synthetic"]["acc1"]
    assert metrics["proxy_acc1_with_synthetic"] == result["proxy"]["with_synthetic"]["acc1"]


def test_similarities(analysis: tuple[dict[str, Any], Path], by_query: list[dict[str, Any]]) -> None:
    found = analysis[0]["similarities"]
    assert list(found) == ["positive", "queue", "hard set", *KINDS]
    for name, summary in found.items():
        values = np.array([row[name] for row in by_query]).ravel()
        assert summary["count"] == len(values) == sum(summary["histogram"])
        assert summary["mean"] == pytest.approx(values.mean(), abs=CLOSE), name
        for percent in (5, 50, 95):
            exact = np.percentile(values, percent, method="inverted_cdf")
            assert summary[f"p{percent}"] == pytest.approx(exact, abs=1e-4 + CLOSE), (name, percent)


def test_false_negatives(analysis: tuple[dict[str, Any], Path], by_query: list[dict[str, Any]]) -> None:
    found = analysis[0]["same_class"]
    assert found["queue"] == pytest.approx(np.mean([row["same class in queue"] for row in by_query]))
    assert [row["n"] for row in found["hardest"]] == [1, 2, 4, 8, 16]
    for row in found["hardest"]:
        share = np.mean([query["same class"][: row["n"]] for query in by_query])
        assert row["share"] == pytest.approx(share), row
    assert analysis[0]["metrics"]["same_class_share"] == found["hardest"][-1]["share"]
    assert found["parents"] == {
        kind: pytest.approx(np.mean([row["parents"][kind] for row in by_query])) for kind in KINDS
    }


def test_projections(analysis: tuple[dict[str, Any], Path], expected: Expected, images: Path) -> None:
    """Of all 20 held-out images; by their inner products, which no choice of signs changes."""
    found = analysis[0]["projection"]
    index = held_out(images)
    assert index is not None and index.labels is not None
    loader = EvalLoader(index, batch_size=20, image_size=32, resize=32, dtype=torch.float32, **LOADING)
    with torch.no_grad():
        rows = F.normalize(expected.query.backbone(next(iter(loader))[0].double()), dim=1).numpy()
    centred = rows - rows.mean(axis=0)
    values, vectors = np.linalg.eigh(centred @ centred.T)
    plane = vectors[:, -2:] * np.sqrt(values[-2:])
    coordinates = np.array(found["pca"])
    assert np.allclose(coordinates @ coordinates.T, plane @ plane.T, atol=CLOSE)
    assert found["pca_variance"] == pytest.approx([values[-1] / values.sum(), values[-2] / values.sum()], abs=1e-3)
    assert found["classes"] == ["class0", "class1"]
    assert found["labels"] == [index.classes[i] for i in index.labels.tolist()]
    tsne = np.array(found["tsne"])
    assert tsne.shape == (20, 2) and np.isfinite(tsne).all() and np.ptp(tsne, axis=0).min() > 0


def test_the_page_shows_all_of_it_and_loads_nothing(analysis: tuple[dict[str, Any], Path]) -> None:
    result, output = analysis
    assert sorted(path.name for path in output.iterdir()) == ["report.html", "result.json"]
    check_self_contained(output / "report.html")
    page = read(output / "report.html")
    assert page.tags.count("svg") == 3
    similarities, same_class = result["similarities"], result["same_class"]
    numbers = [f"{row[key]:.4f}" for row in result["geometry"].values() for key in ("alignment", "uniformity")]
    numbers += [f"{row[key]:.4f}" for row in similarities.values() for key in ("mean", "p5", "p50", "p95")]
    numbers += [f"{share:.2%}" for share in same_class["parents"].values()]
    numbers += [f"{row['share']:.2%}" for row in same_class["hardest"]]
    numbers += [f"{result['proxy'][key][acc]:.2%}" for key in list(result["proxy"])[:2] for acc in ("acc1", "acc5")]
    assert [number for number in numbers if number not in page.text] == []
    assert "t-SNE" in page.text and "class1" in page.text


NAMES = ("_a", r"$\foo$", b"b\xff".decode(errors="surrogateescape"))


def test_classes_of_any_name_are_in_the_legend(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    """What matplotlib would leave out, what it would set as TeX, and bytes that are no character."""
    for split in ("train", "val"):
        for i, name in enumerate(NAMES):
            shutil.copytree(images / split / f"class{i % 2}", tmp_path / "images" / split / name)
    done = call("analyze", checkpoint, "--data", tmp_path / "images", "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / "result.json").read_text())["projection"]["classes"] == sorted(NAMES)
    check_self_contained(tmp_path / "out" / "report.html")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert [page.count(f">{name}</text>") for name in ("_a", r"$\foo$", "b?")] == [1, 1, 1]


def test_weights_without_a_head_and_keys(images: Path, tmp_path: Path) -> None:
    """torchvision's: features are the embedding, keys are the query encoder's; sizes are those that fit 100 images."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    output, size = tmp_path / "out", ("--set", "data.image_size=32", "--set", "data.eval_resize=32")
    done = call("analyze", tmp_path / "resnet18.pth", "--data", images, *size, "--output", output)
    assert done.code == 0, done.err
    result = json.loads((output / "result.json").read_text())
    assert result["geometry"]["embeddings"] == result["geometry"]["features"]
    settings = result["settings"]
    assert (settings["queries"], settings["queue"], settings["negatives"]["n_hard"]) == (25, 75, 75)
    assert (settings["keys_by"], settings["temperature"], settings["negatives"]["noisy"]) == ("query encoder", 0.2, 64)
    assert "tsne" not in result["projection"]


BAD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no queries": (("--queries", "0"), ("--queries 0", "2 or more")),
    "one query": (("--queries", "1"), ("--queries 1", "2 or more")),
    "no queue": (("--queue", "0"), ("--queue 0", "1 or more")),
    "a queue larger than the data": (("--queue", "1000"), ("--queries 24", "--queue 1000", "1024 images", "96")),
    "queries that leave no queue": (("--queries", "96"), ("--queries 96", "--queue 1", "97 images", "96")),
    "a hard set larger than the queue": (("--queue", "20", "--n-hard", "21"), ("--n-hard 21", "20 images")),
    "no hard set": (("--n-hard", "0"), ("--n-hard 0", "1 or more")),
    "another section": (("--set", "queue.size=5"), ("--set", "queue = {'size': 5}")),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_numbers(kind: str, checkpoint: Path, images: Path, tmp_path: Path) -> None:
    options, names = BAD[kind]
    refused(tmp_path / "out", names, checkpoint, "--data", images, *options)


def test_a_missing_checkpoint(images: Path, tmp_path: Path) -> None:
    refused(tmp_path / "out", ("none.pt", "No such file"), tmp_path / "none.pt", "--data", images)


def test_weights_that_are_not_finite(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["query_encoder.head.2.bias"][0] = torch.nan
    torch.save(state, tmp_path / "damaged.pt")
    refused(tmp_path / "out", ("damaged.pt", "not finite"), tmp_path / "damaged.pt", "--data", images)


def test_bad_files_that_are_left_out(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    """Five of 100, of which an epoch of 96 can spare four: then a batch of it is lost."""
    shutil.copytree(images, tmp_path / "images")
    for i in range(5):
        bad = tmp_path / "images" / "train" / "class0" / f"{i:03d}.jpg"
        bad.write_bytes(bad.read_bytes()[:100])
    skip = ("--data", tmp_path / "images", "--set", "data.on_corrupt=skip", "--output", tmp_path / "out")
    done = call("analyze", checkpoint, *skip)
    error = done.err[done.err.index("error: ") :]
    check_error(done.code, error, ("--queries 24", "--queue 72", "96 images", "80 in whole batches"))
    assert not (tmp_path / "out").exists()
    done = call("analyze", checkpoint, *skip, "--queue", 50)
    assert done.code == 0, done.err
    assert "skipping image file" in done.err


def refused(output: Path, names: tuple[str, ...], *arguments: object) -> None:
    done = call("analyze", *arguments, "--output", output)
    assert done.code == 1
    # Progress comes before what only the images can tell.
    check_error(done.code, "\n".join(line for line in done.err.splitlines() if "images:" not in line), names)
    assert not output.exists()


def test_queries_compared_a_few_at_a_time_are_compared_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws, sums and counts of 23 queries at once, and of 2 at a time."""
    random = torch.Generator().manual_seed(0)
    queue, keys, first, second = (F.normalize(torch.randn(n, 8, generator=random), dim=1) for n in (50, 23, 23, 23))
    labels = torch.randint(3, (73,), generator=random)
    embedded = analyze.Embedded(queue, labels[:50], keys, labels[50:], (first, second), (first, second))
    plan = analyze.Plan(23, 50, 1, HardNegatives(12, 5, 5, 5, 2, 2, 2), 0.2)
    whole = analyze.compare(embedded, plan, seed=4)
    monkeypatch.setattr(analyze, "_ENTRIES", 2 * 21 * 8)
    parts = analyze.compare(embedded, plan, seed=4)
    assert parts["same_class"] == whole["same_class"]
    for name in ("without_synthetic", "with_synthetic"):
        assert parts["proxy"][name] == whole["proxy"][name]
    assert parts["proxy"]["loss"] == pytest.approx(whole["proxy"]["loss"], rel=1e-6)
    for name, summary in whole["similarities"].items():
        assert parts["similarities"][name]["mean"] == pytest.approx(summary["mean"], abs=1e-6)
        assert parts["similarities"][name]["p50"] == pytest.approx(summary["p50"], abs=1.1e-4)
