"""Writes a RAFS v6 bootstrap: an EROFS image with the chunk and blob tables. Reference: RAFS format 1 and 5.2 - 5.4.

The placement is upstream's to the byte, which is why it looks the way it does: same tree, same file.
"""

from __future__ import annotations

import stat
from collections import deque
from collections.abc import Sequence

from bootstrap.chunktable import BlobInfo, ChunkTable
from bootstrap.errors import BuildError
from bootstrap.layout import v6
from bootstrap.layout.common import MAX_BLOBS, BlobFeatures, SuperFlags, round_up
from bootstrap.tree import Node, first_name, number, path_of, prefetch_targets

B = v6.BLOCK_SIZE
INODE_SIZE = v6.INODE_EXTENDED.size
_SLOT = v6.NID_UNIT
_U32 = 0xFFFFFFFF
_U64 = (1 << 64) - 1

_FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


def write_v6(
    root: Node,
    table: ChunkTable,
    blobs: Sequence[BlobInfo],
    *,
    chunk_size: int,
    flags: SuperFlags,
    prefetch: list[bytes],
) -> bytes:
    """The whole bootstrap. Sets `index` of the blobs by their order, and the writer slots of the nodes.

    `flags`: compressor, digester, cipher and EXPLICIT_UIDGID; HAS_XATTR and INLINED_CHUNK_DIGEST are derived.
    Raises BuildError for what v6 cannot hold, naming the path.
    """
    if len(blobs) >= MAX_BLOBS:
        raise BuildError(f"{len(blobs)} data blobs; an image can have at most {MAX_BLOBS - 1}")
    for index, blob in enumerate(blobs):
        blob.index = index
    order = number(root)
    if len(order) > v6.MAX_INO:
        raise BuildError(f"{len(order)} files are more than an image can hold")
    targets = prefetch_targets(root, prefetch) if blobs else []
    table_at = round_up(v6.DEVICE_TABLE_OFFSET + v6.DEVICE_SLOT.size * len(blobs), B)
    table_size = v6.BLOB_ENTRY.size * len(blobs)
    meta = round_up(table_at + table_size + 4 * len(targets), B) if blobs else 0
    end = _place(root, chunk_size)
    image = bytearray(round_up(meta + end, B))
    has_xattr = _Inodes(image, meta, table, chunk_size).write(order)
    if targets:
        v6_nids = b"".join(v6.NID.pack(node.offset // _SLOT) for node in targets)
        image[table_at + table_size : table_at + table_size + len(v6_nids)] = v6_nids
    records = _chunk_table(order, table, chunk_size)
    chunk_table = len(image)
    image += records
    image += bytes(-len(image) % B)
    image += bytes(max(0, v6.MIN_FILE_SIZE - len(image)))

    blocks = _write_blobs(image, blobs, table_at)
    if has_xattr:
        flags |= SuperFlags.HAS_XATTR
    if all(blob.features & BlobFeatures.INLINED_CHUNK_DIGEST for blob in blobs):
        flags |= SuperFlags.INLINED_CHUNK_DIGEST
    v6.SUPERBLOCK.pack_into(
        image,
        v6.SUPER_OFFSET,
        *v6.Superblock(inos=len(order), blocks=blocks, meta_blkaddr=meta // B, extra_devices=len(blobs)),
    )
    v6.EXT_SUPERBLOCK.pack_into(
        image,
        v6.EXT_SUPER_OFFSET,
        *v6.ExtSuperblock(
            flags=int(flags),
            blob_table_offset=table_at,
            blob_table_size=table_size,
            chunk_size=chunk_size,
            chunk_table_offset=chunk_table,
            chunk_table_size=len(records),
            prefetch_table_offset=table_at + table_size if targets else 0,
            prefetch_table_size=4 * len(targets),
        ),
    )
    return bytes(image)


# -- placement (5.3)


class _Space:
    """The growing virtual file and the unused ends of its blocks.

    `_free[k]` queues the blocks with k unused slots at their end; bit k of `_some` says that there are any (looking
    through 128 queues for each inode was a third of a merge).
    """

    __slots__ = ("_free", "_some", "cur")

    def __init__(self) -> None:
        self.cur = B
        self._free: list[deque[int]] = [deque() for _ in range(B // _SLOT)]
        self._some = 0

    def note(self, at: int) -> None:
        """Remember the unused rest of the block `at` lies in."""
        used = at % B
        if used:
            k = (B - used) // _SLOT
            self._free[k].append(at - used)
            self._some |= 1 << k

    def take(self, size: int) -> int:
        """Space in a partly used block, or 0 (never a place: everything starts at B)."""
        if size >= B:
            return 0
        need = -(-size // _SLOT)
        enough = self._some >> need
        if not enough:
            return 0
        k = need + (enough & -enough).bit_length() - 1
        blocks = self._free[k]
        at = blocks.popleft() + B - _SLOT * k
        if not blocks:
            self._some &= ~(1 << k)
        self.note(at + need * _SLOT)
        return at

    def align(self, unit: int) -> None:
        self.cur = -(-self.cur // unit) * unit


def _place(root: Node, chunk_size: int) -> int:
    """Give every node its `offset` and, for directories and links, `data_at`; returns the end of the inode area."""
    space = _Space()
    stack = [root]
    while stack:
        directory = stack.pop()
        assert directory.children is not None
        _place_tail(space, directory, _dir_size(directory))
        subdirs = []
        for child in directory.children.values():
            kind = child.mode & 0o170000
            if kind == stat.S_IFREG:
                first = first_name(child)
                if first is child:
                    count = -(-child.size // chunk_size)
                    if child.chunks is None or len(child.chunks) != count:
                        raise BuildError(f"{path_of(child)}: {len(child.chunks or [])} chunks instead of {count}")
                    need = ((_inode_size(child) + 7) & ~7) + 8 * count
                    at = space.take(need)
                    if not at:
                        at = space.cur
                        space.cur += need
                    child.offset = at
                else:
                    child.offset = first.offset
            elif kind == stat.S_IFDIR:
                subdirs.append(child)
            elif kind == stat.S_IFLNK:
                _place_tail(space, child, len(child.target))
            else:
                child.offset = space.cur
                space.cur += _inode_size(child)
            space.cur = (space.cur + 31) & ~31
        subdirs.reverse()
        stack += subdirs
    return space.cur


def _place_tail(space: _Space, node: Node, size: int) -> None:
    """A directory or symbolic link: its data behind the inode if one block can hold both (FLAT_INLINE)."""
    inode = _inode_size(node)
    tail = size % B
    if tail and inode + tail <= B:
        at = space.take(inode + tail)
        if not at:
            if B - space.cur % B < inode + tail:
                space.note(space.cur)
                space.align(B)
            at = space.cur
            space.cur += inode + tail
        if size != tail:
            space.note(space.cur)
            space.align(B)
        node.data_at = space.cur
        space.cur += size - tail
    else:
        at = space.take(inode)
        if not at:
            at = space.cur
            space.cur += inode
        space.note(space.cur)
        space.align(B)
        node.data_at = space.cur
        space.cur += size
        space.align(B)
    node.offset = at
    space.align(_SLOT)


def _is_inline(node: Node, size: int) -> bool:
    return bool(size % B) and _inode_size(node) + size % B <= B


def _inode_size(node: Node) -> int:
    return INODE_SIZE + _xattr_size(node) if node.xattrs else INODE_SIZE


def _xattr_size(node: Node) -> int:
    """Bytes of the inline attribute area (1.7)."""
    total = v6.XATTR_HEADER.size
    for name, value in (node.xattrs or {}).items():
        total += (4 + len(_xattr_suffix(name)[1]) + len(value) + 3) & ~3
    return total


def _xattr_suffix(name: bytes) -> tuple[int, bytes]:
    for index, prefix in v6.XATTR_PREFIXES.items():
        if name.startswith(prefix):
            return index, name[len(prefix) :]
    raise BuildError(f"attribute {name!r} has no place in a v6 image")


def _dir_size(directory: Node) -> int:
    """`i_size` of a directory: names packed into blocks in byte order, "." and ".." among them (1.9)."""
    children = directory.children
    assert children is not None
    need = 27 + 12 * len(children) + sum(map(len, children))
    if need <= B:
        return need
    full = used = 0
    for name in sorted([b".", b"..", *children]):
        size = 12 + len(name)
        if used + size > B:
            full += B
            used = 0
        used += size
    return full + used


# -- serialisation (5.4)


class _Inodes:
    """Writes inodes, attributes, dirents, link targets and chunk addresses into the image."""

    def __init__(self, image: bytearray, meta: int, table: ChunkTable, chunk_size: int) -> None:
        self._image = image
        self._meta = meta
        self._chunk_size = chunk_size
        self._address = table.address
        self._device = [blob.index + 1 for blob in table.blobs]

    def write(self, order: list[Node]) -> bool:
        """All nodes in G-order, so that of the names of one file the last one's attributes stay. True: some xattr."""
        has_xattr = False
        for node in order:
            kind = node.mode & 0o170000
            if kind == stat.S_IFREG:
                self._file(node)
            elif kind == stat.S_IFDIR:
                self._tail(node, _dir_size(node))
            elif kind == stat.S_IFLNK:
                self._tail(node, len(node.target))
            else:
                self._inode(node, v6.LAYOUT_FLAT_PLAIN, 0, node.rdev)
            has_xattr = has_xattr or bool(node.xattrs)
        return has_xattr

    def _inode(self, node: Node, layout: int, size: int, union: int) -> int:
        """Inode and attributes; returns where they end, in the image."""
        at = self._meta + node.offset
        icount = 0
        if node.xattrs:
            icount = (_xattr_size(node) - v6.XATTR_HEADER.size) // 4 + 1
            if icount > 0xFFFF:
                raise BuildError(f"{path_of(node)}: its extended attributes take more than 256 KiB together")
        v6.INODE_EXTENDED.pack_into(
            self._image,
            at,
            v6.FORMAT_EXTENDED | layout << 1,
            icount,
            node.mode & 0xFFFF,
            0,
            size,
            union & _U32,
            first_name(node).index,
            node.uid & _U32,
            node.gid & _U32,
            node.mtime & _U64,
            node.mtime_nsec,
            node.nlink,
        )
        at += INODE_SIZE
        return self._xattrs(node.xattrs, at) if node.xattrs else at

    def _xattrs(self, xattrs: dict[bytes, bytes], at: int) -> int:
        image = self._image
        v6.XATTR_HEADER.pack_into(image, at, 0, 0)
        at += v6.XATTR_HEADER.size
        for name, value in xattrs.items():
            index, suffix = _xattr_suffix(name)
            v6.XATTR_ENTRY.pack_into(image, at, len(suffix), index, len(value))
            at += 4
            image[at : at + len(suffix)] = suffix
            at += len(suffix)
            image[at : at + len(value)] = value
            at = (at + len(value) - self._meta + 3 & ~3) + self._meta
        return at

    def _file(self, node: Node) -> None:
        places = list(map(self._address, node.chunks or ()))
        size = node.size
        union = v6.CHUNK_FORMAT_INDEXES | _chunk_bits(places, size, self._chunk_size)
        at = self._inode(node, v6.LAYOUT_CHUNK_BASED, size, union)
        if not places:
            return
        at = (at + 7) & ~7  # inodes start on 32-byte slots, so this is the inode's own alignment
        image, pack_into, device = self._image, v6.CHUNK_ADDRESS.pack_into, self._device
        for blob, offset, index in places:
            pack_into(image, at, index & 0xFFFF, device[blob] | index >> 16 << 8, offset // B)
            at += 8

    def _tail(self, node: Node, size: int) -> None:
        data = node.target if node.children is None else self._dirents(node)
        inline = _is_inline(node, size)
        layout = v6.LAYOUT_FLAT_INLINE if inline else v6.LAYOUT_FLAT_PLAIN
        at = self._inode(node, layout, size, (node.data_at + self._meta) // B)
        body = size - size % B if inline else size
        image, start = self._image, node.data_at + self._meta
        if body:
            image[start : start + body] = data[:body]
        if inline:
            image[at : at + size - body] = data[body:]

    def _dirents(self, directory: Node) -> bytes:
        children, parent = directory.children, directory.parent
        assert children is not None and parent is not None
        entries = [
            (name, child.offset // _SLOT, _FILE_TYPES[child.mode & 0o170000]) for name, child in children.items()
        ]
        entries.append((b".", directory.offset // _SLOT, 2))
        entries.append((b"..", parent.offset // _SLOT, 2))
        entries.sort()
        blocks: list[bytes] = []
        at = 0
        while at < len(entries):
            used, end = 0, at
            while end < len(entries) and used + 12 + len(entries[end][0]) <= B:
                used += 12 + len(entries[end][0])
                end += 1
            group = entries[at:end]
            offset = 12 * len(group)
            heads = []
            for name, nid, kind in group:
                heads.append(v6.DIRENT.pack(nid, offset, kind, 0))
                offset += len(name)
            block = b"".join(heads) + b"".join([name for name, _, _ in group])
            blocks.append(block if end == len(entries) else block.ljust(B, b"\0"))
            at = end
        return b"".join(blocks)


def _chunk_bits(places: list[tuple[int, int, int]], size: int, chunk_size: int) -> int:
    """log2 of the extent size over B: larger than a chunk if the whole file is one run in its blob (1.10)."""
    extent = chunk_size
    if size > chunk_size and places:
        first, at, _ = places[0]
        for blob, offset, _ in places:
            if blob != first or offset != at:
                break
            at += chunk_size
        else:
            extent = 1 << (size - 1).bit_length()
    return min(extent.bit_length() - B.bit_length(), v6.CHUNK_FORMAT_BITS)


def _chunk_table(order: list[Node], table: ChunkTable, chunk_size: int) -> bytes:
    """One record per stored chunk, by digest; its file offset is that of the last reference (1.12)."""
    last: dict[int, int] = {}
    for node in order:
        if node.chunks:
            offset = 0
            for row in node.chunks:
                last[row] = offset
                offset += chunk_size
    # Sources may hold equal records as different rows (layers that share a blob): one record for each place.
    records = {}
    for row, offset in last.items():
        record = table.record(row, offset)
        records[record[:36] + record[72:76]] = record  # digest, blob, index
    return b"".join([record for _, record in sorted(records.items(), key=_record_order)])


def _record_order(item: tuple[bytes, bytes]) -> tuple[bytes, int, int]:
    key = item[0]
    return key[:32], int.from_bytes(key[32:36], "little"), int.from_bytes(key[36:40], "little")


def _write_blobs(image: bytearray, blobs: Sequence[BlobInfo], table: int) -> int:
    """Device slots and blob table; returns the sum of all blobs' blocks."""
    total = 0
    position = len(image)
    for blob in blobs:
        identifier = blob.id.encode()
        blocks = blob.uncompressed_size // B
        mapped = round_up(position, v6.MAPPED_ALIGNMENT) // B
        position = (mapped + blocks) * B
        total += blocks
        if blocks > _U32 or mapped > _U32:
            raise BuildError(f"blob {blob.id}: {blob.uncompressed_size} bytes are more than a device can have")
        slot = v6.DEVICE_TABLE_OFFSET + v6.DEVICE_SLOT.size * blob.index
        v6.DEVICE_SLOT.pack_into(image, slot, identifier, blocks, mapped)
        v6.BLOB_ENTRY.pack_into(
            image,
            table + v6.BLOB_ENTRY.size * blob.index,
            *v6.BlobEntry(
                blob_id=identifier,
                blob_index=blob.index,
                chunk_size=blob.chunk_size,
                chunk_count=blob.chunk_count,
                compressor=blob.compressor,
                digester=blob.digester,
                features=int(blob.features),
                compressed_size=blob.compressed_size,
                uncompressed_size=blob.uncompressed_size,
                blob_toc_size=blob.toc_size,
                ci_compressor=blob.ci_compressor,
                ci_offset=blob.ci_offset,
                ci_compressed_size=blob.ci_compressed_size,
                ci_uncompressed_size=blob.ci_uncompressed_size,
                blob_toc_digest=blob.toc_digest,
                blob_meta_digest=blob.meta_digest,
                blob_meta_size=blob.meta_size,
                cipher_iv=blob.cipher_iv,
                cipher=blob.cipher,
            ),
        )
    if total > _U32:
        raise BuildError("the blobs are together larger than an image can address (16 TiB)")
    return total
