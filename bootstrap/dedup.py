"""The dedup stage: which chunks are stored already. Reference: RAFS format 5.6, 5.11, 5.13."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from bootstrap.chunktable import ROW, BlobInfo, ChunkTable

_DIGEST = 32
_FEWEST = 1 << 10  # slots


class ChunkIndex:
    """Chunks by digest: of the dictionary, of a parent image and of this build, in this order of precedence.

    `blobs` is the blob table of the image as it grows: the parent's blobs, then each blob at its first use. Reads of
    other threads (`known`) are safe while `add` runs: a miss there costs time, never a byte.

    A hash table of row numbers beside the records, which have the digests: 10 bytes a chunk where a dict takes 200.
    Python's own hash, which is keyed, decides the slot, so that nobody can choose digests that fall into one.
    """

    def __init__(self, table: ChunkTable) -> None:
        self.table = table
        self.blobs: list[BlobInfo] = []
        self._listed: set[int] = set()
        self._slots = array("I", bytes(4 * _FEWEST))
        """Row + 1, 0: free. The length is a power of two, at most 2/3 are taken, what is full is tried at the next."""
        self._taken = 0

    def learn(self, rows: Iterable[int]) -> None:
        """Rows of another image: of equal digests the first counts. Dictionary before parent."""
        for row in rows:
            self.add(self.table.digest(row), row)

    def list_blob(self, place: int) -> None:
        """Put a blob (by its place in the table) into the image's blob table unless it is there."""
        if place not in self._listed:
            self._listed.add(place)
            self.blobs.append(self.table.blobs[place])

    def known(self, digest: bytes) -> bool:
        """Whether such a chunk may be stored already: a hint for workers that need not compress it then."""
        return self._row(digest) >= 0

    def find(self, digest: bytes, size: int) -> int:
        """The row to use for `size` bytes with this digest, -1 if they must be stored. Lists the row's blob."""
        row = self._row(digest)
        if row < 0:
            return -1
        table = self.table
        if table.size(row) != size:  # a record of another image that does not tell the truth
            return -1
        self.list_blob(table.address(row)[0])
        return row

    def forget(self) -> None:
        """Nothing will be looked up any more."""
        self._slots = array("I", bytes(4 * _FEWEST))
        self._taken = 0

    def add(self, digest: bytes, row: int) -> None:
        """A chunk of this build, found by all equal ones that follow."""
        slots, records = self._slots, self.table.records
        mask = len(slots) - 1
        at = hash(digest) & mask
        while taken := slots[at]:
            start = (taken - 1) * ROW
            if records[start : start + _DIGEST] == digest:
                return
            at = at + 1 & mask
        slots[at] = row + 1
        self._taken += 1
        if 3 * self._taken > 2 * len(slots):
            self._grow()

    def _row(self, digest: bytes) -> int:
        slots, records = self._slots, self.table.records
        mask = len(slots) - 1
        at = hash(digest) & mask
        while taken := slots[at]:
            start = (taken - 1) * ROW
            if records[start : start + _DIGEST] == digest:
                return taken - 1
            at = at + 1 & mask
        return -1

    def _grow(self) -> None:
        """Twice the slots; readers keep the old ones until all is moved."""
        size = 2 * len(self._slots)
        slots, records, mask = array("I", bytes(4 * size)), self.table.records, size - 1
        for taken in self._slots:
            if taken:
                start = (taken - 1) * ROW
                at = hash(bytes(records[start : start + _DIGEST])) & mask
                while slots[at]:
                    at = at + 1 & mask
                slots[at] = taken
        self._slots = slots
