"""Writes one data blob front to back: chunks, blob meta, digests, bootstrap, table of contents.

Reference: RAFS format 4. Chunks come in order; digest, checksum and compression of several of them run in a small
thread pool, results are taken in order, so the output does not depend on timing.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from crc32c import crc32c

from bootstrap.codec import compress
from bootstrap.digest import digest
from bootstrap.errors import BuildError
from bootstrap.layout import blobmeta, toc
from bootstrap.layout.common import INLINE_BLOB_ID, ChunkFlags, Compressor
from bootstrap.options import BuildOptions
from bootstrap.tree import BlobInfo, Chunk

MAX_INDEX = 0xFFFFFF
BATCH_BYTES = 1 << 19
"""Work is handed to the pool in pieces of at least this size: a task costs 40 us, a 2 KiB chunk alone 25 us."""

_COMPRESSED = int(ChunkFlags.COMPRESSED)
_HAS_CRC = int(ChunkFlags.HAS_CRC)

Item = tuple["list[Chunk]", bytes]
Packed = tuple[bytes, int, "bytes | None"]


class BlobWriter:
    """Appends chunks to `out` and finishes the blob around them.

    `known` maps (digest, uncompressed size) to chunks that need not be stored again; it grows. `progress` is called
    with the number of uncompressed bytes taken in. Use as a context manager: it owns the thread pool.
    """

    def __init__(
        self,
        out: BinaryIO,
        options: BuildOptions,
        known: dict[tuple[bytes, int], Chunk] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._write_raw = out.write
        self._options = options
        self._known = {} if known is None else known
        self._progress = progress
        self._framed = options.inline_meta or options.blob_toc
        self.info = BlobInfo(
            id="",
            chunk_size=options.chunk_size,
            compressor=options.compressor,
            digester=options.digester,
            features=options.features,
        )
        self.sha256: Any = hashlib.sha256()
        """Of every byte written so far."""
        self.size = 0
        self._hash_for_id: Any = self.sha256
        self._meta = bytearray()
        self._digests = bytearray()
        self._toc: list[toc.TocEntry] = []
        self._items: list[Item] = []
        self._items_size = 0
        self._running: deque[tuple[list[Item], Future[list[Packed]]]] = deque()
        self._pool = ThreadPoolExecutor(options.threads, "chunk") if options.threads > 1 else None

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    # -- chunks

    def add(self, sink: list[Chunk], data: bytes) -> None:
        """Take one chunk of a file; the stored or reused chunk is appended to `sink`, at the latest by `flush`."""
        self._items.append((sink, data))
        self._items_size += len(data)
        if self._items_size >= BATCH_BYTES:
            self._submit()

    def flush(self) -> None:
        """Write everything taken so far."""
        self._submit()
        while self._running:
            self._commit()

    def _submit(self) -> None:
        items, self._items, self._items_size = self._items, [], 0
        if not items:
            return
        if self._pool is None:
            self._store(items, self._pack(items))
            return
        self._running.append((items, self._pool.submit(self._pack, items)))
        # Memory: at most 2 tasks per thread, each one chunk or BATCH_BYTES of small ones.
        while len(self._running) > 2 * self._options.threads or (self._running and self._running[0][1].done()):
            self._commit()

    def _commit(self) -> None:
        items, future = self._running.popleft()
        self._store(items, future.result())

    def _pack(self, items: list[Item]) -> list[Packed]:
        """Runs in the pool. Skips compression of what is stored already; a miss here costs time, never a byte."""
        digester, compressor, known = self._options.digester, self._options.compressor, self._known
        done: list[Packed] = []
        for _, data in items:
            name = digest(digester, data)
            if (name, len(data)) in known:
                done.append((name, 0, b""))
            else:
                done.append((name, crc32c(data), compress(compressor, data)))
        return done

    def _store(self, items: list[Item], packed: list[Packed]) -> None:
        info, known = self.info, self._known
        aligned, v6 = self._options.aligned, self._options.fs_version == 6
        taken = 0
        for (sink, data), (name, crc, stored) in zip(items, packed, strict=True):
            size = len(data)
            taken += size
            chunk = known.get((name, size))
            if chunk is None:
                flags = _HAS_CRC if crc else 0  # readers refuse the flag together with 0
                if stored is None:
                    stored = data
                else:
                    flags |= _COMPRESSED
                index = info.chunk_count
                if index >= MAX_INDEX:
                    raise BuildError(f"more than {MAX_INDEX} chunks in one layer; use a larger chunk size")
                chunk = Chunk(
                    name, info, flags, len(stored), size, info.compressed_size, info.uncompressed_size, index, crc
                )
                known[name, size] = chunk
                if v6:
                    self._meta += blobmeta.pack_v1(info.compressed_size, len(stored), info.uncompressed_size, size)
                    self._digests += name
                info.chunk_count = index + 1
                info.compressed_size += len(stored)
                info.uncompressed_size += (size + 4095) & ~4095 if aligned else size
                self._write(stored)
            sink.append(chunk)
        if self._progress is not None:
            self._progress(taken)

    # -- the rest of the blob

    def _write(self, data: bytes | bytearray) -> None:
        self._write_raw(data)
        self.sha256.update(data)
        if self._hash_for_id is not self.sha256:
            self._hash_for_id.update(data)
        self.size += len(data)

    def _frame(self, name: str, size: int) -> None:
        if self._framed:
            self._write(toc.pack_tar_header(name, size))

    def finish_data(self) -> None:
        """Everything that lies before the bootstrap: blob meta and digest array behind the chunks (4.7, 4.8)."""
        self.flush()
        info, options = self.info, self._options
        data_size = info.compressed_size
        if not info.chunk_count:
            return
        self._frame(toc.IMAGE_BLOB, data_size)
        self._toc.append(
            toc.TocEntry(
                toc.IMAGE_BLOB, Compressor.NONE, self.sha256.digest(), 0, data_size, info.uncompressed_size
            )
        )
        if options.fs_version == 6:
            self._write_meta()
        if options.blob_toc:
            # The id is the hash of everything but these bytes (4.10).
            self._hash_for_id = self.sha256.copy()
            at = self.size
            self._write_raw(self._digests)
            self.sha256.update(self._digests)
            self.size += len(self._digests)
            self._frame(toc.BLOB_DIGEST, len(self._digests))
            plain = hashlib.sha256(self._digests).digest()
            size = len(self._digests)
            self._toc.append(toc.TocEntry(toc.BLOB_DIGEST, Compressor.NONE, plain, at, size, size))
        info.compressed_size = self.size

    def _write_meta(self) -> None:
        info, meta = self.info, bytes(self._meta)
        stored = compress(self._options.compressor, meta)
        kind = Compressor.NONE if stored is None else self._options.compressor
        if stored is None:
            stored = meta
        info.ci_compressor, info.ci_offset = kind, self.size
        info.ci_compressed_size, info.ci_uncompressed_size = len(stored), len(meta)
        # Upstream fills the place of the zran contexts with the end of the table even when there are none.
        header = blobmeta.HEADER.pack(
            *blobmeta.Header(
                blobmeta.MAGIC,
                int(info.features),
                kind,
                info.chunk_count,
                info.ci_offset,
                info.ci_compressed_size,
                info.ci_uncompressed_size,
            )
        )
        self._write(stored)
        self._write(header)
        self._frame(toc.BLOB_META, len(stored) + len(header))
        at = info.ci_offset
        self._toc.append(
            toc.TocEntry(toc.BLOB_META, kind, hashlib.sha256(meta).digest(), at, len(stored), len(meta))
        )
        size = len(header)
        self._toc.append(
            toc.TocEntry(
                toc.BLOB_META_HEADER,
                Compressor.NONE,
                hashlib.sha256(header).digest(),
                at + len(stored),
                size,
                size,
            )
        )

    def blobs(self) -> list[BlobInfo]:
        """The blob table this blob alone makes: empty when there is no chunk."""
        if not self.info.chunk_count:
            return []
        if self._options.inline_meta:
            self.info.id = INLINE_BLOB_ID
        return [self.info]

    def finish_inline(self, bootstrap: bytes) -> None:
        """Append the bootstrap and, if asked for, the table of contents: the end of a layer blob."""
        stored = compress(Compressor.ZSTD, bootstrap) if self._options.blob_toc else None
        kind = Compressor.NONE if stored is None else Compressor.ZSTD
        if stored is None:
            stored = bootstrap
        at = self.size
        self._write(stored)
        self._frame(toc.IMAGE_BOOT, len(stored))
        plain = hashlib.sha256(bootstrap).digest()
        self._toc.append(toc.TocEntry(toc.IMAGE_BOOT, kind, plain, at, len(stored), len(bootstrap)))
        if self._options.blob_toc:
            self._write_toc(self._toc)

    def finish_separate(self) -> None:
        """End a blob whose bootstrap lies elsewhere; afterwards `info` is complete."""
        info = self.info
        if not info.chunk_count:
            return
        if self._options.blob_toc:
            table = self._write_toc(self._toc)
            info.toc_size, info.toc_digest = len(table), hashlib.sha256(table).digest()
        info.compressed_size = self.size
        info.id = self._options.blob_id or self.id_hash()

    def id_hash(self) -> str:
        """SHA-256 of everything written but the digest array (4.10)."""
        return cast(str, self._hash_for_id.hexdigest())

    def _write_toc(self, entries: Sequence[toc.TocEntry]) -> bytes:
        table = b"".join(map(toc.pack_toc_entry, entries))
        table += toc.pack_tar_header(toc.BLOB_TOC, len(table))
        self._write(table)
        return table
