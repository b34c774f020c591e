"""Batch chunks: small chunks compressed together; reference: RAFS format 4.6."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

CONTEXT = Struct("<II32x")


class BatchContext(NamedTuple):
    """One batch: bytes stored in the blob, and once decompressed (the sum of its members, unaligned)."""

    compressed_size: int
    uncompressed_batch_size: int


def pack_context(context: BatchContext) -> bytes:
    return CONTEXT.pack(*context)


def unpack_context(data: bytes | memoryview, offset: int = 0) -> BatchContext:
    return BatchContext._make(CONTEXT.unpack_from(data, offset))
