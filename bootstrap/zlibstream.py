"""inflate with the calls that Python's zlib module leaves out.

Random access into gzip needs inflate to stop at deflate block borders (Z_BLOCK), to start in the middle of a byte
(inflatePrime) and to be given the window it would have (inflateSetDictionary). These calls are made through ctypes, on
zlib-ng where it is at hand (a shared library of its own, or the one inside the `zlib-ng` package, which exports its
native API), else on the system's zlib. Both stop at the same places; zlib-ng takes half the time (a layer of 500 MB:
0.74 and 1.45 s).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Iterator
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_ulong, c_void_p
from dataclasses import dataclass
from typing import Any, cast

from bootstrap.errors import CodecError, RafsError

__all__ = ["BLOCK", "GZIP", "NO_FLUSH", "RAW", "Engine", "Inflate", "ZlibMissing", "engines"]

RAW = -15
GZIP = 31
"""Window bits: bare deflate data, or gzip members with header and checked trailer; both with a 32 KiB window."""

NO_FLUSH = 0
BLOCK = 5

_OK, _STREAM_END, _NEED_DICT, _BUF_ERROR = 0, 1, 2, -5
_MAX_AVAIL = (1 << 32) - 1


class ZlibMissing(RafsError):
    """No zlib of any kind on this machine."""


def _fields(total: Any, adler: Any) -> tuple[tuple[str, Any], ...]:
    # next_in is a char pointer so that a bytes object can be assigned to it; it is never read back.
    return (
        ("next_in", c_char_p),
        ("avail_in", c_uint),
        ("total_in", total),
        ("next_out", c_void_p),
        ("avail_out", c_uint),
        ("total_out", total),
        ("msg", c_char_p),
        ("state", c_void_p),
        ("zalloc", c_void_p),
        ("zfree", c_void_p),
        ("opaque", c_void_p),
        ("data_type", c_int),
        ("adler", adler),
        ("reserved", c_ulong),
    )


class _ZStream(ctypes.Structure):
    _fields_ = _fields(c_ulong, c_ulong)


class _ZngStream(ctypes.Structure):
    _fields_ = _fields(c_size_t, c_uint)


_CALLS = {
    "inflateReset2": (c_void_p, c_int),
    "inflatePrime": (c_void_p, c_int, c_int),
    "inflateSetDictionary": (c_void_p, c_char_p, c_uint),
    "inflateGetDictionary": (c_void_p, c_void_p, c_void_p),
    "inflate": (c_void_p, c_int),
    "inflateEnd": (c_void_p,),
}


@dataclass(frozen=True, slots=True)
class Engine:
    """One implementation: its calls by zlib's names (they release the interpreter's lock), its stream structure."""

    name: str
    stream: type[ctypes.Structure]
    init: Callable[[int, int], int]
    calls: dict[str, Callable[..., int]]


def _typed(library: ctypes.CDLL, name: str, *arguments: Any) -> Callable[..., int]:
    function = getattr(library, name)
    function.argtypes = arguments
    function.restype = c_int
    return cast("Callable[..., int]", function)


def _zlib(name: str) -> Engine:
    library = ctypes.CDLL(name)
    version = getattr(library, "zlibVersion")  # noqa: B009  typed as any function otherwise
    version.restype = c_char_p
    start = _typed(library, "inflateInit2_", c_void_p, c_int, c_char_p, c_int)

    def init(where: int, window_bits: int) -> int:
        return start(where, window_bits, version(), ctypes.sizeof(_ZStream))

    return Engine(name, _ZStream, init, {call: _typed(library, call, *types) for call, types in _CALLS.items()})


def _zlib_ng(name: str) -> Engine:
    library = ctypes.CDLL(name)
    init = _typed(library, "zng_inflateInit2", c_void_p, c_int)
    return Engine(name, _ZngStream, init, {call: _typed(library, f"zng_{call}", *t) for call, t in _CALLS.items()})


def _packaged() -> str:
    """The extension module of the zlib-ng package."""
    try:
        found = importlib.util.find_spec("zlib_ng.zlib_ng")
    except ImportError:
        found = None
    if found is None or found.origin is None:
        raise OSError("no zlib-ng package")
    return found.origin


def engines() -> Iterator[Engine]:
    """Those this machine has, the fastest first."""
    loads: tuple[Callable[[], Engine], ...] = (
        lambda: _zlib_ng("libz-ng.so.2"),
        lambda: _zlib_ng(_packaged()),
        lambda: _zlib("libz.so.1"),
        lambda: _zlib("libz.so"),
    )
    for load in loads:
        try:
            found = load()
        except (OSError, AttributeError):
            continue
        if _works(found):
            yield found


def _works(engine: Engine) -> bool:
    """Whether the library is what it seems: it inflates a few known bytes and says where it stopped."""
    room = ctypes.create_string_buffer(16)
    try:
        inflate = Inflate(RAW, engine)
        inflate.feed(b"\xcb\x48\xcd\xc9\xc9\x07\x00\x00")  # "hello" and one byte too many
        size = inflate.inflate_into(ctypes.addressof(room), 16)
    except CodecError:
        return False
    return room.raw[:size] == b"hello" and inflate.ended and inflate.left == 1


@functools.cache
def _engine() -> Engine:
    for found in engines():
        return found
    raise ZlibMissing(
        "gzip layers with random access need the Python package zlib-ng, or the shared library libz.so.1: install "
        "zlib1g (Debian, Ubuntu) or zlib"
    )


class Inflate:
    """One inflate state. Not thread-safe; a state is used by one thread at a time.

    `window_bits` is RAW or GZIP. Feed with `feed`, take with `inflate_into`. `engine`: by default the fastest.
    """

    def __init__(self, window_bits: int, engine: Engine | None = None) -> None:
        found = engine or _engine()
        self._calls = found.calls
        self._stream: Any = found.stream()
        self._input = b""
        self._where = ctypes.addressof(self._stream)
        self._inflate = found.calls["inflate"]
        self._open = False
        self._check(found.init(self._where, window_bits), "inflateInit2")
        self._open = True
        self.ended = False
        """Whether the end of the deflate data (RAW) or of the member's trailer (GZIP) was reached."""

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self._calls["inflateEnd"](self._where)

    def _check(self, status: int, what: str) -> None:
        if status != _OK:
            detail = self._stream.msg
            raise CodecError(f"zlib: {what}: {detail.decode('latin-1') if detail else f'error {status}'}")

    def reset(self, window_bits: int) -> None:
        """Begin anew behind what was consumed: the next stream, with an empty window."""
        self._check(self._calls["inflateReset2"](self._where, window_bits), "inflateReset2")
        self.ended = False

    def prime(self, bits: int, value: int) -> None:
        """Put `bits` (1..7) low bits of `value` before the input."""
        self._check(self._calls["inflatePrime"](self._where, bits, value), "inflatePrime")

    def set_dictionary(self, data: bytes) -> None:
        """What came before, at most 32768 bytes; RAW only, before the first byte is taken."""
        self._check(self._calls["inflateSetDictionary"](self._where, data, len(data)), "inflateSetDictionary")

    def copy_dictionary(self, address: int) -> int:
        """The window to `address`, where 32768 bytes must fit: the last ones since the start or reset. Their number."""
        size = c_uint()
        self._check(
            self._calls["inflateGetDictionary"](self._where, address, ctypes.addressof(size)), "inflateGetDictionary"
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
        status = self._inflate(self._where, flush)
        if status == _STREAM_END:
            self.ended = True
        elif status not in (_OK, _BUF_ERROR):
            if status == _NEED_DICT:
                raise CodecError("zlib: the stream asks for a preset dictionary")
            self._check(status, "inflate")
        return size - cast(int, stream.avail_out)
