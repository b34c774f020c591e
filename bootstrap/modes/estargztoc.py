"""eStargz by its table of contents alone: each chunk is a gzip member of the layer. Reference: RAFS format 7.5.

Nobody opens the layer: digests and places are what the table says. gzip together with 16-byte entries marks such blobs
("legacy stargz"): the stored size of a chunk is a bound, not a fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bootstrap.errors import BuildError
from bootstrap.layout import blobmeta
from bootstrap.layout.common import ChunkFlags
from bootstrap.modes import Content
from bootstrap.modes.reference import Referring
from bootstrap.tree import Node

if TYPE_CHECKING:
    from bootstrap.stargztoc import TocChunk

_COMPRESSED = int(ChunkFlags.COMPRESSED)
MAX_V1_SIZE = 1 << 24


class TocMode(Referring):
    """Give it the chunks of each file with `add_chunks`; `layer` is the id and the size of the layer."""

    layer: tuple[str, int] = ("", 0)

    def original(self) -> tuple[str, int]:
        return self.layer

    def add_file(self, node: Node, content: Content) -> None:
        raise TypeError("a table of contents has no file content")

    def add_chunks(self, node: Node, chunks: Sequence[TocChunk]) -> None:
        """The content of a regular file."""
        find = self.index.find
        for chunk in chunks:
            row = find(chunk.digest, chunk.size)
            node.add_chunk(row if row >= 0 else self._add(chunk))

    def _add(self, chunk: TocChunk) -> int:
        offset, stored_size, size, name = chunk
        if stored_size > MAX_V1_SIZE:
            raise BuildError(f"eStargz chunk of {size} bytes at {offset}: too large for an image; convert it")
        info = self.info
        plain_at = info.uncompressed_size
        index = self.next_index()
        row = self.table.add(name, self.place, _COMPRESSED, stored_size, size, offset, plain_at, index, 0)
        self.index.add(name, row)
        self.entries += blobmeta.pack_v1(offset, stored_size, plain_at, size)
        if self.options.blob_toc:
            self.digests += name
        info.uncompressed_size = plain_at + (size + 4095 & ~4095)
        return row
