"""Stored bytes to plain ones, and whether these are the image's. Reference: RAFS format 4.3 to 4.5.

Pure functions for worker threads: codecs and digests release the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence

from bootstrap import crypt
from bootstrap.base import Blob, Chunk
from bootstrap.codec import decompress, zstd_many
from bootstrap.digest import digest, function
from bootstrap.errors import CodecError, DigestMismatch
from bootstrap.layout.common import BlobFeatures, ChunkFlags, Compressor

__all__ = ["decode_chunk", "decode_together", "decrypt_blob", "is_legacy_stargz", "verify", "verify_crc", "where"]

NO_DIGEST = bytes(32)
# As plain numbers: `&` with an enumeration takes longer than the digest of a small chunk.
_COMPRESSED, _ENCRYPTED = int(ChunkFlags.COMPRESSED), int(ChunkFlags.ENCRYPTED)


def where(chunk: Chunk, blob: Blob) -> str:
    """What errors call a chunk."""
    return f"chunk {chunk.index} of blob {blob.id}"


def is_legacy_stargz(blob: Blob) -> bool:
    """An `estargztoc-ref` blob (7.5): one gzip member or zstd frame per chunk, whose stored size is an upper bound."""
    if blob.compressor != Compressor.GZIP and not (  # only a blob of somebody else's is zstd:chunked
        blob.compressor == Compressor.ZSTD and blob.features & BlobFeatures.SEPARATE
    ):
        return False
    return bool(blob.ci_uncompressed_size and not blob.features & BlobFeatures.CHUNK_INFO_V2)


def decode_chunk(chunk: Chunk, blob: Blob, stored: bytes | memoryview) -> bytes:
    """The plain bytes of a chunk stored by itself: length, decompression and digest checked.

    Raises CodecError when the bytes do not decode, DigestMismatch when they decode to something else than the image
    was built from. Members of batches and slices decode through `ChunkMap.decode`.
    """
    if len(stored) != chunk.compressed_size or not stored:
        raise CodecError(f"{where(chunk, blob)}: {len(stored)} bytes instead of {chunk.compressed_size}")
    size = chunk.uncompressed_size
    stargz = is_legacy_stargz(blob)
    compressed = chunk.flags & _COMPRESSED or stargz
    try:
        if chunk.flags & _ENCRYPTED:
            stored = decrypt_blob(blob, stored, None if compressed else size)
        if compressed:
            plain = decompress(blob.compressor, stored, size, begins=stargz)
        elif len(stored) == size:
            plain = bytes(stored)
        else:
            raise CodecError(f"stored plain but with two sizes, {len(stored)} and {size}")
    except CodecError as error:
        raise CodecError(f"{where(chunk, blob)}: {error}") from error
    verify(chunk, blob, plain)
    return plain


def decode_together(chunks: Sequence[Chunk], blob: Blob, offset: int, stored: memoryview) -> list[memoryview] | None:
    """`decode_chunk` of many small chunks, stored by themselves in `stored` (which begins at `offset` of the blob), by
    one call: 10 us for each of 8 KiB, where one by one they take 23. None where that cannot be done, or one of them is
    wrong: `decode_chunk` says which and why. The caller has seen to it that their sizes together are sensible."""
    if blob.compressor != Compressor.ZSTD or is_legacy_stargz(blob):
        return None
    places: list[int] = []
    sizes: list[int] = []
    for chunk in chunks:
        if chunk.flags & _ENCRYPTED or not chunk.compressed_size:
            return None
        if chunk.flags & _COMPRESSED:
            places += chunk.compressed_offset - offset, chunk.compressed_size
            sizes.append(chunk.uncompressed_size)
    packed = zstd_many(stored, places, sizes) if sizes else []
    if packed is None:
        return None
    unpacked, found = iter(packed), list[memoryview]()
    right = function(blob.digester)
    for chunk in chunks:
        if chunk.flags & _COMPRESSED:
            plain = next(unpacked)
        else:
            begin = chunk.compressed_offset - offset
            plain = stored[begin : begin + chunk.compressed_size]
        if len(plain) != chunk.uncompressed_size or chunk.digest == NO_DIGEST or right(plain) != chunk.digest:
            return None
        found.append(plain)
    return found


def decrypt_blob(blob: Blob, stored: bytes | memoryview, size: int | None = None) -> bytes:
    """`stored` of an encrypted blob decrypted by the key in the blob table; `size` as for `crypt.decrypt`."""
    secret = crypt.from_table(blob.cipher, blob.meta_digest, blob.meta_size, blob.cipher_iv)
    return crypt.decrypt(secret, stored, size)


def verify(chunk: Chunk, blob: Blob, plain: bytes | bytearray | memoryview) -> None:
    """DigestMismatch unless `plain` is this chunk.

    The digest decides where there is one, also where upstream is content with the CRC. External chunks have none
    (5.15): there the CRC vouches, and a chunk without either must not be served.
    """
    if chunk.digest == NO_DIGEST:
        verify_crc(chunk, blob, plain)
    elif digest(blob.digester, plain) != chunk.digest:
        raise DigestMismatch(f"{where(chunk, blob)}: its {blob.digester.label} digest is wrong")


def verify_crc(chunk: Chunk, blob: Blob, plain: bytes | bytearray | memoryview) -> None:
    """DigestMismatch unless the chunk has a CRC-32C and it is that of `plain`."""
    from crc32c import crc32c

    if not chunk.flags & ChunkFlags.HAS_CRC:
        raise DigestMismatch(f"{where(chunk, blob)}: has neither digest nor CRC, nothing vouches for its bytes")
    if crc32c(plain) != chunk.crc32:
        raise DigestMismatch(f"{where(chunk, blob)}: its CRC-32C is wrong")
