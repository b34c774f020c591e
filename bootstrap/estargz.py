"""A bootstrap for an eStargz layer as it is: from its table of contents, a few small ranges of it. RAFS format 7.5.

zstd:chunked as the same project writes it (`nerdctl image convert --zstdchunked`) is eStargz with frames of zstd. Our
nydusd alone reads such a blob: upstream's takes a frame for no longer than its chunk.

This is what lets a node run an eStargz image that nobody converted: one bootstrap per layer, merged like those of any
image (`merge_layers`, original_blob_id = the layer's digest). Modification times and special files are kept, which
upstream's builder drops: Python would compile every module anew.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

from bootstrap.build import Build, BuildOptions, BuildResult
from bootstrap.errors import BuildError, FormatError
from bootstrap.kinds import KINDS
from bootstrap.modes.estargztoc import TocMode
from bootstrap.stargztoc import MAX_TOC, TAIL_SIZE, Toc, parse_toc, toc_compressor, toc_range, unpack_toc
from bootstrap.tartree import LayerTree

__all__ = ["MAX_TOC", "TAIL_SIZE", "build_toc", "layer_bootstrap", "parse_toc", "read_toc", "toc_range", "unpack_toc"]

ReadAt = Callable[[int, int], bytes]
"""(offset, size) -> exactly so many bytes of the layer."""


def read_toc(read: ReadAt, size: int, toc_digest: str | None = None) -> Toc:
    """The table of the layer of `size` bytes that `read` reads from: two reads, of the tail and of the table.

    `toc_digest`: what the image says of the table's JSON (annotation containerd.io/snapshot/stargz/toc.digest), if it
    does. Raises FormatError when the layer is no eStargz, another RafsError when its table cannot be trusted.
    """
    length = min(TAIL_SIZE, size)
    tail = read(size - length, length)
    if len(tail) != length:
        raise FormatError("eStargz footer", size - length, f"{len(tail)} of {length} bytes could be read")
    offset, length = toc_range(tail, size)
    stored = read(offset, length)
    if len(stored) != length:
        raise FormatError("eStargz table", offset, f"{len(stored)} of {length} bytes could be read")
    return parse_toc(unpack_toc(stored, toc_digest), offset, toc_compressor(stored))


def build_toc(toc: Toc, out: BinaryIO, options: BuildOptions, layer: tuple[str, int]) -> BuildResult:
    """The bootstrap of a layer from its table (`--type estargztoc-ref`); the meta blob goes to `out`.

    `layer`: its id (the digest in hex) and its size in bytes. `options.chunk_size` must be that of the archive, see
    `Toc.fitting_chunk_size`. Raises BuildError, naming the file.
    """
    build = Build(out, options, replace(KINDS["estargztoc-ref"], compressor=toc.compressor))
    tree = LayerTree(build.xattr_limit)
    mode = build.mode
    assert isinstance(mode, TocMode)
    mode.layer = layer
    with mode:
        for entry, chunks in toc.files(build.options.chunk_size):
            node = tree.add(entry)
            if node is not None and chunks:
                mode.add_chunks(node, chunks)
        build.stage("build_tree")
        build.end_of_layer(tree)
        return build.finish(tree.root)


def layer_bootstrap(
    read: ReadAt, size: int, layer_id: str, *, chunk_size: int | None = None, toc_digest: str | None = None
) -> bytes | bytearray:
    """The v6 bootstrap of an unconverted eStargz layer, ready to be merged with those of the other layers.

    `read` and `toc_digest` as in `read_toc`; `layer_id`: the layer's digest in hex. All layers of an image need the
    same `chunk_size` (bytes); by default it is what fits this one. Raises a RafsError that says why it cannot run so.
    """
    toc = read_toc(read, size, toc_digest)
    found = chunk_size or toc.fitting_chunk_size()
    if not layer_id:
        raise BuildError("an eStargz layer without its digest")
    return build_toc(toc, io.BytesIO(), BuildOptions(chunk_size=found), (layer_id, size)).bootstrap
