"""What the bootstrap does not tell about a blob's chunks: fetched at the first read of the blob, checked, kept.

That is the blob meta of batched and gzip (zran) blobs, and for a tarfs blob the digests of its pieces, for which the
whole tar is read and hashed once. Either is taken from beside the bootstrap (`<id>.blob.meta` comes with the bootstrap
layer), from the cache, or through the image's source; a failure is the reader's EIO, and the next read tries again.
"""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import TypeVar

import trio

from bootstrap import blobmeta
from bootstrap.base import Blob, Bootstrap
from bootstrap.blobsource import local_meta
from bootstrap.chunkmap import ChunkMap
from bootstrap.errors import DigestMismatch, RafsError
from bootstrap.tarmap import TarMap
from nydusfs.cache import CacheStore
from nydusfs.cache.foreign import META_SUFFIX
from nydusfs.errors import SourceError
from nydusfs.sources import Buffer, Priority, Source, WrongBytes
from nydusfs.wholetar import read_tar

log = logging.getLogger("nydusfs.tables")

SAMPLES = 2048  # chunks looked up in a table that no digest vouches for
RENEW_PAUSE = 60.0  # seconds between two fetches of the same table because of wrong bytes
WRONG_TAR_PAUSE = 10.0  # seconds in which a wrong tar is not read as a whole again
KEY_SIZE = 32

_T = TypeVar("_T")


@dataclass(slots=True)
class _Flight:
    done: trio.Event = field(default_factory=trio.Event)
    error: SourceError | None = None


