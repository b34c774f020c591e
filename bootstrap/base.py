"""The one view of a bootstrap that v5 and v6 readers share. Import from `bootstrap.reader`.

A reader holds the mapped file and a handful of numbers: everything about an inode is decoded from the map when asked
for, so opening costs the same for ten files as for a million and nothing is kept per inode.
"""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bootstrap.errors import FormatError
from bootstrap.layout.common import BlobFeatures, Compressor, Digester, SuperFlags

S_IFMT = 0o170000
S_IFDIR = 0o040000
S_IFREG = 0o100000
S_IFLNK = 0o120000
S_IFCHR = 0o020000
S_IFBLK = 0o060000
FILE_TYPES = frozenset({0o010000, S_IFCHR, S_IFDIR, S_IFBLK, S_IFREG, S_IFLNK, 0o140000})
DEVICE_TYPES = frozenset({S_IFCHR, S_IFBLK})
MAX_NSEC = 999_999_999


class Attr(NamedTuple):
    """What stat shows. `mode` has the type bits; `rdev` is in Linux' 32-bit encoding, 0 unless a device;
    `mtime` may be negative; `blocks` in 512-byte units."""

    mode: int
    uid: int
    gid: int
    size: int
    nlink: int
    rdev: int
    mtime: int
    mtime_nsec: int
    blocks: int


class DirEntry(NamedTuple):
    """One name in a directory. `dtype` is DT_* of readdir; `cookie` makes `list_dir` go on behind this entry."""

    name: bytes
    ino: int
    dtype: int
    cookie: int


HOLE = -1
"""`blob_index` of an extent that no chunk holds: zeros."""


class Extent(NamedTuple):
    """A piece of a file inside one chunk, or a `HOLE`. `blob_offset` counts in the *uncompressed* blob."""

    blob_index: int
    blob_offset: int
    size: int
    file_offset: int


class ChunkRef(NamedTuple):
    """A file's reference to a chunk: which blob, which chunk of it, where that chunk starts uncompressed."""

    blob_index: int
    chunk_index: int
    uncompressed_offset: int


class Chunk(NamedTuple):
    """A CHUNK_RECORD (reference 1.12). Sizes and offsets in bytes, `flags` are ChunkFlags.

    The compressed place is that of the chunk alone: 0 for members of a batch, which only their blob meta locates.
    """

    digest: bytes
    blob_index: int
    flags: int
    compressed_size: int
    uncompressed_size: int
    compressed_offset: int
    uncompressed_offset: int
    file_offset: int
    index: int  # type: ignore[assignment]  # the name the format gives it; nobody needs tuple.index
    crc32: int


@dataclass(frozen=True, slots=True)
class Blob:
    """An entry of the blob table. All sizes in bytes; `data_size` is the chunk data at the head of the stored blob.

    `ci_*` locate the blob meta (v6), `readahead_*` is the blob prefetch range (v5 only). For encrypted blobs
    `meta_digest` is the key and `meta_size` with `cipher_iv` the IV (reference 1.4).
    """

    index: int
    id: str
    chunk_size: int
    chunk_count: int
    compressor: Compressor
    digester: Digester
    features: BlobFeatures
    compressed_size: int
    uncompressed_size: int
    data_size: int
    toc_size: int = 0
    toc_digest: bytes = bytes(32)
    ci_compressor: int = 0
    ci_offset: int = 0
    ci_compressed_size: int = 0
    ci_uncompressed_size: int = 0
    meta_digest: bytes = bytes(32)
    meta_size: int = 0
    cipher_iv: bytes = bytes(8)
    cipher: int = 0
    readahead_offset: int = 0
    readahead_size: int = 0


