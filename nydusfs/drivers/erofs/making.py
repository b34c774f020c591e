"""From a bootstrap to the body of its EROFS metadata image: which segment each chunk lies in, and where.

The tree is written by `bootstrap.write_erofs`, in a stream. Chunks are written down by their places on devices, for
`filemap`.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import IO, Protocol

import numpy as np
import numpy.ma  # np.unique imports it at its first call, for 23 ms: not when a container waits
from numpy.typing import NDArray

from bootstrap.base import Bootstrap
from bootstrap.chunkmap import ChunkMap
from bootstrap.erofs_devices import Device
from bootstrap.errors import BuildError, FormatError
from bootstrap.layout.common import SuperFlags
from bootstrap.write_erofs import MAX_DEVICES, ErofsImage, References
from nydusfs.drivers.erofs.filemap import ROW_SIZE
from nydusfs.drivers.erofs.image import SMALL_FILE, UnsuitableError
from nydusfs.segments import BLOCK, SEGMENT_SIZE, Segment, many_names

Ints = NDArray[np.int64]
AT_ONCE = 256  # segments, of a few or hundreds of chunks each
ROWS = 32768  # of the file map, at a time


class Parts(Protocol):
    """What of an `ImageReader` is needed."""

    @property
    def bootstrap(self) -> Bootstrap: ...
    @property
    def chunks(self) -> ChunkMap: ...
    @property
    def segment(self) -> Callable[[int, int], Segment]: ...


def make_body(
    reader: Parts, file: IO[bytes], xattrs: bool, listed: Callable[[], None] = lambda: None
) -> tuple[int, int]:
    """Write an image, and its file map behind it, into an empty file; the map's rows, and how many per cent of the
    image's bytes are in small files. All its blobs' own tables must be there. `listed` is called when the file has its
    device table. Raises `UnsuitableError`, OSError, and RafsError for bad metadata."""
    if reader.bootstrap.flags & SuperFlags.TARFS:
        raise UnsuitableError("its data is a plain tar, whose files begin at no block of 4096 bytes")
    with ExitStack() as stack:

        def scratch() -> IO[bytes]:
            return stack.enter_context(tempfile.TemporaryFile(dir=os.path.dirname(file.name)))

        try:
            image = ErofsImage(reader.bootstrap, scratch(), scratch(), xattrs=xattrs)
            image.scan()
            return _write(reader, file, image, listed)
        except (FormatError, BuildError) as error:
            raise UnsuitableError(str(error)) from None
        except KeyError as error:
            raise UnsuitableError(f"its blobs have no chunk {error}") from None


class _Devices:
    """The segments an image uses, in the order of their blobs and places. `slots`: blob << 40 | segment's number."""

    def __init__(self, reader: Parts, slots: Ints) -> None:
        if len(slots) > MAX_DEVICES:
            raise UnsuitableError(f"{len(slots)} segments are more than the {MAX_DEVICES} devices of an EROFS image")
        self._slots = slots
        self._packed: dict[int, dict[int, int]] = {}
        self.table: list[Device] = []
        for begin in range(0, len(slots), AT_ONCE):
            part = slots[begin : begin + AT_ONCE]
            blobs, numbers = part >> 40, part & (1 << 40) - 1
            many = {
                blob: many_names(reader.chunks, reader.bootstrap.blobs[blob], numbers[blobs == blob])
                for blob in np.unique(blobs).tolist()
            }
            for blob, number in zip(blobs.tolist(), numbers.tolist(), strict=True):
                name, padded = many[blob].get(number) or self._describe(reader, blob, number)
                self.table.append(Device(f"{blob}/{name}", padded // BLOCK))

    def _describe(self, reader: Parts, blob: int, number: int) -> tuple[str, int]:
        segment = reader.segment(blob, number)
        if segment.places is not None:
            self._packed[len(self.table)] = segment.places
        return segment.name, segment.padded

    def places(self, slots: Ints, blobs: Ints, offsets: Ints) -> tuple[Ints, Ints]:
        """Of chunks: the device's number and the byte on it. Raises `UnsuitableError`."""
        device = np.searchsorted(self._slots, slots)
        places = offsets - (slots & (1 << 40) - 1) * SEGMENT_SIZE
        if self._packed:
            for one in np.unique(device).tolist():
                if (packed := self._packed.get(one)) is not None:
                    mine = np.flatnonzero(device == one)
                    places[mine] = [packed[at] for at in offsets[mine].tolist()]
        if (odd := np.flatnonzero(places % BLOCK)).size:
            at = f"{offsets[odd[0]]:#x} of blob {blobs[odd[0]]}"
            raise UnsuitableError(f"a chunk at {at} begins at no block of {BLOCK}")
        return device, places


def _write(reader: Parts, file: IO[bytes], image: ErofsImage, listed: Callable[[], None]) -> tuple[int, int]:
    """Body and file map of an image that was scanned."""
    used: dict[int, int] = {}
    every = small = 0
    for found in image.references():
        slots, counts = np.unique(_slots(reader, found), return_counts=True)
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            used[slot] = used.get(slot, 0) + count
        _, whose = np.unique(found.inodes, return_inverse=True)
        sizes = np.bincount(whose, found.needed)
        every, small = every + int(sizes.sum()), small + int(sizes[sizes <= SMALL_FILE].sum())
    order = np.array(sorted(used), np.int64)
    devices = _Devices(reader, order)
    size = image.size(len(order))
    rows = _Rows(np.array([used[slot] for slot in order.tolist()], np.int64))
    file.truncate(size + -(-rows.total * ROW_SIZE // BLOCK) * BLOCK)

    def places(found: References) -> tuple[Ints, Ints]:
        device, byte = devices.places(_slots(reader, found), found.blobs, found.offsets)
        rows.add(found, device, byte)
        return device, byte

    # All through the page cache: nothing of the image is memory of ours. Unmapped when the last table over it goes.
    view = memoryview(mmap.mmap(file.fileno(), 0))
    rows.use(view[size:])
    image.write(view[:size], devices.table, places, listed)
    rows.sort()
    return rows.total, 100 * small // max(every, 1)


class _Rows:
    """The file map in the making: three columns, see `filemap`. Rows of one device come together at once, since it is
    known how many there are, and devices are in order; the rest is sorted in the end."""

    def __init__(self, counts: Ints) -> None:
        self.total = int(counts.sum())
        self._starts = np.concatenate(([0], np.cumsum(counts)))
        self._next = self._starts[:-1].copy()
        self._keys = self._inodes = np.empty(0, np.uint64)
        self._within = np.empty(0, np.uint32)

    def use(self, behind: memoryview) -> None:
        n = self.total
        self._keys = np.frombuffer(behind, "<u8", n)
        self._inodes = np.frombuffer(behind, "<u8", n, 8 * n)
        self._within = np.frombuffer(behind, "<u4", n, 16 * n)

    def add(self, found: References, device: Ints, byte: Ints) -> None:
        order = np.argsort(device, kind="stable")
        devices, counts = np.unique(device, return_counts=True)
        ranks = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        at = np.repeat(self._next[devices], counts) + ranks
        self._next[devices] += counts
        self._keys[at] = (device << 32 | byte // BLOCK)[order]
        self._inodes[at] = found.inodes[order]
        self._within[at] = found.within[order]

    def sort(self) -> None:
        devices = len(self._starts) - 1
        first = 0
        while first < devices:
            begin = int(self._starts[first])
            first = max(first + 1, int(np.searchsorted(self._starts, begin + ROWS, side="right")) - 1)
            end = int(self._starts[first])
            order = np.argsort(self._keys[begin:end], kind="stable")
            for column in (self._keys, self._inodes, self._within):
                column[begin:end] = column[begin:end][order]


def _slots(reader: Parts, found: References) -> Ints:
    """blob << 40 | number of the segment of each chunk. Raises KeyError where the image has no such chunk."""
    numbers = found.offsets // SEGMENT_SIZE
    for blob in np.unique(found.blobs).tolist():
        mine = np.flatnonzero(found.blobs == blob)
        rows = reader.chunks.find_starts(blob, found.offsets[mine], found.needed[mine])
        if reader.chunks.anchors_apart(blob):
            anchors = [reader.chunks.anchor(blob, row) for row in rows.tolist()]
            numbers[mine] = np.array(anchors, np.int64) // SEGMENT_SIZE
    slots: Ints = found.blobs << 40 | numbers
    return slots
