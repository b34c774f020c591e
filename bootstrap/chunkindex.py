"""Where the record of a chunk is, by its place in the uncompressed blob: the derived file behind a `ChunkMap`.

A bootstrap has its chunk records in any order; reading needs them by (blob, uncompressed offset). The index holds that
order in 12 bytes per chunk, in a small file that is mapped, so an image of a million chunks costs no memory of ours.
The file is bound to its bootstrap by a fingerprint and to itself by a checksum: a stale or damaged one is rebuilt.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from struct import Struct
from struct import error as StructError
from typing import TYPE_CHECKING

from blake3 import blake3

from bootstrap.base import Bootstrap
from bootstrap.errors import FormatError, RafsError
from bootstrap.layout.common import CHUNK_RECORD, MAX_CHUNK_SIZE
from bootstrap.reader_v6 import BootstrapV6

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC = b"nydus chunk map\0"
VERSION = 2
HEADER = Struct("<16sIIQ32s32s")
"""magic, version, blobs, rows, fingerprint of the bootstrap, BLAKE3 of all that follows the header.

Then u64 arrays: first row of each blob and, once more, their end; uncompressed offset of each row. Then a u32 array:
place of the row's record in the bootstrap, in units of 8 bytes."""

VECTOR_ROWS = 50_000
"""From here on numpy: 1,000,000 rows take 0.3 s instead of 2.1, but importing it 0.06 s, 17 MB and reads from a disk.
An image of 35,000 rows, at its first mount: 0.057 s of processor time without, 0.068 with it."""
LOADED_ROWS = 1_000
"""And so many where it is there already, as with EROFS mounts: those 35,000 rows take 0.01 s then."""

_facts = Struct("<32xI8xI8xQ").unpack_from  # blob index, uncompressed size, uncompressed offset
_identity = Struct("<64s8x8s").unpack_from  # all but the file offset
_PLACE_BITS = 32
_OFFSET_BITS = 44


class ChunkIndex:
    """Rows of all blobs, sorted by blob and uncompressed offset; read-only and thread-safe.

    `starts[n]` is the first row of blob n, `offsets[row]` its uncompressed offset, `places[row]` where its record is.
    """

    def __init__(self, data: mmap.mmap, blobs: int, rows: int, mark: bytes) -> None:
        self.fingerprint = mark
        self._data = data
        self._view = memoryview(data)[HEADER.size :]
        words = 8 * (blobs + 1)
        self.starts: Sequence[int] = self._view[:words].cast("Q").tolist()
        self.offsets: memoryview[int] = self._view[words : words + 8 * rows].cast("Q")
        self.places: memoryview[int] = self._view[words + 8 * rows :].cast("I")

    @classmethod
    def open(cls, bootstrap: Bootstrap, path: str | None) -> ChunkIndex:
        """The index of an image, from the derived file at `path` if it is right, else built and renamed into place.

        None keeps it in an unlinked temporary file. Raises FormatError when the image's chunks contradict each other,
        RafsError when the file cannot be written.
        """
        blobs = len(bootstrap.blobs)
        mark = fingerprint(bootstrap)
        if path is not None and (found := cls._load(path, mark, blobs)) is not None:
            return found
        body, rows = _build(bootstrap)
        try:
            data = _store(body, blobs, rows, mark, path)
        except OSError as error:
            raise RafsError(f"cannot write the chunk map {path or '(temporary)'}: {error}") from error
        return cls(data, blobs, rows, mark)

    @classmethod
    def _load(cls, path: str, mark: bytes, blobs: int) -> ChunkIndex | None:
        """The stored index, None if it is missing, of another bootstrap or damaged."""
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):
            return None
        try:
            magic, version, count, rows, found, checksum = HEADER.unpack_from(data, 0)
            if (magic, version, count, found) != (MAGIC, VERSION, blobs, mark):
                raise FormatError("chunk map", 0, "of another bootstrap")
            if len(data) != HEADER.size + 8 * (count + 1) + 12 * rows:
                raise FormatError("chunk map", 0, "cut")
            with memoryview(data) as view, view[HEADER.size :] as body:
                if blake3(body).digest() != checksum:
                    raise FormatError("chunk map", 0, "damaged")
        except (FormatError, StructError):
            data.close()
            return None
        return cls(data, blobs, rows, mark)

    def __len__(self) -> int:
        return len(self.places)

    def close(self) -> None:
        """Give the map back; nothing may use the index any more."""
        self.offsets.release()
        self.places.release()
        self._view.release()
        self._data.close()


def fingerprint(bootstrap: Bootstrap) -> bytes:
    """32 bytes that change whenever anything the rows are made of does: not the file's name or times."""
    hasher = blake3(b"%d %d " % (bootstrap.version, bootstrap.size))
    with memoryview(bootstrap.data) as view:
        if isinstance(bootstrap, BootstrapV6):
            ext = bootstrap.ext
            spans = [
                (0, 4096),
                (ext.blob_table_offset, ext.blob_table_size),
                (ext.chunk_table_offset, ext.chunk_table_size),
            ]
        else:  # chunk records are spread over the file
            spans = [(0, len(view))]
        for start, size in spans:
            with view[start : start + size] as part:
                hasher.update(part)
    found: bytes = hasher.digest()
    return found


