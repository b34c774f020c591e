"""A whole bootstrap as a tree, for commands that change images. Readers of images use `reader`."""

from __future__ import annotations

from collections.abc import Callable

from bootstrap.chunktable import BlobInfo, ChunkTable
from bootstrap.errors import BuildError
from bootstrap.layout import v5, v6
from bootstrap.layout.common import BlobFeatures
from bootstrap.reader import Blob, Bootstrap, BootstrapV5, BootstrapV6
from bootstrap.tree import IMPLIED_NSEC, LinkGroup, Node, has_default_attributes

_S_IFMT, _S_IFDIR, _S_IFREG, _S_IFLNK = 0o170000, 0o040000, 0o100000, 0o120000


def blob_info(blob: Blob) -> BlobInfo:
    """The builder's view of a blob table entry."""
    return BlobInfo(
        id=blob.id,
        chunk_size=blob.chunk_size,
        compressor=blob.compressor,
        digester=blob.digester,
        features=blob.features,
        chunk_count=blob.chunk_count,
        compressed_size=blob.compressed_size,
        uncompressed_size=blob.uncompressed_size,
        toc_size=blob.toc_size,
        toc_digest=blob.toc_digest,
        ci_compressor=blob.ci_compressor,
        ci_offset=blob.ci_offset,
        ci_compressed_size=blob.ci_compressed_size,
        ci_uncompressed_size=blob.ci_uncompressed_size,
        meta_digest=blob.meta_digest,
        meta_size=blob.meta_size,
        cipher=blob.cipher,
        cipher_iv=blob.cipher_iv,
        readahead_offset=blob.readahead_offset,
        readahead_size=blob.readahead_size,
    )


def load_tree(image: Bootstrap, table: ChunkTable, blobs: list[BlobInfo]) -> Node:
    """All paths of `image`; its chunks become rows of `table`, of `blobs`, which stand for the image's blob table.

    Raises FormatError for bytes that break the format, BuildError for kinds of images that cannot be taken apart.
    """
    if any(blob.features & (BlobFeatures.TARFS | BlobFeatures.EXTERNAL) for blob in blobs):
        raise BuildError(f"{image.path}: tarfs and external blobs cannot be merged")
    if isinstance(image, BootstrapV5):
        return _LoaderV5(image, table, blobs).load()
    assert isinstance(image, BootstrapV6)
    return _LoaderV6(image, table, blobs).load()


class _Loader:
    def __init__(self, image: Bootstrap, table: ChunkTable, blobs: list[BlobInfo]) -> None:
        self._table = table
        self._places = [table.place_of(blob) for blob in blobs]
        self._where = image.path
        self._budget = image.size // v6.DIRENT.size  # no sane file has more names; overlapping directories may
        self._groups: dict[int, LinkGroup] = {}

    def _chunk(self, record: tuple[bytes, int, int, int, int, int, int, int, int, int]) -> int:
        digest, blob, flags, compressed, plain, compressed_at, plain_at, _, index, crc = record
        return self._table.add(
            digest, self._places[blob], flags, compressed, plain, compressed_at, plain_at, index, crc
        )

    def _group(self, number: int) -> LinkGroup:
        group = self._groups.get(number)
        if group is None:
            group = self._groups[number] = LinkGroup()
        return group

    def _grow(self, root: Node, ino: int, children: Callable[[Node, int], list[tuple[Node, int]]]) -> Node:
        stack = [(root, ino)]
        while stack:
            directory, at = stack.pop()
            kids = directory.children
            assert kids is not None
            found = children(directory, at)
            self._budget -= len(found)
            if self._budget < 0:
                raise BuildError(f"{self._where}: more names than fit the file, directories overlap")
            for node, below in found:
                if node.mtime_nsec == IMPLIED_NSEC and node.children is not None:
                    node.implied = has_default_attributes(node)
                if node.name in kids:
                    raise BuildError(f"{self._where}: a directory holds the name {node.name!r} twice")
                kids[node.name] = node
                if node.children is not None:
                    stack.append((node, below))
        return root


