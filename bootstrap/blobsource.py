"""The data of an image from files: any chunk, any file, verified; for tools that work on local blobs.

with open_bootstrap(path) as image, open_blobs(image, folder) as blobs:
    for part in blobs.read_file(ino): ...
"""

from __future__ import annotations

import mmap
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from bootstrap import blobmeta
from bootstrap.base import HOLE, Blob, Bootstrap
from bootstrap.cacheform import DATA_SUFFIX, META_SUFFIX, CacheForm
from bootstrap.chunkmap import Chunk, ChunkMap, Member, Unit
from bootstrap.errors import FormatError, RafsError
from bootstrap.layout.common import BlobFeatures
from bootstrap.tarmap import PIECE_SIZE, TarDigests, TarMap

_HOLE_PART = 1 << 20
KEPT_UNITS = 64 << 20
"""Bytes of decoded batches and slices that are kept: files are rarely asked for in the order of their data."""


class BlobReader(Protocol):
    """Where stored blobs are read from."""

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        """Exactly these bytes of a blob. Raises RafsError when they cannot be had."""

    def close(self) -> None: ...


class Folder:
    """Blobs named by their ids in a directory; also the file the bootstrap itself lies in, and blobs in cache form."""

    def __init__(self, folder: str | os.PathLike[str], bootstrap_path: str = "") -> None:
        self._folder = os.fspath(folder)
        self._own = bootstrap_path
        self._files: dict[str, int | CacheForm] = {}

    def path(self, blob_id: str) -> str:
        """The file of a blob; it may not exist."""
        path = os.path.join(self._folder, blob_id)
        if not os.path.exists(path) and os.path.basename(self._own).split(".", 1)[0] == blob_id:
            return self._own
        return path

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        path = self.path(blob_id)
        try:
            file = self._files.get(blob_id)
            if file is None:
                file = self._files[blob_id] = self._open(path)
            data = _pread(file, size, offset)
        except OSError as error:
            raise RafsError(f"cannot read blob {path}: {error.strerror}") from error
        if len(data) != size:
            raise FormatError(f"blob {path}", offset, f"ends after {len(data)} of {size} bytes")
        return data

    @staticmethod
    def _open(path: str) -> int | CacheForm:
        if not os.path.exists(path) and os.path.exists(path + DATA_SUFFIX):
            return CacheForm(path)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        for file in self._files.values():
            if isinstance(file, int):
                os.close(file)
            else:
                file.close()
        self._files.clear()


def _pread(file: int | CacheForm, size: int, offset: int) -> bytes:
    if not isinstance(file, int):
        return file.pread(size, offset)
    data = os.pread(file, size, offset)
    while 0 < len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
        data += more
    return data


