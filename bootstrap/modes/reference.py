"""Reference mode: chunks stay where they are in the original layer, a gzip file (zran) or a plain tar. Reference: 7.

What is written is the meta blob: chunk entries, restart points, dictionaries. The blob that the image lists is the
original layer.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import BinaryIO, NamedTuple

from crc32c import crc32c

from bootstrap.digest import digest
from bootstrap.errors import BuildError
from bootstrap.layout import blobmeta
from bootstrap.layout.common import BlobFeatures, ChunkFlags, Compressor
from bootstrap.modes import Content, Context, Mode
from bootstrap.original import GzipLayer, PlainLayer, open_original
from bootstrap.packing import Packer
from bootstrap.slices import SliceMaker
from bootstrap.tree import Node

_COMPRESSED = int(ChunkFlags.COMPRESSED)
_HAS_CRC = int(ChunkFlags.HAS_CRC)


class Piece(NamedTuple):
    """A chunk on its way: its row is the next one of `node`. `place`: the data field of its entry (slice and offset in
    it; 0 in a plain tar), offset and size in the original layer."""

    node: Node
    data: bytes
    place: tuple[int, int, int]


class Referring(Mode):
    """What is written is a meta blob; the blob that the image lists is somebody else's, see `original`."""

    has_data = False

    @abstractmethod
    def original(self) -> tuple[str, int]:
        """Id and bytes of the blob with the data; asked when all files were taken."""

    def features(self) -> BlobFeatures:
        return super().features() | BlobFeatures.SEPARATE

    @property
    def meta_compressor(self) -> Compressor:
        return Compressor.ZSTD

    def finish_data(self) -> None:
        super().finish_data()
        self.info.id, self.info.compressed_size = self.original()

    def finish_separate(self) -> None:
        super().finish_separate()
        info, file = self.info, self.file
        info.meta_digest, info.meta_size = bytes.fromhex(file.id_hash()), file.size

    @property
    def file_id(self) -> str:
        return self.file.id_hash() if self.file.size else ""

    @property
    def listed_id(self) -> str:
        return self.info.id


class RefMode(Referring):
    """Digests of chunks in threads, their places in the original file in order."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._packer: Packer[Piece, tuple[bytes, int]] = Packer(self._pack, self._store, self.options.threads)
        self._keep_digests = self.options.blob_toc
        self._layer: GzipLayer | PlainLayer | None = None
        self._slices: SliceMaker | None = None

    def close(self) -> None:
        self._packer.close()

    @staticmethod
    def open(stream: BinaryIO) -> BinaryIO:
        return open_original(stream)  # type: ignore[return-value]  # a raw stream that reads exactly

    def begin(self, source: BinaryIO) -> None:
        if isinstance(source, GzipLayer):
            self._slices = SliceMaker(source)
            self.info.features |= BlobFeatures.ZRAN
        elif not isinstance(source, PlainLayer):
            raise TypeError(f"a reference needs a layer from open_original, not {type(source).__name__}")
        self._layer = source

    def features(self) -> BlobFeatures:
        return super().features() | BlobFeatures.CHUNK_INFO_V2

    def original(self) -> tuple[str, int]:
        assert self._layer is not None
        return self._layer.blob_id, self._layer.stored_size

    def add_file(self, node: Node, content: Content) -> None:
        left, chunk_size, slices = node.size, self.options.chunk_size, self._slices
        while left:
            size = min(left, chunk_size)
            if slices is None:
                place = 0, content.position, size
                data = content.read(size)
            else:
                slices.begin(chunk_size)
                data = content.read(size)
                place = slices.end()
            self._packer.add(Piece(node, data, place), size)
            left -= size

    def flush(self) -> None:
        self._packer.flush()

    def _pack(self, pieces: list[Piece]) -> list[tuple[bytes, int]]:
        digester = self.options.digester
        return [(digest(digester, piece.data), crc32c(piece.data)) for piece in pieces]

    def _store(self, pieces: list[Piece], packed: list[tuple[bytes, int]]) -> None:
        find, add = self.index.find, self.index.add
        taken = 0
        for (node, data, place), (name, crc) in zip(pieces, packed, strict=True):
            taken += len(data)
            row = find(name, len(data))
            if row < 0:
                row = self._add_chunk(name, crc, len(data), place)
                add(name, row)
            node.add_chunk(row)
        if self.progress is not None:
            self.progress(taken)

    def _add_chunk(self, name: bytes, crc: int, size: int, place: tuple[int, int, int]) -> int:
        info = self.info
        data, at, stored_size = place
        if stored_size > blobmeta.MAX_V2_SIZE:
            raise BuildError(
                f"a chunk takes {stored_size} bytes of the layer, more than an entry can say: use a --chunk-size of "
                f"0x800000 or less"
            )
        record_flags = _HAS_CRC if crc else 0  # readers refuse the flag together with 0
        if self._slices is None:
            flags, data = record_flags, crc
        else:
            record_flags |= _COMPRESSED
            flags = blobmeta.V2_COMPRESSED | blobmeta.V2_ZRAN
        plain_at = info.uncompressed_size
        index = self.next_index()
        row = self.table.add(name, self.place, record_flags, stored_size, size, at, plain_at, index, crc)
        self.entries += blobmeta.pack_v2(blobmeta.EntryV2(at, stored_size, plain_at, size, flags, data))
        if self._keep_digests:
            self.digests += name
        info.uncompressed_size = plain_at + (size + 4095 & ~4095)
        return row

    def finish_data(self) -> None:
        self.flush()
        if self._slices is not None:
            contexts, self.context_count = self._slices.finish()
            self.contexts += contexts
            self.dictionaries = self._slices.dictionaries
        super().finish_data()
