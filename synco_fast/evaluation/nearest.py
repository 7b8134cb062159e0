"""`synco-fast knn`: weighted k-nearest-neighbour accuracy of a frozen backbone."""

from collections.abc import Sequence
from typing import Any

from synco_fast.engine.probe import KnnProbe
from synco_fast.engine.progress import CountProgress
from synco_fast.evaluation.session import RESULT, Request, opened


def knn(request: Request, *, ks: Sequence[int], temperatures: Sequence[float]) -> dict[str, Any]:
    """Classify held-out images by the votes of their neighbours in `train/`, for each k with each temperature.

    Features are taken once. Neither the bank's features nor all similarities are ever in memory.

    Returns:
        What `result.json` holds; `metrics.accuracy` is that of the first k and temperature.

    Raises:
        UserError: see `opened`; or no image of a set can be used.
    """
    votes = [(k, temperature) for k in ks for temperature in temperatures]
    with opened("knn", request) as session:
        probe = KnnProbe(session.data, session.processes, session.bank, session.held_out, bf16=session.bf16)
        share = probe.images // session.processes.world_size
        with CountProgress("knn, images", share, quiet=not session.processes.is_main) as progress:
            probe.on_images, probe.on_skip = progress.advance, progress.warn
            accuracies, images = probe.measure(session.weights.encoder.to(session.processes.device), votes)
        rows = [
            {"k": min(k, images["bank"]), "temperature": temperature, "accuracy": accuracy}
            for (k, temperature), accuracy in zip(votes, accuracies, strict=True)
        ]
        for row in rows:
            session.say(f"kNN accuracy {row['accuracy']:.2%} (k {row['k']}, t {row['temperature']})")
        session.say(f"bank {images['bank']}, held out {images['held_out']}; {request.output / RESULT}")
        settings = {"k": list(ks), "temperature": list(temperatures)}
        return session.write({"accuracy": accuracies[0]}, settings, accuracies=rows, used=images)
