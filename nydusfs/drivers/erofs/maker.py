"""A metadata image made by a process of its own, both sides of it.

It is 0.1 s and more of computing for 20,000 files, at the very moment at which the worker fetches what the start reads
first; and it may end badly, or take much memory, without harm to anybody's mounts. The worker believes nothing of it:
the image it made is one by its trailer and checksum, as any that is found in the cache.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import trio

from bootstrap.base import Bootstrap
from bootstrap.blobmeta import needs_meta
from bootstrap.chunkmap import ChunkMap
from bootstrap.errors import FormatError
from bootstrap.layout.common import SuperFlags
from bootstrap.reader import open_bootstrap
from nydusfs.drivers.erofs.image import (
    DeviceFile,
    UnsuitableError,
    fingerprint,
    listed_devices,
    open_image,
    write_image,
)
from nydusfs.keeper.jobs import Jobs
from nydusfs.keeper.protocol import receive, send
from nydusfs.pieces import Pieces
from nydusfs.segments import Segment

PATIENT = 10  # niceness: a tenth of what a program that somebody waits for has


class Making:
    """An image in the making: `begin`, then `close`; `finish` between."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @staticmethod
    def begin(
        jobs: Jobs, bootstrap: str, folder: Path, *, enable_xattr: bool, patient: bool = False
    ) -> Making | None:
        """It will be in `folder`, named by its fingerprint. `enable_xattr`: as configured. `patient`: nobody waits for
        it. None: the worker has to."""
        # a zygote of a later keeper is in another directory
        path, into = os.path.abspath(bootstrap), str(folder)
        sock = jobs.begin(__name__, bootstrap=path, folder=into, enable_xattr=enable_xattr, patient=patient)
        return None if sock is None else Making(sock)

    async def finish(
        self, path: Path, mark: bytes, listed: Callable[[list[DeviceFile]], Awaitable[None]]
    ) -> list[DeviceFile] | None:
        """The devices of the image that is at `path` now; None where it was not made, for whatever reason:
        `write_image` tells. `listed` is given the devices while the rest is made, and they may prove wrong. Raises
        `UnsuitableError`."""
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                message, fds = receive(self._sock)
            except EOFError:
                return None
            with ExitStack() as stack:
                for fd in fds:
                    stack.callback(os.close, fd)
                if message["op"] == "unsuitable":
                    raise UnsuitableError(message["why"])
                if message["op"] == "made":
                    return await trio.to_thread.run_sync(open_image, path, mark)
                if message["op"] != "listed" or not fds:
                    continue
                try:
                    found = await trio.to_thread.run_sync(listed_devices, fds[0])
                except (OSError, ValueError, FormatError):
                    continue
            await listed(found)

    def close(self) -> None:
        """The process ends, if it still runs."""
        self._sock.close()


class _Parts(NamedTuple):
    bootstrap: Bootstrap
    chunks: ChunkMap
    segment: Callable[[int, int], Segment]


def job(request: dict[str, Any], sock: socket.socket) -> None:
    """In the other process. What goes wrong ends it."""
    if request.get("patient"):
        os.nice(PATIENT)
    bootstrap = open_bootstrap(request["bootstrap"])
    if any(needs_meta(blob) for blob in bootstrap.blobs):
        return  # the worker gets their own tables
    xattrs = request["enable_xattr"] or bool(bootstrap.flags & SuperFlags.HAS_XATTR)
    mark = fingerprint(bootstrap, xattrs)
    path = Path(request["folder"]) / mark.hex()
    if open_image(path, mark) is None:
        chunks = ChunkMap.open(bootstrap, None)
        parts = _Parts(bootstrap, chunks, Pieces(chunks, bootstrap.blobs).segment)
        try:
            write_image(parts, path, mark, xattrs, lambda fd: send(sock, "listed", [fd]))
        except UnsuitableError as error:
            send(sock, "unsuitable", why=str(error))
            return
    send(sock, "made")
