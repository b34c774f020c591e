"""What a thread that answers reads from the cache brings along."""

from __future__ import annotations

from collections.abc import Callable

LEAST = 128 << 10  # bytes


class Hands:
    """Room for the bytes of one answer, used again for the next: with a fresh 1 MiB each time the kernel gives and
    clears 256 pages, which takes as long as copying the data. `waits` is called before a call that may wait for the
    disk, so that somebody else can answer other requests meanwhile; `later` takes what need not be in the reader's way.
    Belongs to one thread."""

    __slots__ = ("_later", "_room", "_used", "stop", "stopped")

    def __init__(self) -> None:
        self._room = memoryview(b"")
        self._used = 0
        self._later: list[Callable[[], object]] = []
        self.stop: Callable[[], None] | None = None  # ends what it waits for
        self.stopped = 0  # the error that its reader is to get, if it cannot be answered at once

    def begin(self) -> None:
        """The next answer: what `room` gave before may be written over."""
        self._used = 0

    def later(self, call: Callable[[], object]) -> None:
        """To be done once the answer is given, or there is none."""
        self._later.append(call)

    def finish(self) -> None:
        """Do what was left for later."""
        while self._later:
            self._later.pop(0)()

    def room(self, size: int) -> memoryview:
        """So many writable bytes, with whatever was in them."""
        start = self._used
        end = self._used = start + size
        if end > len(self._room):  # views of the old one keep it
            self._room = memoryview(bytearray(max(end, LEAST)))
        return self._room[start:end]

    def waits(self) -> None:
        pass

    def give_up(self, code: int) -> None:
        """Wait for no server any more: the reader was killed, or the daemon is to end. From any thread."""
        self.stopped = code
        if (stop := self.stop) is not None:
            stop()
