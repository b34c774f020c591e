"""Sources for programs without an event loop: `nydus-image` reads blobs of any backend through this.

bootstrap knows nothing of backends (imports go one way); its command line looks this module up by name when a user
names a backend. A thread runs the loop, calls wait for it.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import trio

from bootstrap.errors import RafsError
from nydusfs.config import BackendConfig, load_backend, load_config
from nydusfs.errors import NydusError
from nydusfs.sources.base import Priority, Source
from nydusfs.sources.hub import SourceHub
from nydusfs.sources.opening import open_source


class BlockingReader:
    """A `bootstrap.blobsource.BlobReader` over a source. One call at a time per caller; `close` ends the thread."""

    def __init__(self, backend: BackendConfig) -> None:
        """Raises `NydusError` for a backend that cannot be used."""
        self._source: Source | None = None
        self._failure: NydusError | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop = trio.Event()
        started = threading.Event()
        arguments = (self._run, backend, started)
        self._thread = threading.Thread(target=trio.run, args=arguments, name="blob-source", daemon=True)
        self._thread.start()
        started.wait()
        if self._failure is not None:
            raise self._failure

    async def _run(self, backend: BackendConfig, started: threading.Event) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            hub = SourceHub(nursery)
            try:
                source = self._source = open_source(backend, hub)
            except NydusError as error:
                self._failure = error
                nursery.cancel_scope.cancel()
                return
            finally:
                started.set()
            await self._stop.wait()
            with trio.move_on_after(5, shield=True):
                await source.aclose()
            hub.close()
            nursery.cancel_scope.cancel()

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        """Exactly these bytes of the stored blob; RafsError names every place that was tried."""
        assert self._source is not None
        try:
            data = trio.from_thread.run(
                self._source.read, blob_id, offset, size, Priority.DEMAND, trio_token=self._token
            )
        except NydusError as error:
            raise RafsError(str(error)) from error
        return bytes(data)

    def close(self) -> None:
        if self._thread.is_alive() and self._token is not None:
            trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
            self._thread.join(10)


def open_backend(kind: str, text: str, where: str) -> BlockingReader:
    """The blobs of a backend given as `--backend-type` and its JSON; RafsError for a configuration that is wrong."""
    try:
        return BlockingReader(load_backend(kind, text, where))
    except NydusError as error:
        raise RafsError(str(error)) from error


def open_config(text: str, where: str) -> BlockingReader:
    """The blobs of the backend in a configuration: a daemon's (any version), or a blob cache entry that holds one."""
    try:
        kind, backend = _entry(text)
        if kind:
            return BlockingReader(load_backend(kind, json.dumps(backend), where))
        return BlockingReader(load_config(backend or text, where).backend)
    except NydusError as error:
        raise RafsError(str(error)) from error


def _entry(text: str) -> tuple[str, Any]:
    """Backend type and table of a v1 blob cache entry; ("", text) of the configuration in a v2 one; else ("", None)."""
    try:
        document = json.loads(text)
    except ValueError:
        return "", None
    if not isinstance(document, dict):
        return "", None
    inner = document.get("config_v2")
    if isinstance(inner, dict):
        return "", json.dumps(inner)
    old = document.get("config")
    if isinstance(old, dict) and isinstance(old.get("backend_type"), str):
        return old["backend_type"], old.get("backend_config", {})
    return "", None
