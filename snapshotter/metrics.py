"""Metrics: upstream's names (snapshotter.md 5.2) and ours, collected in the background, served as they were then.

A nydusd is asked for each of its images, with deadlines; one that does not answer is `nydusd_up 0` and costs its own
numbers alone. Nothing here can fail a mount.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nydusfs.trees import disk_usage
from snapshotter.daemons import EVENTS, Daemon
from snapshotter.errors import SnapshotterError
from snapshotter.exposition import CONTENT_TYPE, Family, render
from snapshotter.httpd import Reply, Request
from snapshotter.images import Images
from snapshotter.records import InstanceRecord
from snapshotter.settings import MetricsSettings
from snapshotter.store import Kind, Store
from snapshotter.system import cpu_seconds
from snapshotter.tally import tally

log = logging.getLogger(__name__)

BLOCK_KIB = (1, 4, 16, 64, 128, 512, 1024, 2048)
# Upstream's edges, put by it on nydusd's eight counts in order, although those count other times
UPSTREAM_LATENCY = (1, 20, 50, 100, 500, 1000, 2000, 4000)
LATENCY_SECONDS = (0.0002, 0.001, 0.02, 0.05, 0.5, 1.0, 2.0)
READ = 4  # place of reads in nydusd's lists of operations
OPERATIONS = (
    *("getattr", "readlink", "open", "release", "read", "statfs", "getxattr", "listxattr"),
    *("opendir", "lookup", "readdir", "readdirplus", "access", "forget", "batch_forget"),
)
LIFE = ("RUNNING", "DIED", "DESTROYED")
CACHE_WALK_SHARE = 0.01  # of the time may go into measuring the cache
_CACHE = {
    "nydusd_cache_partial_hits": "partial_hits",
    "nydusd_cache_whole_hits": "whole_hits",
    "nydusd_cache_total_requests": "total",
    "nydusd_cache_entries_count": "entries_count",
    "nydusd_cache_prefetch_data_bytes": "prefetch_data_amount",
    "nydusd_cache_prefetch_requests_count": "prefetch_requests_count",
    "nydusd_cache_prefetch_workers": "prefetch_workers",
    "nydusd_cache_prefetch_unmerged_chunks": "prefetch_unmerged_chunks",
    "nydusd_cache_prefetch_cumulative_time_millis": "prefetch_cumulative_time_millis",
    "nydusd_cache_buffered_backend_size": "buffered_backend_size",
    "nydusd_cache_prefetch_used_segments": "prefetch_used",  # ours, as is all from here on
    "nydusd_cache_prefetch_segments": "prefetch_segments",
}
_BACKEND = {
    "nydusd_backend_reads": "read_count",
    "nydusd_backend_read_errors": "read_errors",
    "nydusd_backend_read_bytes": "read_amount_total",
    "nydusd_backend_read_milliseconds": "read_cumulative_latency_millis_total",
}
_SOURCE = {
    "nydusd_source_in_flight": "in_flight",
    "nydusd_source_error_rate": "error_rate",
    "nydusd_source_first_byte_milliseconds": "first_byte_millis",
    "nydusd_source_bytes_per_second": "bytes_per_second",
    "nydusd_source_read_bytes": "bytes",
    "nydusd_source_requests": "requests",
    "nydusd_source_failures": "failures",
}


class Metrics:
    """`start` begins to collect; `answer` is the route."""

    def __init__(self, settings: MetricsSettings, images: Images, store: Store, root: Path, cache: Path) -> None:
        self._settings = settings
        self._images = images
        self._store = store
        self._places = {"root": root, "cache": cache}
        self._cache = cache
        self._closing = threading.Event()
        self._begun = time.time()
        self._collected: list[Family] = []
        self._first = threading.Event()
        self._hung = 0
        self._cache_kb = 0.0
        self._cache_next = 0.0
        self._cpu = (time.monotonic(), cpu_seconds(os.getpid()), 0.0)

    def start(self) -> None:
        for name, period, action in (
            ("metrics", self._settings.interval, self._collect),
            ("hung-io", max(1.0, self._settings.hung_io), self._find_hung),
        ):
            threading.Thread(target=self._repeat, args=(period, action), name=name, daemon=True).start()

    def close(self) -> None:
        self._closing.set()

    def answer(self, request: Request) -> Reply:
        """GET /v1/metrics."""
        self._first.wait(10)
        return Reply(200, render([*self._collected, *self._own()]), CONTENT_TYPE)

    def _repeat(self, period: float, action: Any) -> None:
        while True:
            try:
                action()
            except Exception:
                log.exception("metrics are not complete")
            if self._closing.wait(period):
                return

    # ---- nydusd

    def _collect(self) -> None:
        table = _Table()
        for daemon in self._images.daemons():
            self._daemon(table, daemon)
        self._disk(table)
        self._collected = list(table.families.values())
        self._first.set()

    def _daemon(self, table: _Table, daemon: Daemon) -> None:
        instances = self._images.instances(daemon.id)
        for one in instances:
            table.gauge("nydusd_image_info", "A mounted image.", ("daemon_id", "image_ref")).add(
                1, daemon.id, one.image
            )
        up = table.gauge("nydusd_up", "Whether the API of nydusd answers.", ("daemon_id",))
        try:
            told = daemon.api.info(timeout=5)
        except SnapshotterError:
            up.add(0, daemon.id)
            return
        up.add(1, daemon.id)
        version = str((told.get("version") or {}).get("package_ver", ""))
        table.gauge("nydusd_counts", "nydusd processes by version.", ("version",)).add(1, version)
        rss = table.gauge("nydusd_rss_kilobytes", "Resident memory, shared pages counted once.", ("daemon_id",))
        rss.add(daemon.memory_kb(), daemon.id)
        for source in _ask(daemon, "sources") or []:
            # one mirror with other headers, so before another registry, is another source; no header: as if no label
            labels = ("daemon_id", "source", "headers")
            values = (daemon.id, str(source.get("address")), source.get("headers", ""))
            state = table.gauge("nydusd_source_up", "1: answers, 0.5: on probation, 0: given up for now.", labels)
            state.add({"up": 1.0, "trying": 0.5}.get(str(source.get("state")), 0.0), *values)
            for name, key in _SOURCE.items():
                if source.get(key) is not None:
                    table.gauge(name, f"{key} of a mirror, proxy or registry.", labels).add(source[key], *values)
        for one in instances:
            _image(table, daemon, one)

    def _find_hung(self) -> None:
        hung = 0
        for daemon in self._images.daemons():
            for request in _ask(daemon, "inflight") or []:
                hung += time.time() - request.get("timestamp_secs", time.time()) > self._settings.hung_io
        self._hung = hung

    # ---- this program and the node

    def _disk(self, table: _Table) -> None:
        counts = table.gauge("snapshotter_snapshots", "Snapshots by kind.", ("kind",))
        found = self._store.counts()
        for kind in Kind:
            counts.add(found.get(kind, 0), kind.name.lower())
        free = table.gauge("snapshotter_disk_free_bytes", "Free on the file system of root or cache.", ("place",))
        size = table.gauge("snapshotter_disk_size_bytes", "Size of the file system of root or cache.", ("place",))
        for place, path in self._places.items():
            try:
                usage = shutil.disk_usage(path)
            except OSError:
                continue
            free.add(usage.free, place)
            size.add(usage.total, place)
        began = time.monotonic()
        if began >= self._cache_next:
            try:
                self._cache_kb = disk_usage(self._cache)[0] / 1024
            except OSError:
                self._cache_kb = 0.0
            self._cache_next = time.monotonic() + (time.monotonic() - began) / CACHE_WALK_SHARE

    def _own(self) -> Iterable[Family]:
        table = _Table()
        operations = table.family(
            "snapshotter_snapshot_operation_elapsed_milliseconds", "histogram",
            "Time of calls of the snapshots service.", ("snapshot_operation",))  # fmt: skip
        for name, one in tally.operations().items():
            operations.histogram(one.edges, one.counts, one.total, name)
        for name, labels, text in (
            (EVENTS, ("nydusd_event",), "Starts, deaths and ends of nydusd."),
            ("snapshotter_cache_blobs_deleted_total", (), "Blobs of removed images deleted from the cache."),
            ("snapshotter_cache_blob_deletion_errors_total", (), "Blobs that could not be deleted."),
            ("snapshotter_credential_renewals_total", ("image_ref", "result"), "Renewals of registry credentials."),
            ("snapshotter_snapshot_operation_errors_total", ("snapshot_operation", "code"), "Failed calls."),
        ):
            family = table.family(name, "counter", text, labels)
            for known in [()] if not labels else [(event,) for event in LIFE] if name == EVENTS else []:
                family.add(0, *known)
            for values, count in tally.counted(name).items():
                family.add(count, *values)
        entries = table.gauge("snapshotter_credential_store_entries", "Credentials kept for renewal.", ("image_ref",))
        for values, count in tally.counted(entries.name).items():
            entries.add(count, *values)
        table.gauge("nydusd_hung_io_counts", "Requests in nydusd older than hung_io_interval.").add(self._hung)
        table.gauge("snapshotter_images_mounted", "Images that are mounted.").add(
            sum(map(self._images.serves, self._images.instances()))
        )
        table.gauge("snapshotter_cache_usage_kilobytes", "Size of the blob cache on disk.").add(self._cache_kb)
        in_use = sum(tally.counted("snapshotter_cache_blobs_in_use").values())
        table.gauge("snapshotter_cache_blobs_in_use", "Blobs in the cache that images use, at the last clean-up.").add(
            in_use
        )
        self._process(table)
        return table.families.values()

    def _process(self, table: _Table) -> None:
        times = os.times()
        before, used, percent = self._cpu
        now = time.monotonic()
        if now - before >= 1:
            percent = 100 * (times.user + times.system - used) / (now - before)
            self._cpu = (now, times.user + times.system, percent)
        with open("/proc/self/statm", encoding="ascii") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
        for name, value in (
            ("cpu_usage_percentage", percent),
            ("cpu_user_time_seconds", times.user),
            ("cpu_system_time_seconds", times.system),
            ("memory_usage_kilobytes", resident),
            ("fd_counts", len(os.listdir("/proc/self/fd"))),
            ("run_time_seconds", time.time() - self._begun),
            ("thread_counts", threading.active_count()),
        ):
            table.gauge(f"snapshotter_{name}", f"{name} of the snapshotter's process.").add(value)


class _Table:
    """Families by name, in order of first use."""

    def __init__(self) -> None:
        self.families: dict[str, Family] = {}

    def family(self, name: str, kind: str, text: str, labels: tuple[str, ...] = ()) -> Family:
        if name not in self.families:
            self.families[name] = Family(name, kind, text, labels)
        return self.families[name]

    def gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Family:
        return self.family(name, "gauge", text, labels)


def _ask(daemon: Daemon, kind: str, identity: str | None = None) -> Any:
    """None when it does not answer or has no such number."""
    try:
        return daemon.api.metrics(kind, identity)
    except SnapshotterError as error:
        log.debug("%s", error)
        return None


def _image(table: _Table, daemon: Daemon, one: InstanceRecord) -> None:
    labels = ("image_ref",)
    where = f"/{one.name}" if daemon.shared else "/"
    stats = _ask(daemon, "", where)
    if stats:
        table.gauge("nydusd_total_read_bytes", "Bytes given to readers.", labels).add(stats["data_read"], one.image)
        table.gauge("nydusd_read_hits", "Reads.", labels).add(stats["fop_hits"][READ], one.image)
        table.gauge("nydusd_read_errors", "Reads that failed.", labels).add(stats["fop_errors"][READ], one.image)
        blocks = table.family("nydusd_cumulative_read_block_bytes", "histogram", "Reads by size in KiB.", labels)
        blocks.histogram(BLOCK_KIB, stats["block_count_read"], stats["data_read"] / 1024, one.image)
        micros = stats["fop_cumulative_latency_total"][READ]
        table.family(
            "nydusd_read_latency_microseconds", "histogram",
            "Reads by time, under upstream's edges; see nydusd_read_latency_seconds.", labels,
        ).histogram(UPSTREAM_LATENCY, stats["read_latency_dist"], micros, one.image)  # fmt: skip
        table.family("nydusd_read_latency_seconds", "histogram", "Reads by time.", labels).histogram(
            LATENCY_SECONDS, stats["read_latency_dist"], micros / 1e6, one.image
        )
        for name, hits, errors in zip(OPERATIONS, stats["fop_hits"], stats["fop_errors"], strict=False):
            operation = (*labels, "operation")
            if hits:
                table.gauge("nydusd_operations", "File system calls.", operation).add(hits, one.image, name)
                table.gauge("nydusd_operation_errors", "Those that failed.", operation).add(errors, one.image, name)
    # a configuration's id is the mountpoint that the snapshotter gave it, whoever serves it
    cache = _ask(daemon, "blobcache", f"/{one.name}")
    if cache:
        _gauges(table, _CACHE, cache, one.image)
        begin, end = (
            1000 * cache[f"prefetch_{when}_time_secs"] + cache[f"prefetch_{when}_time_millis"]
            for when in ("begin", "end")
        )
        table.gauge("nydusd_cache_prefetch_duration_millis", "From the first prefetch to the last.", labels).add(
            max(0, end - begin), one.image
        )
    backend = _ask(daemon, "backend", where)
    if backend:
        _gauges(table, _BACKEND, backend, one.image)


def _gauges(table: _Table, names: Mapping[str, str], values: Mapping[str, Any], image: str) -> None:
    for name, key in names.items():
        if key in values:
            table.gauge(name, f"{key} as nydusd counts it.", ("image_ref",)).add(values[key], image)
