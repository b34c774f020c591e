"""Bytes that grow without growing in memory: the restart points of a large gzip layer are a sixteenth of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

PIECE = 1 << 20
IN_MEMORY = 32 << 20


class Spool:
    """Appended to and then read from the start, any number of times; beyond 32 MiB it lies in an unnamed file.

    OSError when the temporary directory is full.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  closed with the object
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, data: bytes) -> None:
        self._file.write(data)
        self._size += len(data)

    def pieces(self) -> Iterator[bytes]:
        """Everything, in pieces of a MiB. Nothing may be appended afterwards."""
        self._file.seek(0)
        while data := self._file.read(PIECE):
            yield data
