"""Everything about a bootstrap that can be judged without its data. Reference: RAFS format 3 and 10.

The readers refuse what would be dangerous to serve; here all promises of the format are held against the file. The
first broken one ends the check with FormatError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

from bootstrap.base import S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, Attr, Blob, Bootstrap
from bootstrap.chunkmap import Chunk, ChunkMap, iter_chunks
from bootstrap.digest import EMPTY, digest, hasher
from bootstrap.errors import FormatError
from bootstrap.layout import v5, v6
from bootstrap.layout.common import MAX_NAME, BlobFeatures, ChunkFlags, SuperFlags, round_up
from bootstrap.reader_v5 import BootstrapV5
from bootstrap.reader_v6 import BootstrapV6

_NO_PLACE = BlobFeatures.ZRAN | BlobFeatures.BATCH | BlobFeatures.EXTERNAL | BlobFeatures.IS_CHUNKDICT_GENERATED
"""Blobs whose records do not tell where the stored bytes are."""


def check_bootstrap(image: Bootstrap) -> int:
    """Check the whole tree and its chunks; the number of paths. Raises FormatError at the first flaw."""
    chunks = ChunkMap.open(image, None)
    try:
        for blob in image.blobs:
            if blob.features & BlobFeatures.TARFS:
                continue  # it has no chunks but the addresses of its files
            _check_places(blob, list(iter_chunks(chunks, blob.index)))
        if isinstance(image, BootstrapV5):
            return _CheckV5(image, chunks).run()
        assert isinstance(image, BootstrapV6)
        return _CheckV6(image, chunks).run()
    finally:
        chunks.close()


def _check_places(blob: Blob, chunks: list[Chunk]) -> None:
    """Stored chunks lie inside the blob's data, do not overlap, and come in the order of their numbers.

    `chunks` in the order of their uncompressed places, which do not overlap: `ChunkMap` saw to that.
    """
    last = -1
    for chunk in chunks:
        what = f"chunk {chunk.index} of blob {blob.id}"
        if blob.features & BlobFeatures.ALIGNED and chunk.uncompressed_offset % v6.BLOCK_SIZE:
            raise FormatError("chunk record", 0, f"{what} starts at {chunk.uncompressed_offset:#x}, inside a block")
        if chunk.index <= last and not blob.features & BlobFeatures.EXTERNAL:
            raise FormatError("chunk record", 0, f"{what} lies behind chunk {last} uncompressed")
        last = chunk.index
    if blob.features & _NO_PLACE:
        return
    end, last = 0, -1
    for chunk in sorted(chunks, key=lambda c: c.compressed_offset):
        what = f"chunk {chunk.index} of blob {blob.id}"
        if chunk.compressed_offset < end:
            raise FormatError("chunk record", 0, f"{what} overlaps the one before it in the blob")
        end = chunk.compressed_offset + chunk.compressed_size
        if blob.data_size and end > blob.data_size:
            raise FormatError("chunk record", 0, f"{what} ends at {end}, behind the data of {blob.data_size} bytes")
        if chunk.index <= last:
            raise FormatError("chunk record", 0, f"{what} lies behind chunk {last}")
        last = chunk.index
        plain = not chunk.flags & (ChunkFlags.COMPRESSED | ChunkFlags.ENCRYPTED)
        if plain and chunk.compressed_size != chunk.uncompressed_size:
            raise FormatError("chunk record", 0, f"{what} is stored plain but with two sizes")


class _Check:
    """What both versions promise: names, types, link counts, chunks of files."""

    def __init__(self, image: Bootstrap, chunks: ChunkMap) -> None:
        self.image = image
        self.chunks = chunks
        self.tarfs = bool(image.flags & SuperFlags.TARFS)
        # The one file of a generated dictionary is a list of chunks, whatever their sizes (5.11).
        flags = [blob.features & BlobFeatures.IS_CHUNKDICT_GENERATED for blob in image.blobs]
        self.dictionary = bool(flags) and all(flags) and image.inode_count == 2
        self.left = image.size
        self.names_of: dict[int, int] = {}
        self.links: dict[int, tuple[int, str]] = {}

    def take(self, size: int) -> None:
        """Account for the bytes of one more inode: overlapping ones must not make a check take quadratic time."""
        self.left -= size
        if self.left < 0:
            raise FormatError("inode", 0, "more inodes than fit the file: they overlap")

    def count_name(self, number: int, attr: Attr, path: str) -> None:
        """One more name of the file with this builder's inode number."""
        self.names_of[number] = self.names_of.get(number, 0) + 1
        self.links.setdefault(number, (attr.nlink, path))

    def check_links(self) -> None:
        for number, (nlink, path) in self.links.items():
            if self.names_of[number] != nlink:
                raise FormatError("inode", 0, f"{path}: link count {nlink}, but {self.names_of[number]} names")

    def check_file(self, ino: int, attr: Attr, path: str) -> None:
        """Every chunk of a file exists, at the place the file says and of the size its part needs."""
        refs = self.image.chunk_refs(ino)
        chunk_size = self.image.chunk_size
        if self.tarfs:  # there the file's own addresses are all there is (1.13)
            for number, ref in enumerate(refs):
                size = min(chunk_size, attr.size - number * chunk_size)
                if ref.uncompressed_offset + size > self.image.blobs[ref.blob_index].compressed_size:
                    raise FormatError("inode", 0, f"{path}: part {number} lies behind the end of the tar")
            return
        any_size = self.dictionary or (isinstance(self.image, BootstrapV5) and self.image.has_holes(ino))
        for number, ref in enumerate(refs):
            try:
                chunk = self.chunks.chunk(self.chunks.find(ref.blob_index, ref.uncompressed_offset))
            except KeyError:
                chunk = None
            if chunk is None or (chunk.index, chunk.uncompressed_offset) != (ref.chunk_index, ref.uncompressed_offset):
                raise FormatError(
                    "inode", 0, f"{path}: chunk {ref.chunk_index} of blob {ref.blob_index} is in no table"
                )
            size = min(chunk_size, attr.size - number * chunk_size)
            if chunk.uncompressed_size != size and not any_size:
                raise FormatError(
                    "inode", 0, f"{path}: part {number} has {size} bytes, its chunk {chunk.uncompressed_size}"
                )

    def check_order(self, names: list[bytes], path: str) -> None:
        """Names are sorted by their bytes, unique and usable."""
        for first, second in pairwise(names):
            if first >= second:
                raise FormatError("directory", 0, f"{path}: {second!r} comes behind {first!r}")
        for name in names:
            if not name or len(name) > MAX_NAME or b"/" in name or b"\0" in name:
                raise FormatError("directory", 0, f"{path}: name {name!r}")


