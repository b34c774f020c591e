"""A RAFS v6 image and all its data as one EROFS disk image. Reference: RAFS format 1.3 and 5.16, `export --block`.

The bootstrap comes first, each uncompressed blob at the block address its device slot names. The kernel mounts such a
file through a loop device and needs nothing else. What no file of the image uses is left out: a hole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from bootstrap.blobsource import Blobs, Part
from bootstrap.errors import BuildError
from bootstrap.layout import v6
from bootstrap.layout.common import round_up
from bootstrap.packing import Packer
from bootstrap.reader_v6 import BootstrapV6


class _Item(NamedTuple):
    offset: int
    part: bytes | memoryview | Part


def export_block(
    blobs: Blobs, out: BinaryIO, *, threads: int = 2, progress: Callable[[int], None] | None = None
) -> tuple[int, int]:
    """Write the disk image to a seekable file; its size and its block size, both in bytes.

    Chunks are decoded and verified in `threads`. `progress` is called with bytes of data written. Raises BuildError
    for images that are no EROFS images, RafsError for data that is damaged or not there.
    """
    image = blobs.image
    if not isinstance(image, BootstrapV6):
        raise BuildError(f"{image.path} is RAFS v{image.version}: only version 6 is an EROFS image")
    starts, size = _places(image)
    header = bytearray(image.data)
    for blob in image.blobs:
        slot = v6.DEVICE_TABLE_OFFSET + blob.index * v6.DEVICE_SLOT.size
        identifier, blocks, _ = v6.DEVICE_SLOT.unpack_from(header, slot)
        v6.DEVICE_SLOT.pack_into(header, slot, identifier, blocks, starts[blob.index] // image.block_size)
    out.write(header)

    def work(items: list[_Item]) -> list[bytes | memoryview]:
        return [blobs.decode(item.part) for item in items]

    def write(items: list[_Item], done: list[bytes | memoryview]) -> None:
        for item, data in zip(items, done, strict=True):
            out.seek(item.offset)
            out.write(data)
        if progress is not None:
            progress(sum(map(len, done)))

    with Packer(work, write, threads) as packer:
        for blob in image.blobs:
            for chunk, part in blobs.blob_parts(blob.index):
                end = chunk.uncompressed_offset + chunk.uncompressed_size
                if end > blob.uncompressed_size // image.block_size * image.block_size:
                    raise BuildError(f"chunk {chunk.index} ends at {end}, outside blob {blob.id}")
                packer.add(_Item(starts[blob.index] + chunk.uncompressed_offset, part), chunk.uncompressed_size)
        packer.flush()
    out.truncate(size)
    return size, image.block_size


def _places(image: BootstrapV6) -> tuple[list[int], int]:
    """Where each blob begins, and the size of the whole; bytes.

    The addresses of the device slots, unless they are those of images that had none (0) or cannot be used: then the
    ones a builder of today would give.
    """
    unit = image.block_size
    given, spans = [], []
    for blob in image.blobs:
        slot = v6.DEVICE_TABLE_OFFSET + blob.index * v6.DEVICE_SLOT.size
        _, blocks, mapped = v6.DEVICE_SLOT.unpack_from(image.data, slot)
        given.append(mapped * unit)
        spans.append(blocks * unit)
    end = len(image.data)
    for start, span in sorted(zip(given, spans, strict=True)):
        if start < end:
            break
        end = start + span
    else:
        return given, end
    starts, position = [], len(image.data)
    for span in spans:
        starts.append(round_up(position, v6.MAPPED_ALIGNMENT))
        position = starts[-1] + span
    return starts, position
