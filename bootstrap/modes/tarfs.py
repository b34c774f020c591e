"""Tarfs mode: the tar itself is the blob, addressed in blocks of 512 bytes; nothing is stored. RAFS format 1.13."""

from __future__ import annotations

from typing import BinaryIO

from bootstrap.errors import BuildError
from bootstrap.layout import tarfs
from bootstrap.layout.common import BlobFeatures, Compressor, SuperFlags
from bootstrap.modes import Content, Mode
from bootstrap.original import PlainLayer, open_original
from bootstrap.tree import Node

_NO_DIGEST = bytes(32)


class TarfsMode(Mode):
    """Chunks are places in the tar; they have no digests and equal ones stay apart.

    A last chunk of full size counts as such: upstream says 0 bytes there.
    """

    has_data = False
    _layer: PlainLayer | None = None

    @staticmethod
    def open(stream: BinaryIO) -> BinaryIO:
        layer = open_original(stream)
        if not isinstance(layer, PlainLayer):
            raise BuildError("tarfs needs an uncompressed tar, this one is gzip: decompress it first")
        return layer

    def begin(self, source: BinaryIO) -> None:
        if not isinstance(source, PlainLayer):
            raise TypeError(f"tarfs needs a layer from open_original, not {type(source).__name__}")
        self._layer = source

    def features(self) -> BlobFeatures:
        return tarfs.FEATURES

    @property
    def super_flags(self) -> SuperFlags:
        return super().super_flags | SuperFlags.TARFS

    def add_file(self, node: Node, content: Content) -> None:
        at, left, chunk_size = content.position, node.size, self.options.chunk_size
        while left:
            size = min(left, chunk_size)
            node.add_chunk(self.table.add(_NO_DIGEST, self.place, 0, size, size, at, at, self.next_index(), 0))
            at += size
            left -= size
        if self.progress is not None:
            self.progress(node.size)

    def finish_data(self) -> None:
        info, layer = self.info, self._layer
        assert layer is not None
        info.id = self.options.blob_id or layer.blob_id
        info.compressed_size = info.uncompressed_size = layer.stored_size
        info.ci_compressor = Compressor.LZ4_BLOCK  # what upstream has where no blob meta was ever written

    @property
    def file_id(self) -> str:
        return ""

    @property
    def listed_id(self) -> str:
        return self.info.id
