"""`synco-fast semisup`: fine-tuning on a labelled subset, as the scripts of SynCo (arXiv 2410.02401) do."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from synco_fast.data import operator
from synco_fast.data.index import Index
from synco_fast.data.order import steps_per_epoch
from synco_fast.engine import checkpoints
from synco_fast.errors import UserError
from synco_fast.evaluation.classifier import Protocol, Training, check_batch
from synco_fast.evaluation.journal import FILES, Journal
from synco_fast.evaluation.session import RESULT, Request, Session, opened
from synco_fast.evaluation.subset import check_classes, draw, hold_back, listed_names, named_by, write_names

EPOCHS = {0.01: 60, 0.1: 30, 1.0: 90}
"""Of those scripts, by share of the labels."""
VALIDATION = 0.2
"""Share of the subset that is held back to choose the rates by."""

SUBSET, FINETUNED = "subset.txt", "finetuned.pth"


def semisup(
    request: Request,
    *,
    fraction: float,
    listed: Path | None,
    lr_backbone: Sequence[float],
    lr_head: Sequence[float],
    epochs: int | None,
    batch_size: int,
    weight_decay: float,
    seed: int,
    resume: str | None,
) -> dict[str, Any]:
    """Fine-tune backbone and head on a share of the labels, and measure them on the held-out images.

    With several rates, each pair is trained on four fifths of the subset; the one that does best on the rest, the first
    of equals, is taken to train on the whole subset.

    Args:
        fraction: of the training images, in (0, 1]. listed: a list of their names, or None: they are drawn.
        lr_backbone, lr_head: rates at the start.
        epochs: None: those of `EPOCHS`. weight_decay: of all weights. seed: of all that is drawn.
        resume: None to start, "auto" to go on if there is something to go on with, or a checkpoint's path.

    Returns:
        What `result.json` holds; `metrics` are the last epoch's.

    Raises:
        UserError: see `opened`; an option or the list cannot be used, or a loss was not finite.
        Interrupted: by a signal, with the state saved.
    """
    epochs = checked(fraction, epochs, weight_decay)
    protocols = [
        Protocol(epochs, batch_size, seed, head, backbone, weight_decay, None)
        for backbone, head in itertools.product(lr_backbone, lr_head)
    ]
    settings = {
        "fraction": fraction,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr_backbone": list(lr_backbone),
        "lr_head": list(lr_head),
        "weight_decay": weight_decay,
        "seed": seed,
    }
    with opened("semisup", request, {*FILES, SUBSET, FINETUNED}) as session:
        subset = _subset(session, fraction, listed, seed)
        names = listed_names(subset, session.bank) if listed is None else []
        tuning = Tuning(
            session,
            protocols,
            subset,
            seed,
            # Each process has batch norm statistics of its own, so over more of them it is another training.
            Journal(session, settings | {"subset": subset.digest, "processes": session.processes.world_size}, resume),
        )
        with tuning.journal.opened(tuning.total_steps):
            if names and session.processes.is_main:
                write_names(request.output / SUBSET, names)
            training = tuning.run()
        if session.processes.is_main:
            write_backbone(request.output / FINETUNED, training.model.backbone)
        top, chosen = training.accuracies[-1], training.protocol.rates
        for row in tuning.journal.finished:
            session.say(f"validation top-1 {row['top1']:.2%} ({_text(row)})")
        session.say(f"fine-tuned on {len(subset)} images: top-1 {top['top1']:.2%}, top-5 {top['top5']:.2%}")
        session.say(f"{_text(chosen)}; {request.output / RESULT}")
        return session.write(
            top,
            settings,
            subset={"images": len(subset), "digest": subset.digest, "list": None if listed is None else str(listed)},
            chosen=chosen,
            validation=tuning.journal.finished,
            epochs=training.accuracies,
        )


class Tuning:
    """The trainings of one run: of each pair of rates, if there are several, and then of the chosen one.

    Args:
        session: the evaluation. protocols: with each pair of rates. subset: labelled images.
        seed: of which of them are held back. journal: of the run.

    Attributes:
        total_steps: of all trainings.

    Raises:
        UserError: the subset is too small for a batch, or to hold some of it back.
    """

    def __init__(
        self, session: Session, protocols: Sequence[Protocol], subset: Index, seed: int, journal: Journal
    ) -> None:
        self.session, self.protocols, self.subset, self.journal = session, protocols, subset, journal
        self.fit: Index | None = None
        batch_size, epochs = protocols[0].batch_size, protocols[0].epochs
        if len(protocols) > 1:
            check_classes(subset, "to choose between several rates by a fifth of the subset", 2)
            assert subset.labels is not None
            kept = hold_back(subset.labels, VALIDATION, seed)
            self.fit, self.validation = (subset.take(rows.nonzero().flatten().tolist()) for rows in (kept, ~kept))
        smallest, what = (subset, "the subset") if self.fit is None else (self.fit, "four fifths of the subset")
        check_batch(batch_size, len(smallest), session, what)
        if batch_size < 2 * session.processes.world_size:
            raise UserError(f"--batch-size {batch_size}: batch norm needs 2 or more images in each process")
        operator.resolve(session.data.augmentation, session.processes.device)
        self._trial_steps = 0 if self.fit is None else epochs * steps_per_epoch(len(self.fit), batch_size)
        self.total_steps = len(self.protocols) * self._trial_steps + epochs * steps_per_epoch(len(subset), batch_size)

    def run(self) -> Training:
        """The training on the whole subset, done; `journal.finished` has what the trials came to."""
        finished = self.journal.finished
        if self.fit is not None:
            for number in range(len(finished), len(self.protocols)):
                protocol, offset = self.protocols[number], number * self._trial_steps
                trial = Training(
                    self.session, protocol, self.fit, self.validation, self.journal, on="validation", offset=offset
                )
                finished.append(protocol.rates | trial.run())
                del trial
        best = max(range(len(finished)), key=lambda number: finished[number]["top1"], default=0)
        training = Training(
            self.session,
            self.protocols[best],
            self.subset,
            self.session.held_out,
            self.journal,
            offset=len(finished) * self._trial_steps,
        )
        training.run()
        return training


def write_backbone(path: Path, backbone: nn.Module) -> None:
    """Write a backbone's weights by torchvision's names, as `load_weights` reads them."""
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    checkpoints.write(path, state)


def _subset(session: Session, fraction: float, listed: Path | None, seed: int) -> Index:
    """The labelled images, of every class some."""
    bank = session.bank
    if listed is None:
        assert bank.labels is not None
        return bank.take(draw(bank.labels, fraction, seed))
    subset = bank.take(named_by(listed, bank))
    check_classes(subset, f"--list {listed}", 1)
    share = len(subset) / len(bank)
    if not 0.5 < share / fraction < 2:
        raise UserError(
            f"--list {listed}: names {len(subset)} of {len(bank)} images, a share of {share:.2g}, and --fraction is "
            f"{fraction:g}; make them agree"
        )
    return subset


def _text(rates: Mapping[str, float]) -> str:
    return f"backbone {rates['lr_backbone']:g}, head {rates['lr_head']:g}"


def checked(fraction: float, epochs: int | None, weight_decay: float) -> int:
    """The epochs of a fine-tuning whose options can be used: see `semisup`.

    Raises:
        UserError: they cannot.
    """
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"--weight-decay {weight_decay:g}: expected a number that is not negative")
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction:g}: expected a share of the labels above 0 and at most 1, as in 0.01")
    if epochs is None and fraction not in EPOCHS:
        known = ", ".join(f"{share:g}" for share in EPOCHS)
        raise UserError(f"--fraction {fraction:g}: a number of epochs is published for {known} only; give --epochs")
    return EPOCHS[fraction] if epochs is None else epochs
