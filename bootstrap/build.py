"""Builds one layer: a tar or a directory becomes a data blob and a bootstrap. Reference: RAFS format 5 and 6.1.

The stages, and where each lives:

| stage | does | module |
| --- | --- | --- |
| source | the entries and bytes of a layer, front to back | `tar`, `directory` |
| tree | entries become nodes | `tartree`, `directory` |
| chunk | content is cut, digested and compressed, in threads | `modes`, `packing` |
| dedup | chunks that are stored already are found again | `dedup`, `chunkdict` |
| pack | the rest is put into the blob and described there | `modes`, `blobfile` |
| metadata | the tree becomes tables, the tables a bootstrap | `flat`, `overlay`, `metadata`, `write_v5`, `write_v6` |

A new format is a new module in `modes` and a line in `kinds`. Streaming: what is in memory is the tree (about 450
bytes a path), a record of 80 bytes for each chunk, and a few chunks in work.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

from bootstrap import tar
from bootstrap.blobfile import BlobFile
from bootstrap.chunkdict import learn_dictionary, require_like
from bootstrap.chunktable import BlobInfo, ChunkTable
from bootstrap.dedup import ChunkIndex
from bootstrap.directory import dump_order, read_file, scan
from bootstrap.errors import BuildError, FormatError
from bootstrap.flat import FlatTree, flatten
from bootstrap.kinds import KINDS, Kind
from bootstrap.layout import v5, v6
from bootstrap.load import blob_info, load_tree
from bootstrap.lower import LowerTree
from bootstrap.metadata import write_bootstrap
from bootstrap.modes import Context, Mode
from bootstrap.options import BuildOptions, BuildResult
from bootstrap.overlay import is_whiteout, overlay
from bootstrap.reader import open_bootstrap
from bootstrap.tartree import LayerTree
from bootstrap.tree import IMPLIED_NSEC, Node, clean_patterns, dismantle, no_collector, number

if TYPE_CHECKING:
    from bootstrap.external import ExternalFile

__all__ = ["BuildOptions", "BuildResult", "build_directory", "build_layer"]

Progress = Callable[[int], None]
MANY = 20_000  # paths: below it the memory of their nodes is not worth the 10 ms of giving it back


def build_layer(
    source: BinaryIO,
    out: BinaryIO,
    options: BuildOptions,
    progress: Progress | None = None,
    *,
    parent: str | None = None,
    kind: Kind = KINDS["tar-rafs"],
) -> BuildResult:
    """Turn an *uncompressed* layer tar into a layer blob, written to `out` front to back; neither need be seekable.

    `source` is what `kind.open` made of the layer file. With `inline_meta` the bootstrap goes to the end of the
    blob, else only into the result; without any data nothing is written then. `progress` gets the uncompressed bytes of
    each piece done. Whiteouts stay ordinary files: a merge applies them. Raises BuildError naming the entry; what was
    written to `out` so far is then useless.

    `parent`: a bootstrap to put the layer onto, as for `build_directory`; its whiteouts act, and its hard links may
    lead to files of the parent.
    """
    build = Build(out, options, kind, progress)
    options = build.options
    if parent is not None:
        build.load_parent(parent)
    layer = LayerTree(build.xattr_limit, build.lower)
    stream = tar.TarStream(source)
    with no_collector(), build.mode as mode:
        mode.begin(source)
        add_entry, add_file, regular = layer.add, mode.add_file, tar.REGULAR
        while (entry := stream.next()) is not None:
            node = add_entry(entry)
            if node is not None and entry.type == regular and entry.size:
                add_file(node, stream)
        mode.flush()
        build.stage("dump_blob")
        build.end_of_layer(layer)
        return build.finish(layer.root, "none" if parent is None else options.whiteout_spec)


def build_directory(
    source: str | bytes,
    out: BinaryIO,
    options: BuildOptions,
    progress: Progress | None = None,
    *,
    parent: str | None = None,
    external: dict[bytes, ExternalFile] | None = None,
    kind: Kind = KINDS["dir-rafs"],
) -> BuildResult:
    """Like `build_layer`, from a directory (`dir-rafs`).

    `external`: files by path whose content lies in other stores; they make a second image, see `bootstrap.external`.

    `parent` is a bootstrap to put the directory onto: its whiteouts act on it, its chunks are reused, its blobs come
    first in the blob table (5.13). Without one, whiteouts are left out. Raises BuildError for files that cannot be
    read or change while they are, and for a parent of another version or chunk size.
    """
    build = Build(out, options, kind, progress)
    options = build.options
    root = scan(source, xattr_limit=build.xattr_limit)
    if external:
        from bootstrap.external import build_external

        build.external = build_external(root, external, options)
    if parent is not None:
        build.load_parent(parent)
    build.stage("load_from_directory")
    order = _content(number(root), options.whiteout_spec)
    patterns = clean_patterns(options.prefetch)[0] if options.prefetch_policy != "none" else []
    with no_collector(), build.mode as mode:
        ahead, rest = dump_order(order, patterns)
        for node in ahead:
            read_file(node, mode.add_file)
        if options.prefetch_policy == "blob":
            mode.flush()
            mode.info.readahead_size = mode.info.compressed_size
        for node in rest:
            read_file(node, mode.add_file)
        mode.flush()
        build.stage("dump_blob")
        return build.finish(root, options.whiteout_spec)


def _content(order: list[Node], spec: str) -> list[Node]:
    """`order` without whiteouts and what lies in them: they have no place in the blob."""
    hidden: set[Node] = set()
    for node in order:
        if is_whiteout(node.name, node.mode, node.rdev, spec) or node.parent in hidden:
            hidden.add(node)
    return [node for node in order if node not in hidden]


class Build:
    """What the stages of one build share, from its options to its result."""

    def __init__(self, out: BinaryIO, options: BuildOptions, kind: Kind, progress: Progress | None = None) -> None:
        self.options = options = kind.settle(options)
        self.table = ChunkTable()
        self.index = ChunkIndex(self.table)
        self.file = BlobFile(out, framed=options.inline_meta or options.blob_toc)
        if options.chunk_dict is not None:
            learn_dictionary(self.index, options.chunk_dict, options)
        self.below: FlatTree | None = None
        self.lower: LowerTree | None = None
        self.external: tuple[bytes | bytearray | None, list[str]] = None, []
        self.mode: Mode = kind.mode(Context(options, self.file, self.index, progress))
        self._started = self._last = time.perf_counter()
        self.times: dict[str, float] = {}

    def stage(self, name: str) -> None:
        """Note the seconds since the last stage under upstream's name for them."""
        now = time.perf_counter()
        self.times[name] = round(now - self._last, 6)
        self.times["total_build"] = round(now - self._started, 6)
        self._last = now

    def load_parent(self, path: str) -> None:
        """Take a parent image below the layer; its chunks are known from now on, its blobs come first."""
        options, table = self.options, self.table
        try:
            with open_bootstrap(path) as image:
                require_like(image, f"parent {path}", options)
                blobs = [blob_info(blob) for blob in image.blobs]
                self.below = overlay([(load_tree(image, blobs), "none")])
        except FormatError as error:
            raise BuildError(f"parent {path}: {error}") from error
        for blob in blobs:
            self.index.list_blob(table.place_of(blob))
        first = len(table)
        table.extend(self.below.chunks, blobs)
        self.index.learn(range(first, len(table)))
        self.lower = LowerTree(self.below, first, options.whiteout_spec)

    @property
    def xattr_limit(self) -> int:
        """Bytes that an attribute's value can have."""
        return v6.MAX_XATTR_VALUE if self.options.fs_version == 6 else v5.MAX_XATTR_VALUE

    def end_of_layer(self, layer: LayerTree) -> None:
        """All entries are there: mark directories that only lie on the way, if this bootstrap is for a merge."""
        for_merge = self.options.inline_meta or self.options.whiteout_spec == "none"
        if for_merge and layer.has_implied and self.below is None:
            for node in number(layer.root):
                if node.implied:
                    node.mtime_nsec = IMPLIED_NSEC

    def finish(self, root: Node, spec: str = "none") -> BuildResult:
        """`spec`: of the whiteouts among the nodes, which are used up."""
        mode, options = self.mode, self.options
        mode.finish_data()
        self.index.forget()
        listed: dict[str, BlobInfo] = {}
        for blob in self.index.blobs:  # what a parent had once and lost may be stored again: one blob, one entry
            listed.setdefault(blob.id, blob)
        blobs = list(listed.values())
        tree = flatten(root, self.table, blobs, options.chunk_size)
        dismantle(number(root))
        if len(tree.names) > MANY:
            _close_ranks(tree)
        if self.below is not None:
            tree = overlay([(self.below, "none"), (tree, spec)])
        elif spec != "none":
            tree = overlay([(tree, spec)])
        bootstrap, count = write_bootstrap(tree, options, mode.super_flags)
        if options.inline_meta:
            mode.finish_inline(bootstrap)
        self.stage("dump_bootstrap")
        info = mode.info
        ids = [mode.listed_id if blob is info else blob.id for blob in blobs]
        return BuildResult(
            blob_id=mode.file_id,
            blob_size=self.file.size,
            blob_sha256=self.file.sha256.hexdigest(),
            bootstrap=bootstrap,
            chunk_count=info.chunk_count,
            uncompressed_size=info.uncompressed_size,
            inode_count=count,
            timings=self.times,
            blobs=ids,
            external_bootstrap=self.external[0],
            external_blobs=self.external[1],
        )


def _close_ranks(tree: FlatTree) -> None:
    """Give the memory of the nodes back: their names, spread among them, would keep nearly all of it in use.

    For a layer of 300,000 files 70 MB, just before its bootstrap takes as much.
    """
    joined = b"\0".join(tree.names)
    tree.names = []
    gc.collect()
    tree.names = joined.split(b"\0")
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library


def open_source(path: str) -> BinaryIO:
    """A layer file, FIFO or device, opened for reading; BuildError if that fails."""
    try:
        return open(path, "rb", buffering=0)  # the caller closes it
    except OSError as error:
        raise BuildError(f"cannot open {path}: {error.strerror}") from error
