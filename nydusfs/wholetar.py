"""Reading a tarfs blob from one end to the other, once, before any byte of it is served.

What had to be fetched over a network is kept on the way, piece by piece as segments, so that it is not fetched again
when files are read. A segment's name holds the digest of what is in it: pieces of a tar that turns out wrong in the
end, or that was read half when the daemon died, can never be taken for others.
"""

from __future__ import annotations

from functools import partial

import trio

from bootstrap.base import Blob, Bootstrap
from bootstrap.errors import DigestMismatch
from bootstrap.layout.common import DIGEST_SIZE
from bootstrap.tarmap import PIECE_SIZE, TarDigests, TarMap
from nydusfs.cache import BlobCache, CacheStore
from nydusfs.errors import CacheError, SourceError
from nydusfs.segments import SEGMENT_SIZE, Segment, make_segment
from nydusfs.sources import Buffer, Priority, Source
from nydusfs.sources.localfs import LocalFsSource

PART = 16 * PIECE_SIZE  # fetched at a time: 4 MiB
AHEAD = 2  # parts fetched while one is hashed


async def read_tar(bootstrap: Bootstrap, blob: Blob, source: Source, store: CacheStore | None) -> bytes:
    """The digests of all pieces of the tar. Raises SourceError, DigestMismatch or FormatError."""
    digests = TarDigests(blob)
    keeper = _Keeper(bootstrap, blob, _cache(blob, source, store))
    sender, receiver = trio.open_memory_channel[Buffer | SourceError](AHEAD)

    async def fetch() -> None:
        async with sender:
            for offset in range(0, blob.compressed_size, PART):
                size = min(PART, blob.compressed_size - offset)
                try:
                    await sender.send(await source.read(blob.id, offset, size, Priority.DEMAND))
                except SourceError as error:
                    await sender.send(error)
                    return

    def take(part: Buffer) -> None:
        first = len(digests.digests)
        digests.update(part)
        keeper.keep(digests.digests, first, memoryview(part))

    failed = None
    async with trio.open_nursery() as nursery, receiver:
        nursery.start_soon(fetch)
        async for part in receiver:
            if isinstance(part, SourceError):
                failed = part
                break
            await trio.to_thread.run_sync(partial(take, part))
    if failed is not None:
        raise failed
    try:
        return digests.finish()
    except DigestMismatch:
        await trio.to_thread.run_sync(keeper.drop)
        raise


def _cache(blob: Blob, source: Source, store: CacheStore | None) -> BlobCache | None:
    """Where pieces stay; None for a local file, which need not be copied."""
    if store is None or isinstance(source, LocalFsSource):
        return None
    try:
        return store.blob(blob.id)
    except CacheError:
        return None


class _Keeper:
    """Pieces on their way to become segments."""

    def __init__(self, bootstrap: Bootstrap, blob: Blob, cache: BlobCache | None) -> None:
        assert PIECE_SIZE == SEGMENT_SIZE
        self._map = TarMap(bootstrap)
        self._blob = blob
        self._cache = cache
        self._written: list[Segment] = []

    def keep(self, digests: list[bytes], first: int, part: memoryview) -> None:
        """Write the pieces in `part`, the first of which has this number. For a worker thread."""
        if self._cache is None:
            return
        rows = len(self._map.blob_rows(self._blob.index))
        if len(digests) > rows:
            return  # longer than the image says: `finish` refuses it
        self._map.attach_digests(self._blob.index, b"".join(digests) + bytes(DIGEST_SIZE * (rows - len(digests))))
        for number in range(first, len(digests)):
            segment = make_segment(self._map, self._blob, number)
            at = (number - first) * PIECE_SIZE
            # Of a read that ended early they stay: the next one finds them here.
            if segment.key not in self._cache and self._cache.write(segment, bytearray(part[at : at + segment.size])):
                self._cache.add(segment)
                self._written.append(segment)

    def drop(self) -> None:
        """They are of no image. For a worker thread."""
        for segment in self._written:
            assert self._cache is not None
            self._cache.drop(segment)
