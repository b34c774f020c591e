"""A thread that produces blocks ahead of a reader: decompression beside chunking."""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Iterator

DEPTH = 4  # blocks in flight, 1 MiB each


class ReadAhead(io.RawIOBase):
    """A readable stream over an iterator of byte blocks that runs in a thread of its own.

    What the iterator raises is raised by `read`, at its place in the stream. `close` ends the thread.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._queue: queue.Queue[bytes | BaseException | None] = queue.Queue(DEPTH)
        self._stop = threading.Event()
        self._block = b""
        self._at = 0
        self._end: BaseException | bool = False
        self._thread = threading.Thread(target=self._pump, args=(blocks,), name="read-ahead", daemon=True)
        self._thread.start()

    def _put(self, item: bytes | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def _pump(self, blocks: Iterator[bytes]) -> None:
        try:
            for block in blocks:
                if not self._put(block):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def readable(self) -> bool:
        return True

    def _fill(self) -> bool:
        """Whether there is something to read in `_block`."""
        while self._at >= len(self._block):
            if self._end:
                if isinstance(self._end, BaseException):
                    raise self._end
                return False
            item = self._queue.get()
            if item is None:
                self._end = True
            elif isinstance(item, bytes):
                self._block, self._at = item, 0
            else:
                self._end = item
        return True

    def read(self, size: int = -1) -> bytes:
        """`size` bytes unless the stream ends before (unlike a raw stream, never short in the middle)."""
        if size is None or size < 0:
            size = 1 << 62
        end = self._at + size
        if end <= len(self._block):  # the common case: a header or a small file inside one block
            data = self._block[self._at : end]
            self._at = end
            return data
        pieces = []
        while size and self._fill():
            piece = self._block[self._at : self._at + size]
            self._at += len(piece)
            size -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stop.set()
        super().close()
