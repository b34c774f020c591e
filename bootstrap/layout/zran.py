"""Restart points inside a gzip layer (OCI reference mode); reference: RAFS format 7.2.

Behind the chunk entries of the blob meta: contexts, then all dictionaries one after the other.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

CONTEXT = Struct("<QQQIIIBB2x")
MAX_OUT_LEN = 16 << 20
MAX_DICT_SIZE = 32768
MAX_CTX_BITS = 7

# How the writer cuts slices (7.3), bytes.
MIN_COMP_SIZE = 512 << 10
MAX_COMP_SIZE = 1 << 20
MAX_UNCOMP_SIZE = 2 << 20


class ZranContext(NamedTuple):
    """One slice. `in_*` count in the gzip file, `out_*` in the tar, `dict_*` in the dictionary area; all in bytes.

    `ctx_bits` high bits of `ctx_byte`, the byte before `in_offset`, still belong to the stream.
    """

    in_offset: int
    out_offset: int
    dict_offset: int
    in_len: int
    out_len: int
    dict_size: int
    ctx_byte: int
    ctx_bits: int


def pack_context(context: ZranContext) -> bytes:
    return CONTEXT.pack(*context)


def unpack_context(data: bytes | memoryview, offset: int = 0) -> ZranContext:
    return ZranContext._make(CONTEXT.unpack_from(data, offset))
