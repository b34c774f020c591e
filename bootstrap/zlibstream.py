"""The system's zlib, with the calls that Python's own module leaves out.

Random access into gzip needs inflate to stop at deflate block borders (Z_BLOCK), to start in the middle of a byte
(inflatePrime) and to be given the window it would have (inflateSetDictionary). zlib's ABI has been stable since 2004;
its library is found by its soname.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_char_p, c_int, c_uint, c_ulong, c_void_p
from typing import cast

from bootstrap.errors import CodecError, RafsError

__all__ = ["BLOCK", "GZIP", "NO_FLUSH", "RAW", "Inflate", "ZlibMissing"]

RAW = -15
GZIP = 31
"""Window bits: bare deflate data, or gzip members with header and checked trailer; both with a 32 KiB window."""

NO_FLUSH = 0
BLOCK = 5

_OK, _STREAM_END, _NEED_DICT, _BUF_ERROR = 0, 1, 2, -5
_MAX_AVAIL = (1 << 32) - 1
_SONAMES = ("libz.so.1", "libz.so", "libz-ng-compat.so.1", "libz.1.dylib")


class ZlibMissing(RafsError):
    """No shared zlib on this machine."""


class _Stream(ctypes.Structure):
    # next_in is a char pointer so that a bytes object can be assigned to it; it is never read back.
    _fields_ = (
        ("next_in", c_char_p),
        ("avail_in", c_uint),
        ("total_in", c_ulong),
        ("next_out", c_void_p),
        ("avail_out", c_uint),
        ("total_out", c_ulong),
        ("msg", c_char_p),
        ("state", c_void_p),
        ("zalloc", c_void_p),
        ("zfree", c_void_p),
        ("opaque", c_void_p),
        ("data_type", c_int),
        ("adler", c_ulong),
        ("reserved", c_ulong),
    )


_CALLS = {
    "inflateInit2_": (c_void_p, c_int, c_char_p, c_int),
    "inflateReset2": (c_void_p, c_int),
    "inflatePrime": (c_void_p, c_int, c_int),
    "inflateSetDictionary": (c_void_p, c_char_p, c_uint),
    "inflateGetDictionary": (c_void_p, c_void_p, c_void_p),
    "inflate": (c_void_p, c_int),
    "inflateEnd": (c_void_p,),
}


@functools.cache
def _zlib() -> ctypes.CDLL:
    """The library, its calls typed. Foreign calls through it release the GIL."""
    for name in _SONAMES:
        try:
            library = ctypes.CDLL(name)
            for call, arguments in _CALLS.items():
                function = getattr(library, call)
                function.argtypes = arguments
                function.restype = c_int
            library.zlibVersion.restype = c_char_p
        except (OSError, AttributeError):
            continue
        return library
    raise ZlibMissing(
        "gzip layers with random access need the shared library libz.so.1: install zlib1g (Debian, Ubuntu) or zlib"
    )


class Inflate:
    """One inflate state. Not thread-safe; a state is used by one thread at a time.

    `window_bits` is RAW or GZIP. Feed with `feed`, take with `inflate_into`.
    """

    def __init__(self, window_bits: int) -> None:
        self._stream = _Stream()
        self._input = b""
        library = _zlib()
        self._where = ctypes.addressof(self._stream)
        self._call = cast("Callable[[int, int], int]", library.inflate)
        self._library = library
        self._open = False
        version = library.zlibVersion()
        self._check(
            library.inflateInit2_(self._where, window_bits, version, ctypes.sizeof(self._stream)), "inflateInit2"
        )
        self._open = True
        self.ended = False
        """Whether the end of the deflate data (RAW) or of the member's trailer (GZIP) was reached."""

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self._library.inflateEnd(self._where)

    def _check(self, status: int, what: str) -> None:
        if status != _OK:
            detail = self._stream.msg
            raise CodecError(f"zlib: {what}: {detail.decode('latin-1') if detail else f'error {status}'}")

    def reset(self, window_bits: int) -> None:
        """Begin anew behind what was consumed: the next stream, with an empty window."""
        self._check(self._library.inflateReset2(self._where, window_bits), "inflateReset2")
        self.ended = False

    def prime(self, bits: int, value: int) -> None:
        """Put `bits` (1..7) low bits of `value` before the input."""
        self._check(self._library.inflatePrime(self._where, bits, value), "inflatePrime")

    def set_dictionary(self, data: bytes) -> None:
        """What came before, at most 32768 bytes; RAW only, before the first byte is taken."""
        self._check(self._library.inflateSetDictionary(self._where, data, len(data)), "inflateSetDictionary")

    def copy_dictionary(self, address: int) -> int:
        """The window to `address`, where 32768 bytes must fit: the last ones since the start or reset. Their number."""
        size = c_uint()
        self._check(
            self._library.inflateGetDictionary(self._where, address, ctypes.addressof(size)), "inflateGetDictionary"
        )
        return size.value

    def dictionary(self) -> bytes:
        """The window: the last bytes produced since the start or reset, at most 32768 of them."""
        window = ctypes.create_string_buffer(32768)
        size = self.copy_dictionary(ctypes.addressof(window))
        return window.raw[:size]

    def feed(self, data: bytes) -> None:
        """The next input. What was left of the last one is given up: feed when `left` is 0, or feed what remains."""
        if len(data) > _MAX_AVAIL:
            raise ValueError(f"{len(data)} bytes of input at once")
        self._input = data  # keeps the bytes alive; ctypes does too, but only as long as the field stands
        self._stream.next_in = data
        self._stream.avail_in = len(data)

    @property
    def left(self) -> int:
        """Bytes of the input that were not consumed so far."""
        return cast(int, self._stream.avail_in)

    @property
    def data_type(self) -> int:
        """Bits 0..2: unused bits of the last byte consumed; 0x40: in the last block; 0x80: just behind a block."""
        return cast(int, self._stream.data_type)

    def inflate_into(self, address: int, size: int, flush: int = NO_FLUSH) -> int:
        """Produce up to `size` bytes at `address` and return their number.

        Stops when there is no room, no input, at the end of the stream or, with flush BLOCK, at a block border. 0
        means that one of these already held. Raises CodecError for data that is no deflate stream. The caller keeps
        the memory at `address` alive.
        """
        stream = self._stream
        stream.next_out = address
        stream.avail_out = size
        status = self._call(self._where, flush)
        if status == _STREAM_END:
            self.ended = True
        elif status not in (_OK, _BUF_ERROR):
            if status == _NEED_DICT:
                raise CodecError("zlib: the stream asks for a preset dictionary")
            self._check(status, "inflate")
        return size - cast(int, stream.avail_out)
