"""`GET /api/v1/daemon/backend`: the superblock of a mounted bootstrap, in the fields upstream shows."""

from __future__ import annotations

import struct
from typing import Any, Protocol

from bootstrap.layout import v5, v6

_FOREVER = {"secs": 1 << 32, "nanos": 0}


class MappedBootstrap(Protocol):
    @property
    def version(self) -> int: ...
    @property
    def data(self) -> Any: ...
    @property
    def root(self) -> int: ...
    @property
    def inode_count(self) -> int: ...


def superblock_info(bootstrap: MappedBootstrap) -> dict[str, Any]:
    """Fields a version does not have are 0. Offsets and sizes in bytes, `chunk_size` too."""
    info: dict[str, Any] = {
        "magic": 0, "version": 0, "sb_size": 0, "root_inode": 0, "chunk_size": 0, "batch_size": 0,
        "inodes_count": bootstrap.inode_count, "flags": {"bits": 0}, "inode_table_entries": 0, "inode_table_offset": 0,
        "blob_table_size": 0, "blob_table_offset": 0, "extended_blob_table_offset": 0, "extended_blob_table_entries": 0,
        "blob_device_table_count": 0, "blob_device_table_offset": 0, "prefetch_table_offset": 0,
        "prefetch_table_entries": 0, "attr_timeout": _FOREVER, "entry_timeout": _FOREVER, "is_chunk_dict": False,
        "meta_blkaddr": 0, "root_nid": 0, "chunk_table_offset": 0, "chunk_table_size": 0,
    }  # fmt: skip
    try:
        info.update(_version6(bootstrap.data) if bootstrap.version == 6 else _version5(bootstrap.data))
    except struct.error:
        pass  # opened before, so this cannot be short; zeros are better than a failed status query
    return info


def _version6(data: Any) -> dict[str, Any]:
    main = v6.Superblock(*v6.SUPERBLOCK.unpack_from(data, v6.SUPER_OFFSET))
    extended = v6.ExtSuperblock(*v6.EXT_SUPERBLOCK.unpack_from(data, v6.EXT_SUPER_OFFSET))
    return {
        "magic": main.magic,
        "version": 0x600,
        "chunk_size": extended.chunk_size,
        "flags": {"bits": extended.flags},
        "blob_table_size": extended.blob_table_size,
        "blob_table_offset": extended.blob_table_offset,
        "blob_device_table_count": main.extra_devices,
        "blob_device_table_offset": v6.DEVICE_TABLE_OFFSET,
        "prefetch_table_offset": extended.prefetch_table_offset,
        "prefetch_table_entries": extended.prefetch_table_size // v6.NID.size,
        "meta_blkaddr": main.meta_blkaddr,
        "root_nid": main.root_nid,
        "chunk_table_offset": extended.chunk_table_offset,
        "chunk_table_size": extended.chunk_table_size,
    }


def _version5(data: Any) -> dict[str, Any]:
    sb = v5.Superblock(*v5.SUPERBLOCK.unpack_from(data, 0))
    return {
        "magic": sb.magic,
        "version": sb.version,
        "sb_size": sb.sb_size,
        "chunk_size": sb.block_size,
        "flags": {"bits": sb.flags},
        "inode_table_entries": sb.inode_table_entries,
        "inode_table_offset": sb.inode_table_offset,
        "blob_table_size": sb.blob_table_size,
        "blob_table_offset": sb.blob_table_offset,
        "extended_blob_table_offset": sb.extended_blob_table_offset,
        "extended_blob_table_entries": sb.extended_blob_table_entries,
        "prefetch_table_offset": sb.prefetch_table_offset,
        "prefetch_table_entries": sb.prefetch_table_entries,
    }
