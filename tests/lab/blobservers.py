"""Blob servers of several characters in one process of their own: what `bench_sources` measures against.

    python -m tests.lab.blobservers healthy:0.2 sick:0.1 hang:0.2

Prints a JSON line with the ports in order. A line `NUMBER CHARACTER SECONDS` on stdin changes one of them; the process
ends with its stdin. Every server has every blob: the bytes of `BLOB`. Characters: `healthy`; `sick` (10 % are
503, 1 % with a flipped byte); `hang` (headers, then nothing). A protocol of asyncio and no HTTP library: a request
costs 40 us, so that the client under test has the processor.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.lab.tiny import noise

BLOB = noise(1 << 20)
_RANGE = re.compile(rb"\r\nrange: bytes=(\d+)-(\d+)\r\n", re.IGNORECASE)


class _Server(asyncio.Protocol):
    """One connection; `settings` is shared by all of a port: [character, seconds, requests so far]."""

    def __init__(self, settings: list[object], rng: random.Random) -> None:
        self._settings = settings
        self._rng = rng
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._out = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            request, self._buffer = self._buffer[: end + 2], self._buffer[end + 4 :]
            character, seconds, _ = self._settings
            match = _RANGE.search(request)
            if match is None:
                self._answer(b"HTTP/1.1 401 U\r\nContent-Length: 0\r\n\r\n")  # a ping
                continue
            first, last = int(match[1]), int(match[2])
            asyncio.get_running_loop().call_later(float(str(seconds)), self._blob, str(character), first, last)

    def _answer(self, data: bytes) -> None:
        if not self._out.is_closing():
            self._out.write(data)

    def _blob(self, character: str, first: int, last: int) -> None:
        self._settings[2] = int(str(self._settings[2])) + 1
        luck = self._rng.random()
        if character == "sick" and luck < 0.10:
            self._answer(b"HTTP/1.1 503 S\r\nContent-Length: 4\r\n\r\nsick")
            return
        body = BLOB[first : last + 1]
        head = (
            f"HTTP/1.1 206 P\r\nContent-Range: bytes {first}-{last}/{len(BLOB)}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        if character == "hang":
            self._answer(head.encode())
            return
        if character == "sick" and luck < 0.11:
            body = bytes([body[0] ^ 0x55]) + body[1:]
        self._answer(head.encode() + body)


async def _main(characters: list[str]) -> None:
    loop = asyncio.get_running_loop()
    rng = random.Random(4)
    ports, settings = [], []
    for text in characters:
        name, _, seconds = text.partition(":")
        own: list[object] = [name, float(seconds or 0), 0]
        server = await loop.create_server(lambda own=own: _Server(own, rng), "127.0.0.1", 0, backlog=1024)
        ports.append(server.sockets[0].getsockname()[1])
        settings.append(own)
    print(json.dumps(ports), flush=True)
    ended = asyncio.Event()

    def commands() -> None:
        for line in sys.stdin:
            number, name, seconds = line.split()
            settings[int(number)][:2] = [name, float(seconds)]
            print(json.dumps([own[2] for own in settings]), flush=True)
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=commands, daemon=True).start()
    await ended.wait()


@dataclass
class BlobServers:
    ports: list[int]
    process: subprocess.Popen[str]

    def change(self, number: int, character: str, seconds: float) -> list[int]:
        """Returns how many blob requests each server has answered so far."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{number} {character} {seconds}\n")
        self.process.stdin.flush()
        counts: list[int] = json.loads(self.process.stdout.readline())
        return counts


@contextmanager
def blob_servers(*characters: str) -> Iterator[BlobServers]:
    command = [sys.executable, "-m", "tests.lab.blobservers", *characters]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield BlobServers(json.loads(process.stdout.readline()), process)
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
