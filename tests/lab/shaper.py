"""A TCP proxy that makes loopback a slower, longer link: the kernels of test machines have no netem.

    python -m tests.lab.shaper --listen 127.0.0.1:6000 --target 127.0.0.1:5000 --rtt-ms 20 --mbit 40

Model: one link per direction, shared by all connections. Each piece read occupies its link for size/rate seconds
after everything queued before it, then travels half a round trip. A new connection costs one round trip before its
first byte. A connection has at most a window of bytes under way (128 KiB or twice the bandwidth-delay product), so
that a sender is slowed instead of filling this process' memory; what was delivered makes room for more after the half
round trip of its acknowledgement. A receiver that takes less (its buffer is small, or full) has the link carry less, as
TCP would from end to end: its window is read from the kernel.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import signal
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.lab.process import Child, can_connect, free_port

_COUNTERS = struct.Struct("=4Q")  # connections, bytes to the target, bytes from the target, open connections
_PIECE = 16 * 1024
_SEGMENT = 1448
_SND_WND = 228  # of struct tcp_info: the window that the peer offers
# A receive buffer that nobody has set; over a link with this delay the kernel would have let it grow.
_GROWING = 0.75 * int(Path("/proc/sys/net/ipv4/tcp_rmem").read_text().split()[1])


class Link:
    """One direction: `rate` bytes/s (0: unlimited), `delay` seconds one way."""

    def __init__(self, rate: float, delay: float) -> None:
        self.rate, self.delay = rate, delay
        self.window = max(128 * 1024, int(2 * rate * 2 * delay))
        # Above about 10 MB/s the cost per piece (0.1 ms of CPU) would itself become the limit.
        self.piece = _PIECE if 0 < rate < 10e6 else 128 * 1024
        self.free_at = 0.0
        self.bytes = 0

    def due(self, now: float, size: int) -> float:
        """Books `size` bytes and returns the time at which their last byte arrives."""
        self.bytes += size
        if self.rate:
            self.free_at = max(now, self.free_at) + size / self.rate
            return self.free_at + self.delay
        return now + self.delay


class Shaper:
    def __init__(self, target: tuple[str, int], rtt: float, rate: float, stats: mmap.mmap | None = None) -> None:
        self.target, self.rtt, self.stats = target, rtt, stats
        self.up, self.down = Link(rate, rtt / 2), Link(rate, rtt / 2)
        self.connections = self.open = 0

    def publish(self) -> None:
        if self.stats is not None:
            _COUNTERS.pack_into(self.stats, 0, self.connections, self.up.bytes, self.down.bytes, self.open)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.publish()
        far_writer = None
        try:
            await asyncio.sleep(self.rtt)
            far_reader, far_writer = await asyncio.open_connection(*self.target, limit=256 * 1024)
            pumps = [
                asyncio.create_task(self._pump(self.up, reader, far_writer)),
                asyncio.create_task(self._pump(self.down, far_reader, writer)),
            ]
            try:
                await asyncio.gather(*pumps)
            finally:
                for pump in pumps:
                    pump.cancel()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            self.publish()
            for stream in (writer, far_writer):
                if stream is not None:
                    stream.close()

    async def _pump(self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: deque[tuple[float, bytes]] = deque()
        state = {"under_way": 0, "delivered": 0, "widest": 1}
        wake, room = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        clock = loop.time
        peer: socket.socket = writer.get_extra_info("socket")

        def window() -> int:
            """What may be under way; less than is, if the receiver does not take it."""
            info = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SND_WND + 4)
            if len(info) < _SND_WND + 4:
                return link.window
            (offered,) = struct.unpack_from("=I", info, _SND_WND)
            state["widest"] = widest = max(state["widest"], offered)
            # What was delivered, not acknowledged and not read fills the receiver's buffer too: it counts once.
            open_ = min(int(offered) + state["delivered"], widest)
            return min(link.window, open_) if widest < _GROWING else link.window * open_ // widest

        def acknowledged(size: int) -> None:
            state["under_way"] -= size
            state["delivered"] -= size
            room.set()

        async def deliver() -> None:
            while True:
                while not queue:
                    wake.clear()
                    await wake.wait()
                due, data = queue.popleft()
                wait = due - clock()
                if wait > 0:
                    await asyncio.sleep(wait)
                if not data:
                    if writer.can_write_eof():
                        writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()
                state["delivered"] += len(data)
                loop.call_later(link.delay, acknowledged, len(data))

        delivery = asyncio.create_task(deliver())
        try:
            while True:
                data = await reader.read(link.piece)
                now = clock()
                queue.append((link.due(now, len(data)), data))
                wake.set()
                self.publish()
                if not data:
                    break
                state["under_way"] += len(data)
                while state["under_way"] >= window() and not delivery.done():
                    room.clear()
                    try:
                        async with asyncio.timeout(0.005):  # a window that opens says nothing
                            await room.wait()
                    except TimeoutError:
                        pass
            await delivery
        finally:
            delivery.cancel()


@dataclass(frozen=True, slots=True)
class LinkCount:
    """Bytes over the link since it was opened, headers included; from the target's side `down` is what it sent."""

    connections: int
    up: int
    down: int
    open: int


