"""The EROFS metadata image of a bootstrap: a derived file, made once, checked when it is used again.

Its devices are segment files of the cache (`nydusfs.segments`); the table names each by `<blob index>/<file name>`, so
a second start needs neither the chunks nor the blob's own tables. Behind the image lies one block that binds it to its
bootstrap and to itself.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from bootstrap.base import Bootstrap
from bootstrap.errors import BuildError, FormatError
from bootstrap.layout.common import SuperFlags
from nydusfs.errors import NydusError
from nydusfs.segments import BLOCK, SEGMENT_SIZE

if TYPE_CHECKING:
    from nydusfs.image_reader import ImageReader

MAGIC = b"nydus erofs img\0"
VERSION = 1
TRAILER = Struct("<16sI32s32s")
"""magic, version, fingerprint, BLAKE3 of all that comes before."""


class UnsuitableError(NydusError):
    """This image cannot be an EROFS mount; the text says why."""


class DeviceFile(NamedTuple):
    """A device of an image: which segment file, and how large it is when complete, in bytes."""

    blob_index: int
    name: str
    size: int


def fingerprint(bootstrap: Bootstrap, xattrs: bool) -> bytes:
    """Of everything an image follows from."""
    hasher = blake3(b"%d %d %d %d " % (VERSION, SEGMENT_SIZE, xattrs, bootstrap.version))
    with memoryview(bootstrap.data) as view:
        hasher.update(view)
    found: bytes = hasher.digest()
    return found


def open_image(path: Path, mark: bytes) -> list[DeviceFile] | None:
    """The devices of a written image; None when it is missing, damaged or of something else.

    Reading all of it has a second use: a mount whose metadata is not in the page cache made Linux 6.18 log a warning.
    """
    from bootstrap.write_erofs import read_devices

    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = len(data) - BLOCK
            magic, version, found, checksum = TRAILER.unpack_from(data, end)
            if end <= 0 or (magic, version, found) != (MAGIC, VERSION, mark):
                return None
            with memoryview(data) as view, view[:end] as body:
                if blake3(body).digest() != checksum:
                    return None
                return [_device(tag, blocks) for tag, blocks in read_devices(body)]
    except (OSError, ValueError, StructError, FormatError):
        return None


def _device(tag: str, blocks: int) -> DeviceFile:
    blob, _, name = tag.partition("/")
    return DeviceFile(int(blob), name, blocks * BLOCK)


def write_image(reader: ImageReader, path: Path, mark: bytes, xattrs: bool) -> list[DeviceFile]:
    """Make the image of a bootstrap and put it at `path`. All its blobs' own tables must be there. For a worker thread.

    Raises `UnsuitableError`, RafsError for bad metadata, OSError.
    """
    from bootstrap.write_erofs import read_devices

    body = _make(reader, xattrs)
    trailer = TRAILER.pack(MAGIC, VERSION, mark, blake3(body).digest()).ljust(BLOCK, b"\0")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".image-", delete=False) as file:
        try:
            file.write(body)
            file.write(trailer)
            file.flush()
            os.fsync(file.fileno())
            os.rename(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return [_device(tag, blocks) for tag, blocks in read_devices(body)]


def _make(reader: ImageReader, xattrs: bool) -> bytearray:
    import numpy as np

    from bootstrap.rewrite import draft
    from bootstrap.write_erofs import MAX_DEVICES, Device, write_erofs

    image = reader.bootstrap
    if image.flags & SuperFlags.TARFS:
        raise UnsuitableError("its data is a plain tar, whose files begin at no block of 4096 bytes")
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
    slots, device = np.unique(blobs << 40 | numbers, return_inverse=True)
    if len(slots) > MAX_DEVICES:
        raise UnsuitableError(f"{len(slots)} segments are more than the {MAX_DEVICES} devices of an EROFS image")
    places = offsets - numbers * SEGMENT_SIZE
    devices = []
    for place, slot in enumerate(slots.tolist()):
        segment = reader.segment(slot >> 40, slot & (1 << 40) - 1)
        devices.append(Device(f"{segment.blob.index}/{segment.name}", segment.padded // BLOCK))
        if segment.places is not None:
            mine = np.flatnonzero(device == place)
            places[mine] = [segment.places[at] for at in offsets[mine].tolist()]
    if (odd := np.flatnonzero(places % BLOCK)).size:
        raise UnsuitableError(f"a chunk at {offsets[odd[0]]:#x} of blob {blobs[odd[0]]} begins at no block of {BLOCK}")
    chunks["blob"][used] = device
    chunks["uncompressed_offset"][used] = places
    chunks["index"] = 0
    tree.chunks = chunks
    try:
        return write_erofs(tree, devices, chunk_size=step)
    except BuildError as error:
        raise UnsuitableError(str(error)) from None
