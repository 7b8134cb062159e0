"""`synco-fast linear --cached`: logistic regression on features taken once, which approximates the linear probe."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synco_fast.data.index import Index
from synco_fast.engine.features import features_of
from synco_fast.engine.probe import evaluation_loader
from synco_fast.engine.progress import CountProgress
from synco_fast.errors import UserError
from synco_fast.evaluation.classifier import right
from synco_fast.evaluation.linear import HEAD, write_head
from synco_fast.evaluation.session import RESULT, Request, Session, opened
from synco_fast.evaluation.subset import hold_back
from synco_fast.files import make_folder

LABEL = "logistic regression on centre-crop features: approximates the probe, no augmentation"
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""L2 penalties to choose from, each solved from the solution before it."""
HELD_BACK = 0.1

_ROWS = 2**15  # of features on the device at a time, beside what stays there
_GRADIENT = 1e-6  # largest entry of the gradient at the minimum; float32 stalls at 1e-5
_ROUGHLY = (
    1e-4  # of it while a penalty is chosen: scikit-learn's default, which moves an accuracy by a tenth of a point
)
_ITERATIONS = 1000


def cached(request: Request, *, seed: int) -> dict[str, Any]:
    """Fit the layer on the training images' centre crops to its minimum, and measure it on the held-out ones'.

    The penalty is chosen by the accuracy on a tenth of the training images, of each class alike, that are held back;
    among equals the larger wins. Then the layer is fitted to all of them.

    Args:
        seed: of which images are held back.

    Returns:
        What `result.json` holds.

    Raises:
        UserError: see `opened`; several processes; or no features to fit.
    """
    with opened("linear", request, {HEAD}) as session:
        if session.processes.world_size > 1:
            raise UserError(f"--cached: is for one process, and this run has {session.processes.world_size}")
        (train, labels), (test, test_labels) = _extracted(session)
        kept = hold_back(labels, HELD_BACK, seed)
        if bool(kept.all()):
            raise UserError(
                f"--cached: no class in {session.bank.root} has 2 images, so none can be held back to choose a penalty"
            )
        scaler = Scaler.of(train)
        for features in (train, test):
            scaler.apply(features)
        regression = Regression(_near(train, session), labels, len(session.bank.classes), session.processes.device)
        with CountProgress("logistic regression, fits", len(PENALTIES) + 1) as progress:
            rows = regression.sweep(kept, lambda: progress.advance(1))
            best = max(rows, key=lambda row: row["accuracy"])
            solved = regression.fit(best["l2"], torch.ones(len(labels)))
            progress.advance(1)
        counts = regression.right(_near(test, session), test_labels).tolist()
        make_folder(request.output)
        weight, bias = scaler.folded(regression.weight, regression.bias)
        write_head(request.output, weight, bias)
        top1, top5 = counts[0] / len(test), counts[1] / len(test)
        session.say(f"{LABEL}: top-1 {top1:.2%}, top-5 {top5:.2%}")
        if not solved["converged"]:
            session.say(f"not converged: gradient {solved['gradient']:.1e} after {solved['iterations']} iterations")
        session.say(f"L2 penalty {best['l2']:g}, chosen on held-back training images; {request.output / RESULT}")
        return session.write(
            {"cached_top1": top1, "cached_top5": top5},
            {"seed": seed, "penalties": list(PENALTIES), "held_back": HELD_BACK},
            protocol="cached",
            label=LABEL,
            l2=best["l2"],
            penalties=rows,
            solver=solved,
            used={"train": len(train), "held_back": int((~kept).sum()), "held_out": len(test)},
        )


