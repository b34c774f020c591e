"""The device table of a plain EROFS image. Without numpy: it is read wherever an image is mounted again."""

from __future__ import annotations

from typing import NamedTuple

from bootstrap.errors import FormatError
from bootstrap.layout import v6


class Device(NamedTuple):
    """`tag`: at most 63 bytes that tell the opener which file it is. `blocks`: its size, in units of 4096 bytes."""

    tag: str
    blocks: int


def read_devices(image: bytes | bytearray | memoryview) -> list[Device]:
    """The device table of an image of `write_erofs`. Raises FormatError."""
    if len(image) < v6.DEVICE_TABLE_OFFSET:
        raise FormatError("EROFS image", 0, f"{len(image)} bytes hold no superblock")
    super_block = v6.Superblock(*v6.SUPERBLOCK.unpack_from(image, v6.SUPER_OFFSET))
    if super_block.magic != v6.SUPER_MAGIC or super_block.devt_slotoff != v6.DEVICE_SLOT_OFFSET_UNITS:
        raise FormatError("EROFS superblock", v6.SUPER_OFFSET, f"magic {super_block.magic:#x}")
    end = v6.DEVICE_TABLE_OFFSET + v6.DEVICE_SLOT.size * super_block.extra_devices
    if end > len(image):
        text = f"{super_block.extra_devices} slots end behind the file"
        raise FormatError("device table", v6.DEVICE_TABLE_OFFSET, text)
    slots = v6.DEVICE_SLOT.iter_unpack(image[v6.DEVICE_TABLE_OFFSET : end])
    return [Device(tag.rstrip(b"\0").decode("ascii", "replace"), blocks) for tag, blocks, _ in slots]
