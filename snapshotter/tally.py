"""What happened in this process, counted where it happens and shown as metrics and to `nydusctl explain`.

One per process, as logging is: `from snapshotter.tally import tally`. Labels are label sets of upstream's metrics.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

OPERATION_MS = (0.5, 1, 5, 10, 50, 100, 150, 200, 250, 300, 350, 400, 600, 1000)  # upstream's buckets
MAX_REMEMBERED = 1024


@dataclass(slots=True)
class Histogram:
    """`counts` has one place more than `edges`; not cumulative."""

    edges: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.edges) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.total += value


class Tally:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._operations: dict[str, Histogram] = {}
        self._counters: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._gauges: dict[tuple[str, tuple[str, ...]], float] = {}
        self._times: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def operation(self, name: str, seconds: float) -> None:
        """One call of the snapshots service that ended, well or not. `name` as upstream's label: PREPARE, ..."""
        with self._lock:
            self._operations.setdefault(name, Histogram(OPERATION_MS)).observe(seconds * 1000)

    def count(self, metric: str, *labels: str, by: int = 1) -> None:
        with self._lock:
            self._counters[metric, labels] += by

    def set(self, metric: str, *labels: str, value: float) -> None:
        with self._lock:
            self._gauges[metric, labels] = value

    def drop(self, metric: str, *labels: str) -> None:
        """A gauge of something that is gone."""
        with self._lock:
            self._gauges.pop((metric, labels), None)

    def operations(self) -> dict[str, Histogram]:
        with self._lock:
            return {name: Histogram(one.edges, list(one.counts), one.total) for name, one in self._operations.items()}

    def counted(self, metric: str) -> dict[tuple[str, ...], float]:
        """Label values -> what `count` and `set` made of them."""
        with self._lock:
            found = {**self._gauges, **self._counters}
        return {labels: value for (name, labels), value in found.items() if name == metric}

    def remember(self, what: str, **phases: float) -> None:
        """Times of something that happens once: `image 12`, `container KEY`. Seconds; `at` is wall clock, added."""
        with self._lock:
            self._times[what] = {"at": time.time(), **{name: round(value, 6) for name, value in phases.items()}}
            self._times.move_to_end(what)
            if len(self._times) > MAX_REMEMBERED:
                self._times.popitem(last=False)

    def remembered(self, what: str) -> dict[str, Any]:
        """{} when it was before this program's start."""
        with self._lock:
            return dict(self._times.get(what, {}))


tally = Tally()
