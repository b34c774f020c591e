"""New credentials reach images that are mounted: before the old ones end, at an interval, and when a source changes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from snapshotter.tally import tally

RENEWALS = "snapshotter_credential_renewals_total"
ENTRIES = "snapshotter_credential_store_entries"
FIRST_PAUSE, MAX_PAUSE = 5.0, 600.0  # seconds, after a failed renewal, doubling
MIN_PAUSE = 1.0
GATHER_SECONDS = 0.2  # a change seldom comes alone


class Result(Enum):
    SAME = "same"
    RENEWED = "success"
    FAILED = "failure"


@dataclass(frozen=True, slots=True)
class Renewal:
    """`expires`: when the credentials now in use should be asked for again, seconds since the epoch."""

    image: str
    result: Result
    expires: float | None


class Renewer:
    """One thread. `mounted` names what is there, `renew` looks one up again and hands it on; it raises nothing.

    `interval` (seconds): everything is looked up again so often; 0: only what is known to end, and on `kick`.
    """

    def __init__(
        self, mounted: Callable[[], Iterable[str]], renew: Callable[[str], Renewal | None], interval: float
    ) -> None:
        self._mounted, self._renew, self._interval = mounted, renew, interval
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._everything = False
        self._due: dict[str, float] = {}  # monotonic
        self._pauses: dict[str, float] = {}
        self._images: dict[str, str] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        threading.Thread(target=self._run, name="auth-renewal", daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._wake.set()

    def kick(self) -> None:
        """A source knows something new: everything is looked up again soon."""
        self._everything = True
        self._wake.set()

    def learned(self, instance: str, expires: float | None) -> None:
        """An image was mounted with credentials that should be asked for again at `expires`."""
        if expires is not None:
            self._set(instance, max(MIN_PAUSE, expires - time.time()))
            self._wake.set()

    def _set(self, instance: str, delay: float) -> None:
        with self._lock:
            self._due[instance] = time.monotonic() + delay

    def _run(self) -> None:
        next_round = time.monotonic() + self._interval if self._interval else float("inf")
        while not self._closing.is_set():
            with self._lock:
                due = min([*self._due.values(), next_round])
            # a wait of many years overflows the clock's type
            self._wake.wait(min(max(0.0, due - time.monotonic()), 86400.0))
            if self._closing.is_set():
                return
            self._wake.clear()
            if self._everything:
                self._closing.wait(GATHER_SECONDS)
            everything, self._everything = self._everything, False
            if time.monotonic() >= next_round:
                everything = True
                next_round = time.monotonic() + self._interval * random.uniform(0.9, 1.0)
            self._round(everything)

    def _round(self, everything: bool) -> None:
        with self._lock:
            wanted = {one for one, at in self._due.items() if at <= time.monotonic()}
        if everything:
            wanted |= set(self._mounted())
        for instance in sorted(wanted):
            if self._closing.is_set():
                return
            with self._lock:
                self._due.pop(instance, None)
            done = self._renew(instance)
            if done is None:  # unmounted meanwhile
                self._pauses.pop(instance, None)
                tally.drop(ENTRIES, self._images.pop(instance, ""))
                continue
            if done.result is Result.FAILED:
                pause = self._pauses[instance] = min(self._pauses.get(instance, FIRST_PAUSE / 2) * 2, MAX_PAUSE)
                self._set(instance, pause)
            else:
                self._pauses.pop(instance, None)
                if done.expires is not None:
                    self._set(instance, max(MIN_PAUSE, done.expires - time.time()))
                    self._images[instance] = done.image
                    tally.set(ENTRIES, done.image, value=1)
            if done.result is not Result.SAME:
                tally.count(RENEWALS, done.image, done.result.value)