def local_meta(image: Bootstrap, blob: Blob) -> blobmeta.BlobMeta | None:
    """The blob meta that lies beside the bootstrap, as `<id>.blob.meta` of the blob or of its meta blob; else None.

    Raises FormatError for a file that is not the blob's.
    """
    folder = os.path.dirname(image.path)
    names = [blob.id, blob.meta_digest.hex()] if blob.features & BlobFeatures.SEPARATE else [blob.id]
    for name in names:
        path = os.path.join(folder, name + META_SUFFIX)
        try:
            # A layer brought it: no link to files elsewhere is followed, no pipe waited for, no device opened.
            if not stat.S_ISREG(os.lstat(path).st_mode):
                continue
            with open(path, "rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError):  # not there, or empty
            continue
        try:
            return blobmeta.open_cache_form(blob, data)
        except FormatError as error:
            raise FormatError(f"{path}: {error.structure}", error.offset, error.message) from error
    return None


class Part(NamedTuple):
    """A piece of a file still to be decoded: `length` bytes at `begin` of the chunk stored alone in `stored`."""

    member: Member
    stored: bytes
    begin: int
    length: int


class Blobs:
    """The chunks of one image. Errors are RafsError and name blob and chunk.

    Not for several threads at once, but for `decode`.
    """

    def __init__(self, image: Bootstrap, source: BlobReader, chunks: ChunkMap) -> None:
        self.image = image
        self.chunks = chunks
        self.source = source
        self._units: OrderedDict[tuple[int, Unit], dict[int, bytes | memoryview]] = OrderedDict()  # chunks by row
        self._kept = 0

    def need_meta(self, blob: Blob) -> None:
        """Read and attach what the bootstrap does not say about a blob's chunks, if that is needed."""
        if not self.chunks.lacks_meta(blob.index):
            return
        if isinstance(self.chunks, TarMap):
            digests = TarDigests(blob)
            for offset in range(0, blob.compressed_size, 16 * PIECE_SIZE):
                size = min(16 * PIECE_SIZE, blob.compressed_size - offset)
                digests.update(self.source.read(blob.id, offset, size))
            self.chunks.attach_digests(blob.index, digests.finish())
            return
        meta = local_meta(self.image, blob)
        if meta is None:
            own = os.path.basename(self.image.path).split(".", 1)[0]
            where = blobmeta.meta_range(blob, own)
            region, header = blobmeta.read_meta(blob, where, self.source.read(*where[:3]))
            meta = blobmeta.BlobMeta(blob, region, header)
        self.chunks.attach(blob.index, meta)

    def read_chunk(self, chunk: Chunk) -> bytes:
        """Its plain bytes, verified."""
        return bytes(self._row(chunk.blob_index, self._find(chunk.blob_index, chunk.uncompressed_offset, 1)))

    def read_chunks(self, blob_index: int) -> Iterator[tuple[Chunk, bytes | memoryview]]:
        """All chunks of a blob that the image uses, in the order of their places, each unit decoded once."""
        return ((chunk, self.decode(part)) for chunk, part in self.blob_parts(blob_index))

    def blob_parts(self, blob_index: int) -> Iterator[tuple[Chunk, bytes | memoryview | Part]]:
        """As `read_chunks`, but chunks stored alone are left for `decode`."""
        self.need_meta(self.image.blobs[blob_index])
        for row in self.chunks.blob_rows(blob_index):
            chunk = self.chunks.chunk(row)
            yield chunk, self._part(blob_index, row, chunk.uncompressed_offset, chunk.uncompressed_size)

    def read_stored(self, unit: Unit, blob: Blob) -> bytes:
        """The stored bytes of a unit, unverified."""
        return self.source.read(blob.id, unit.start, unit.end - unit.start)

    def read_file(self, ino: int) -> Iterator[bytes | memoryview]:
        """All bytes of a regular file in parts of at most a chunk."""
        return map(self.decode, self.file_parts(ino))

    def file_parts(self, ino: int) -> Iterator[bytes | memoryview | Part]:
        """As `read_file`, but chunks stored alone are left for `decode`, which may run in other threads."""
        size, offset, step = self.image.attr(ino).size, 0, self.image.chunk_size * 16
        while offset < size:
            for extent in self.image.extents(ino, offset, min(step, size - offset)):
                if extent.blob_index == HOLE:
                    for at in range(0, extent.size, _HOLE_PART):
                        yield bytes(min(_HOLE_PART, extent.size - at))
                    continue
                self.need_meta(self.image.blobs[extent.blob_index])
                try:
                    pieces = self.chunks.pieces(extent.blob_index, extent.blob_offset, extent.size)
                except KeyError:
                    raise self._missing(extent.blob_index, extent.blob_offset) from None
                for row, start, length in pieces:
                    yield self._part(extent.blob_index, row, start, length)
            offset += step

    def chunk_part(self, chunk: Chunk) -> bytes | memoryview | Part:
        """A whole chunk in the same way."""
        row = self._find(chunk.blob_index, chunk.uncompressed_offset, chunk.uncompressed_size)
        return self._part(chunk.blob_index, row, chunk.uncompressed_offset, chunk.uncompressed_size)

    def decode(self, part: bytes | memoryview | Part) -> bytes | memoryview:
        """The verified bytes of a part. Thread-safe."""
        if not isinstance(part, Part):
            return part
        plain = self.chunks.decode([part.member], part.stored)[0]
        return plain if part.length == len(plain) else plain[part.begin : part.begin + part.length]

    def _part(self, blob_index: int, row: int, start: int, length: int) -> bytes | memoryview | Part:
        member = self.chunks.member(row)
        begin = start - member.chunk.uncompressed_offset
        if member.unit.kind == "chunk":
            return Part(member, self.read_stored(member.unit, self.image.blobs[blob_index]), begin, length)
        return self._row(blob_index, row)[begin : begin + length]

    def _find(self, blob_index: int, offset: int, size: int) -> int:
        self.need_meta(self.image.blobs[blob_index])
        try:
            return self.chunks.find(blob_index, offset, size)
        except KeyError:
            raise self._missing(blob_index, offset) from None

    def _missing(self, blob_index: int, offset: int) -> FormatError:
        return FormatError("chunk table", 0, f"no chunk holds {offset:#x} of blob {self.image.blobs[blob_index].id}")

    def _row(self, blob_index: int, row: int) -> bytes | memoryview:
        """A chunk. One that shares its unit brings its neighbours along, the unit is then decoded once for all."""
        member = self.chunks.member(row)
        blob = self.image.blobs[blob_index]
        if member.unit.kind == "chunk":
            return self.chunks.decode([member], self.read_stored(member.unit, blob))[0]
        key = blob_index, member.unit
        found = self._units.get(key)
        if found is None or row not in found:  # a hostile table may scatter a unit
            rows, members = self._neighbours(blob_index, row, member)
            plain = self.chunks.decode(members, self.read_stored(member.unit, blob))
            found = self._units[key] = dict(zip(rows, plain, strict=True))
            self._kept += sum(map(len, plain))
            while self._kept > KEPT_UNITS and len(self._units) > 1:
                self._kept -= sum(map(len, self._units.popitem(last=False)[1].values()))
        else:
            self._units.move_to_end(key)
        return found[row]

    def _neighbours(self, blob_index: int, row: int, member: Member) -> tuple[list[int], list[Member]]:
        """The rows around this one that lie in the same unit."""
        rows, members = [row], [member]
        every = self.chunks.blob_rows(blob_index)
        for direction in (range(row + 1, every.stop), range(row - 1, every.start - 1, -1)):
            for other in direction:
                following = self.chunks.member(other)
                if following.unit != member.unit:
                    break
                rows.append(other)
                members.append(following)
        return rows, members

    def close(self) -> None:
        self._units.clear()
        self.chunks.close()
        self.source.close()

    def __enter__(self) -> Blobs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_blobs(image: Bootstrap, where: str | os.PathLike[str] | BlobReader) -> Blobs:
    """All data of an image: `where` is a directory of blobs named by their ids, or a `BlobReader`.

    Nothing is read yet. `close` also closes a reader that was given. Raises FormatError for contradicting chunks.
    """
    chunks = ChunkMap.open(image, None)
    source = Folder(where, image.path) if isinstance(where, (str, os.PathLike)) else where
    return Blobs(image, source, chunks)


__all__ = ["BlobReader", "Blobs", "Folder", "Part", "local_meta", "open_blobs"]
