"""`synco-fast analyze`: how an encoder's embedding lies on the sphere, and what its hard negatives are."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synco_fast.config import DTYPES
from synco_fast.data.loader import TrainLoader
from synco_fast.data.recipes import RECIPES
from synco_fast.engine.features import features_of
from synco_fast.engine.probe import evaluation_loader
from synco_fast.engine.progress import CountProgress
from synco_fast.errors import UserError
from synco_fast.evaluation.analysis_page import page
from synco_fast.evaluation.embedding import (
    Similarities,
    alignment,
    powers,
    principal_components,
    same_class_among,
    uniformity,
)
from synco_fast.evaluation.report import write_page
from synco_fast.evaluation.session import Request, Session, opened
from synco_fast.models.encoders import Encoder
from synco_fast.ops import HardNegatives, infonce, synthesize

REPORT = "report.html"
QUERIES, QUEUE = 2048, 65536
"""How many images are queries and fill the queue, where the data has them."""
DRAWN_CLASSES, DRAWN_IMAGES = 10, 2000
"""How many classes and held-out images are projected."""

_TEMPERATURE = 0.2  # where the file does not tell
_ENTRIES = 2**22  # of the largest tensor in a comparison of some queries, (B, K) or (B, S, D)


@dataclass(frozen=True)
class Plan:
    """What is compared with what.

    Attributes:
        queries, queue: numbers of images. batch: images that are read at a time.
        hard: synthetic negatives of the proxy task. temperature: of its softmax.
    """

    queries: int
    queue: int
    batch: int
    hard: HardNegatives
    temperature: float


@dataclass(frozen=True, eq=False)
class Embedded:
    """Unit rows. The encoder is the query encoder; keys are the key encoder's, if the file has one.

    Attributes:
        queue: (K, D) keys of one view each, and their labels (K,).
        keys: (n, D) keys of the queries' second views. labels: (n,) of the queries.
        views, features: the encoder's embeddings (n, D) and backbone features (n, F) of the queries' two views.
    """

    queue: Tensor
    queue_labels: Tensor
    keys: Tensor
    labels: Tensor
    views: tuple[Tensor, Tensor]
    features: tuple[Tensor, Tensor]


def analyze(
    request: Request, *, queries: int | None, queue: int | None, n_hard: int | None, seed: int, tsne: bool
) -> dict[str, Any]:
    """Measure an embedding on views of training images, and project held-out ones.

    Args:
        request: what every evaluation is told.
        queries: images whose two views are positive pairs; None: 2048, at most a quarter.
        queue: other images, whose keys are the negatives; None: 65536, at most those left.
        n_hard: size of the hard set; None: the run's, or 1024, at most the queue's.
        seed: of the choice of images, of views and of synthetic negatives.
        tsne: project by t-SNE, too.

    Returns:
        What `result.json` holds.

    Raises:
        UserError: see `opened`; or the numbers do not fit the data; nothing has been written.
    """
    with opened("analyze", request, {REPORT}, unread=("root",)) as session:
        if session.processes.world_size > 1:
            raise UserError("analyze: is for one process; start it without torchrun")
        plan = _plan(session, queries, queue, n_hard)
        drawn, names = _drawn(session)
        encoder = session.weights.encoder.to(session.processes.device).eval()
        with CountProgress("analyze, images", plan.queue + plan.queries + len(drawn)) as progress:
            embedded = _embed(session, plan, encoder, seed, progress)
            projection = _project(session, encoder, drawn, progress, seed if tsne else None)
        measured = {"geometry": _geometry(embedded), **compare(embedded, plan, seed)}
        result = session.write(
            _metrics(measured),
            _settings(session, plan, seed, tsne),
            **measured,
            projection={"classes": names, **projection},
        )
        write_page(request.output / REPORT, page(result))
        return result


def _plan(session: Session, queries: int | None, queue: int | None, n_hard: int | None) -> Plan:
    """The numbers asked for, or what fits.

    Raises:
        UserError: naming the option that is wrong.
    """
    for option, value, least in (("--queries", queries, 2), ("--queue", queue, 1), ("--n-hard", n_hard, 1)):
        if value is not None and value < least:
            raise UserError(f"{option} {value}: expected a whole number of {least} or more")
    images = len(session.bank)
    batch = min(session.data.batch_size, max(1, images // 4))
    usable = images // batch * batch  # an epoch has whole batches
    queries = min(QUERIES, max(2, usable // 4)) if queries is None else queries
    queue = min(QUEUE, max(1, usable - queries)) if queue is None else queue
    if queries + queue > usable:
        raise UserError(
            f"--queries {queries} and --queue {queue}: need {queries + queue} images, and {session.bank.root} has "
            f"{usable} in whole batches of {batch}; lower one of them"
        )
    if n_hard is not None and n_hard > queue:
        raise UserError(f"--n-hard {n_hard}: must be at most the queue's {queue} images (--queue)")
    own = session.weights.negatives
    hard = own if own is not None and own.total else HardNegatives.synco()
    hard = dataclasses.replace(hard, n_hard=min(hard.n_hard, queue) if n_hard is None else n_hard)
    return Plan(queries, queue, batch, hard, session.weights.temperature or _TEMPERATURE)


def _drawn(session: Session) -> tuple[list[int], list[str]]:
    """The held-out images to project, and their classes' names: ten classes at most, evenly spaced by number."""
    count = len(session.held_out.classes)
    chosen = torch.linspace(0, count - 1, min(count, DRAWN_CLASSES)).round().long()
    assert session.held_out.labels is not None
    rows = torch.isin(session.held_out.labels, chosen).nonzero()[:, 0]
    if len(rows) < 3:
        raise UserError(f"{session.held_out.root}: has {len(rows)} images, and a projection needs 3 or more")
    spaced = torch.arange(min(len(rows), DRAWN_IMAGES)) * len(rows) // min(len(rows), DRAWN_IMAGES)
    return rows[spaced].tolist(), [session.held_out.classes[i] for i in chosen.tolist()]


