"""The whole step as one CUDA graph: launched at once, whatever the host is busy with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from synco_fast.ops import HardNegatives

_EAGER_STEPS = 3
"""Before a capture, for what is set up at first use: compiled code, library handles, optimizer state."""

Run = Callable[[Sequence[Tensor], HardNegatives], None]


class GraphedStep:
    """`run`, replayed from a graph that is captured after a few steps; they are steps of the training like all others.

    When the synthetic negatives change, as they do once after the warm-up, the next few steps are eager again and a new
    graph takes the place of the old one, whose memory is given back first.

    Args:
        run: takes a batch's tensors and the negatives; must work on the device alone, in memory that stays where it
            is.
        device: a CUDA device.
    """

    def __init__(self, run: Run, device: torch.device) -> None:
        self._run = run
        self._stream = torch.cuda.Stream(device)
        self._start_anew(None)

    def _start_anew(self, hard: HardNegatives | None) -> None:
        self._hard, self._eager = hard, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []

    def __call__(self, inputs: Sequence[Tensor], hard: HardNegatives) -> None:
        if hard != self._hard:
            self._start_anew(hard)
        if self._eager < _EAGER_STEPS:
            self._eager += 1
            self._run_eagerly(inputs, hard)
            return
        if self._graph is None:
            self._capture(inputs, hard)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        assert self._graph is not None
        self._graph.replay()

    def _run_eagerly(self, inputs: Sequence[Tensor], hard: HardNegatives) -> None:
        """On the stream of the capture, where autograd will look for what it has set up."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._run(inputs, hard)
        for rows in inputs:
            rows.record_stream(self._stream)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self, inputs: Sequence[Tensor], hard: HardNegatives) -> None:
        """Record a step, which does not run it."""
        self._inputs = [torch.empty_like(rows) for rows in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # DALI's threads may allocate memory meanwhile, which only a capture of this thread alone allows.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._run(self._inputs, hard)
