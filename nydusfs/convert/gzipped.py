"""Layers as gzip files: equal content gives equal bytes."""

from __future__ import annotations

import hashlib
import zlib
from typing import BinaryIO

_HEAD = bytes.fromhex("1f8b08000000000000ff")


class GzipWriter:
    """A gzip file in the form Go's compressor writes, with the digests of both sides."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
        self._plain, self._packed = hashlib.sha256(), hashlib.sha256()
        self._checksum = self._length = self.size = 0
        self._put(_HEAD)

    def _put(self, data: bytes) -> None:
        if data:
            self._packed.update(data)
            self._out.write(data)
            self.size += len(data)

    def write(self, data: bytes | memoryview) -> int:
        self._plain.update(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self._length += len(data)
        self._put(self._deflate.compress(data))
        return len(data)

    def finish(self) -> None:
        self._put(self._deflate.flush())
        self._put(self._checksum.to_bytes(4, "little") + (self._length & 0xFFFFFFFF).to_bytes(4, "little"))

    @property
    def digest(self) -> str:
        return f"sha256:{self._packed.hexdigest()}"

    @property
    def diff_id(self) -> str:
        return f"sha256:{self._plain.hexdigest()}"
