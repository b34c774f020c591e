"""Writes a RAFS v5 bootstrap. Reference: RAFS format 2, 3 and 5.5."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Sequence

from blake3 import blake3

from bootstrap.chunktable import BlobInfo, ChunkTable
from bootstrap.digest import EMPTY
from bootstrap.errors import BuildError
from bootstrap.layout import v5
from bootstrap.layout.common import MAX_BLOBS, Digester, SuperFlags, digester_of
from bootstrap.tree import Node, first_name, number, path_of, prefetch_targets, walk

_U32 = 0xFFFFFFFF
_U64 = (1 << 64) - 1


def write_v5(
    root: Node,
    table: ChunkTable,
    blobs: Sequence[BlobInfo],
    *,
    chunk_size: int,
    flags: SuperFlags,
    prefetch: list[bytes],
) -> bytes:
    """The whole bootstrap; parameters as for `write_v6`. Raises BuildError for what v5 cannot hold."""
    if len(blobs) > MAX_BLOBS:
        raise BuildError(f"{len(blobs)} data blobs; an image can have at most {MAX_BLOBS}")
    for index, blob in enumerate(blobs):
        blob.index = index
    order = number(root)
    targets = prefetch_targets(root, prefetch)
    prefetch_at = v5.SUPER_SIZE + v5.align8(4 * len(order))
    blob_table_at = prefetch_at + v5.align8(4 * len(targets))
    text = b"\0".join(v5.READAHEAD.pack(b.readahead_offset, b.readahead_size) + b.id.encode() for b in blobs)
    blob_table = text.ljust(v5.align8(len(text)), b"\0")
    extended_at = blob_table_at + len(blob_table)
    at = extended_at + v5.EXT_BLOB.size * len(blobs)

    digester = digester_of(flags)
    digests = _digests(order, table, digester)
    children_at = _child_indexes(order)
    offsets = bytearray(4 * len(order))
    records: list[bytes] = []
    has_xattr = False
    for node in walk(root):
        v5.INODE_OFFSET.pack_into(offsets, 4 * (node.index - 1), at >> 3)
        record = _record(node, digests[node.index - 1], children_at[node.index - 1], table, chunk_size)
        records.append(record)
        at += len(record)
        has_xattr = has_xattr or bool(node.xattrs)
    if at > v5.MAX_FILE_SIZE:
        raise BuildError(f"the bootstrap would have {at} bytes; v5 allows {v5.MAX_FILE_SIZE}: use version 6")
    if has_xattr:
        flags |= SuperFlags.HAS_XATTR
    extended = b"".join(
        v5.EXT_BLOB.pack(b.chunk_count, int(b.features), b.uncompressed_size, b.compressed_size) for b in blobs
    )
    superblock = v5.SUPERBLOCK.pack(
        *v5.Superblock(
            magic=v5.SUPER_MAGIC,
            version=v5.SUPER_VERSION,
            sb_size=v5.SUPER_SIZE,
            block_size=chunk_size,
            flags=int(flags),
            inodes_count=sum(first_name(node) is node for node in order),
            inode_table_offset=v5.SUPER_SIZE,
            prefetch_table_offset=prefetch_at,
            blob_table_offset=blob_table_at,
            inode_table_entries=len(order),
            prefetch_table_entries=len(targets),
            blob_table_size=len(blob_table),
            extended_blob_table_entries=len(blobs),
            extended_blob_table_offset=extended_at,
        )
    )
    prefetch_table = b"".join(v5.INODE_OFFSET.pack(first_name(node).index) for node in targets)
    return b"".join(
        [
            superblock,
            bytes(offsets).ljust(prefetch_at - v5.SUPER_SIZE, b"\0"),
            prefetch_table.ljust(blob_table_at - prefetch_at, b"\0"),
            blob_table,
            extended,
            *records,
        ]
    )


def _child_indexes(order: list[Node]) -> list[int]:
    """`i_child_index` by node index - 1: that of the first child, for an empty directory the next free one."""
    found = [0] * len(order)
    next_free = 2
    stack = [order[0]]
    while stack:
        directory = stack.pop()
        assert directory.children is not None
        found[directory.index - 1] = next_free
        next_free += len(directory.children)
        stack += reversed([child for child in directory.children.values() if child.children is not None])
    return found


def _digests(order: list[Node], table: ChunkTable, digester: Digester) -> list[bytes]:
    """Inode digests by node index - 1; children have higher indexes, so from the end all of a directory's are there."""
    empty = EMPTY[digester]
    make = hashlib.sha256 if digester == Digester.SHA256 else blake3
    found = [empty] * len(order)
    for node in reversed(order):
        if node.children:
            data = b"".join([found[child.index - 1] for child in node.children.values()])
        elif node.chunks:
            data = b"".join(map(table.digest, node.chunks))
        elif node.target:
            data = node.target
        else:
            continue
        found[node.index - 1] = make(data).digest()
    return found


def _record(node: Node, digest: bytes, child_index: int, table: ChunkTable, chunk_size: int) -> bytes:
    kind = node.mode & 0o170000
    flags = v5.INODE_HARDLINK if node.linked else 0
    name = node.name
    chunks = node.chunks or []
    child_count = 0
    size = node.size
    tail = [name.ljust(v5.align8(len(name)), b"\0")]
    if kind == stat.S_IFDIR:
        assert node.children is not None
        child_count = len(node.children)
        size = -(-sum(len(child) + 8 for child in node.children) // 4096) * 4096 or 4096
    elif kind == stat.S_IFLNK:
        if len(node.target) > v5.MAX_SYMLINK:
            raise BuildError(f"{path_of(node)}: link target of {len(node.target)} bytes")
        flags |= v5.INODE_SYMLINK
        size = len(node.target)
        tail.append(node.target.ljust(v5.align8(size), b"\0"))
    elif kind == stat.S_IFREG:
        child_count = -(-size // chunk_size)
        if len(chunks) != child_count:
            raise BuildError(f"{path_of(node)}: {len(chunks)} chunks instead of {child_count}")
    xattr_bytes = 0
    if node.xattrs:
        flags |= v5.INODE_XATTR
        pairs = b"".join(
            v5.XATTR_PAIR.pack(len(key) + 1 + len(value)) + key + b"\0" + value for key, value in node.xattrs.items()
        )
        xattr_bytes = len(pairs)
        tail.append(v5.XATTR_TOTAL.pack(xattr_bytes) + pairs.ljust(v5.align8(xattr_bytes), b"\0"))
    if chunks:
        tail += [table.record(row, chunk_size * number) for number, row in enumerate(chunks)]
    parent = node.parent
    assert parent is not None
    fixed = v5.INODE.pack(
        *v5.Inode(
            digest=digest,
            parent=parent.index if parent is not node else 0,
            ino=first_name(node).index,
            uid=node.uid & _U32,
            gid=node.gid & _U32,
            projid=0,
            mode=node.mode,
            size=size,
            blocks=-(-(size + v5.align8(xattr_bytes)) // 512),
            flags=flags,
            nlink=node.nlink,
            child_index=child_index,
            child_count=child_count,
            name_size=len(name),
            symlink_size=len(node.target),
            rdev=node.rdev & _U32,
            mtime_nsec=node.mtime_nsec,
            mtime=node.mtime & _U64,
        )
    )
    return fixed + b"".join(tail)
