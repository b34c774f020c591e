"""Reads a gzip layer and finds restart points in it: the making of zran contexts. Reference: RAFS format 7.3.

`GzipReader` inflates and remembers the last deflate block border; `SliceMaker` decides at which of them a slice
starts. Positions are those upstream's builder sees, so slices, dictionaries and chunk entries are the same bytes: zlib
is asked for exactly the bytes wanted, because how far it has read into the input depends on that.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from typing import Any, BinaryIO, NamedTuple

from bootstrap.errors import BuildError, CodecError
from bootstrap.layout.zran import (
    MAX_COMP_SIZE,
    MAX_DICT_SIZE,
    MAX_UNCOMP_SIZE,
    MIN_COMP_SIZE,
    ZranContext,
    pack_context,
)
from bootstrap.zlibstream import BLOCK, GZIP, Inflate

__all__ = ["Border", "GzipReader", "SliceMaker"]

log = logging.getLogger(__name__)

INPUT_SIZE = 64 << 10
"""Upstream's input buffer. A border at its end is seen one read later, so its size shows in the entries."""

SCRATCH_SIZE = 1 << 20


class Border(NamedTuple):
    """A deflate block border: where it is, and what inflating from there needs. Offsets in bytes."""

    in_offset: int
    out_offset: int
    ctx_byte: int
    ctx_bits: int
    dict_size: int


class GzipReader:
    """The decompressed bytes of a gzip file of any number of members, read front to back in one pass.

    Not thread-safe. `source` need not be seekable. Zero padding and garbage behind the last member are hashed and
    ignored, as gzip does. Raises BuildError for damaged or truncated data.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._inflate = Inflate(GZIP)
        self._fed = 0  # bytes given to zlib
        self._input = b""
        self._before = 0  # the last byte of the input before `_input`
        self._scratch = bytearray(SCRATCH_SIZE)
        self._view = memoryview(self._scratch)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._scratch))
        self._window = ctypes.create_string_buffer(MAX_DICT_SIZE)
        self._hash: Any = hashlib.sha256()
        self._end = False
        self.size = 0
        """Bytes of the file read so far."""
        self.out_position = 0
        self.border = Border(0, 0, 0, 0, 0)
        """The last one passed."""

    @property
    def in_position(self) -> int:
        """Bytes of the file that were consumed by what was read so far."""
        return self._fed - self._inflate.left

    @property
    def blob_id(self) -> str:
        """SHA-256 of the file as read so far: complete once `read` came to the end."""
        return str(self._hash.hexdigest())

    def window(self) -> bytes:
        """The dictionary of the last border."""
        return self._window.raw[: self.border.dict_size]

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        if size <= SCRATCH_SIZE:
            return bytes(self._view[: self._read(size)])
        pieces = []
        while size:
            got = self._read(min(size, SCRATCH_SIZE))
            if not got:
                break
            pieces.append(bytes(self._view[:got]))
            size -= got
        return b"".join(pieces)

    def _read(self, size: int) -> int:
        inflate, produced = self._inflate, 0
        while produced < size and not self._end:
            if inflate.ended:
                self._next_member()
                continue
            if not inflate.left and not self._fill():
                if self.in_position == 0 and not self.out_position:
                    raise BuildError("the layer is empty")
                raise BuildError("the layer's gzip data ends too early: truncated download?")
            try:
                got = inflate.inflate_into(self._address + produced, size - produced, BLOCK)
            except CodecError as error:
                raise BuildError(f"the layer's gzip data is damaged at {self.in_position}: {error}") from error
            produced += got
            self.out_position += got
            kind = inflate.data_type
            if kind & 0xC0 == 0x80 and not inflate.ended:
                self._remember(kind & 7)
        return produced

    def _remember(self, bits: int) -> None:
        at = self.in_position
        byte = 0
        if bits:
            inside = len(self._input) - self._inflate.left
            byte = self._input[inside - 1] if inside else self._before
        size = self._inflate.copy_dictionary(ctypes.addressof(self._window))
        self.border = Border(at, self.out_position, byte, bits, size)

    def _fill(self) -> bool:
        data = self._source.read(INPUT_SIZE)
        if not data:
            return False
        self._hash.update(data)
        self.size += len(data)
        self._fed += len(data)
        if self._input:
            self._before = self._input[-1]
        self._input = data
        self._inflate.feed(data)
        return True

    def _next_member(self) -> None:
        inflate = self._inflate
        if not inflate.left and not self._fill():
            self._end = True
            return
        rest = self._input[len(self._input) - inflate.left :]
        if rest[0] == 0x1F:
            inflate.reset(GZIP)
            return
        if rest.strip(b"\0"):
            log.warning("gzip layer: ignoring what follows its last member at %d", self.in_position)
        while self._fill():
            pass
        self._end = True


class SliceMaker:
    """Cuts the gzip file of `reader` into slices around the chunks that are read from it.

    Call `begin` before and `end` behind the bytes of a chunk. Slices may overlap.
    """

    def __init__(self, reader: GzipReader) -> None:
        self._reader = reader
        self._slices: list[ZranContext] = []
        self._dictionaries = bytearray()
        self._in_offset = self._out_offset = 0  # where the current slice starts
        self._in_len = self._out_len = 0
        self._chunk_in = self._chunk_out = 0

    def begin(self, chunk_size: int) -> None:
        """A chunk of up to `chunk_size` bytes starts here."""
        reader = self._reader
        self._chunk_in, self._chunk_out = reader.in_position, reader.out_position
        if not self._slices or self._is_full(chunk_size):
            self._open()

    def _is_full(self, chunk_size: int) -> bool:
        if self._reader.border.in_offset == self._in_offset:
            return False
        compressed = self._chunk_in - self._in_offset
        return (
            compressed >= MAX_COMP_SIZE // 2
            or self._chunk_out - self._out_offset + chunk_size >= MAX_UNCOMP_SIZE
            or (self._in_len > MIN_COMP_SIZE and compressed > 2 * self._in_len)
        )

    def _open(self) -> None:
        border = self._reader.border
        dictionary = self._reader.window()
        self._in_offset, self._out_offset = border.in_offset, border.out_offset
        self._slices.append(
            ZranContext(
                border.in_offset,
                border.out_offset,
                len(self._dictionaries),
                0,
                0,
                len(dictionary),
                border.ctx_byte,
                border.ctx_bits,
            )
        )
        self._dictionaries += dictionary

    def end(self) -> tuple[int, int, int]:
        """The chunk ends here. Its `data` field (slice index, offset in it), compressed offset and size."""
        reader = self._reader
        index = len(self._slices) - 1
        self._in_len = reader.in_position - self._in_offset
        self._slices[-1] = self._slices[-1]._replace(
            in_len=self._in_len, out_len=reader.out_position - self._out_offset
        )
        return (
            index << 32 | (self._chunk_out - self._out_offset),
            self._chunk_in,
            reader.in_position - self._chunk_in,
        )

    @property
    def count(self) -> int:
        return len(self._slices)

    def pack(self) -> bytes:
        """All contexts, then all dictionaries."""
        return b"".join(map(pack_context, self._slices)) + self._dictionaries
