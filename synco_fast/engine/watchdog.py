"""Noticing a process that no longer gets on: one that waits for another, or for data, would wait for ever."""

import faulthandler
import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from synco_fast.engine.distributed import Processes
from synco_fast.errors import EXIT_ERROR

_SHOWN = 8  # ranks in a report


class Watchdog:
    """Ends this process, with a report, where it has been in one place for too long; torchrun then starts all anew.

    Entered, it watches from a thread of its own, as a process that hangs in a collective or in a driver runs no Python.
    The report says where each rank is, so that it names the one that the others wait for.

    Args:
        processes: of the run. minutes: how long is too long; None: no limit, and no watching.
    """

    def __init__(self, processes: Processes, minutes: float | None) -> None:
        self._processes, self._minutes = processes, minutes
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.at("the start", 0)

    def at(self, what: str, step: int) -> None:
        """This process has come to a place: `what` it begins there, and the step."""
        self._what, self._step, self._since = what, step, time.monotonic()

    def still(self) -> None:
        """It gets on with what it is at."""
        self._since = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        if self._minutes is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        if self._minutes is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self._minutes is not None
        limit = 60 * self._minutes
        looked = time.monotonic()
        while not self._stopped.wait(min(1.0, limit / 10)):
            before, looked = looked, time.monotonic()
            if looked - before > limit / 2:  # this very process was stopped for that long, and now goes on
                self._since = looked
            if looked - self._since > limit:
                self._report(min(10.0, limit / 2))
                os._exit(EXIT_ERROR)

    def _report(self, patience: float) -> None:
        rank, many = self._processes.rank, self._processes.world_size
        lines = [
            f"error: rank {rank} of {many} has been at step {self._step}, in {self._what}, for more than "
            f"trainer.stall_minutes = {self._minutes:g}"
        ]
        if many > 1:
            # In a thread, as a store that hangs itself keeps whoever asks it, whatever its timeout.
            said: list[str] = []
            asking = threading.Thread(target=lambda: said.extend(self._others(patience)), daemon=True)
            asking.start()
            asking.join(3 * max(1.0, patience))
            lines += said or ["the other ranks cannot be asked: their store does not answer"]
        print("\n  ".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)

    def _others(self, patience: float) -> list[str]:
        """Where the other ranks are, the one furthest behind first."""
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=max(1.0, patience))
            )
            store.set(self._key(self._processes.rank), f"{self._step:012d} {self._what}")
            time.sleep(patience)  # the others come to the same conclusion, about now
            places = []
            for rank in range(self._processes.world_size):
                if not store.check([self._key(rank)]):
                    places.append(("", f"rank {rank} does not answer"))
                elif rank != self._processes.rank:
                    step, _, what = store.get(self._key(rank)).decode().partition(" ")
                    places.append((step, f"rank {rank} is at step {int(step)}, in {what}"))
            return [text for _, text in sorted(places)[:_SHOWN]]
        except (RuntimeError, KeyError, ValueError) as error:
            return [f"the other ranks cannot be asked: {str(error).partition(chr(10))[0]}"]

    def _key(self, rank: int) -> str:
        """Of this start of the processes: torchrun's store outlives them."""
        return f"synco_fast/stalled/{self._processes.start}/{rank}"
