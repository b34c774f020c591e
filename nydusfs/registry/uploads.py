"""Uploads of blobs: one request where that works, pieces where a proxy limits bodies, resumed where the registry can.

A broken upload is asked for its state (GET on its location). A registry that still knows it gets the rest; one that
does not (docker-registry 2.x drops a session whose request broke) gets the blob from the start in a new session.
"""

from __future__ import annotations

import io
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO
from urllib.parse import urlencode

from nydusfs.errors import AuthError, NotFoundError, RegistryError, WrongBytesError
from nydusfs.registry.transport import RETRY_STATUS, Transport

log = logging.getLogger(__name__)

_PIECE = 1 << 20
_RANGE = re.compile(r"(?:bytes=)?0-(\d{1,18})")
# a session that the registry has lost or closed: begin another
_SESSION_GONE = frozenset({404, 410, 416})
# registries with slow stores move a large blob to its place before they answer
_COMMIT_TIMEOUT = 300.0


class BlobUpload:
    """One blob to one repository; `run` may be called once. `opener` gives the bytes from the start, once per try."""

    def __init__(
        self,
        transport: Transport,
        repository: str,
        digest: str,
        size: int,
        opener: Callable[[], BinaryIO],
        *,
        mount_from: str = "",
        chunk_size: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._transport = transport
        self._repository = repository
        self._digest = digest
        self._size = size
        self._opener = opener
        self._mount_from = mount_from
        self._chunk_size = chunk_size
        self._progress = progress
        self._reported = 0
        self._location: str | None = None
        self._what = f"pushing blob {digest} to {transport.host}/{repository}"

    def run(self) -> bool:
        """False if the blob was there or could be mounted. Raises RegistryError, and what reading the bytes raises."""
        options = self._transport.options
        offset = 0
        for attempt in range(options.retries + 1):
            try:
                if self._location is None:
                    if has_blob(self._transport, self._repository, self._digest, pushing=True):
                        return False
                    offset = 0
                    self._location = start_upload(self._transport, self._repository, self._digest, self._mount_from)
                    if self._location is None:
                        return False
                self._send(offset)
                return True
            except RegistryError as error:
                in_session = self._location is not None
                if attempt == options.retries or not _may_help(error, in_session):
                    raise
                pause = max(error.retry_after, options.retry_delay * 2**attempt)
                log.debug("%s; next try in %.1f s", error, pause)
                time.sleep(pause)
                offset = self._state() if in_session and error.status not in _SESSION_GONE else self._forget()
        raise AssertionError("unreachable")

    def _send(self, offset: int) -> None:
        assert self._location is not None
        if offset == 0 and not 0 < self._chunk_size < self._size:
            self._finish(self._size, lambda: self._pieces(0, self._size))
            return
        step = self._chunk_size or self._size
        while offset < self._size:
            end = min(offset + step, self._size)
            self._patch(offset, end)
            offset = end
        self._finish(0, lambda: iter(()))

    def _finish(self, size: int, body: Callable[[], Iterator[bytes]]) -> None:
        assert self._location is not None
        separator = "&" if "?" in self._location else "?"
        with self._transport.request(
            "PUT",
            f"{self._location}{separator}{urlencode({'digest': self._digest})}",
            scope=push_scope(self._repository),
            headers={"Content-Type": "application/octet-stream"},
            body=body,
            size=size,
            retry=False,
            timeout=_COMMIT_TIMEOUT,
        ) as response:
            if response.status_code not in (200, 201, 204):
                self._transport.raise_for(response, self._what)

    def _patch(self, start: int, end: int) -> None:
        assert self._location is not None
        with self._transport.request(
            "PATCH",
            self._location,
            scope=push_scope(self._repository),
            headers={"Content-Type": "application/octet-stream", "Content-Range": f"{start}-{end - 1}"},
            body=lambda: self._pieces(start, end),
            size=end - start,
            retry=False,
        ) as response:
            if response.status_code not in (202, 204):
                self._transport.raise_for(response, self._what)
            self._location = self._transport.location(response, self._location)

    def _pieces(self, start: int, end: int) -> Iterator[bytes]:
        with self._opener() as source:
            _skip(source, start)
            position = start
            while position < end:
                piece = source.read(min(_PIECE, end - position))
                if not piece:
                    raise RegistryError(f"{self._what}: data ends at byte {position} of {self._size}", status=400)
                yield piece
                position += len(piece)
                if self._progress and position > self._reported:
                    self._progress(position - max(self._reported, position - len(piece)))
                    self._reported = position
            if end == self._size and source.read(1):
                raise RegistryError(f"{self._what}: there is more data than {self._size} bytes", status=400)

    def _state(self) -> int:
        """How many bytes the broken session holds; without an answer to that the session is given up."""
        assert self._location is not None
        try:
            with self._transport.request("GET", self._location, scope=push_scope(self._repository)) as response:
                found = _RANGE.fullmatch(response.headers.get("range", ""))
                if response.status_code not in (202, 204) or found is None:
                    return self._forget()
                self._location = self._transport.location(response, self._location)
        except RegistryError as error:
            log.debug("%s: state of the upload unknown: %s", self._what, error)
            return self._forget()
        last = int(found[1])  # "0-0" is what docker-registry says of an empty session
        return min(last + 1, self._size) if last else 0

    def _forget(self) -> int:
        self._location = None
        return 0


def start_upload(transport: Transport, repository: str, digest: str = "", mount_from: str = "") -> str | None:
    """The address of a new upload; None if a mount from another repository made it needless."""
    path, scope = f"/v2/{repository}/blobs/uploads/", push_scope(repository)
    if mount_from and mount_from != repository:
        path += "?" + urlencode({"mount": digest, "from": mount_from})
        scope += f" {pull_scope(mount_from)}"
    with transport.request("POST", path, scope=scope, size=0) as response:
        if response.status_code == 201:
            return None
        if response.status_code != 202:
            transport.raise_for(response, f"pushing to {transport.host}/{repository}")
        return transport.location(response)


def has_blob(transport: Transport, repository: str, digest: str, *, pushing: bool = False) -> bool:
    scope = push_scope(repository) if pushing else pull_scope(repository)
    with transport.request("HEAD", f"/v2/{repository}/blobs/{digest}", scope=scope) as response:
        if response.status_code not in (200, 204, 404):
            transport.raise_for(response, f"blob {digest} of {transport.host}/{repository}")
        return response.status_code != 404


def pull_scope(repository: str) -> str:
    return f"repository:{repository}:pull"


def push_scope(repository: str) -> str:
    return f"repository:{repository}:pull,push"


def _may_help(error: RegistryError, in_session: bool) -> bool:
    """Whether another try can end better."""
    if isinstance(error, WrongBytesError | AuthError):
        return False
    if isinstance(error, NotFoundError) or error.status in _SESSION_GONE:
        return in_session
    return error.status == 0 or error.status in RETRY_STATUS or error.status >= 500


def _skip(source: BinaryIO, count: int) -> None:
    if not count:
        return
    if source.seekable():
        source.seek(count, io.SEEK_SET)
        return
    while count > 0 and (piece := source.read(min(_PIECE, count))):
        count -= len(piece)
