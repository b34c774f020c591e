"""Pushing the parts of an image: several at once, each once, each again when a registry fails it."""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypeVar, cast

from nydusfs.convert.backends import BlobStore
from nydusfs.convert.endpoints import Endpoint, copy_blob
from nydusfs.convert.images import Descriptor
from nydusfs.convert.manifests import digest_of
from nydusfs.convert.progress import Progress, size_text
from nydusfs.convert.streams import PieceStream
from nydusfs.convert.threads import DaemonPool
from nydusfs.errors import AuthError, ConvertError, NotFoundError, RegistryError
from nydusfs.registry.transport import RETRY_STATUS

log = logging.getLogger(__name__)

_THREADS = 3
_PIECE = 1 << 20
RETRIES = 3
RETRY_DELAY = 5.0

T = TypeVar("T")


class Pusher:
    """Blobs go out in the background; `wait` for them before any manifest names them. Leaving the block early abandons
    what is not done. After `wait`, `sent` counts the blobs whose bytes went out: others were there or taken over."""

    def __init__(
        self, target: Endpoint, progress: Progress, retries: int = RETRIES, delay: float = RETRY_DELAY
    ) -> None:
        self.target = target
        self.sent = 0
        self._progress = progress
        self._retries = retries
        self._delay = delay
        self._pool = DaemonPool(_THREADS, "push")
        self._pushes: dict[str, Future[bool]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close()

    def copy(self, origin: Endpoint, blob: Descriptor) -> None:
        """A blob of another place; taken over there where the target can."""
        self.submit(
            blob.digest,
            blob.size,
            lambda report: copy_blob(origin, self.target, blob.digest, blob.size, progress=report),
        )

    def file(self, digest: str, path: Path) -> None:
        size = path.stat().st_size
        self.submit(digest, size, lambda report: self.target.push_file(digest, path, progress=report))

    def data(self, data: bytes) -> str:
        """Its digest."""
        digest = digest_of(data)
        self.submit(digest, len(data), lambda report: self.target.push_bytes(digest, data))
        return digest

    def stream(self, digest: str, size: int, opener: Callable[[], BinaryIO]) -> None:
        """`opener` gives the bytes from the start, once per try."""
        self.submit(digest, size, lambda report: self.target.push_blob(digest, size, opener, progress=report))

    def knows(self, digest: str) -> bool:
        return digest in self._pushes

    def __len__(self) -> int:
        return len(self._pushes)

    def wait(self) -> None:
        self.sent = sum(push.result() for push in self._pushes.values())

    def manifest(self, media_type: str, body: bytes) -> str:
        """After `wait`. Its digest."""
        self.retried(lambda: self.target.push_manifest(media_type, body))
        return digest_of(body)

    def image(self, media_type: str, body: bytes) -> str:
        """The last step, after `wait`: what makes the image visible under its name. Its digest."""
        self.retried(lambda: self.target.push_image(media_type, body))
        return digest_of(body)

    def check(self) -> None:
        """Raises what the first failed push raised, without waiting for the others."""
        for push in self._pushes.values():
            if push.done():
                push.result()

    def submit(self, digest: str, size: int, push: Callable[[Callable[[int], None]], bool]) -> None:
        """`push` is given what reports progress and says whether it sent anything. Once for each digest."""
        if digest not in self._pushes:
            self._pushes[digest] = self._pool.submit(self._push, digest, size, push)

    def _push(self, digest: str, size: int, push: Callable[[Callable[[int], None]], bool]) -> bool:
        key = f"push {digest}"
        self._progress.start(key, f"push  {digest.removeprefix('sha256:')[:12]}", size)
        try:
            sent = self.retried(lambda: push(lambda count: self._progress.advance(key, count)))
        finally:
            self._progress.finish(key)
        self._progress.note(f"{'pushed' if sent else 'kept'} {digest.removeprefix('sha256:')[:12]} ({size_text(size)})")
        return sent

    def retried(self, push: Callable[[], T]) -> T:
        """The client retries single requests; this repeats a whole push, with a fresh upload session."""
        attempt = 0
        while True:
            try:
                return push()
            except (AuthError, NotFoundError):
                raise
            except RegistryError as error:
                if attempt == self._retries or (400 <= error.status < 500 and error.status not in RETRY_STATUS):
                    raise
                attempt += 1
                pause = max(self._delay, error.retry_after)
                log.warning("%s; trying again in %.0f s", error, pause)
                time.sleep(pause)


def verified_stream(store: BlobStore, blob_id: str) -> BinaryIO:
    """A blob of a backend as a layer. Its end is only reached if its name is its digest, else reading raises
    ConvertError."""

    def pieces() -> Iterator[bytes]:
        digest = hashlib.sha256()
        with store.open(blob_id) as source:
            while piece := source.read(_PIECE):
                digest.update(piece)
                yield piece
        if digest.hexdigest() != blob_id:
            raise ConvertError(
                f"blob {blob_id} of {store.name} has the digest {digest.hexdigest()}: "
                "layers are named by their digest, this blob cannot become one"
            )

    return cast(BinaryIO, io.BufferedReader(PieceStream(pieces()), _PIECE))


def unique(blobs: Iterable[Descriptor]) -> list[Descriptor]:
    return list({blob.digest: blob for blob in blobs}.values())
