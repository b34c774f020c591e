"""Builds one layer: a tar or a directory becomes a data blob and a bootstrap. Reference: RAFS format 5 and 6.1.

Streaming: what is in memory is the tree (about 1 kB per path), the chunk index and a few chunks in work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import BinaryIO

from bootstrap import tar
from bootstrap.blobwriter import BlobWriter
from bootstrap.directory import dump_order, read_chunks, scan
from bootstrap.errors import BuildError
from bootstrap.layout import v5, v6
from bootstrap.layout.common import SuperFlags, super_flags
from bootstrap.load import blob_info, load_tree
from bootstrap.options import BuildOptions, BuildResult
from bootstrap.overlay import apply_layer, drop_whiteouts
from bootstrap.reader import open_bootstrap
from bootstrap.tartree import LayerTree
from bootstrap.tree import IMPLIED_NSEC, BlobInfo, Chunk, Node, clean_patterns, number
from bootstrap.write_v5 import write_v5
from bootstrap.write_v6 import write_v6

__all__ = ["BuildOptions", "BuildResult", "build_directory", "build_layer"]

Progress = Callable[[int], None]


def build_layer(
    source: BinaryIO, out: BinaryIO, options: BuildOptions, progress: Progress | None = None
) -> BuildResult:
    """Turn an *uncompressed* layer tar into a layer blob, written to `out` front to back; neither need be seekable.

    With `inline_meta` the bootstrap goes to the end of the blob, else only into the result; without any data nothing
    is written then. `progress` gets the uncompressed bytes of each piece done. Whiteouts stay ordinary files: a merge
    applies them. Raises BuildError naming the entry; what was written to `out` so far is then useless.
    """
    clock = _Clock()
    layer = LayerTree(_xattr_limit(options))
    stream = tar.TarStream(source)
    chunk_size = options.chunk_size
    with BlobWriter(out, options, progress=progress) as writer:
        while (entry := stream.next()) is not None:
            node = layer.add(entry)
            if node is None or entry.type != tar.REGULAR:
                continue
            left = entry.size
            sink = node.chunks
            assert sink is not None
            while left:
                piece = stream.read(chunk_size)
                writer.add(sink, piece)
                left -= len(piece)
        writer.flush()
        clock.stage("dump_blob")
        if options.inline_meta and layer.has_implied:  # this bootstrap is for a merge
            for node in number(layer.root):
                if node.implied:
                    node.mtime_nsec = IMPLIED_NSEC
        return _finish(layer.root, writer, options, clock)


def build_directory(
    source: str | bytes,
    out: BinaryIO,
    options: BuildOptions,
    progress: Progress | None = None,
    *,
    parent: str | None = None,
) -> BuildResult:
    """Like `build_layer`, from a directory (`dir-rafs`).

    `parent` is a bootstrap to put the directory onto: its whiteouts act on it, its chunks are reused, its blobs come
    first in the blob table (5.13). Without one, whiteouts are left out. Raises BuildError for files that cannot be
    read or change while they are, and for a parent of another version or chunk size.
    """
    clock = _Clock()
    root = scan(source, xattr_limit=_xattr_limit(options))
    below: list[BlobInfo] = []
    known: dict[tuple[bytes, int], Chunk] = {}
    if parent is None:
        drop_whiteouts(root, options.whiteout_spec)
    else:
        lower, below = _load_parent(parent, options)
        for node in number(lower):
            for chunk in node.chunks or ():
                known.setdefault((chunk.digest, chunk.uncompressed_size), chunk)
        root = apply_layer(lower, root, options.whiteout_spec)
    clock.stage("load_from_directory")
    order = [node for node in number(root) if node.source is not None]
    patterns = clean_patterns(options.prefetch)[0] if options.prefetch_policy != "none" else []
    with BlobWriter(out, options, known, progress) as writer:
        ahead, rest = dump_order(order, patterns)
        for node in ahead:
            read_chunks(node, options.chunk_size, writer.add)
        if options.prefetch_policy == "blob":
            writer.flush()
            writer.info.readahead_size = writer.info.compressed_size
        for node in rest:
            read_chunks(node, options.chunk_size, writer.add)
        writer.flush()
        clock.stage("dump_blob")
        return _finish(root, writer, options, clock, below)


def _load_parent(path: str, options: BuildOptions) -> tuple[Node, list[BlobInfo]]:
    with open_bootstrap(path) as image:
        if (image.version, image.chunk_size) != (options.fs_version, options.chunk_size):
            raise BuildError(
                f"parent {path} has version {image.version} and chunk size {image.chunk_size:#x}, "
                f"this build {options.fs_version} and {options.chunk_size:#x}"
            )
        blobs = [blob_info(blob) for blob in image.blobs]
        return load_tree(image, blobs), blobs


def _finish(
    root: Node, writer: BlobWriter, options: BuildOptions, clock: _Clock, below: Sequence[BlobInfo] = ()
) -> BuildResult:
    if options.repeatable:
        _forget_owners(root)
    writer.finish_data()
    blobs = [*below, *writer.blobs()]
    if not options.inline_meta:
        writer.finish_separate()
    bootstrap, count = write_bootstrap(root, blobs, options)
    if options.inline_meta:
        writer.finish_inline(bootstrap)
    clock.stage("dump_bootstrap")
    digest = writer.sha256.hexdigest()
    blob_id = writer.id_hash() if options.inline_meta else writer.info.id
    return BuildResult(
        blob_id=blob_id,
        blob_size=writer.size,
        blob_sha256=digest,
        bootstrap=bootstrap,
        chunk_count=writer.info.chunk_count,
        uncompressed_size=writer.info.uncompressed_size,
        inode_count=count,
        timings=clock.times,
        blobs=[*(blob.id for blob in below), *([blob_id] if writer.info.chunk_count else [])],
    )


def write_bootstrap(root: Node, blobs: list[BlobInfo], options: BuildOptions) -> tuple[bytes, int]:
    """The bootstrap of a finished tree in the version, flags and prefetch policy of `options`; and its inode count."""
    flags = super_flags(options.compressor, options.digester)
    if not options.repeatable:
        flags |= SuperFlags.EXPLICIT_UIDGID
    prefetch = clean_patterns(options.prefetch)[0] if options.prefetch_policy == "fs" else []
    if options.fs_version == 6:
        flags |= SuperFlags.ENCRYPT_NONE
        data = write_v6(root, blobs, chunk_size=options.chunk_size, flags=flags, prefetch=prefetch)
        return data, v6.SUPERBLOCK.unpack_from(data, v6.SUPER_OFFSET)[6]
    data = write_v5(root, blobs, chunk_size=options.chunk_size, flags=flags, prefetch=prefetch)
    return data, v5.SUPERBLOCK.unpack_from(data)[9]


def _forget_owners(root: Node) -> None:
    for node in number(root):
        node.uid = node.gid = 0


def _xattr_limit(options: BuildOptions) -> int:
    return v6.MAX_XATTR_VALUE if options.fs_version == 6 else v5.MAX_XATTR_VALUE


class _Clock:
    """Seconds by stage, under upstream's names."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self.times: dict[str, float] = {}

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        self.times[name] = round(now - self._last, 6)
        self.times["total_build"] = round(now - self._started, 6)
        self._last = now


def open_source(path: str) -> BinaryIO:
    """A layer file, FIFO or device, opened for reading; BuildError if that fails."""
    try:
        return open(path, "rb", buffering=0)  # the caller closes it
    except OSError as error:
        raise BuildError(f"cannot open {path}: {error.strerror}") from error