@torch.no_grad()
def _embed(session: Session, plan: Plan, encoder: Encoder, seed: int, progress: CountProgress) -> Embedded:
    """The first images of a permutation by the seed fill the queue, the next are queries."""
    device = session.processes.device
    key_encoder = encoder if session.weights.key_encoder is None else session.weights.key_encoder.to(device).eval()
    parts: dict[str, list[Tensor]] = {name: [] for name in ("keys", "labels", "view 0", "view 1", "wide 0", "wide 1")}
    done, total = 0, plan.queue + plan.queries
    loader = _loader(session, plan, seed, progress.warn)
    try:
        for batch in loader:
            if batch.epoch > 0:
                raise UserError(
                    f"{session.bank.root}: --queries {plan.queries} and --queue {plan.queue} need {total} images, and "
                    f"with bad files left out there are {done} in whole batches; lower one of them"
                )
            images = min(len(batch.samples), total - done)
            parts["keys"].append(_embeddings(key_encoder, batch.views[1][:images], session.bf16)[0])
            parts["labels"].append(loader.labels(batch.samples[:images]))
            first = max(0, plan.queue - done)  # before it are images of the queue
            for i, view in enumerate(batch.views if first < images else ()):
                narrow, wide = _embeddings(encoder, view[first:images], session.bf16)
                parts[f"view {i}"].append(narrow)
                parts[f"wide {i}"].append(wide)
            progress.advance(images)
            done += images
            if done == total:
                break
    finally:
        loader.close()
    whole = {name: torch.cat(rows) for name, rows in parts.items()}
    keys, labels = whole["keys"], whole["labels"].to(device)
    if not all(bool(rows.isfinite().all()) for rows in whole.values()):
        raise UserError(f"{session.request.checkpoint}: its embeddings are not finite; these weights cannot be used")
    return Embedded(
        queue=keys[: plan.queue],
        queue_labels=labels[: plan.queue],
        keys=keys[plan.queue :],
        labels=labels[plan.queue :],
        views=(whole["view 0"], whole["view 1"]),
        features=(whole["wide 0"], whole["wide 1"]),
    )


def _loader(session: Session, plan: Plan, seed: int, warn: Callable[[str], None]) -> TrainLoader:
    data = session.data
    loader = TrainLoader(
        session.bank,
        batch_size=plan.batch,
        image_size=data.image_size,
        recipe=RECIPES[data.recipe],
        seed=seed,
        dtype=DTYPES[data.dtype],
        augmentation=data.augmentation,
        device=session.processes.device,
        threads=data.threads,
        prefetch=data.prefetch,
        on_corrupt=data.on_corrupt,
    )
    loader.bad.on_skip = warn
    return loader