class _LoaderV6(_Loader):
    def __init__(self, image: BootstrapV6, table: ChunkTable, blobs: list[BlobInfo]) -> None:
        super().__init__(image, table, blobs)
        self._image = image
        self._records = {}
        for record in image.chunk_records():
            if record[1] < len(blobs):
                self._records[record[1], record[8], record[6]] = record
        self._chunks: dict[tuple[int, int, int], int] = {}
        self._seen: set[int] = set()

    def load(self) -> Node:
        root = self._node(b"/", self._image.root)
        self._seen.add(self._image.root)
        return self._grow(root, self._image.root, self._children)

    def _children(self, directory: Node, ino: int) -> list[tuple[Node, int]]:
        found = []
        for name, child, _, _ in self._image.list_dir(ino):
            node = self._node(name, child)
            if node.children is not None:
                if child in self._seen:
                    raise BuildError(f"{self._image.path}: directory {name!r} is reached twice")
                self._seen.add(child)
            found.append((node, child))
        return found

    def _node(self, name: bytes, ino: int) -> Node:
        image = self._image
        mode, uid, gid, size, nlink, rdev, mtime, nsec, _ = image.attr(ino)
        node = Node(name, mode)
        node.uid, node.gid, node.mtime, node.mtime_nsec = uid, gid, mtime, nsec
        node.rdev = rdev
        node.xattrs = image.xattrs(ino) or None
        kind = mode & _S_IFMT
        if kind == _S_IFREG:
            node.size = size
            node.chunks = self._file(ino)
        elif kind == _S_IFLNK:
            node.target = image.readlink(ino)
            node.size = len(node.target)
        if nlink > 1 and kind != _S_IFDIR:
            node.group = self._group(image.inode_number(ino))
        return node

    def _file(self, ino: int) -> list[int]:
        found = []
        chunks = self._chunks
        for ref in self._image.chunk_refs(ino):
            chunk = chunks.get(ref)
            if chunk is None:
                record = self._records.get(ref)
                if record is None:
                    raise BuildError(f"{self._image.path}: chunk {ref.index} of blob {ref.blob_index} has no record")
                chunk = chunks[ref] = self._chunk(record)
            found.append(chunk)
        return found


class _LoaderV5(_Loader):
    def __init__(self, image: BootstrapV5, table: ChunkTable, blobs: list[BlobInfo]) -> None:
        super().__init__(image, table, blobs)
        self._image = image
        self._chunks: dict[tuple[int, int, int], int] = {}

    def load(self) -> Node:
        return self._grow(self._node(b"/", self._image.root), self._image.root, self._children)

    def _children(self, directory: Node, index: int) -> list[tuple[Node, int]]:
        # By table slot, not by inode number: each name of a hard link has a record of its own.
        image = self._image
        first = image.node(index).child_index
        return [
            (self._node(entry.name, first + entry.cookie - 1), first + entry.cookie - 1)
            for entry in image.list_dir(index)
        ]

    def _node(self, name: bytes, index: int) -> Node:
        image = self._image
        record = image.node(index)
        node = Node(name, record.mode)
        node.uid, node.gid, node.mtime_nsec = record.uid, record.gid, record.mtime_nsec
        node.mtime = record.mtime - (1 << 64) if record.mtime >> 63 else record.mtime
        node.rdev = record.rdev
        node.linked = bool(record.flags & v5.INODE_HARDLINK)
        if record.flags & v5.INODE_XATTR:
            node.xattrs = image.xattrs(index) or None
        kind = record.mode & _S_IFMT
        if kind == _S_IFREG:
            node.size = record.size
            node.chunks = self._file(index)
        elif kind == _S_IFLNK:
            node.target = image.readlink(index)
            node.size = len(node.target)
        if kind != _S_IFDIR and (record.nlink > 1 or node.linked):
            node.group = self._group(record.ino)
        return node

    def _file(self, index: int) -> list[int]:
        found = []
        chunks = self._chunks
        for record in self._image.file_records(index):
            if record[1] >= len(self._places):
                raise BuildError(f"{self._image.path}: a chunk refers to blob {record[1]} of {len(self._places)}")
            key = (record[1], record[8], record[6])
            chunk = chunks.get(key)
            if chunk is None:
                chunk = chunks[key] = self._chunk(record)
            found.append(chunk)
        return found
