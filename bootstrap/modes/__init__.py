"""Modes: how the data of files is stored and described. The one place where a new kind of image plugs in.

A build is a pipeline (see `bootstrap.build`): source -> tree -> chunk -> dedup -> pack -> metadata. Sources and trees
know nothing of blobs, writers of metadata nothing of tars; what lies between is a mode:

* `packed.PackedMode`: chunks are compressed into a data blob of their own, small ones in batches, maybe encrypted.
* `reference.RefMode`: chunks stay where they are in the original tar or tar.gz layer.
* `estargztoc.TocMode`: the same for an eStargz layer of which only the table of contents is known.
* `tarfs.TarfsMode`: a tar is itself the blob.

To add one (a tar that is itself the blob, data in some other store): derive
from `Mode` in a new module here and name it in `bootstrap.kinds.KINDS`. What a mode decides:

* `open(stream)`: how the layer file becomes the tar that the tree is made from. A mode that needs to know where in the
  *stored* layer each byte came from returns its own stream here; the pipeline reads it front to back, exactly
  `Content.read(size)` bytes at a time and never ahead. `begin` is given what `open` returned.
* `add_file(node, content)`: the content of one regular file, in build order. For each chunk a row of `self.table`
  (`ChunkTable.add`) has to be in `node.chunks` when `flush` returns, own or found in `self.index` (dedup). The mode
  counts in `self.info` (chunk_count, compressed_size, uncompressed_size), and fills `self.entries` (blob meta, 16 or 24
  bytes a chunk), `self.contexts` with `self.context_count` (behind the entries), `self.dictionaries` (behind those),
  `self.digests` (32 bytes a chunk).
  `content.position` is the offset in the tar of the next byte `content.read` gives (-1 for directories).
* class attributes `has_data` (the blob starts with chunk data), `meta_compressor`, `super_flags`, and
  `features()`.
* `finish_separate` and `finish_inline` end the blob; override them where the blob id is not the hash of what was
  written, or size and digest of the blob are those of another file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, ClassVar, Protocol

from bootstrap.blobfile import BlobFile, Region, Seal
from bootstrap.chunktable import BlobInfo, ChunkTable
from bootstrap.dedup import ChunkIndex
from bootstrap.errors import BuildError
from bootstrap.layout.common import INLINE_BLOB_ID, BlobFeatures, Compressor, SuperFlags
from bootstrap.options import BuildOptions
from bootstrap.spool import Spool
from bootstrap.tree import Node

MAX_INDEX = 0xFFFFFF


class Content(Protocol):
    """The bytes of one file, front to back."""

    @property
    def position(self) -> int:
        """Offset in the layer's tar of what `read` gives next; -1 where there is no tar."""

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes; BuildError if the source ends before."""


@dataclass(slots=True)
class Context:
    """What a mode works with: the options, where the blob goes, the chunks of this build, and whom to tell of progress
    (uncompressed bytes since the last call)."""

    options: BuildOptions
    file: BlobFile
    index: ChunkIndex
    progress: Callable[[int], None] | None = None

    @property
    def table(self) -> ChunkTable:
        return self.index.table


class Mode(ABC):
    """One way to store and describe file data. Use as a context manager: a mode may own threads."""

    has_data: ClassVar[bool] = True
    """The blob starts with the chunks' bytes; False: blob meta and chunks lie in different blobs (SEPARATE)."""

    def __init__(self, context: Context) -> None:
        options = context.options
        self.options = options
        self.file = context.file
        self.index = context.index
        self.table = context.table
        self.progress = context.progress
        self.info = BlobInfo(
            id="",
            chunk_size=options.chunk_size,
            compressor=options.compressor,
            digester=options.digester,
            features=self.features(),
        )
        self.place = self.table.place_of(self.info)
        self.entries = bytearray()
        self.contexts = bytearray()
        self.dictionaries: Spool | None = None
        self.context_count = 0
        self.digests = bytearray()
        self.seal: Seal | None = None

    def __enter__(self) -> Mode:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027  most modes own nothing
        """Release threads and files; the build may have failed."""

    # -- what a kind of image decides

    @staticmethod
    def open(stream: BinaryIO) -> BinaryIO:
        """The uncompressed tar inside a layer file; closing it leaves `stream` open."""
        from bootstrap.tar import open_layer

        return open_layer(stream)

    def begin(self, source: BinaryIO) -> None:  # noqa: B027  most modes need not know
        """Called before the first file with what `open` returned; not for directories."""

    @abstractmethod
    def add_file(self, node: Node, content: Content) -> None:
        """Take the content of a regular file of `node.size` > 0 bytes."""

    def flush(self) -> None:  # noqa: B027  or store at once
        """After it every row is in its node."""

    def next_index(self) -> int:
        """Count one more chunk of the own blob: its index. The first one lists the blob."""
        index = self.info.chunk_count
        if index >= MAX_INDEX:
            raise BuildError(f"more than {MAX_INDEX} chunks in one layer; use a larger chunk size")
        if not index:
            self.index.list_blob(self.place)
        self.info.chunk_count = index + 1
        return index

    def features(self) -> BlobFeatures:
        """Features of the blob that is written (0.5)."""
        options = self.options
        found = BlobFeatures.CAP_TAR_TOC
        if options.fs_version == 6:
            found |= BlobFeatures.ALIGNED
        if options.inline_meta:
            found |= BlobFeatures.INLINED_FS_META | BlobFeatures.HAS_TAR_HEADER
        if options.blob_toc:
            found |= BlobFeatures.HAS_TAR_HEADER | BlobFeatures.HAS_TOC | BlobFeatures.INLINED_CHUNK_DIGEST
        return found

    @property
    def meta_compressor(self) -> Compressor:
        """How the blob meta is compressed (4.7)."""
        return self.options.compressor

    @property
    def super_flags(self) -> SuperFlags:
        """Superblock flags of v6 beyond compressor, digester and what the writer derives."""
        return SuperFlags.ENCRYPT_NONE

    @property
    def file_id(self) -> str:
        """What the file that was written is called in a directory of blobs."""
        return self.file.id_hash() if self.options.inline_meta else self.info.id

    @property
    def listed_id(self) -> str:
        """What the result lists for the own blob."""
        return self.file_id

    # -- the end of the blob, the same for most

    def finish_data(self) -> None:
        """Everything that lies before the bootstrap: end of the data, blob meta, digest array (4.7, 4.8)."""
        self.flush()
        info, file, options = self.info, self.file, self.options
        if not info.chunk_count:
            return
        if self.has_data:
            file.end_data(info.uncompressed_size)
        if options.fs_version == 6:
            region = Region(bytes(self.entries), bytes(self.contexts), self.context_count, self.dictionaries)
            file.add_meta(info, region, self.meta_compressor, self.seal)
        if options.blob_toc:
            file.add_digests(self.digests)
        if self.has_data:
            info.compressed_size = file.size
        if options.inline_meta:
            self.info.id = INLINE_BLOB_ID
        else:
            self.finish_separate()

    def finish_separate(self) -> None:
        """End a blob whose bootstrap lies elsewhere; afterwards `info` is complete."""
        import hashlib

        info, file, options = self.info, self.file, self.options
        if options.blob_toc:
            table = file.add_toc()
            info.toc_size, info.toc_digest = len(table), hashlib.sha256(table).digest()
        if self.has_data:
            info.compressed_size = file.size
            info.id = options.blob_id or file.id_hash()

    def finish_inline(self, bootstrap: bytes | bytearray) -> None:
        """Append the bootstrap and, if asked for, the table of contents: the end of a layer blob."""
        self.file.add_bootstrap(bootstrap, packed=self.options.blob_toc)
        if self.options.blob_toc:
            self.file.add_toc()
