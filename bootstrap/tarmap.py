"""The extent map of a tarfs image: pieces of a plain tar instead of chunks. Reference: RAFS format 1.13.

Tarfs has no chunk digests; the only promise is the blob's id, the SHA-256 of the whole tar. So the tar is read once
from one end to the other: `TarDigests` hashes it and each piece of it. If the whole is right, so are the pieces'
digests, and from then on pieces are read, verified and cached one by one like the chunks of any other image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from bootstrap.base import Blob, Bootstrap, Chunk
from bootstrap.blobmeta import alone
from bootstrap.chunkmap import ChunkMap, Facts, Member, MissingMeta, facts_of
from bootstrap.decode import NO_DIGEST
from bootstrap.digest import digest
from bootstrap.errors import DigestMismatch, FormatError
from bootstrap.layout.common import DIGEST_SIZE

PIECE_SIZE = 256 << 10
"""As large as a segment of the cache: one piece is one file there."""


class TarMap(ChunkMap):
    """Rows are pieces; `lacks_meta` until the digests of a blob's pieces are there."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        self.blobs = bootstrap.blobs
        self.identity = b""
        self._digests: dict[int, bytes] = {}
        self._starts = [0]
        for blob in self.blobs:
            self._starts.append(self._starts[-1] + -(-blob.compressed_size // PIECE_SIZE))

    def __len__(self) -> int:
        return self._starts[-1]

    def lacks_meta(self, blob_index: int) -> bool:
        return blob_index not in self._digests

    def attach_digests(self, blob_index: int, digests: bytes) -> None:
        """What `TarDigests.finish` gave, now or when the tar was read before. Raises FormatError for a wrong number."""
        rows = self.blob_rows(blob_index)
        if len(digests) != len(rows) * DIGEST_SIZE:
            raise FormatError("piece digests", 0, f"{len(digests)} bytes for {len(rows)} pieces")
        self._digests[blob_index] = digests

    def digests_of(self, blob_index: int) -> bytes:
        """What was attached. KeyError when nothing was."""
        return self._digests[blob_index]

    def blob_rows(self, blob_index: int) -> range:
        return range(self._starts[blob_index], self._starts[blob_index + 1])

    def _blob_of(self, row: int) -> Blob:
        for blob in self.blobs:
            if row < self._starts[blob.index + 1]:
                return blob
        raise IndexError(row)

    def chunk(self, row: int) -> Chunk:
        blob = self._blob_of(row)
        digests = self._digests.get(blob.index, b"")  # without them nothing verifies
        number = row - self._starts[blob.index]
        offset = number * PIECE_SIZE
        size = min(PIECE_SIZE, blob.compressed_size - offset)
        own = digests[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE] or NO_DIGEST
        return Chunk(own, blob.index, 0, size, size, offset, offset, 0, number, 0)

    def find(self, blob_index: int, offset: int, size: int = 1) -> int:
        if offset % PIECE_SIZE + size > PIECE_SIZE or offset + size > self.blobs[blob_index].compressed_size:
            raise KeyError((blob_index, offset))
        return self._starts[blob_index] + offset // PIECE_SIZE

    def pieces(self, blob_index: int, offset: int, size: int) -> list[tuple[int, int, int]]:
        found = []
        while size > 0:
            length = min(size, PIECE_SIZE - offset % PIECE_SIZE)
            found.append((self.find(blob_index, offset, length), offset, length))
            offset += length
            size -= length
        return found

    def anchor(self, blob_index: int, row: int) -> int:
        return (row - self._starts[blob_index]) * PIECE_SIZE

    def anchored(self, blob_index: int, start: int, end: int) -> range:
        rows = self.blob_rows(blob_index)
        return rows[-(-start // PIECE_SIZE) : -(-end // PIECE_SIZE)]

    def member(self, row: int) -> Member:
        chunk = self.chunk(row)
        if self.lacks_meta(chunk.blob_index):
            raise MissingMeta(self.blobs[chunk.blob_index])
        return Member(chunk, alone(chunk), 0)

    def facts(self, blob_index: int, rows: range) -> Iterator[Facts]:
        return map(facts_of, map(self.member, rows))

    def close(self) -> None:
        self._digests.clear()


class TarDigests:
    """Feed all of the tar in order, in parts of whole pieces (but for the last); `finish` tells whether it is right."""

    def __init__(self, blob: Blob) -> None:
        if len(blob.id) != 2 * DIGEST_SIZE or set(blob.id) - set("0123456789abcdef"):
            raise FormatError("blob table entry", 0, f"tarfs blob {blob.id!r}: its id is no SHA-256, nothing vouches")
        self._blob = blob
        self._whole = hashlib.sha256()
        self._pieces: list[bytes] = []
        self.size = 0

    @property
    def digests(self) -> list[bytes]:
        """Of the pieces so far. Worth nothing before `finish`."""
        return self._pieces

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """The next part."""
        if self.size % PIECE_SIZE:
            raise ValueError("a part that is not whole pieces was not the last")
        view = memoryview(data)
        self._whole.update(view)
        for at in range(0, len(view), PIECE_SIZE):
            self._pieces.append(digest(self._blob.digester, view[at : at + PIECE_SIZE]))
        self.size += len(view)

    def finish(self) -> bytes:
        """The digests of all pieces. Raises DigestMismatch when the tar is not the one the image was made of."""
        if self.size != self._blob.compressed_size or self._whole.hexdigest() != self._blob.id:
            raise DigestMismatch(
                f"tar {self._blob.id}: its SHA-256 over {self.size} of {self._blob.compressed_size} bytes is wrong"
            )
        return b"".join(self._pieces)
