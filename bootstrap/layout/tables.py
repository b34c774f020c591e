"""The structures that come in thousands as numpy types; field by field those of `v5`, `v6` and `common`."""

from __future__ import annotations

import numpy as np

from bootstrap.layout import v5, v6
from bootstrap.layout.common import CHUNK_RECORD

CHUNK = np.dtype(
    [
        ("digest", "V32"),
        ("blob", "<u4"),
        ("flags", "<u4"),
        ("compressed_size", "<u4"),
        ("uncompressed_size", "<u4"),
        ("compressed_offset", "<u8"),
        ("uncompressed_offset", "<u8"),
        ("file_offset", "<u8"),
        ("index", "<u4"),
        ("crc32", "<u4"),
    ]
)
"""A chunk record (1.12)."""

V6_INODE = np.dtype(
    [
        ("format", "<u2"),
        ("xattr_icount", "<u2"),
        ("mode", "<u2"),
        ("reserved", "<u2"),
        ("size", "<u8"),
        ("union", "<u4"),
        ("ino", "<u4"),
        ("uid", "<u4"),
        ("gid", "<u4"),
        ("mtime", "<i8"),
        ("mtime_nsec", "<u4"),
        ("nlink", "<u4"),
        ("reserved2", "V16"),
    ]
)
"""An extended inode (1.6)."""

V6_COMPACT = np.dtype(
    [
        ("format", "<u2"),
        ("xattr_icount", "<u2"),
        ("mode", "<u2"),
        ("nlink", "<u2"),
        ("size", "<u4"),
        ("mtime", "<u4"),
        ("union", "<u4"),
        ("ino", "<u4"),
        ("uid", "<u2"),
        ("gid", "<u2"),
        ("reserved2", "V4"),
    ]
)
"""A compact inode (1.6). Its time, since the superblock's, is new in Linux 6.15; RAFS leaves the field empty."""

V6_DIRENT = np.dtype([("nid", "<u8"), ("nameoff", "<u2"), ("type", "u1"), ("reserved", "u1")])

V5_INODE = np.dtype(
    [
        ("digest", "V32"),
        ("parent", "<u8"),
        ("ino", "<u8"),
        ("uid", "<u4"),
        ("gid", "<u4"),
        ("projid", "<u4"),
        ("mode", "<u4"),
        ("size", "<u8"),
        ("blocks", "<u8"),
        ("flags", "<u8"),
        ("nlink", "<u4"),
        ("child_index", "<u4"),
        ("child_count", "<u4"),
        ("name_size", "<u2"),
        ("symlink_size", "<u2"),
        ("rdev", "<u4"),
        ("mtime_nsec", "<u4"),
        ("mtime", "<i8"),
        ("reserved", "V8"),
    ]
)
"""The fixed part of an inode record (2.6)."""

for _table, _record in (
    (CHUNK, CHUNK_RECORD),
    (V6_INODE, v6.INODE_EXTENDED),
    (V6_COMPACT, v6.INODE_COMPACT),
    (V6_DIRENT, v6.DIRENT),
    (V5_INODE, v5.INODE),
):
    assert _table.itemsize == _record.size
