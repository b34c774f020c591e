"""Blobs as files: a verified stream that survives broken connections, and random access by ranges."""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import httpx

from nydusfs.errors import RegistryError, WrongBytesError
from nydusfs.redact import public_url
from nydusfs.registry.hosts import Endpoint

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from nydusfs.registry.transport import Transport

log = logging.getLogger(__name__)

_TAIL = 64 * 1024
# a connection that carried this much before it broke does not count as one more failure in a row
_PROGRESS = 1 << 20


class BlobStream(io.RawIOBase):
    """A blob from its first to its last byte. The last read raises RegistryError if size or digest are wrong, so bytes
    may be used for derived results only once the end was seen. A broken connection is taken up where it broke."""

    def __init__(self, transport: Transport, repository: str, digest: str, size: int | None = None) -> None:
        self._transport = transport
        self._path = f"/v2/{repository}/blobs/{digest}"
        self._scope = f"repository:{repository}:pull"
        self._name = f"blob {digest} of {transport.host}/{repository}"
        self._digest = digest
        self._size = size
        self._hash = hashlib.sha256()
        self._position = 0
        self._pending = memoryview(b"")
        self._pieces: Iterator[bytes] | None = None
        self._open = ExitStack()
        self._mirrors = transport.mirrors()  # those left to be asked, before the registry itself
        self._failures = 0
        self._broke_at = 0
        self._done = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        if not self._pending and not self._done:
            self._pending = memoryview(self._next())
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._pending))
        view[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def close(self) -> None:
        self._open.close()
        super().close()

    def _next(self) -> bytes:
        """The next piece, hashed and counted; b"" at the verified end."""
        while True:
            try:
                if self._pieces is None:
                    self._pieces = self._connect()
                piece = next(self._pieces, b"")
                if not piece:
                    self._finish()
                    return b""
            except httpx.HTTPError as error:
                self._broken(str(error) or type(error).__name__)
                continue
            self._position += len(piece)
            self._hash.update(piece)
            if self._size is not None and self._position > self._size:
                raise self._wrong(f"{self._name} is longer than its {self._size} bytes")
            return piece

    def _connect(self) -> Iterator[bytes]:
        end = self._size - 1 if self._size else ""
        headers = {"Range": f"bytes={self._position}-{end}"} if self._position else {}
        while True:
            try:
                endpoint = self._mirrors[0] if self._mirrors else self._transport.server
                return self._answer(endpoint, headers)
            except RegistryError as error:
                self._leave_mirror(error)

    def _answer(self, endpoint: Endpoint, headers: dict[str, str]) -> Iterator[bytes]:
        response = self._open.enter_context(
            self._transport.request("GET", self._path, scope=self._scope, endpoint=endpoint, headers=headers)
        )
        if response.status_code not in (200, 206):
            self._transport.raise_for(response, self._name)
        start = 0
        if response.status_code == 206 and self._position:
            text = response.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
            if not text.isdecimal() or int(text) > self._position:
                raise RegistryError(f"{self._name}: asked from byte {self._position}, got from byte {text!r}")
            start = int(text)
        return _skip(response.iter_raw(), self._position - start)

    def _leave_mirror(self, error: RegistryError) -> None:
        """For the next address; raises `error` where it is not of a mirror."""
        self._open.close()
        if not self._mirrors:
            raise error
        mirror = public_url(self._mirrors.pop(0).url)
        log.warning("%s: mirror %s failed (%s), trying the next", self._name, mirror, error)

    def _broken(self, reason: str) -> None:
        self._failures = 1 if self._position - self._broke_at >= _PROGRESS else self._failures + 1
        self._broke_at = self._position
        self._pieces = None
        self._open.close()
        if self._failures > self._transport.options.retries:
            self._leave_mirror(RegistryError(f"{self._name}: connection broke at byte {self._position}: {reason}"))
            self._failures = 0
            return
        log.debug("%s: %s at byte %d, going on", self._name, reason, self._position)
        time.sleep(self._transport.options.retry_delay * 2 ** (self._failures - 1))

    def _finish(self) -> None:
        self._open.close()
        if self._size is not None and self._position != self._size:
            raise self._wrong(f"{self._name} has {self._position} bytes, its descriptor says {self._size}")
        found = f"sha256:{self._hash.hexdigest()}"
        if self._digest.startswith("sha256:") and found != self._digest:
            raise self._wrong(f"{self._name}: the bytes received have digest {found}")
        self._done = True

    def _wrong(self, what: str) -> WrongBytesError:
        if self._mirrors:
            self._transport.distrust(self._mirrors[0])
        return WrongBytesError(what)


def _skip(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    for piece in pieces:
        if count >= len(piece):
            count -= len(piece)
            continue
        yield piece[count:]
        count = 0


class RangedBlob(io.RawIOBase):
    """Random access to a blob of known size, for the few kilobytes at a layer's tail. Such tails are read in pieces
    from the back, so what lies before a wanted piece is fetched with it. Bytes are not verified here, only their
    number; callers check digests of what they take out."""

    def __init__(self, transport: Transport, repository: str, digest: str, size: int) -> None:
        self._transport = transport
        self._repository = repository
        self._digest = digest
        self._size = size
        self._position = 0
        self._start = 0
        self._window = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._position))
        if count:
            end = self._position + count
            if not self._start <= self._position <= end <= self._start + len(self._window):
                start = min(self._position, max(0, end - _TAIL))
                self._window = self._fetch(start, end - start)
                self._start = start
            view[:count] = self._window[self._position - self._start : end - self._start]
            self._position = end
        return count

    def _fetch(self, offset: int, count: int) -> bytes:
        name = f"blob {self._digest} of {self._transport.host}/{self._repository}"
        failure: RegistryError | None = None
        for endpoint in self._transport.pull_endpoints():
            try:
                return self._fetch_from(endpoint, offset, count, name)
            except RegistryError as error:
                failure = error
        raise failure or RegistryError(f"{name}: no address to read from")

    def _fetch_from(self, endpoint: Endpoint, offset: int, count: int, name: str) -> bytes:
        options, data, breaks = self._transport.options, bytearray(), 0
        while True:
            start = offset + len(data)
            with self._transport.request(
                "GET",
                f"/v2/{self._repository}/blobs/{self._digest}",
                scope=f"repository:{self._repository}:pull",
                endpoint=endpoint,
                headers={"Range": f"bytes={start}-{offset + count - 1}"},
            ) as response:
                if response.status_code not in (200, 206):
                    self._transport.raise_for(response, name)
                pieces = response.iter_raw()
                try:
                    for piece in _skip(pieces, start) if response.status_code == 200 else pieces:
                        data += piece
                        if len(data) >= count:
                            break
                    break
                except httpx.HTTPError:
                    if breaks == options.retries:
                        raise
            time.sleep(options.retry_delay * 2**breaks)
            breaks += 1
        if len(data) < count or (response.status_code == 206 and len(data) > count):
            raise RegistryError(f"{name}: asked for {count} bytes at {offset}, got {len(data)}")
        return bytes(data[:count])
