"""Random access into gzip files: contexts (restart points) and the decoding of a slice. Reference: RAFS format 7.2."""

from __future__ import annotations

import ctypes

from bootstrap.errors import CodecError, FormatError
from bootstrap.layout.zran import CONTEXT, MAX_CTX_BITS, MAX_DICT_SIZE, MAX_OUT_LEN, ZranContext, unpack_context
from bootstrap.zlibstream import GZIP, RAW, Inflate

__all__ = ["Contexts", "decode_slice"]

MAX_MEMBERS = 65536
"""Gzip members in one slice. Each costs a few us of Python, so a hostile slice of empty ones must end."""

_STRUCTURE = "zran context"


class Contexts:
    """The contexts and dictionaries of one blob, as they lie in the uncompressed blob meta.

    `data` is that region, contexts start at `offset` and they and the dictionaries take `size` bytes, `count` is their
    number (ci_zran_offset, ci_zran_size and ci_zran_count of the header). `compressed_size` is the length of the gzip
    file. Nothing is read ahead: a context is checked when it is asked for. Raises FormatError.
    """

    def __init__(self, data: memoryview | bytes, offset: int, size: int, count: int, compressed_size: int) -> None:
        if offset < 0 or size < 0 or offset + size > len(data):
            raise FormatError(_STRUCTURE + "s", offset, f"{size} bytes do not lie within {len(data)}")
        if not 0 <= count * CONTEXT.size <= size:
            raise FormatError(_STRUCTURE + "s", offset, f"{count} of them do not fit {size} bytes")
        self._data = memoryview(data)
        self._offset = offset
        self._count = count
        self._dictionaries = offset + count * CONTEXT.size
        self._dictionaries_size = size - count * CONTEXT.size
        self._compressed_size = compressed_size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> ZranContext:
        if not 0 <= index < self._count:
            raise FormatError(_STRUCTURE, self._offset, f"index {index} of {self._count}")
        at = self._offset + index * CONTEXT.size
        context = unpack_context(self._data, at)
        if context.out_len > MAX_OUT_LEN or not context.out_len:
            raise FormatError(_STRUCTURE, at, f"out_len {context.out_len} is not in 1..{MAX_OUT_LEN}")
        if context.in_offset + context.in_len > self._compressed_size or not context.in_len:
            raise FormatError(
                _STRUCTURE,
                at,
                f"in_offset {context.in_offset}, in_len {context.in_len} in a file of {self._compressed_size} bytes",
            )
        if context.dict_size > MAX_DICT_SIZE or context.dict_offset + context.dict_size > self._dictionaries_size:
            raise FormatError(
                _STRUCTURE,
                at,
                f"dict_offset {context.dict_offset}, dict_size {context.dict_size} of {self._dictionaries_size} bytes",
            )
        if context.ctx_bits > MAX_CTX_BITS:
            raise FormatError(_STRUCTURE, at, f"ctx_bits {context.ctx_bits} is more than {MAX_CTX_BITS}")
        return context

    def dictionary(self, context: ZranContext) -> memoryview:
        """The bytes that come before the slice, for a context from here."""
        start = self._dictionaries + context.dict_offset
        return self._data[start : start + context.dict_size]


def decode_slice(
    context: ZranContext, dictionary: bytes | memoryview, stored: bytes | memoryview, size: int | None = None
) -> bytearray:
    """The first `size` (default: all `out_len`) bytes that the slice decompresses to.

    `stored` is the gzip file from `in_offset` on, `in_len` bytes of it. Where a gzip member ends inside the slice its
    trailer and the header of the next one are skipped. Thread-safe, releases the GIL. Raises CodecError if these bytes
    do not give that many; it does not tell right bytes from wrong ones, the chunk's digest does.
    """
    wanted = context.out_len if size is None else size
    if not 0 <= wanted <= context.out_len <= MAX_OUT_LEN:
        raise CodecError(f"zran slice: {wanted} bytes of a slice of {context.out_len}")
    if len(stored) != context.in_len:
        raise CodecError(f"zran slice: {len(stored)} stored bytes instead of {context.in_len}")
    if not 0 <= context.ctx_bits <= MAX_CTX_BITS or len(dictionary) != context.dict_size:
        raise CodecError(f"zran slice: {context.ctx_bits} bits, dictionary of {len(dictionary)} bytes")
    out = bytearray(wanted)
    if not wanted:
        return out
    inflate = Inflate(RAW)
    if context.ctx_bits:
        inflate.prime(context.ctx_bits, context.ctx_byte >> (8 - context.ctx_bits))
    if dictionary:
        inflate.set_dictionary(bytes(dictionary))
    window = (ctypes.c_char * wanted).from_buffer(out)
    address = ctypes.addressof(window)
    stored = bytes(stored)
    inflate.feed(stored)
    members = 0
    produced = 0
    while produced < wanted:
        got = inflate.inflate_into(address + produced, wanted - produced)
        produced += got
        if produced == wanted:
            break
        if inflate.ended:
            # The first member was entered behind its header, so its trailer is still ahead; zlib reads those of all
            # later ones itself.
            behind = len(stored) - inflate.left + (0 if members else 8)
            members += 1
            if behind >= len(stored) or members > MAX_MEMBERS:
                raise CodecError(f"zran slice: ends after {produced} of {wanted} bytes and {members} gzip members")
            if members == 1:
                inflate.feed(stored[behind:])
                stored = stored[behind:]
            inflate.reset(GZIP)
        elif not got or not inflate.left:
            raise CodecError(f"zran slice: {context.in_len} stored bytes give {produced} of {wanted} bytes")
    del window
    return out
