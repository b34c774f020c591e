"""An image through our own reader: what nydusd does, without nydusd, kernel and root."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nydusfs.convert.facts import Facts, kept_xattrs
from nydusfs.convert.views import hashed

if TYPE_CHECKING:
    import trio

    from nydusfs.image_reader import ImageReader

_PIECE = 1 << 20
_STOP = 30.0  # seconds for requests that are under way


class ReaderView:
    """Handles are inodes. See `reader_view`."""

    def __init__(self, reader: ImageReader, token: trio.lowlevel.TrioToken) -> None:
        self._reader = reader
        self._bootstrap = reader.bootstrap
        self._token = token

    def root(self) -> object:
        return self._bootstrap.root

    def children(self, handle: object) -> dict[bytes, object]:
        assert isinstance(handle, int)
        return {entry.name: entry.ino for entry in self._bootstrap.list_dir(handle)}

    def facts(self, handle: object) -> tuple[Facts, object]:
        assert isinstance(handle, int)
        attr = self._bootstrap.attr(handle)
        regular, link = stat.S_ISREG(attr.mode), stat.S_ISLNK(attr.mode)
        facts = Facts(
            attr.mode,
            attr.uid,
            attr.gid,
            attr.size if regular else 0,
            attr.rdev,
            attr.mtime,
            self._bootstrap.readlink(handle) if link else b"",
            kept_xattrs(self._bootstrap.xattrs(handle)),
        )
        return facts, handle

    def digest(self, handle: object) -> str:
        assert isinstance(handle, int)
        return hashed(self._pieces(handle))

    def _pieces(self, ino: int) -> Iterator[bytes]:
        import trio

        size, offset = self._bootstrap.attr(ino).size, 0
        while offset < size:
            wanted = min(_PIECE, size - offset)
            piece = trio.from_thread.run(self._reader.read, ino, offset, wanted, trio_token=self._token)
            if not piece:
                return
            yield piece
            offset += len(piece)


@contextmanager
def reader_view(bootstrap: Path, config: dict[str, Any], name: str) -> Iterator[ReaderView]:
    """`config`: nydusd's, version 1. `name` stands for the image in messages. Raises NydusError, RafsError."""
    import trio

    opened = threading.Event()
    view: list[ReaderView] = []
    failure: list[BaseException] = []
    ended: list[trio.Event] = []

    async def serve() -> None:
        from nydusfs.config import load_config
        from nydusfs.services import open_services

        done = trio.Event()
        async with open_services() as services:
            reader = await services.open_image(str(bootstrap), load_config(json.dumps(config), name), name=name)
            view.append(ReaderView(reader, trio.lowlevel.current_trio_token()))
            ended.append(done)
            opened.set()
            await done.wait()
            reader.close()

    def run() -> None:
        try:
            trio.run(serve)
        except BaseException as error:
            failure.append(error)
        finally:
            opened.set()

    thread = threading.Thread(target=run, name="reader", daemon=True)
    thread.start()
    opened.wait()
    if not view:
        thread.join()
        raise _cause(failure[0])
    try:
        yield view[0]
    finally:
        view[0]._token.run_sync_soon(ended[0].set)
        thread.join(_STOP)


def _cause(error: BaseException) -> BaseException:
    """What a nursery wrapped."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return error