class Bootstrap(ABC):
    """Base of `BootstrapV5` and `BootstrapV6`. Read-only and thread-safe.

    `ino` is an opaque handle above 0 that fits 48 bits; names of one hard-linked regular file have the same. Every
    method raises FormatError when the bytes it needs break the format, whatever the handle.
    """

    version: int
    flags: SuperFlags
    chunk_size: int
    compressor: Compressor
    digester: Digester
    blobs: list[Blob]
    root: int
    inode_count: int

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self.path = path
        self.size = len(data)
        self._map = data

    @property
    def data(self) -> mmap.mmap:
        """The mapped file: for checks and fingerprints; do not write, do not keep slices of memoryviews."""
        return self._map

    @abstractmethod
    def attr(self, ino: int) -> Attr:
        """Attributes of an inode."""

    @abstractmethod
    def lookup(self, parent: int, name: bytes) -> int:
        """The child of that name, 0 if there is none (or `parent` is no directory)."""

    @abstractmethod
    def list_dir(self, ino: int, cookie: int = 0) -> Iterator[DirEntry]:
        """Entries sorted by raw name, without "." and "..", behind the one that gave `cookie` (0: from the start)."""

    @abstractmethod
    def readlink(self, ino: int) -> bytes:
        """Target of a symbolic link."""

    @abstractmethod
    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        """All extended attributes, full names."""

    def lacks_xattrs(self, ino: int) -> bool:
        """True: there are none, which is known for less than reading them costs. False: `xattrs` tells."""
        return not self.xattrs(ino)

    @abstractmethod
    def extents(self, ino: int, offset: int, size: int) -> list[Extent]:
        """Where the bytes [offset, offset + size) of a regular file are, cut at the end of the file.

        One per chunk or hole touched, in file order and without gaps.
        """

    @abstractmethod
    def chunk_refs(self, ino: int) -> list[ChunkRef]:
        """All chunks of a regular file in file order."""

    @abstractmethod
    def prefetch_inodes(self) -> list[int]:
        """The prefetch table, in its order: files, or directories that stand for all files below."""

    @abstractmethod
    def chunk_records(self) -> Iterator[tuple[bytes, int, int, int, int, int, int, int, int, int]]:
        """Raw CHUNK_RECORD fields in any order; v5 repeats a chunk for each file that uses it."""

    @abstractmethod
    def record_places(self) -> Sequence[int]:
        """Where in the file those records are, in units of 8 bytes, in the order of `chunk_records`."""

    @abstractmethod
    def _walk_budget(self) -> int:
        """No sane file of this size has more directory entries than this."""

    def resolve(self, path: bytes) -> int:
        """The inode at an absolute path, 0 if there is none. Symbolic links are not followed."""
        ino = self.root
        for name in path.split(b"/"):
            if name:
                ino = self.lookup(ino, name)
                if not ino:
                    return 0
        return ino

    def walk(self, top: int = 0) -> Iterator[tuple[bytes, DirEntry]]:
        """All entries below `top` (0: the root), depth first, each with its path relative to `top`.

        Ends with FormatError, in time linear in the file size, on trees that loop or reach a directory twice.
        """
        seen = {top or self.root}
        budget = self._walk_budget()
        stack = [(b"", self.list_dir(top or self.root))]
        while stack:
            prefix, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                stack.pop()
                continue
            budget -= 1
            if budget < 0:
                raise FormatError("directory tree", 0, "more entries than fit the file: directories overlap")
            path = prefix + entry.name
            yield path, entry
            if entry.dtype == 4:
                if entry.ino in seen:
                    raise FormatError("directory tree", 0, f"directory {os.fsdecode(path)!r} is reached twice")
                seen.add(entry.ino)
                stack.append((path + b"/", self.list_dir(entry.ino)))

    def close(self) -> None:
        """Give the map back. Reads after this raise ValueError."""
        try:
            self._map.close()
        except BufferError:
            # A reader in another thread holds the buffer this instant; the map goes when the last of them does.
            pass

    def __enter__(self) -> Bootstrap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def blob_id(raw: bytes, offset: int, substitute: str, inline_id: str) -> str:
    """Text of a blob id as it will be used in file names and URLs; FormatError for one that could escape from there."""
    try:
        text = raw.rstrip(b"\0").decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("blob id", offset, f"{raw!r} is not UTF-8") from error
    if text == inline_id:
        text = substitute
    if not text or not text.isprintable() or "/" in text or text in {".", ".."} or "\\" in text:
        raise FormatError("blob id", offset, f"{text!r} is not usable as a name")
    return text
