"""Writes a RAFS v6 bootstrap: an EROFS image with the chunk and blob tables. Reference: RAFS format 1 and 5.2 - 5.4.

The placement is upstream's to the byte (`place_v6`): same tree, same file. Inodes, chunk addresses and dirents are made
as tables and scattered into the image.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from bootstrap.errors import BuildError
from bootstrap.flat import FlatTree, Ints, last_of, ragged
from bootstrap.layout import tarfs, v6
from bootstrap.layout.common import MAX_BLOBS, BlobFeatures, SuperFlags, round_up
from bootstrap.layout.tables import V6_DIRENT, V6_INODE
from bootstrap.place_v6 import DIRENT_SIZE, INODE_SIZE, SLOT, Placement, dots, listing, place

B = v6.BLOCK_SIZE
_U32 = 0xFFFFFFFF
_AT_ONCE = 1 << 16  # rows


FILE_TYPES = np.zeros(16, np.uint8)
for _kind, _number in (
    (stat.S_IFREG, 1),
    (stat.S_IFDIR, 2),
    (stat.S_IFCHR, 3),
    (stat.S_IFBLK, 4),
    (stat.S_IFIFO, 5),
    (stat.S_IFSOCK, 6),
    (stat.S_IFLNK, 7),
):
    FILE_TYPES[_kind >> 12] = _number


def write_v6(tree: FlatTree, *, chunk_size: int, flags: SuperFlags, prefetch: Sequence[bytes]) -> bytearray:
    """The whole bootstrap of a tree in G-order; its `blobs` become the blob table.

    `flags`: compressor, digester, cipher, EXPLICIT_UIDGID and TARFS (blocks of 512 bytes); HAS_XATTR and
    INLINED_CHUNK_DIGEST are derived. `prefetch`: absolute paths for the prefetch table. Raises BuildError for what v6
    cannot hold, naming the path.
    """
    if len(tree.blobs) >= MAX_BLOBS:
        raise BuildError(f"{len(tree.blobs)} data blobs; an image can have at most {MAX_BLOBS - 1}")
    return _Writer(tree, chunk_size, flags).write(prefetch)


class TreeWriter:
    """What every EROFS image of a tree needs, whatever its tables: inodes, attributes, addresses, directories."""

    def __init__(self, tree: FlatTree, chunk_size: int, flags: SuperFlags) -> None:
        if len(tree.names) > v6.MAX_INO:
            raise BuildError(f"{len(tree.names)} files are more than an image can hold")
        self._tree = tree
        self._chunk_size = chunk_size
        self._flags = flags
        self._block = tarfs.BLOCK_SIZE if flags & SuperFlags.TARFS else B
        self._first_names, self._nlink = tree.links()
        self._xattrs = [pack_xattrs(xattrs) for xattrs in tree.xattrs]
        sizes = np.array([len(packed) for packed in self._xattrs], np.int64)
        self._place: Placement = place(tree, self._first_names, sizes, chunk_size, self._block)

    # -- inodes, attributes, chunk addresses, link targets

    def _write_inodes(self, image: bytearray, meta: int, rows: Ints, within: Ints, refs: Ints) -> None:
        """Of the names of one regular file, which share an inode, the last one's attributes stay."""
        tree, where = self._tree, self._place
        inodes, kinds = tree.inodes, tree.kinds()
        flat = (kinds == stat.S_IFDIR) | (kinds == stat.S_IFLNK)
        regular = kinds == stat.S_IFREG
        layout = np.where(flat & where.inline, v6.LAYOUT_FLAT_INLINE, v6.LAYOUT_FLAT_PLAIN)
        layout[regular] = v6.LAYOUT_CHUNK_BASED
        made = np.zeros(len(inodes), V6_INODE)
        made["format"] = v6.FORMAT_EXTENDED | layout << 1
        made["mode"] = inodes["mode"]
        made["size"] = where.sizes
        made["union"] = np.where(flat, (where.data + meta) // self._block, inodes["rdev"])
        made["union"][regular] = v6.CHUNK_FORMAT_INDEXES | self._extent_bits(rows, within, refs)[regular]
        made["ino"] = self._first_names + 1
        made["nlink"] = self._nlink
        for field in ("uid", "gid", "mtime", "mtime_nsec"):
            made[field] = inodes[field]
        with_xattrs = np.flatnonzero(inodes["xattrs"] >= 0)
        icounts = (where.heads[with_xattrs] - INODE_SIZE - v6.XATTR_HEADER.size) // 4 + 1
        if (large := np.flatnonzero(icounts > 0xFFFF)).size:
            path = tree.path(int(with_xattrs[large[0]]))
            raise BuildError(f"{path}: its extended attributes take more than 256 KiB together")
        made["xattr_icount"][with_xattrs] = icounts

        last = last_of(self._first_names, len(inodes))
        own = np.flatnonzero(~regular | (last[self._first_names] == np.arange(len(inodes))))
        slots = np.frombuffer(image, "V32")
        for part in _parts(own):
            halves = made[part].view("V32").reshape(-1, 2)
            at = (where.offsets[part] + meta) // SLOT
            slots[at], slots[at + 1] = halves[:, 0], halves[:, 1]

        packed = self._xattrs
        areas = (where.offsets[with_xattrs] + (meta + INODE_SIZE)).tolist()
        for offset, number in zip(areas, inodes["xattrs"][with_xattrs].tolist(), strict=True):
            image[offset : offset + len(packed[number])] = packed[number]

        addresses = np.frombuffer(image, "<u8")
        place = (where.offsets[rows] + meta + (where.heads[rows] + 7 & ~7)) // 8 + within
        index = tree.chunks["index"][refs].astype(np.uint64)
        addresses[place] = (
            (index & np.uint64(0xFFFF))
            | (tree.chunks["blob"][refs].astype(np.uint64) + np.uint64(1)) << np.uint64(16)
            | (index >> np.uint64(16)) << np.uint64(24)
            | (tree.chunks["uncompressed_offset"][refs] // np.uint64(self._block)) << np.uint64(32)
        )
        del slots, addresses

        links = np.flatnonzero(kinds == stat.S_IFLNK)
        bodies = tree.targets
        for row, number in zip(links.tolist(), inodes["first"][links].tolist(), strict=True):
            self._put(image, meta, row, bodies[number])

    def _extent_bits(self, rows: Ints, within: Ints, refs: Ints) -> Ints:
        """By row: log2 of the extent size over B, more than a chunk if the whole file is one run in its blob (1.10)."""
        block_bits = self._block.bit_length()
        found = np.full(len(self._tree.inodes), self._chunk_size.bit_length() - block_bits)
        follows = np.flatnonzero(within > 0)
        if len(follows):
            blob = self._tree.chunks["blob"][refs]
            at = self._tree.chunks["uncompressed_offset"][refs].astype(np.int64)
            run = np.zeros(len(found), bool)
            run[rows[follows]] = True
            apart = (blob[follows] != blob[follows - 1]) | (at[follows] != at[follows - 1] + self._chunk_size)
            run[rows[follows[apart]]] = False
            long = np.flatnonzero(run)
            sizes = self._tree.inodes["size"][long]
            found[long] = np.frexp(sizes - 1)[1] + 1 - block_bits
        return found.clip(max=v6.CHUNK_FORMAT_BITS)

    def _put(self, image: bytearray, meta: int, row: int, data: bytes) -> None:
        """Dirents or a link target: full blocks at their place, the rest there too or behind the inode."""
        where = self._place
        body = len(data)
        if where.inline[row]:
            body -= body % self._block
            at = int(where.offsets[row]) + meta + int(where.heads[row])
            image[at : at + len(data) - body] = data[body:]
        if body:
            at = int(where.data[row]) + meta
            image[at : at + body] = data[:body]

    # -- directories

    def _write_directories(self, image: bytearray, meta: int) -> None:
        """Those of one block all at once, the others block by block."""
        tree, where, names = self._tree, self._place, self._tree.names
        nids = where.offsets // SLOT
        types = FILE_TYPES[tree.kinds() >> 12]
        parents = tree.parents()
        directories = tree.directories()
        first = tree.inodes["first"]
        count = tree.inodes["count"].astype(np.int64)
        usual: list[int] = []
        rest: list[int] = []
        for row, begin, number in zip(
            directories.tolist(), first[directories].tolist(), count[directories].tolist(), strict=True
        ):
            odd = row in where.splits or dots(names, begin, begin + number) != (0, 0)
            (rest if odd else usual).append(row)
        rows = np.array(usual, np.int64)
        totals = count[rows] + 2
        within = ragged(totals)
        child = np.repeat(first[rows] - 2, totals) + within
        own, up = within == 0, within == 1
        child[own], child[up] = rows, parents[rows]
        lengths = np.fromiter(map(len, names), np.int64, len(names))[child]
        lengths[own], lengths[up] = 1, 2
        dirents = np.zeros(len(child), V6_DIRENT)
        dirents["nid"], dirents["type"] = nids[child], types[child]
        ends = np.cumsum(lengths)
        starts = np.cumsum(totals) - totals
        before = (ends - lengths)[starts]  # of all names of the directories before
        dirents["nameoff"] = ends - lengths + np.repeat(totals * DIRENT_SIZE - before, totals)
        heads = dirents.tobytes()
        at = 0
        begins, counts = first[rows].tolist(), count[rows].tolist()
        for row, begin, number in zip(usual, begins, counts, strict=True):
            size = (number + 2) * DIRENT_SIZE
            text = b"".join(names[begin : begin + number])
            self._put(image, meta, row, b"".join((heads[at : at + size], b"...", text)))
            at += size
        for row in rest:
            begin = int(first[row])
            end = begin + int(count[row])
            one, two = dots(names, begin, end)
            child = np.insert(np.arange(begin, end), (one, two), (row, parents[row]))
            splits = where.splits.get(row, [0, len(child)])
            stored = listing(names, begin, end)
            self._put(image, meta, row, dirent_blocks(stored, nids[child], types[child], splits, self._block))


class _Writer(TreeWriter):
    """A RAFS v6 bootstrap: the image with blob and chunk tables."""

    def write(self, prefetch: Sequence[bytes]) -> bytearray:
        tree, blobs = self._tree, self._tree.blobs
        targets = tree.prefetch_targets(prefetch) if blobs else []
        table = round_up(v6.DEVICE_TABLE_OFFSET + v6.DEVICE_SLOT.size * len(blobs), B)
        table_size = v6.BLOB_ENTRY.size * len(blobs)
        meta = round_up(table + table_size + v6.NID.size * len(targets), B) if blobs else 0
        chunk_table = round_up(meta + self._place.end, B)
        rows, within, refs = tree.file_refs()
        stored = _stored_chunks(tree, refs, bool(self._flags & SuperFlags.TARFS))
        chunk_table_size = tree.chunks.dtype.itemsize * len(stored)
        image = bytearray(max(round_up(chunk_table + chunk_table_size, B), v6.MIN_FILE_SIZE))
        records = np.frombuffer(image, tree.chunks.dtype, len(stored), chunk_table)
        for begin, part in enumerate(_parts(stored)):
            records[begin * _AT_ONCE :][: len(part)] = tree.chunks[part]
        del records, stored
        self._write_inodes(image, meta, rows, within, refs)
        self._write_directories(image, meta)
        if targets:
            nids = self._place.offsets[targets] // SLOT
            image[table + table_size : table + table_size + 4 * len(targets)] = nids.astype("<u4").tobytes()
        blocks = self._write_blobs(image, table)
        flags = self._flags
        if (tree.inodes["xattrs"] >= 0).any():
            flags |= SuperFlags.HAS_XATTR
        if all(blob.features & BlobFeatures.INLINED_CHUNK_DIGEST for blob in blobs):
            flags |= SuperFlags.INLINED_CHUNK_DIGEST
        v6.SUPERBLOCK.pack_into(
            image,
            v6.SUPER_OFFSET,
            *v6.Superblock(
                blkszbits=self._block.bit_length() - 1,
                inos=len(tree.names),
                blocks=blocks,
                meta_blkaddr=meta // self._block,
                extra_devices=len(blobs),
            ),
        )
        v6.EXT_SUPERBLOCK.pack_into(
            image,
            v6.EXT_SUPER_OFFSET,
            *v6.ExtSuperblock(
                flags=int(flags),
                blob_table_offset=table,
                blob_table_size=table_size,
                chunk_size=self._chunk_size,
                chunk_table_offset=chunk_table,
                chunk_table_size=chunk_table_size,
                prefetch_table_offset=table + table_size if targets else 0,
                prefetch_table_size=4 * len(targets),
            ),
        )
        return image

    # -- tables

    def _write_blobs(self, image: bytearray, table: int) -> int:
        """Device slots and blob table; returns the sum of all blobs' blocks."""
        total = 0
        position = len(image)
        for index, blob in enumerate(self._tree.blobs):
            identifier = blob.id.encode()
            blocks = blob.uncompressed_size // self._block
            mapped = round_up(position, v6.MAPPED_ALIGNMENT) // self._block
            position = (mapped + blocks) * self._block
            total += blocks
            if blocks > _U32 or mapped > _U32:
                raise BuildError(f"blob {blob.id}: {blob.uncompressed_size} bytes are more than a device can have")
            slot = v6.DEVICE_TABLE_OFFSET + v6.DEVICE_SLOT.size * index
            v6.DEVICE_SLOT.pack_into(image, slot, identifier, blocks, mapped)
            v6.BLOB_ENTRY.pack_into(
                image,
                table + v6.BLOB_ENTRY.size * index,
                *v6.BlobEntry(
                    blob_id=identifier,
                    blob_index=index,
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


def dirent_blocks(names: list[bytes], nids: Ints, types: Ints, splits: list[int], block: int) -> bytes:
    lengths = np.fromiter(map(len, names), np.int64, len(names))
    parts: list[bytes] = []
    for start, end in pairwise(splits):
        dirents = np.zeros(end - start, V6_DIRENT)
        dirents["nid"], dirents["type"] = nids[start:end], types[start:end]
        spans = lengths[start:end]
        dirents["nameoff"] = len(dirents) * DIRENT_SIZE + np.cumsum(spans) - spans
        made = dirents.tobytes() + b"".join(names[start:end])
        parts.append(made if end == len(names) else made.ljust(block, b"\0"))
    return b"".join(parts)


def pack_xattrs(xattrs: dict[bytes, bytes]) -> bytes:
    """The inline attribute area (1.7)."""
    packed = bytearray(v6.XATTR_HEADER.pack(0, 0))
    for name, value in xattrs.items():
        index, suffix = _xattr_suffix(name)
        packed += v6.XATTR_ENTRY.pack(len(suffix), index, len(value)) + suffix + value
        packed += bytes(-len(packed) % 4)
    return bytes(packed)


def _xattr_suffix(name: bytes) -> tuple[int, bytes]:
    for index, prefix in v6.XATTR_PREFIXES.items():
        if name.startswith(prefix):
            return index, name[len(prefix) :]
    raise BuildError(f"attribute {name!r} has no place in a v6 image")


def _parts(rows: Ints) -> Iterator[Ints]:
    """`rows` in pieces, so that what is made of them at once stays small."""
    for begin in range(0, len(rows), _AT_ONCE):
        yield rows[begin : begin + _AT_ONCE]


def _stored_chunks(tree: FlatTree, refs: Ints, tarfs: bool) -> Ints:
    """Rows of the chunk table: one record per stored chunk, by digest (1.12).

    Layers that share a blob bring records of the same place in it: the one referred to last is kept. Tarfs has no
    digests and one record per blob.
    """
    last = last_of(refs, len(tree.chunks))
    used = np.flatnonzero(last >= 0)
    index = np.zeros(len(used), np.uint32) if tarfs else tree.chunks["index"][used]
    blob = tree.chunks["blob"][used]
    digest = np.ascontiguousarray(tree.chunks["digest"][used]).view(">u8").reshape(-1, 4)
    order = np.argsort(digest[:, 0], kind="stable")
    equal = digest[order[1:], 0] == digest[order[:-1], 0]
    if equal.any():  # as for all content that several layers have
        tied = np.concatenate((equal, [False])) | np.concatenate(([False], equal))
        rows = order[tied]
        keys = (last[used[rows]], index[rows], blob[rows], *(digest[rows, word] for word in (3, 2, 1, 0)))
        rows = rows[np.lexsort(keys)]
        order[tied] = rows
        after, before = order[1:], order[:-1]
        same = (digest[after] == digest[before]).all(axis=1)
        same &= (index[after] == index[before]) & (blob[after] == blob[before])
        order = order[~np.concatenate((same, [False]))]
    return used[order]
