"""Compression of chunks, blob meta and inlined bootstraps; reference: RAFS format 4.3.

Safe to call from many threads: zstd contexts are kept per thread, and every codec releases the GIL while it works.
"""

from __future__ import annotations

import threading
import zlib
from array import array
from collections.abc import Sequence
from typing import cast

import lz4.block
import lz4.frame
import zstandard

from bootstrap.errors import CodecError
from bootstrap.layout.common import Compressor

ZSTD_LEVEL = 3

_local = threading.local()


def _zstd_compressor() -> zstandard.ZstdCompressor:
    # A context costs about 1 MB of tables: one per thread instead of one per chunk.
    found = getattr(_local, "compressor", None)
    if found is None:
        found = _local.compressor = zstandard.ZstdCompressor(
            level=ZSTD_LEVEL, write_content_size=True, write_checksum=False
        )
    return cast("zstandard.ZstdCompressor", found)


def zstd_stream(size: int) -> zstandard.ZstdCompressionObj:
    """Compresses `size` bytes given piece by piece into one frame."""
    return _zstd_compressor().compressobj(size=size)


def _zstd_decompressor() -> zstandard.ZstdDecompressor:
    found = getattr(_local, "decompressor", None)
    if found is None:
        found = _local.decompressor = zstandard.ZstdDecompressor()
    return cast("zstandard.ZstdDecompressor", found)


def compress(kind: Compressor, data: bytes | bytearray | memoryview) -> bytes | None:
    """`data` compressed, or None when that would not be smaller: it is then stored raw.

    Raises CodecError for gzip, which images only ever read.
    """
    if kind == Compressor.NONE or not data:
        return None
    if kind == Compressor.ZSTD:
        out = _zstd_compressor().compress(data)
    elif kind == Compressor.LZ4_BLOCK:
        out = _lz4_block(data)
    else:
        raise CodecError(f"cannot write chunks with {kind.label}")
    return out if len(out) < len(data) else None


_LZ4_SMALL = 65547
"""From this size on (64 KiB and a bit, LZ4_64Klimit) both of liblz4's ways to compress use the same match table."""


def _lz4_block(data: bytes | bytearray | memoryview) -> bytes:
    """What LZ4_compress_default makes, to the byte, so that blobs have the id upstream's builder gives them.

    The block API of the binding uses liblz4's streaming call, whose match table differs below 64 KiB and so some
    outputs do; a frame of one independent block holds the right bytes: 7 bytes of header, u32 size (top bit: stored
    raw), block, u32 end mark. It costs 4.5 instead of 2.9 us for 3 kB.
    """
    if len(data) >= _LZ4_SMALL:
        return cast(bytes, lz4.block.compress(data, mode="default", store_size=False))
    frame = lz4.frame.compress(
        data,
        compression_level=0,
        block_size=lz4.frame.BLOCKSIZE_MAX256KB,
        block_linked=False,
        content_checksum=False,
        block_checksum=False,
        store_size=False,
    )
    stored_raw = frame[10] & 0x80
    return bytes(data) if stored_raw else cast(bytes, frame[11:-4])


def decompress(kind: Compressor, data: bytes | bytearray | memoryview, size: int, *, begins: bool = False) -> bytes:
    """The `size` bytes that `data` stands for; CodecError unless it decodes to exactly that many (gzip, and zstd that
    only `begins` with them: or more).

    `size` comes from a record that was bounds-checked before: it limits what a hostile stream can make us allocate.
    """
    try:
        if kind == Compressor.ZSTD:
            out = _zstd_begin(data, size) if begins else _zstd_exact(data, size)
        elif kind == Compressor.LZ4_BLOCK:
            out = lz4.block.decompress(data, uncompressed_size=size) if size else b""
        elif kind == Compressor.GZIP:
            # eStargz: behind a chunk its member goes on with padding and the next header; the digest covers the chunk.
            out = zlib.decompressobj(31).decompress(data, size) if size else b""
        else:
            out = bytes(data)
    except (zstandard.ZstdError, lz4.block.LZ4BlockError, zlib.error, ValueError, OverflowError) as error:
        raise CodecError(f"{kind.label} data does not decode: {error}") from error
    if len(out) != size:
        raise CodecError(f"{kind.label} data decodes to {len(out)} bytes instead of {size}")
    return out


def zstd_many(stored: memoryview, places: Sequence[int], sizes: Sequence[int]) -> list[memoryview] | None:
    """Many frames decoded by one call, which has not the GIL all the while; `places`: begin and length of each in
    `stored`, `sizes`: what each decodes to. None when it cannot be done: `decompress` one by one, which says why."""
    many = getattr(_zstd_decompressor(), "multi_decompress_to_buffer", None)
    if many is None:  # linked to the system's libzstd
        return None
    try:
        frames = zstandard.BufferWithSegments(stored, array("Q", places).tobytes())
        return [memoryview(plain) for plain in many(frames, decompressed_sizes=array("Q", sizes).tobytes())]
    except (zstandard.ZstdError, ValueError, OverflowError):
        return None


def _zstd_begin(data: bytes | bytearray | memoryview, size: int) -> bytes:
    # zstd:chunked: as with gzip, behind a chunk its frame goes on with padding and the next header
    stream = _zstd_decompressor().stream_reader(data, read_across_frames=False)
    return stream.read(size)


def _zstd_exact(data: bytes | bytearray | memoryview, size: int) -> bytes:
    # The one-shot call allocates what the frame header says, so look at the header first.
    declared = zstandard.frame_content_size(data)
    if declared == size and size:
        return _zstd_decompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    if declared not in (-1, size):
        raise CodecError(f"zstd frame holds {declared} bytes instead of {size}")
    stream = _zstd_decompressor().stream_reader(data, read_across_frames=False)
    return stream.read(size + 1)
