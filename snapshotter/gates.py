"""Who waits for what while this program starts: for the daemon of his image at most, or for that image alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable


class Gates:
    """One gate for each daemon on record, opened once it was found or started again. Thread-safe."""

    def __init__(self) -> None:
        self.recovered = threading.Event()
        """What is on record is known."""
        self.started = threading.Event()
        """The daemons on record, and the one of all, run or cannot."""
        self._gates: dict[str, threading.Event] = {}
        self._progress = threading.Condition()  # a gate was opened, or an image is served again

    def shut(self, daemons: Iterable[str]) -> None:
        """Before anybody is let in by `recovered`."""
        self._gates = {daemon: threading.Event() for daemon in daemons}

    def open(self, daemon: str) -> None:
        with self._progress:
            self._gates[daemon].set()
            self._progress.notify_all()

    def open_all(self) -> None:
        """Whatever became of the recovery."""
        self.recovered.set()
        for daemon in self._gates:
            self.open(daemon)

    def look_again(self) -> None:
        """What somebody in `wait` waits for may have come."""
        with self._progress:
            self._progress.notify_all()

    def wait(self, daemon: str, served: Callable[[], bool], deadline: float) -> bool:
        """Until the gate is open or the image is served: those of one daemon are mounted one after the other. False:
        neither until `deadline`, of the monotonic clock."""
        gate = self._gates.get(daemon)
        if gate is None:
            return True
        with self._progress:
            return self._progress.wait_for(lambda: gate.is_set() or served(), max(0.0, deadline - time.monotonic()))
