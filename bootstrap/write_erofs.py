"""Any tree as a plain EROFS image whose file data lies on many small devices. No RAFS tables, no promises about data.

The kernel's format (`fs/erofs/erofs_fs.h`) is what RAFS v6 is made of, so inodes and directories are placed and written
as there (`place_v6`, `write_v6`); only superblock and device table differ. Same tree and devices, same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from bootstrap.erofs_devices import Device
from bootstrap.errors import BuildError
from bootstrap.flat import FlatTree
from bootstrap.layout import v6
from bootstrap.layout.common import SuperFlags, round_up
from bootstrap.write_v6 import TreeWriter

MAX_DEVICES = 0xFFFF
"""A chunk address has 16 bits for the device, and 0 is the image itself."""
B = v6.BLOCK_SIZE


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