def _build(bootstrap: Bootstrap) -> tuple[bytes, int]:
    """What follows the header, and the number of rows."""
    places = bootstrap.record_places()
    blobs = len(bootstrap.blobs)
    if len(places) < (LOADED_ROWS if "numpy" in sys.modules else VECTOR_ROWS):
        keys = _sorted_keys(bootstrap, places)
        starts = [bisect_left(keys, blob << _OFFSET_BITS + _PLACE_BITS) for blob in range(blobs + 1)]
        offsets = array("Q", [key >> _PLACE_BITS & (1 << _OFFSET_BITS) - 1 for key in keys])
        rows = array("I", [key & (1 << _PLACE_BITS) - 1 for key in keys])
        return array("Q", starts).tobytes() + offsets.tobytes() + rows.tobytes(), len(keys)
    return _build_big(bootstrap, places)


def _sorted_keys(bootstrap: Bootstrap, places: Sequence[int]) -> list[int]:
    """(blob, uncompressed offset, place) of each chunk as one number, in order, each chunk once."""
    data, blobs = bootstrap.data, len(bootstrap.blobs)
    keys = []
    for place in places:
        blob, size, offset = _facts(data, place * 8)
        if blob >= blobs or offset >> _OFFSET_BITS or not 0 < size <= MAX_CHUNK_SIZE:
            raise _bad_place(place, blob, blobs, offset, size)
        keys.append(blob << _OFFSET_BITS + _PLACE_BITS | offset << _PLACE_BITS | place)
    keys.sort()
    kept: list[int] = []
    last = -1  # blob and offset of the chunk before, and where it ends
    end = 0
    for key in keys:
        where, place = key >> _PLACE_BITS, key & (1 << _PLACE_BITS) - 1
        if where < end:
            first = kept[-1] & (1 << _PLACE_BITS) - 1
            if where != last or _identity(data, first * 8) != _identity(data, place * 8):
                raise _clash(bootstrap, place, same=where == last)
            continue
        size = _facts(data, place * 8)[1]
        last, end = where, where + size
        kept.append(key)
    return kept


def _build_big(bootstrap: Bootstrap, places: Sequence[int]) -> tuple[bytes, int]:
    """The same for many rows."""
    import numpy as np

    if isinstance(places, range):
        place = np.arange(places.start, places.stop, places.step, dtype=np.uint32)
    else:
        place = np.asarray(places, dtype=np.uint32)
    words: NDArray[np.uint64] = np.frombuffer(bootstrap.data, "<u8", len(bootstrap.data) // 8)
    blobs = len(bootstrap.blobs)
    # Words of a record: 0..3 digest, 4 blob and flags, 5 sizes, 6 stored place, 7 place, 9 index and CRC.
    blob = words[place + 4] & 0xFFFF_FFFF
    offset = words[place + 7]
    size = words[place + 5] >> 32
    wrong = (blob >= blobs) | (offset >> _OFFSET_BITS != 0) | (size == 0) | (size > MAX_CHUNK_SIZE)
    if wrong.any():
        at = int(wrong.argmax())
        raise _bad_place(int(place[at]), int(blob[at]), blobs, int(offset[at]), int(size[at]))
    where = blob << _OFFSET_BITS | offset
    order = np.argsort(where, kind="stable")
    where, place, size = where[order], place[order], size[order]
    repeats = np.flatnonzero(where[1:] == where[:-1]) + 1
    for word in (0, 1, 2, 3, 4, 5, 6, 9):
        different = words[place[repeats] + word] != words[place[repeats - 1] + word]
        if different.any():
            raise _clash(bootstrap, int(place[repeats[int(different.argmax())]]), same=True)
    if len(repeats):
        kept = np.ones(len(place), dtype=bool)
        kept[repeats] = False
        where, place, size = where[kept], place[kept], size[kept]
    overlap = where[1:] < where[:-1] + size[:-1]
    if overlap.any():
        raise _clash(bootstrap, int(place[int(overlap.argmax()) + 1]), same=False)
    starts = np.searchsorted(where, np.arange(blobs + 1, dtype=np.uint64) << np.uint64(_OFFSET_BITS))
    offsets = where & np.uint64((1 << _OFFSET_BITS) - 1)
    return starts.astype("<u8").tobytes() + offsets.astype("<u8").tobytes() + place.astype("<u4").tobytes(), len(place)


def _bad_place(place: int, blob: int, blobs: int, offset: int, size: int) -> FormatError:
    return FormatError("chunk record", place * 8, f"{size} bytes at {offset:#x} in blob {blob} of {blobs}")


def _clash(bootstrap: Bootstrap, place: int, *, same: bool) -> FormatError:
    blob, _, offset = _facts(bootstrap.data, place * 8)
    what = "two different chunks" if same else "chunks overlap"
    return FormatError("chunk record", place * 8, f"{what} at {offset:#x} of blob {bootstrap.blobs[blob].id}")


def _store(body: bytes, blobs: int, rows: int, mark: bytes, path: str | None) -> mmap.mmap:
    """Write the file, make it visible at once, and map it. Nothing waits for the disk: what a power cut makes of it is
    not right by its checksum, and is built again."""
    header = HEADER.pack(MAGIC, VERSION, blobs, rows, mark, blake3(body).digest())
    with tempfile.NamedTemporaryFile(
        dir=None if path is None else os.path.dirname(os.path.abspath(path)), prefix=".chunkmap-", delete=False
    ) as file:
        try:
            file.write(header)
            file.write(body)
            file.flush()
            if path is None:
                os.unlink(file.name)
            else:
                os.rename(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
        # Read-only: a map holds its descriptor, and one for writing would keep the disk from being remounted so.
        with open(f"/proc/self/fd/{file.fileno()}", "rb") as again:
            return mmap.mmap(again.fileno(), 0, access=mmap.ACCESS_READ)


assert CHUNK_RECORD.size % 8 == 0