class ShapedLink:
    """The proxy above as a process of its own (its CPU is then not the test's), as a context manager."""

    def __init__(
        self, work: Path, target: str, rtt_ms: float = 20.0, mbit: float = 40.0, port: int | None = None
    ) -> None:
        self.work, self.target, self.rtt_ms, self.mbit = work, target, rtt_ms, mbit
        self.port = port or free_port()
        self.stats = work / "shaper.stats"
        self._child: Child | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def start(self) -> ShapedLink:
        self.work.mkdir(parents=True, exist_ok=True)
        argv = [
            sys.executable,
            "-m",
            "tests.lab.shaper",
            "--listen",
            self.host,
            "--target",
            self.target,
            "--rtt-ms",
            str(self.rtt_ms),
            "--mbit",
            str(self.mbit),
            "--stats",
            str(self.stats),
        ]
        self._child = Child("shaper", argv, self.work / "shaper.log", cwd=Path(__file__).resolve().parents[2])
        self._child.wait_ready(lambda: self.stats.exists() and can_connect(("127.0.0.1", self.port)))
        return self

    def count(self) -> LinkCount:
        return LinkCount(*_COUNTERS.unpack(self.stats.read_bytes()[: _COUNTERS.size]))

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None

    def __enter__(self) -> ShapedLink:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host or "127.0.0.1", int(port)


async def _main(options: argparse.Namespace, stats: mmap.mmap | None, ready: Callable[[], None]) -> None:
    shaper = Shaper(options.target, options.rtt_ms / 1000, options.mbit * 1e6 / 8, stats)
    server = await asyncio.start_server(shaper.serve, *options.listen, limit=256 * 1024, start_serving=False)
    for listener in server.sockets:  # loopback's 64 KiB would not fit into a small window
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
    await server.start_serving()
    ready()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.shaper", description="A TCP proxy with delay and rate.")
    parser.add_argument("--listen", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--target", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--rtt-ms", type=float, default=20.0, help="round trip time in milliseconds (20)")
    parser.add_argument("--mbit", type=float, default=40.0, help="rate per direction in Mbit/s, 0 for no limit (40)")
    parser.add_argument(
        "--stats", metavar="FILE", help="keep four counters in FILE: connections, bytes up, bytes down, open"
    )
    options = parser.parse_args()
    if not options.stats:
        asyncio.run(_main(options, None, lambda: None))
        return
    part = f"{options.stats}.part"
    with open(part, "wb+") as file:
        file.truncate(_COUNTERS.size)
        stats = mmap.mmap(file.fileno(), _COUNTERS.size)
    asyncio.run(_main(options, stats, lambda: os.rename(part, options.stats)))


if __name__ == "__main__":
    main()
