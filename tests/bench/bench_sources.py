"""Chunk reads over four sources of which one is well: errors, latency beside the good one alone, extra requests.

    python -m tests.bench.bench_sources [--reads 100000] [--seconds N] [--readers 64] [--latency 0.2]
                                        [--good origin|mirror] [--json FILE]

The sources are real servers in a process of their own: nobody listens on the first, the second hangs after its headers,
the third answers one request in ten with 503 and one in a hundred with a flipped byte (after half of the latency), the
fourth is well and answers after `--latency` seconds. With `--good mirror` it is a mirror too, and the origin is dead.
Every read is checked against the blob's bytes. Beside them, from begin to end, a tenth as many readers ask the good
source alone through a client of their own: what load on the machine does to one it does to both. At the end the second
source recovers and must carry traffic again.
The time is `reads * latency / readers`, so many readers make a long run short; connections are raised to as many, and
`origin_rate_limit` to twice what they can ask for: at its default of 100 a second it is what 100 readers would measure.
A read takes half a millisecond of one core here: with 100 readers on a busy machine they wait for each other, and p99
says nothing of the sources. `--seconds` ends a run early; the figures are of what was read then.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio

from nydusfs.config import ConnectionConfig, MirrorConfig, RegistryBackend
from nydusfs.errors import SourceError
from nydusfs.http import client as http_client
from nydusfs.sources import Priority, RegistrySource, SourceHub, WrongBytes
from tests.lab.blobservers import BLOB, BlobServers, blob_servers
from tests.lab.faulty import dead_port

CHUNK = 4096
BLOBS = 64  # a source with a wrong byte is left alone for that blob: few blobs would hide it soon


@dataclass
class Result:
    """Seconds; `extra`: requests beyond one per read, as a share of the reads; `alone_p99`: of the good source."""

    reads: int
    errors: int
    p50: float
    p99: float
    longest: float
    alone_p99: float
    extra: float
    hedges: int
    retries: int
    recovered_after: float
    processor_us_per_read: float

    @property
    def ratio(self) -> float:
        return self.p99 / self.alone_p99


def blob_id(number: int) -> str:
    return f"{number % BLOBS:064x}"


async def _read(source: RegistrySource, number: int) -> None:
    offset = number * CHUNK % len(BLOB)

    async def check(body: bytes | bytearray) -> None:
        if body != BLOB[offset : offset + CHUNK]:
            raise WrongBytes("its digest is wrong")

    await source.read(blob_id(number), offset, CHUNK, Priority.DEMAND, check)


async def _many(source: RegistrySource, reads: int, readers: int, finished: trio.Event) -> tuple[list[float], int]:
    """Sorted times and failures of `reads` reads, or of those until `finished`."""
    taken: list[float] = []
    errors = 0
    numbers = iter(range(reads))

    async def reader() -> None:
        nonlocal errors
        for number in numbers:
            started = time.monotonic()
            try:
                await _read(source, number)
            except SourceError as error:
                errors += 1
                print(error, file=sys.stderr)
            taken.append(time.monotonic() - started)
            if finished.is_set():
                return

    async with trio.open_nursery() as nursery:
        for _ in range(readers):
            nursery.start_soon(reader)
    return sorted(taken), errors


async def _after(seconds: float, event: trio.Event) -> None:
    await trio.sleep(seconds)
    event.set()


def _source(hub: SourceHub, mirrors: list[str], origin: str, rate: int = 100) -> RegistrySource:
    listed = tuple(MirrorConfig(f"http://{host}") for host in mirrors)
    connection = ConnectionConfig(
        scheme="http", timeout=10, connect_timeout=10, retry_limit=2, mirrors=listed, origin_rate_limit=rate
    )
    return RegistrySource(RegistryBackend(origin, "a/b", hosts_dir="", connection=connection), hub)


async def _recovery(source: RegistrySource, servers: BlobServers, readers: int) -> float:
    """Seconds until the source that hung, now the fastest, has answered 20 reads."""
    counts = servers.change(0, "healthy", 0.005)
    started = time.monotonic()
    while time.monotonic() - started < 30:
        await _many(source, 4 * readers, readers, trio.Event())
        if servers.change(0, "healthy", 0.005)[0] - counts[0] >= 20:
            return time.monotonic() - started
    return float("inf")


async def _measure(reads: int, readers: int, latency: float, good: str, seconds: float) -> Result:
    with (
        blob_servers(f"hang:{latency / 10}", f"sick:{latency / 2}", f"healthy:{latency}") as servers,
        dead_port() as dead,
    ):
        hang, sick, healthy = (f"127.0.0.1:{port}" for port in servers.ports)
        async with trio.open_nursery() as nursery:
            mirrors = [dead, hang, sick]
            if good == "origin":
                source = _source(SourceHub(nursery), mirrors, healthy, max(100, int(2 * readers / latency)))
            else:
                source = _source(SourceHub(nursery), [*mirrors, healthy], dead)
            alone: list[float] = []
            finished, time_is_up = trio.Event(), trio.Event()

            async def control() -> None:
                good_source = _source(SourceHub(nursery), [], healthy)
                alone.extend((await _many(good_source, reads, max(1, readers // 10), finished))[0])

            async with trio.open_nursery() as both:
                both.start_soon(control)
                before = resource.getrusage(resource.RUSAGE_SELF)
                nursery.start_soon(_after, seconds, time_is_up)
                taken, errors = await _many(source, reads, readers, time_is_up)
                after = resource.getrusage(resource.RUSAGE_SELF)
                finished.set()
            tally, reads = source.racer.tally, len(taken)
            extra, hedges, retries = (tally.requests - reads) / reads, tally.hedges, tally.retries
            recovered = await _recovery(source, servers, readers)
            nursery.cancel_scope.cancel()
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def quantile(values: list[float], share: float) -> float:
        return values[min(len(values) - 1, int(len(values) * share))]

    return Result(
        reads, errors, quantile(taken, 0.5), quantile(taken, 0.99), taken[-1], quantile(alone, 0.99), extra, hedges,
        retries, recovered, used / reads * 1e6,
    )  # fmt: skip


def measure(reads: int, readers: int, latency: float = 0.2, good: str = "origin", seconds: float = math.inf) -> Result:
    kept = http_client.MAX_CONNECTIONS, http_client.MAX_IDLE
    http_client.MAX_CONNECTIONS = http_client.MAX_IDLE = max(32, 2 * readers)
    try:
        return trio.run(_measure, reads, readers, latency, good, seconds)
    finally:
        http_client.MAX_CONNECTIONS, http_client.MAX_IDLE = kept


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reads", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--readers", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--good", choices=("origin", "mirror"), default="origin")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options.reads, options.readers, options.latency, options.good, options.seconds)
    figures: dict[str, Any] = {**asdict(result), "ratio": result.ratio}
    for name, value in figures.items():
        print(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    kept = result.errors == 0 and result.ratio <= 1.5 and result.extra <= 0.03 and result.recovered_after <= 5
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