class Regression:
    """Multinomial logistic regression: the weight (C, F) and bias (C,) of least loss.

    The loss is mean(cross-entropy) + l2 / 2 |weight|^2; the bias is not penalised. That is scikit-learn's
    `LogisticRegression` with C = 1 / (l2 n) for n rows, where there are 3 classes or more. It is computed in float64.

    Args:
        features: (n, F) float32, anywhere; they pass through the device in parts. labels: (n,) int64.
        classes: C. device: where it is computed.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, device: torch.device) -> None:
        self._features, self._labels, self._device = features, labels.to(device), device
        self.weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, device=device, requires_grad=True)
        self.bias = torch.zeros(classes, dtype=torch.float64, device=device, requires_grad=True)

    def sweep(self, kept: Tensor, on_fit: Callable[[], object] = lambda: None) -> list[dict[str, Any]]:
        """Fit roughly to the rows kept (n,) with each of `PENALTIES`: accuracies on the others. Ends at the best."""
        rows, best, solution = [], -1.0, (self.weight, self.bias)
        for l2 in PENALTIES:
            solved = self.fit(l2, kept.float(), _ROUGHLY)
            on_fit()
            held_back = self.right(self._features, self._labels, (~kept).float())
            accuracy = float(held_back[0]) / int((~kept).sum())
            rows.append({"l2": l2, "accuracy": accuracy, **solved})
            if accuracy > best:
                best, solution = accuracy, (self.weight.detach().clone(), self.bias.detach().clone())
        with torch.no_grad():
            self.weight.copy_(solution[0])
            self.bias.copy_(solution[1])
        return rows

    def fit(self, l2: float, shares: Tensor, gradient_below: float = _GRADIENT) -> dict[str, Any]:
        """Minimise from where weight and bias are, by L-BFGS; each row counts as much as its share (n,) says.

        Returns:
            iterations; gradient: its largest entry at the end; converged: that is as small as it should be.
        """
        shares = (shares.double() / shares.sum()).to(self._device)
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias],
            max_iter=_ITERATIONS,
            max_eval=10 * _ITERATIONS,
            tolerance_grad=gradient_below,
            tolerance_change=1e-12,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            total = 0.5 * l2 * self.weight.square().sum()
            total.backward()
            total = total.detach()
            for features, labels, part in self._parts(self._features, self._labels, shares):
                loss = F.cross_entropy(self._logits(features), labels, reduction="none") @ part
                loss.backward()
                total += loss.detach()
            return total

        optimizer.step(closure)
        closure()
        gradient = max(float(tensor.grad.abs().max()) for tensor in (self.weight, self.bias) if tensor.grad is not None)
        iterations = optimizer.state[self.weight].get("n_iter", 0)
        return {"iterations": iterations, "gradient": gradient, "converged": gradient <= gradient_below}

    @torch.no_grad()
    def right(self, features: Tensor, labels: Tensor, counted: Tensor | None = None) -> Tensor:
        """How many rows have their label as the most likely class, and how many among five: (2,) float64.

        Args:
            features: (m, F), labels: (m,) int64. counted: (m,), 1 for rows that count; None: all.
        """
        counted = torch.ones(len(labels)) if counted is None else counted
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        for some, truth, part in self._parts(features, labels.to(self._device), counted.to(self._device)):
            total += right(self._logits(some[part > 0]), truth[part > 0])
        return total

    def _logits(self, features: Tensor) -> Tensor:
        return F.linear(features.double(), self.weight, self.bias)

    def _parts(self, features: Tensor, *others: Tensor) -> Any:
        for start in range(0, len(features), _ROWS):
            rows = slice(start, start + _ROWS)
            yield features[rows].to(self._device), *(other[rows] for other in others)


@dataclass(frozen=True, eq=False)
class Scaler:
    """Standardisation of features: mean (F,) and standard deviation (F,) float64, 1 where a feature is constant."""

    mean: Tensor
    std: Tensor

    @staticmethod
    def of(features: Tensor) -> "Scaler":
        """Of rows (n, F), part by part."""
        mean = _mean(features, lambda part: part)
        std = _mean(features, lambda part: (part - mean).square()).sqrt()
        # float32 features that are all the same have a deviation of rounding.
        constant = std <= 10 * torch.finfo(torch.float32).eps * mean.abs()
        return Scaler(mean, torch.where(constant, 1.0, std))

    def apply(self, features: Tensor) -> None:
        """Standardise rows in place."""
        features.sub_(self.mean.float()).div_(self.std.float())

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A layer on standardised features, as one on features as they are; float32."""
        with torch.no_grad():
            weight = weight.cpu() / self.std
            return weight.float(), (bias.cpu() - weight @ self.mean).float()


def _mean(features: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    parts = [function(part.double()).sum(dim=0) for part in features.split(_ROWS)]
    return torch.stack(parts).sum(dim=0) / len(features)


def _extracted(session: Session) -> list[tuple[Tensor, Tensor]]:
    """Features (n, F) float32 and labels (n,) int64, on the host, of the training and of the held-out images."""
    backbone = session.weights.encoder.to(session.processes.device).backbone
    with CountProgress("features, images", len(session.bank) + len(session.held_out)) as progress:
        return [
            _features(session, backbone, index, progress, width=session.weights.encoder.width)
            for index in (session.bank, session.held_out)
        ]


def _features(
    session: Session, backbone: torch.nn.Module, index: Index, progress: CountProgress, *, width: int
) -> tuple[Tensor, Tensor]:
    loader = evaluation_loader(session.data, session.processes, index)
    loader.bad.on_skip = progress.warn
    features, labels = torch.empty(len(index), width), torch.empty(len(index), dtype=torch.int64)
    done, finite = 0, torch.ones((), dtype=torch.bool, device=session.processes.device)
    for some, truth in features_of(backbone, loader, device=session.processes.device, bf16=session.bf16):
        finite &= some.isfinite().all()
        features[done : done + len(some)], labels[done : done + len(some)] = some, truth
        done += len(some)
        progress.advance(len(some))
    if done == 0:
        raise UserError(f"none of the {len(index)} images in {index.root} can be used")
    if not bool(finite):
        raise UserError(f"{session.request.checkpoint}: features of {index.root} are not finite; its weights are bad")
    return features[:done], labels[:done]


def _near(features: Tensor, session: Session) -> Tensor:
    """On the device where there is room for them; else they stay, and pass through it in each iteration."""
    device = session.processes.device
    if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] < 1.5 * features.nbytes:
        return features
    return features.to(device)