class Tables:
    """The tables of one image's blobs. Belongs to the trio thread."""

    def __init__(
        self, name: str, bootstrap: Bootstrap, chunks: ChunkMap, source: Source, store: CacheStore | None
    ) -> None:
        self._name = name
        self._bootstrap = bootstrap
        self._chunks = chunks
        self._source = source
        self._store = store
        self._flights: dict[int, _Flight] = {}
        self._vouched: set[int] = set()  # blobs whose table has the digest that the bootstrap names
        self._renewed: dict[int, float] = {}  # when tables were fetched anew
        self._wrong_tars: dict[int, tuple[float, DigestMismatch]] = {}  # when one was read and found to be another

    def missing(self) -> list[int]:
        """Blobs that cannot be read yet."""
        return [blob.index for blob in self._bootstrap.blobs if self._chunks.lacks_meta(blob.index)]

    async def load(self, blob_index: int) -> None:
        """Returns when the blob can be read; one fetch for all who wait. Raises SourceError."""
        while self._chunks.lacks_meta(blob_index):
            flight = self._flights.get(blob_index)
            if flight is not None:
                await flight.done.wait()
                if flight.error is not None:
                    raise SourceError(flight.error.what, flight.error.tried, damaged=flight.error.damaged)
                continue  # it is here, or its reader was cancelled
            flight = self._flights[blob_index] = _Flight()
            try:
                await self._load(self._bootstrap.blobs[blob_index])
            except SourceError as error:
                flight.error = error
                raise
            finally:
                del self._flights[blob_index]
                flight.done.set()

    async def renew(self, blob_index: int) -> bool:
        """Chunks of this blob came out wrong from every source: fetch the table that led to them anew, if nothing
        vouches for it. Whether there is another one now."""
        blob = self._bootstrap.blobs[blob_index]
        if blob_index in self._vouched or not blobmeta.needs_meta(blob):
            return False
        now = trio.current_time()
        if now < self._renewed.get(blob_index, -RENEW_PAUSE) + RENEW_PAUSE:
            return False
        self._renewed[blob_index] = now
        try:
            self._chunks.attach(blob_index, await self._fetch(blob))
        except (SourceError, RafsError) as error:
            log.warning("image %s: %s", self._name, error)
            return False
        return True

    async def _load(self, blob: Blob) -> None:
        chunks = self._chunks
        try:
            if isinstance(chunks, TarMap):
                await self._load_tar(chunks, blob)
                return
            meta = await _in_thread(partial(self._local, blob))
            if meta is None:
                meta = await self._fetch(blob)
            chunks.attach(blob.index, meta)
        except RafsError as error:
            raise SourceError(f"blob meta of blob {blob.id}", [(self._source.name, str(error))]) from None

    async def _load_tar(self, chunks: TarMap, blob: Blob) -> None:
        digests = await _in_thread(partial(self._kept, blob))
        if digests is None:
            wrong = self._wrong_tars.get(blob.index)
            if wrong is not None and trio.current_time() < wrong[0] + WRONG_TAR_PAUSE:
                raise wrong[1]
            log.info("image %s: reading all of tar %s to verify it", self._name, blob.id)
            try:
                whole = await read_tar(self._bootstrap, blob, self._source, self._store)
            except DigestMismatch as error:
                self._wrong_tars[blob.index] = (trio.current_time(), error)
                raise
            await _in_thread(partial(self._keep, blob, whole))
            digests = memoryview(whole)
        chunks.attach_digests(blob.index, bytes(digests))

    # ---- blob meta

    def _local(self, blob: Blob) -> blobmeta.BlobMeta | None:
        """From beside the bootstrap or the cache. For a worker thread."""
        for look in (partial(local_meta, self._bootstrap), self._cached, self._left):
            try:
                meta = look(blob)
                if meta is not None:
                    self._check_rows(blob, meta)
                    return meta
            except RafsError as error:
                log.warning("image %s: %s: it is read from the blob instead", self._name, error)
        return None

    def _cached(self, blob: Blob) -> blobmeta.BlobMeta | None:
        kept = self._kept(blob)
        return None if kept is None else blobmeta.open_cache_form(blob, kept)

    def _left(self, blob: Blob) -> blobmeta.BlobMeta | None:
        """What upstream's nydusd or snapshotter left in the work directory. Read rather than mapped: it may change."""
        if self._store is None or "/" in blob.id:
            return None
        path = self._store.path / f"{blob.id}{META_SUFFIX}"
        try:
            data = path.read_bytes()
        except OSError:
            return None
        meta = blobmeta.open_cache_form(blob, memoryview(data))
        log.info("image %s: table %s of another nydusd is taken over", self._name, path)
        return meta

    async def _fetch(self, blob: Blob) -> blobmeta.BlobMeta:
        own = os.path.basename(self._bootstrap.path).split(".", 1)[0]
        where = blobmeta.meta_range(blob, own)
        found: list[blobmeta.BlobMeta] = []

        def judge(stored: Buffer) -> None:
            try:
                region, header = blobmeta.read_meta(blob, where, memoryview(stored))
                meta = blobmeta.BlobMeta(blob, region, header)
                self._check_rows(blob, meta)
            except RafsError as error:
                raise WrongBytes(str(error)) from None
            kept = self._keep(blob, blobmeta.pack_cache_form(region, header))
            found.append(meta if kept is None else blobmeta.open_cache_form(blob, kept))

        async def check(stored: Buffer) -> None:
            await _in_thread(partial(judge, stored))

        await self._source.read(where.blob_id, where.offset, where.size, Priority.DEMAND, check)
        if where.vouched:
            self._vouched.add(blob.index)
        return found[-1]

    def _check_rows(self, blob: Blob, meta: blobmeta.BlobMeta) -> None:
        check_rows(self._chunks, blob, meta)

    # ---- kept on disk: BLAKE2b of what follows, then it

    def _path(self, blob: Blob) -> str | None:
        return None if self._store is None else self._store.map_path(kept_name(blob))

    def _kept(self, blob: Blob) -> memoryview | None:
        """What an earlier read of the blob left, if it is undamaged. For a worker thread."""
        path = self._path(blob)
        return None if path is None else read_kept(path)

    def _keep(self, blob: Blob, content: bytes) -> memoryview | None:
        """Write it for the next time; None when the disk does not take it. For a worker thread."""
        path = self._path(blob)
        if path is None:
            return None
        try:
            write_kept(path, content)
            if self._store is not None:
                self._store.count_beside()
        except OSError as error:
            if self._store is not None:
                self._store.health.failed(error)
            return None
        return self._kept(blob)


def check_rows(chunks: ChunkMap, blob: Blob, meta: blobmeta.BlobMeta) -> None:
    """FormatError when the table is not of the chunks the image has: a stale or forged one, before it is used.

    A sample: what it says wrongly of a chunk, the chunk's digest finds in any case.
    """
    rows = chunks.blob_rows(blob.index)
    for row in rows[:: max(1, len(rows) // SAMPLES)]:
        meta.place(chunks.chunk(row))


def kept_name(blob: Blob) -> str:
    """Of the file in `.maps` that keeps a blob's table."""
    return "table-" + blake2b(repr(replace(blob, index=0)).encode(), digest_size=12).hexdigest()


def read_kept(path: str) -> memoryview | None:
    """The table in such a file, mapped; None when there is none or it is damaged."""
    try:
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError):
        return None
    body = data[KEY_SIZE:]
    if blake2b(body, digest_size=KEY_SIZE).digest() != data[:KEY_SIZE]:
        return None
    return body


def write_kept(path: str, content: bytes | memoryview) -> None:
    """Whole and durable, or not at all. Raises OSError."""
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix=".table-", delete=False) as file:
        try:
            file.write(blake2b(content, digest_size=KEY_SIZE).digest())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.rename(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


async def _in_thread(work: Callable[[], _T]) -> _T:
    return await trio.to_thread.run_sync(work)