def _text(path: bytes) -> str:
    return repr("/" + os.fsdecode(path))


class _CheckV6(_Check):
    image: BootstrapV6

    def run(self) -> int:
        self._check_layout()
        image = self.image
        self._spans: dict[int, tuple[int, str]] = {}
        paths = 1
        root = image.attr(image.root)
        self._check_inode(image.root, root, b"")
        self._check_directory(image.root, image.root, root, b"")
        parents = {b"": image.root}
        for path, entry in image.walk():
            paths += 1
            attr = image.attr(entry.ino)
            if attr.mode >> 12 != entry.dtype:
                raise FormatError("dirent", 0, f"{_text(path)}: file type {entry.dtype} for mode {attr.mode:#o}")
            self._check_inode(entry.ino, attr, path)
            if attr.mode & S_IFMT == S_IFDIR:
                parents[path] = entry.ino
                self._check_directory(entry.ino, parents[path.rpartition(b"/")[0]], attr, path)
            else:
                self.count_name(image.inode_number(entry.ino), attr, _text(path))
        self.check_links()
        for (start, (end, first)), (second_start, (_, second)) in pairwise(sorted(self._spans.items())):
            if end > second_start:
                raise FormatError("inode", start, f"those of {first} and {second} overlap")
        for ino in image.prefetch_inodes():
            if image.inode_offset(ino) not in self._spans:
                raise FormatError("prefetch table", image.ext.prefetch_table_offset, f"inode {ino} has no name")
        return paths

    def _check_layout(self) -> None:
        """The places that follow from the number of blobs and chunks (chapter 1)."""
        image, ext, sb = self.image, self.image.ext, self.image.superblock
        count = len(image.blobs)
        table = round_up(v6.DEVICE_TABLE_OFFSET + v6.DEVICE_SLOT.size * count, v6.BLOCK_SIZE)
        meta = round_up(table + v6.BLOB_ENTRY.size * count + ext.prefetch_table_size, v6.BLOCK_SIZE) if count else 0
        if image.size < v6.MIN_FILE_SIZE:
            raise FormatError("bootstrap", 0, f"{image.size} bytes: readers want at least {v6.MIN_FILE_SIZE}")
        if image.root != v6.ROOT_NID:
            raise FormatError("v6 superblock", v6.SUPER_OFFSET + 14, f"root inode {image.root} instead of 128")
        if image.size % v6.BLOCK_SIZE:
            raise FormatError("bootstrap", image.size, f"{image.size} bytes are not whole blocks of {v6.BLOCK_SIZE}")
        if sb.xattr_blkaddr:
            raise FormatError("v6 superblock", v6.SUPER_OFFSET + 44, f"shared xattrs in block {sb.xattr_blkaddr}")
        behind = table + v6.BLOB_ENTRY.size * count
        if ext.prefetch_table_size and ext.prefetch_table_offset != behind:
            raise FormatError(
                "v6 extended superblock",
                v6.EXT_SUPER_OFFSET + 40,
                f"prefetch table at {ext.prefetch_table_offset:#x} instead of {behind:#x}",
            )
        if ext.blob_table_offset != table:
            raise FormatError(
                "v6 extended superblock", v6.EXT_SUPER_OFFSET + 8, f"blob table at {ext.blob_table_offset:#x}"
            )
        if image.inode_offset(0) != meta:
            raise FormatError("v6 superblock", v6.SUPER_OFFSET + 40, f"inodes from {image.inode_offset(0):#x} on")
        if sb.xattr_blkaddr:
            raise FormatError("v6 superblock", v6.SUPER_OFFSET + 44, "shared xattrs, which no RAFS image has")
        chunks = ext.chunk_table_offset + ext.chunk_table_size
        if ext.chunk_table_size and round_up(chunks, v6.BLOCK_SIZE) != image.size:
            raise FormatError("bootstrap", chunks, f"{image.size} bytes, but the last table ends at {chunks:#x}")
        blocks = sum(blob.uncompressed_size // image.block_size for blob in image.blobs)
        if sb.blocks not in (blocks, 4096):  # the constant of 2022
            raise FormatError("v6 superblock", v6.SUPER_OFFSET + 36, f"{sb.blocks} blocks instead of {blocks}")
        for blob in image.blobs:
            at = v6.DEVICE_TABLE_OFFSET + blob.index * v6.DEVICE_SLOT.size
            slot = v6.DEVICE_SLOT.unpack_from(image.data, at)
            if slot[1] != blob.uncompressed_size // image.block_size:
                raise FormatError("device slot", at + 64, f"{slot[1]} blocks for {blob.uncompressed_size} bytes")
            aligned = bool(blob.features & BlobFeatures.ALIGNED)
            special = blob.features & (BlobFeatures.EXTERNAL | BlobFeatures.IS_CHUNKDICT_GENERATED)
            if not special and aligned == bool(blob.features & BlobFeatures.TARFS):
                raise FormatError("blob table", ext.blob_table_offset, f"features {blob.features:#x} of {blob.id}")

    def _check_inode(self, ino: int, attr: Attr, path: bytes) -> None:
        """Its own bytes, attributes and content; remembers the span it takes up."""
        image = self.image
        start = image.inode_offset(ino)
        end = start + image.inode_span(ino)
        limit = image.ext.chunk_table_offset if image.ext.chunk_table_size else image.size
        if start < image.inode_offset(image.root) or end > limit:
            raise FormatError("inode", start, f"that of {_text(path)} lies outside the inode area")
        if start in self._spans:  # one more name of it
            if attr.mode & S_IFMT != S_IFREG:
                raise FormatError("inode", start, f"{_text(path)} shares that of {self._spans[start][1]}")
            return
        self._spans[start] = (end, _text(path))
        self.take(end - start)
        if image.xattrs(ino) and not image.flags & SuperFlags.HAS_XATTR:
            raise FormatError("inode", start, f"{_text(path)} has attributes, but the superblock says none has any")
        if attr.mode & S_IFMT == S_IFREG:
            self.check_file(ino, attr, _text(path))
        elif attr.mode & S_IFMT == S_IFLNK:
            image.readlink(ino)

    def _check_directory(self, ino: int, parent: int, attr: Attr, path: bytes) -> None:
        entries = list(self.image.raw_entries(ino))
        if not any(blob.features & BlobFeatures.IS_CHUNKDICT_GENERATED for blob in self.image.blobs):
            self.check_order([name for name, _, _ in entries], _text(path))
        found = {name: nid for name, nid, _ in entries if name in (b".", b"..")}
        if found != {b".": ino, b"..": parent}:
            raise FormatError("directory", self.image.inode_offset(ino), f'{_text(path)}: "." and ".." lead to {found}')
        directories = sum(1 for _, _, kind in entries if kind == v6.DT_TO_FILE_TYPE[4])
        if attr.nlink != directories:  # "." and ".." are among them
            raise FormatError(
                "inode",
                self.image.inode_offset(ino),
                f"{_text(path)}: link count {attr.nlink} with {directories - 2} directories inside",
            )


class _CheckV5(_Check):
    image: BootstrapV5

    def run(self) -> int:
        image = self.image
        count = image.node_count()
        root = image.node(v5.ROOT_INO)
        if root.ino != v5.ROOT_INO or root.parent:
            raise FormatError("v5 root inode", 0, f"number {root.ino}, parent {root.parent}")
        reached = bytearray(count + 1)
        reached[v5.ROOT_INO] = 1
        for path, first, children in self._directories():
            for index in range(first, first + children):
                if reached[index]:
                    raise FormatError("inode", 0, f"slot {index} is a child of {_text(path)} and of another directory")
                reached[index] = 1
        missing = reached.find(0, 1)
        if missing > 0:
            raise FormatError("inode table", image.superblock.inode_table_offset, f"inode {missing} is in no directory")
        self.check_links()
        image.prefetch_inodes()
        return count

    def _directories(self) -> Iterator[tuple[bytes, int, int]]:
        """All directories that have children, checked with them; parents first."""
        image = self.image
        stack = [(b"", v5.ROOT_INO)]
        budget = image.node_count()
        while stack:
            path, ino = stack.pop()
            node = image.node(ino)
            if sum(1 for _ in image.list_dir(ino)) != node.child_count:
                raise FormatError("inode", 0, f"{_text(path)}: children are missing")
            budget -= node.child_count
            if budget < 0:
                raise FormatError("inode", 0, f"{_text(path)}: more children than inodes")
            prefix = path + b"/" if path else b""
            names = []
            subdirectories = 0
            own = hasher(image.digester)
            for index in range(node.child_index, node.child_index + node.child_count):
                name = image.node_name(index)
                child = image.node(index)
                names.append(name)
                own.update(child.digest)
                if child.parent != ino:
                    raise FormatError("inode", 0, f"{_text(prefix + name)}: parent {child.parent} instead of {ino}")
                if child.ino <= ino and child.mode & S_IFMT != S_IFREG:  # readers want the parent first (2.6)
                    raise FormatError("inode", 0, f"{_text(prefix + name)}: number {child.ino} in directory {ino}")
                if child.mode & S_IFMT == S_IFDIR:
                    subdirectories += 1
                    if child.ino != index:
                        raise FormatError("inode", 0, f"{_text(prefix + name)}: directory {child.ino} in slot {index}")
                    stack.append((prefix + name, index))
                else:
                    self._check_node(index, child, prefix + name)
            self.check_order(names, _text(path))
            image.xattrs(ino)
            if node.digest != own.digest():
                raise FormatError("inode", 0, f"{_text(path)}: its digest is wrong")
            if node.nlink != 2 + subdirectories:
                raise FormatError(
                    "inode", 0, f"{_text(path)}: link count {node.nlink} with {subdirectories} directories inside"
                )
            yield path, node.child_index, node.child_count

    def _check_node(self, index: int, node: v5.Inode, path: bytes) -> None:
        """Attributes, content and digest of one record that is no directory."""
        image = self.image
        self.take(image.record_span(index))
        image.xattrs(index)
        kind = node.mode & S_IFMT
        if kind == S_IFREG:
            self.check_file(index, image.attr(index), _text(path))
            own = hasher(image.digester)
            for record in image.file_records(index):
                own.update(record[0])
            expected = own.digest()
        elif kind == S_IFLNK:
            expected = digest(image.digester, image.readlink(index))
        else:
            expected = EMPTY[image.digester]
        if node.digest != expected:
            raise FormatError("inode", 0, f"{_text(path)}: its digest is wrong")
        self.count_name(node.ino, image.attr(index), _text(path))
