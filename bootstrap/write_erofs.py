"""Any tree as a plain EROFS image whose file data lies on many small devices. No RAFS tables, no promises about data.

The kernel's format (`fs/erofs/erofs_fs.h`) is what RAFS v6 is made of, so inodes and directories are placed and written
as there (`place_v6`, `write_v6`); only superblock and device table differ. Same tree and devices, same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bootstrap.errors import BuildError, FormatError
from bootstrap.flat import FlatTree
from bootstrap.layout import v6
from bootstrap.layout.common import SuperFlags, round_up
from bootstrap.write_v6 import TreeWriter

MAX_DEVICES = 0xFFFF
"""A chunk address has 16 bits for the device, and 0 is the image itself."""
B = v6.BLOCK_SIZE


class Device(NamedTuple):
    """`tag`: at most 63 bytes that tell the opener which file it is. `blocks`: its size, in units of 4096 bytes."""

    tag: str
    blocks: int


def write_erofs(tree: FlatTree, devices: Sequence[Device], *, chunk_size: int) -> bytearray:
    """The image. Of `tree.chunks` `blob` is the device's number and `uncompressed_offset` the place on it, in bytes.

    Raises BuildError for what the format cannot hold.
    """
    if len(devices) > MAX_DEVICES:
        raise BuildError(f"{len(devices)} devices; an EROFS image can have at most {MAX_DEVICES}")
    return _Writer(tree, chunk_size, SuperFlags(0)).write(devices)


class _Writer(TreeWriter):
    def write(self, devices: Sequence[Device]) -> bytearray:
        tree = self._tree
        meta = round_up(v6.DEVICE_TABLE_OFFSET + v6.DEVICE_SLOT.size * len(devices), B)
        image = bytearray(round_up(meta + self._place.end, B))
        self._write_inodes(image, meta, *tree.file_refs())
        self._write_directories(image, meta)
        put_superblock(image, devices, inos=len(tree.names), meta=meta, root=v6.ROOT_NID)
        return image


def put_superblock(
    image: bytearray | memoryview, devices: Sequence[Device], *, inos: int, meta: int, root: int
) -> None:
    """Superblock and device table of an image whose inodes begin at byte `meta`."""
    for number, device in enumerate(devices):
        slot = v6.DEVICE_TABLE_OFFSET + v6.DEVICE_SLOT.size * number
        v6.DEVICE_SLOT.pack_into(image, slot, device.tag.encode(), device.blocks, 0)
    v6.SUPERBLOCK.pack_into(
        image,
        v6.SUPER_OFFSET,
        *v6.Superblock(
            feature_compat=0,
            root_nid=root,
            inos=inos,
            blocks=len(image) // B,
            meta_blkaddr=meta // B,
            extra_devices=len(devices),
        ),
    )


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
