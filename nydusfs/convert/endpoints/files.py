"""Streams over parts of local files, read by position so that threads can share a descriptor."""

from __future__ import annotations

import hashlib
import io
import os
from typing import TYPE_CHECKING

from nydusfs.errors import ConvertError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class FilePart(io.RawIOBase):
    """`size` bytes of a file from `offset` on. With `digest` the read that reaches the end raises ConvertError if the
    bytes have another one; only reading from front to back is possible then. Owns a duplicate of `descriptor`."""

    def __init__(self, descriptor: int, offset: int, size: int, what: str, digest: str = "") -> None:
        self._descriptor = os.dup(descriptor)
        self._offset = offset
        self._size = size
        self._what = what
        self._digest = digest
        self._hash = hashlib.sha256() if digest else None
        self._position = 0
        self._verified = not digest

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._hash is None

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if self._hash is not None:
            raise io.UnsupportedOperation("seek")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._position))
        if count:
            got = os.preadv(self._descriptor, [view[:count]], self._offset + self._position)
            if got == 0:
                raise ConvertError(f"{self._what} ends at byte {self._position} of {self._size}")
            self._position += got
            if self._hash is not None:
                self._hash.update(view[:got])
        else:
            got = 0
        if self._position == self._size and not self._verified:
            self._verify()
        return got

    def _verify(self) -> None:
        assert self._hash is not None
        found = f"sha256:{self._hash.hexdigest()}"
        if found != self._digest:
            raise ConvertError(f"{self._what} is damaged: its digest is {found}")
        self._verified = True

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
