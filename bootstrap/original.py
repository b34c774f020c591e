"""The layer file that an image refers to, as the tar inside it: read once, front to back, hashed on the way.

`GzipLayer` also remembers the last deflate block border it passed, from which `bootstrap.slices` makes restart points.
zlib is asked for exactly the bytes wanted, because how far it has read into its input depends on that, and these
positions are part of what upstream's builder writes (RAFS format 7.3).
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import logging
from typing import Any, BinaryIO, NamedTuple, cast

from bootstrap.errors import BuildError, CodecError
from bootstrap.layout.zran import MAX_DICT_SIZE
from bootstrap.zlibstream import BLOCK, GZIP, Inflate

__all__ = ["Border", "GzipLayer", "PlainLayer", "open_original"]

log = logging.getLogger(__name__)

INPUT_SIZE = 64 << 10
"""Upstream's input buffer. A block border at its end is seen one read later, so its size shows in the chunk entries."""

READ_SIZE = 1 << 20


def open_original(stream: BinaryIO) -> GzipLayer | PlainLayer:
    """The tar inside a layer file that is gzip (any number of members) or no archive at all.

    Nothing else can be referred to: BuildError for zstd and its kin.
    """
    head = b""
    while len(head) < INPUT_SIZE and (more := stream.read(INPUT_SIZE - len(head))):
        head += more
    if head.startswith(b"\x1f\x8b"):
        return GzipLayer(stream, head)
    for magic, name in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz")):
        if head.startswith(magic):
            raise BuildError(
                f"the layer is compressed with {name}, which has no random access: only gzip and plain tar layers can "
                f"be referred to; convert it instead (--type tar-rafs)"
            )
    return PlainLayer(stream, head)


class _Hashed(io.RawIOBase):
    """`head` and then `stream`, hashed and counted."""

    def __init__(self, stream: BinaryIO, head: bytes) -> None:
        self._stream = stream
        self._head = head
        self.hash: Any = hashlib.sha256()
        self.size = 0

    def readable(self) -> bool:
        return True

    def take(self, size: int) -> bytes:
        """Up to `size` bytes; none only at the end."""
        data, self._head = self._head, b""
        if not data:
            data = self._stream.read(size) or b""
        elif len(data) > size:
            data, self._head = data[:size], data[size:]
        self.hash.update(data)
        self.size += len(data)
        return data

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        data = self.take(len(view))
        view[: len(data)] = data
        return len(data)


class PlainLayer(io.BufferedReader):
    """A layer that is a plain tar."""

    def __init__(self, stream: BinaryIO, head: bytes = b"") -> None:
        self._hashed = _Hashed(stream, head)
        super().__init__(self._hashed, READ_SIZE)

    @property
    def stored_size(self) -> int:
        """Bytes of the file; complete when `read` came to the end."""
        return self._hashed.size

    @property
    def blob_id(self) -> str:
        """SHA-256 of the file; complete when `read` came to the end."""
        return cast(str, self._hashed.hash.hexdigest())


class Border(NamedTuple):
    """A deflate block border: where it is and what inflating from there needs. Offsets in bytes, `in_` in the gzip
    file, `out_` in the tar; the upper `ctx_bits` bits of `ctx_byte`, the byte before, belong to the next block."""

    in_offset: int
    out_offset: int
    ctx_byte: int
    ctx_bits: int
    dict_size: int


class GzipLayer(io.RawIOBase):
    """A layer that is a gzip file of any number of members.

    Not thread-safe. `stream` need not be seekable. Zero padding and garbage behind the last member are hashed and
    otherwise ignored, as gzip does. `read` raises BuildError for damaged or truncated data.
    """

    def __init__(self, stream: BinaryIO, head: bytes = b"") -> None:
        self._file = _Hashed(stream, head)
        self._inflate = Inflate(GZIP)
        self._input = b""
        self._before = 0  # the last byte of the input before `_input`
        self._scratch = bytearray(READ_SIZE)
        self._view = memoryview(self._scratch)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._scratch))
        self._window = ctypes.create_string_buffer(MAX_DICT_SIZE)
        self._window_address = ctypes.addressof(self._window)
        self._end = False
        self.out_position = 0
        """Bytes given out so far."""
        self.border = Border(0, 0, 0, 0, 0)
        """The last one passed from which one can go on."""

    def readable(self) -> bool:
        return True

    @property
    def stored_size(self) -> int:
        """Bytes of the file; complete when `read` came to the end."""
        return self._file.size

    @property
    def blob_id(self) -> str:
        """SHA-256 of the file; complete when `read` came to the end."""
        return cast(str, self._file.hash.hexdigest())

    @property
    def in_position(self) -> int:
        """Bytes of the file that zlib has consumed so far."""
        return self._file.size - self._inflate.left

    def window(self) -> bytes:
        """The dictionary of the last border."""
        return self._window.raw[: self.border.dict_size]

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes (-1: all); fewer only at the end."""
        if 0 <= size <= READ_SIZE:
            return bytes(self._view[: self._read(size)])
        pieces = []
        while size:
            got = self._read(READ_SIZE if size < 0 else min(size, READ_SIZE))
            if not got:
                break
            pieces.append(bytes(self._view[:got]))
            size -= got if size > 0 else 0
        return b"".join(pieces)

    def _read(self, size: int) -> int:
        inflate, produced = self._inflate, 0
        while produced < size and not self._end:
            if inflate.ended:
                self._next_member()
                continue
            if not inflate.left and not self._fill():
                raise BuildError("the layer's gzip data ends too early: truncated download?")
            try:
                got = inflate.inflate_into(self._address + produced, size - produced, BLOCK)
            except CodecError as error:
                raise BuildError(f"the layer's gzip data is damaged at {self.in_position}: {error}") from error
            produced += got
            self.out_position += got
            # Behind the last block of a member comes its trailer: nothing can go on there. Upstream takes that border
            # too, and when a file starts right behind it, makes a slice that cannot be decoded.
            if inflate.data_type & 0xC0 == 0x80 and not inflate.ended:
                self._remember(inflate.data_type & 7)
        return produced

    def _remember(self, bits: int) -> None:
        byte = 0
        if bits:
            inside = len(self._input) - self._inflate.left
            byte = self._input[inside - 1] if inside else self._before
        size = self._inflate.copy_dictionary(self._window_address)
        self.border = Border(self.in_position, self.out_position, byte, bits, size)

    def _fill(self) -> bool:
        data = self._file.take(INPUT_SIZE)
        if not data:
            return False
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
        rest = self._input[-inflate.left :]
        if rest[0] == 0x1F:
            inflate.reset(GZIP)
            return
        if rest.strip(b"\0"):
            log.warning("gzip layer: ignoring what follows its last member at %d", self.in_position)
        while self._fill():
            pass
        self._end = True
