"""From a bootstrap to the body of its EROFS metadata image: which segment each chunk lies in, and where.

A v6 bootstrap is copied in a stream (`bootstrap.copy_v6`) and its chunks are written down by their places on devices,
for `filemap`. What cannot be copied, v5 among it, is written anew from tables of all files (`bootstrap.write_erofs`).
"""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bootstrap.copy_v6 import ImageCopy, IrregularError, References
from bootstrap.erofs_devices import Device
from bootstrap.errors import BuildError, FormatError
from bootstrap.layout.common import SuperFlags
from bootstrap.reader_v6 import BootstrapV6
from bootstrap.rewrite import draft
from bootstrap.write_erofs import MAX_DEVICES, write_erofs
from nydusfs.drivers.erofs.filemap import ROW_SIZE
from nydusfs.drivers.erofs.image import SMALL_FILE, UnsuitableError
from nydusfs.segments import BLOCK, SEGMENT_SIZE

if TYPE_CHECKING:
    from nydusfs.image_reader import ImageReader

log = logging.getLogger("nydusfs.erofs")
Ints = NDArray[np.int64]


def make_body(reader: ImageReader, file: IO[bytes], xattrs: bool) -> tuple[int, int]:
    """Write an image, and its file map behind it, into an empty file; the map's rows, and how many per cent of the
    image's bytes are in small files. All its blobs' own tables must be there. Raises `UnsuitableError`, OSError, and
    RafsError for bad metadata."""
    if reader.bootstrap.flags & SuperFlags.TARFS:
        raise UnsuitableError("its data is a plain tar, whose files begin at no block of 4096 bytes")
    try:
        return _copy(reader, file, xattrs)
    except (IrregularError, FormatError, KeyError) as error:
        log.info("image %s: its metadata is written anew, not copied: %s", reader.name, error)
        file.truncate(0)
    body, small = _build(reader, xattrs)
    file.write(body)
    return 0, small


class _Devices:
    """The segments an image uses, in the order of their blobs and places. `slots`: blob << 40 | segment's number."""

    def __init__(self, reader: ImageReader, slots: Ints) -> None:
        if len(slots) > MAX_DEVICES:
            raise UnsuitableError(f"{len(slots)} segments are more than the {MAX_DEVICES} devices of an EROFS image")
        self._slots = slots
        self._packed: dict[int, dict[int, int]] = {}
        self.table: list[Device] = []
        for place, slot in enumerate(slots.tolist()):
            segment = reader.segment(slot >> 40, slot & (1 << 40) - 1)
            self.table.append(Device(f"{segment.blob.index}/{segment.name}", segment.padded // BLOCK))
            if segment.places is not None:
                self._packed[place] = segment.places

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


def _copy(reader: ImageReader, file: IO[bytes], xattrs: bool) -> tuple[int, int]:
    image = reader.bootstrap
    if not isinstance(image, BootstrapV6):
        raise IrregularError("v5")
    with tempfile.TemporaryFile(dir=os.path.dirname(file.name)) as scratch:
        copy = ImageCopy(image, scratch)
        copy.scan()
        if copy.has_attributes and not xattrs:
            raise IrregularError("attributes that are not to be shown")
        used: dict[int, int] = {}
        every = small = 0
        for found in copy.references():
            slots, counts = np.unique(_slots(reader, found), return_counts=True)
            for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
                used[slot] = used.get(slot, 0) + count
            _, whose = np.unique(found.inodes, return_inverse=True)
            sizes = np.bincount(whose, found.needed)
            every, small = every + int(sizes.sum()), small + int(sizes[sizes <= SMALL_FILE].sum())
        order = np.array(sorted(used), np.int64)
        devices = _Devices(reader, order)
        size = copy.size(len(order))
        rows = _Rows(np.array([used[slot] for slot in order.tolist()], np.int64))
        file.truncate(size + -(-rows.total * ROW_SIZE // BLOCK) * BLOCK)

        def places(found: References) -> tuple[Ints, Ints]:
            device, byte = devices.places(_slots(reader, found), found.blobs, found.offsets)
            rows.add(found, device, byte)
            return device, byte

        # All through the page cache: nothing of the image is memory of ours. Unmapped when the last table over it goes.
        view = memoryview(mmap.mmap(file.fileno(), 0))
        rows.use(view[size:])
        copy.write(view[:size], devices.table, places)
        rows.sort()
    return rows.total, 100 * small // max(every, 1)


class _Rows:
    """The file map in the making: three columns, see `filemap`. Rows of one device come together at once, since it is
    known how many there are, and are sorted in the end."""

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
        for begin, end in zip(self._starts[:-1].tolist(), self._starts[1:].tolist(), strict=True):
            order = np.argsort(self._keys[begin:end], kind="stable")
            for column in (self._keys, self._inodes, self._within):
                column[begin:end] = column[begin:end][order]


def _slots(reader: ImageReader, found: References) -> Ints:
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


def _build(reader: ImageReader, xattrs: bool) -> tuple[bytearray, int]:
    image = reader.bootstrap
    try:
        tree = draft(image).tree
    except (FormatError, BuildError) as error:
        raise UnsuitableError(str(error)) from None
    if not xattrs:
        tree.inodes = tree.inodes.copy()
        tree.inodes["xattrs"] = -1

    rows, within, refs = tree.file_refs()
    chunks = tree.chunks.copy()
    step = image.chunk_size
    needed = np.minimum(step, tree.inodes["size"][rows] - within * step)
    if (short := np.flatnonzero(chunks["uncompressed_size"][refs] < needed)).size:
        path = tree.path(int(rows[short[0]]))
        raise UnsuitableError(f"{path}: chunk {within[short[0]]} is shorter than its part of the file")

    used = np.unique(refs)
    blobs = chunks["blob"][used].astype(np.int64)
    offsets = chunks["uncompressed_offset"][used].astype(np.int64)
    numbers = offsets // SEGMENT_SIZE
    for blob in np.unique(blobs).tolist():
        if reader.chunks.anchors_apart(blob):
            mine = np.flatnonzero(blobs == blob)
            anchors = [reader.chunks.anchor(blob, reader.chunks.find(blob, at)) for at in offsets[mine].tolist()]
            numbers[mine] = np.array(anchors, np.int64) // SEGMENT_SIZE
    slots = blobs << 40 | numbers
    devices = _Devices(reader, np.unique(slots))
    chunks["blob"][used], chunks["uncompressed_offset"][used] = devices.places(slots, blobs, offsets)
    chunks["index"] = 0
    tree.chunks = chunks
    sizes = tree.inodes["size"][np.unique(rows)]
    small = 100 * int(sizes[sizes <= SMALL_FILE].sum()) // max(int(sizes.sum()), 1)
    try:
        return write_erofs(tree, devices.table, chunk_size=step), small
    except BuildError as error:
        raise UnsuitableError(str(error)) from None
