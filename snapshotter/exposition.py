"""Prometheus' text format, as it is read by every version.

Written here and not by prometheus-client, which renames counters to `..._total`: upstream's dashboards know
`nydusd_lifetime_event_counts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(slots=True)
class Family:
    """One metric: samples are (name suffix, label values, value) under `labels`."""

    name: str
    kind: str  # gauge, counter, histogram
    help: str
    labels: tuple[str, ...] = ()
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)

    def add(self, value: float, *labels: str, suffix: str = "", **more: str) -> None:
        """Values with the same labels add up: one image may be mounted twice."""
        pairs = (*zip(self.labels, labels, strict=True), *more.items())
        key = suffix, pairs
        self.samples[key] = self.samples.get(key, 0.0) + value

    def histogram(self, edges: Sequence[float], counts: Sequence[float], total: float, *labels: str) -> None:
        """`counts` are not cumulative; those beyond the edges are in +Inf alone."""
        running = 0.0
        for edge, count in zip(edges, counts, strict=False):
            running += count
            self.add(running, *labels, suffix="_bucket", le=_number(edge))
        everything = float(sum(counts))
        self.add(everything, *labels, suffix="_bucket", le="+Inf")
        self.add(total, *labels, suffix="_sum")
        self.add(everything, *labels, suffix="_count")


def render(families: Iterable[Family]) -> bytes:
    out: list[str] = []
    for family in families:
        if not family.samples:
            continue
        out.append(f"# HELP {family.name} {_escape(family.help, quotes=False)}")
        out.append(f"# TYPE {family.name} {family.kind}")
        for (suffix, pairs), value in family.samples.items():
            labels = ",".join(f'{name}="{_escape(text)}"' for name, text in pairs)
            out.append(f"{family.name}{suffix}{{{labels}}} {_number(value)}" if labels else
                       f"{family.name}{suffix} {_number(value)}")  # fmt: skip
    return ("\n".join(out) + "\n").encode("utf-8", "replace")


def _escape(text: str, *, quotes: bool = True) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
