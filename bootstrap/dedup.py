"""The dedup stage: which chunks are stored already. Reference: RAFS format 5.6, 5.11, 5.13."""

from __future__ import annotations

from collections.abc import Iterable

from bootstrap.chunktable import BlobInfo, ChunkTable


class ChunkIndex:
    """Chunks by digest: of the dictionary, of a parent image and of this build, in this order of precedence.

    `blobs` is the blob table of the image as it grows: the parent's blobs, then each blob at its first use. Reads of
    other threads (`known`) are safe while `add` runs: a miss there costs time, never a byte.
    """

    def __init__(self, table: ChunkTable) -> None:
        self.table = table
        self.blobs: list[BlobInfo] = []
        self._listed: set[int] = set()
        self._rows: dict[bytes, int] = {}

    def learn(self, rows: Iterable[int]) -> None:
        """Rows of another image: of equal digests the first counts. Dictionary before parent."""
        digest = self.table.digest
        for row in rows:
            self._rows.setdefault(digest(row), row)

    def list_blob(self, place: int) -> None:
        """Put a blob (by its place in the table) into the image's blob table unless it is there."""
        if place not in self._listed:
            self._listed.add(place)
            self.blobs.append(self.table.blobs[place])

    def known(self, digest: bytes) -> bool:
        """Whether such a chunk may be stored already: a hint for workers that need not compress it then."""
        return digest in self._rows

    def find(self, digest: bytes, size: int) -> int:
        """The row to use for `size` bytes with this digest, -1 if they must be stored. Lists the row's blob."""
        row = self._rows.get(digest, -1)
        if row < 0:
            return -1
        table = self.table
        if table.size(row) != size:  # a record of another image that does not tell the truth
            return -1
        self.list_blob(table.address(row)[0])
        return row

    def forget(self) -> None:
        """Nothing will be looked up any more: 200 bytes a chunk."""
        self._rows.clear()

    def add(self, digest: bytes, row: int) -> None:
        """A chunk of this build, found by all equal ones that follow."""
        self._rows.setdefault(digest, row)
