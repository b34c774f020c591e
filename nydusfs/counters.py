"""Numbers the daemon's metrics API shows, counted where the work happens. Field names and meaning are upstream's.

Plain integer attributes, changed from the trio thread only: counting costs nothing on the read path.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass, field
from typing import Any

SIZE_EDGES = (1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20)
_LATENCY_EDGES_US = tuple(1000 * edge for edge in (1, 20, 50, 100, 500, 1000, 2000))


MAX_UNUSED = 16384  # keys; what is beyond counts as unused


def size_bucket(size: int) -> int:
    """0 to 7: below 1 KiB, 4, 16, 64, 128, 512 KiB, 1 MiB, and from 1 MiB on."""
    return bisect_right(SIZE_EDGES, size)


def _eight() -> list[int]:
    return [0] * 8


@dataclass(slots=True)
class SourceTally:
    """What one server did, for one image or for all. `bytes`: of answers that were verified."""

    requests: int = 0
    failures: int = 0
    bytes: int = 0


@dataclass(slots=True)
class BackendCounters:
    """`/metrics/backend`. One read is counted once, however many sources and attempts it took."""

    backend_type: str = ""
    read_count: int = 0
    read_errors: int = 0
    read_amount_total: int = 0  # bytes asked for, failed reads included
    latency_us_total: int = 0
    latency_us_by_size: list[int] = field(default_factory=_eight)
    read_count_block_size_dist: list[int] = field(default_factory=_eight)
    read_latency_sizes_dist: list[list[int]] = field(default_factory=lambda: [_eight() for _ in range(8)])
    sources: dict[str, SourceTally] = field(default_factory=dict)  # by address; empty for files

    def record(self, size: int, started: float, failed: bool) -> None:
        """`started` is a `time.monotonic()` value."""
        elapsed_us = int((time.monotonic() - started) * 1e6)
        bucket = size_bucket(size)
        self.read_count += 1
        self.read_errors += failed
        self.read_amount_total += size
        self.latency_us_total += elapsed_us
        self.latency_us_by_size[bucket] += elapsed_us
        self.read_count_block_size_dist[bucket] += 1
        latency = bisect_left(_LATENCY_EDGES_US, elapsed_us)
        self.read_latency_sizes_dist[bucket][latency] += 1

    def as_json(self) -> dict[str, Any]:
        return {
            "backend_type": self.backend_type,
            "read_count": self.read_count,
            "read_errors": self.read_errors,
            "read_amount_total": self.read_amount_total,
            "read_cumulative_latency_millis_total": self.latency_us_total // 1000,
            "read_cumulative_latency_millis_dist": [value // 1000 for value in self.latency_us_by_size],
            "read_count_block_size_dist": list(self.read_count_block_size_dist),
            "read_latency_sizes_dist": [list(row) for row in self.read_latency_sizes_dist],
            "sources": [{"address": address, **asdict(tally)} for address, tally in self.sources.items()],
        }


@dataclass(slots=True)
class CacheCounters:
    """`/metrics/blobcache`. A hit is a segment read from its file; `total` counts read calls that reached the cache."""

    store_path: str = ""
    partial_hits: int = 0
    whole_hits: int = 0
    total: int = 0
    entries_count: int = 0  # chunks made ready by this process
    prefetch_data_amount: int = 0
    prefetch_requests_count: int = 0
    prefetch_workers: int = 0
    prefetch_cumulative_us: int = 0
    prefetch_begin: float = 0.0  # wall clock
    prefetch_end: float = 0.0
    buffered_backend_size: int = 0
    underlying_files: set[str] = field(default_factory=set)  # blob ids
    prefetch_segments: int = 0  # fetched before a reader asked
    prefetch_used: int = 0  # of those, how many a reader then asked for
    unused: set[bytes] = field(default_factory=set)  # keys of those that nobody asked for yet

    def fetched_ahead(self, key: bytes) -> None:
        self.prefetch_segments += 1
        if len(self.unused) < MAX_UNUSED:
            self.unused.add(key)

    def used(self, key: bytes) -> None:
        """From any thread: a count that is off by one now and then is no harm."""
        if key in self.unused:
            self.unused.discard(key)
            self.prefetch_used += 1

    def as_json(self) -> dict[str, Any]:
        return {
            "underlying_files": sorted(f"{blob}.blob.data" for blob in self.underlying_files),
            "store_path": self.store_path,
            "partial_hits": self.partial_hits,
            "whole_hits": self.whole_hits,
            "total": self.total,
            "entries_count": self.entries_count,
            "prefetch_data_amount": self.prefetch_data_amount,
            "prefetch_requests_count": self.prefetch_requests_count,
            "prefetch_workers": self.prefetch_workers,
            "prefetch_unmerged_chunks": 0,
            "prefetch_segments": self.prefetch_segments,
            "prefetch_used": self.prefetch_used,
            "prefetch_cumulative_time_millis": self.prefetch_cumulative_us // 1000,
            "prefetch_begin_time_secs": int(self.prefetch_begin),
            "prefetch_begin_time_millis": int(self.prefetch_begin * 1000) % 1000,
            "prefetch_end_time_secs": int(self.prefetch_end),
            "prefetch_end_time_millis": int(self.prefetch_end * 1000) % 1000,
            "buffered_backend_size": self.buffered_backend_size,
            "data_all_ready": False,
        }