def _embeddings(encoder: Encoder, images: Tensor, bf16: bool) -> tuple[Tensor, Tensor]:
    """Unit embeddings (n, D) and backbone features (n, F) of images, float32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        wide = encoder.backbone(images if bf16 else images.float())
    return F.normalize(encoder.head(wide.float()), dim=1), F.normalize(wide.float(), dim=1)


def _geometry(embedded: Embedded) -> dict[str, dict[str, float]]:
    """Alignment, and uniformity as the mean over the two views: of embeddings, and of backbone features."""
    return {
        name: {"alignment": alignment(*views), "uniformity": sum(uniformity(view) for view in views) / 2}
        for name, views in (("embeddings", embedded.views), ("features", embedded.features))
    }


@torch.no_grad()
def compare(embedded: Embedded, plan: Plan, seed: int) -> dict[str, Any]:
    """Every query with its key, the queue and its synthetic negatives, a few queries at a time.

    Returns:
        `proxy`, `similarities` and `same_class` of result.json.
    """
    queue, hard = embedded.queue, plan.hard
    rows = max(1, _ENTRIES // max(len(queue), hard.total * queue.shape[1]))
    sizes, n = powers(hard.n_hard), len(embedded.labels)
    similarities = {name: Similarities(queue.device) for name in ("positive", "queue", "hard set", *hard.kinds)}
    among, in_queue = torch.zeros(len(sizes), dtype=torch.int64), 0
    parents: dict[str, int] = dict.fromkeys(hard.kinds, 0)
    ranks: list[Tensor] = []
    stats: dict[str, float] = {}
    for start in range(0, n, rows):
        q, k = embedded.views[0][start : start + rows], embedded.keys[start : start + rows]
        at: dict[str, Any] = {"hard": hard, "seed": seed, "row_offset": start}
        found = infonce(q, k, queue, temperature=plan.temperature, **at)
        ranks.append(torch.stack([found.rank, found.rank_all]))
        for name, value in (found.stats | {"loss": found.loss}).items():
            stats[name] = stats.get(name, 0.0) + float(value) * len(q) / n

        similarity = q @ queue.T
        same = embedded.labels[start : start + rows, None] == embedded.queue_labels
        counts, hardest = same_class_among(similarity, same, sizes)
        among, in_queue = among + counts.cpu(), in_queue + int(same.sum())
        sets = synthesize(q, queue, **at)
        groups = {"positive": (q * k).sum(dim=1), "queue": similarity, "hard set": hardest}
        for name, values in (groups | {kind: made.logits for kind, made in sets.items()}).items():
            similarities[name].add(values)
        for kind, made in sets.items():
            of_class = same.gather(1, made.parents.flatten(1)).view_as(made.parents).any(dim=-1)
            parents[kind] += int(of_class.sum())
    ranked = torch.cat(ranks, dim=1)
    return {
        "proxy": {
            name: {f"acc{n}": float((rank < n).double().mean()) for n in (1, 5)}
            for name, rank in zip(("without_synthetic", "with_synthetic"), ranked, strict=True)
        }
        | {"loss": stats["loss"], "mass": {kind: stats[f"mass_{kind}"] for kind in ("positive", "queue", *hard.kinds)}},
        "similarities": {name: values.summary() for name, values in similarities.items()},
        "same_class": {
            "queue": in_queue / (n * len(queue)),
            "hardest": [
                {"n": size, "share": int(count) / (n * size)} for size, count in zip(sizes, among, strict=True)
            ],
            "parents": {kind: count / (n * hard.count(kind)) for kind, count in parents.items()},
        },
    }


@torch.no_grad()
def _project(
    session: Session, encoder: Encoder, drawn: list[int], progress: CountProgress, tsne_seed: int | None
) -> dict[str, Any]:
    """Held-out images' unit backbone features in two dimensions; t-SNE only with a seed for it."""
    loader = evaluation_loader(session.data, session.processes, session.held_out.take(drawn))
    loader.bad.on_skip = progress.warn
    features, labels = [], []
    for wide, truth in features_of(encoder.backbone, loader, device=session.processes.device, bf16=session.bf16):
        features.append(F.normalize(wide, dim=1))
        labels += [session.held_out.classes[i] for i in truth.tolist()]
        progress.advance(len(truth))
    if len(labels) < 3:
        raise UserError(f"{session.held_out.root}: only {len(labels)} of its images can be decoded")
    rows = torch.cat(features).cpu()
    coordinates, shares = principal_components(rows)
    projected = {"labels": labels, "pca": coordinates.tolist(), "pca_variance": shares.tolist()}
    if tsne_seed is not None:
        progress.warn("t-SNE")
        projected["tsne"] = _tsne(rows, tsne_seed)
    return projected


def _tsne(rows: Tensor, seed: int) -> list[list[float]]:
    from sklearn.manifold import TSNE  # takes a second to import

    perplexity = min(30.0, (len(rows) - 1) / 3)
    model = TSNE(2, perplexity=perplexity, init="pca", random_state=seed % 2**32)
    return model.fit_transform(rows.numpy()).tolist()


def _metrics(measured: dict[str, Any]) -> dict[str, float]:
    proxy = measured["proxy"]
    return {
        **measured["geometry"]["embeddings"],
        "proxy_acc1": proxy["without_synthetic"]["acc1"],
        "proxy_acc1_with_synthetic": proxy["with_synthetic"]["acc1"],
        "same_class_share": measured["same_class"]["hardest"][-1]["share"],
    }


def _settings(session: Session, plan: Plan, seed: int, tsne: bool) -> dict[str, Any]:
    return {
        "queries": plan.queries,
        "queue": plan.queue,
        "seed": seed,
        "tsne": tsne,
        "temperature": plan.temperature,
        "recipe": session.data.recipe,
        "keys_by": "query encoder" if session.weights.key_encoder is None else "key encoder",
        "negatives": dataclasses.asdict(plan.hard),
    }
