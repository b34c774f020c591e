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
from bootstrap.reader import open_bootstrap
from nydusfs.drivers.erofs.image import (
    DeviceFile,
    UnsuitableError,
    fingerprint,
    listed_devices,
    open_image,
    write_image,
)
from nydusfs.image_reader import ImageReader
from nydusfs.keeper.jobs import Jobs
from nydusfs.keeper.protocol import receive, send
from nydusfs.pieces import Pieces
from nydusfs.segments import Segment


async def make_apart(
    jobs: Jobs,
    reader: ImageReader,
    path: Path,
    mark: bytes,
    xattrs: bool,
    listed: Callable[[list[DeviceFile]], Awaitable[None]],
) -> list[DeviceFile] | None:
    """The devices of the image that is at `path` now; None where it was not made, for whatever reason: `write_image`
    tells. `listed` is given the devices while the rest is made, and they may prove wrong. Raises `UnsuitableError`."""
    if any(needs_meta(blob) for blob in reader.bootstrap.blobs):
        return None  # their own tables are in this process's memory
    sock = _begin(jobs, reader.bootstrap, path, mark, xattrs)
    if sock is None:
        return None
    with sock:
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                message, fds = receive(sock)
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


def _begin(jobs: Jobs, bootstrap: Bootstrap, path: Path, mark: bytes, xattrs: bool) -> socket.socket | None:
    # a zygote of a later keeper is in another directory
    source = os.path.abspath(bootstrap.path)
    return jobs.begin(__name__, bootstrap=source, path=str(path), mark=mark.hex(), xattrs=xattrs)


class _Parts(NamedTuple):
    bootstrap: Bootstrap
    chunks: ChunkMap
    segment: Callable[[int, int], Segment]


def job(request: dict[str, Any], sock: socket.socket) -> None:
    """In the other process. What goes wrong ends it."""
    bootstrap = open_bootstrap(request["bootstrap"])
    mark = bytes.fromhex(request["mark"])
    if fingerprint(bootstrap, request["xattrs"]) != mark:
        return  # the file is another one by now
    chunks = ChunkMap.open(bootstrap, None)
    parts = _Parts(bootstrap, chunks, Pieces(chunks, bootstrap.blobs).segment)
    try:
        write_image(parts, Path(request["path"]), mark, request["xattrs"], lambda fd: send(sock, "listed", [fd]))
        send(sock, "made")
    except UnsuitableError as error:
        send(sock, "unsuitable", why=str(error))
