"""What a Dragonfly peer needs to hear so that peers share what they fetch. Pure state, no I/O.

Its two generations keep different things, and tell themselves apart in the headers of their answers:
- classic (2.0, Go): one task per exact range. What another node asked for is found only under the same range, so
  nothing may be merged into ranges that depend on what was read before (`Peer.by_range`).
- modern (client in Rust): one task per blob, in pieces. A request of at most 4 MiB goes to the registry, never to
  peers, and costs a whole piece all the same. So a piece that was not asked for yet is asked for as a whole, and pieces
  are made a little longer than 4 MiB; of the answer only what was wanted is read. Later reads of the piece are local.

Measured with the origin at 5 MB/s: such a request is answered after 0.1 s when another peer has the piece, after 1.1 s
when nobody has it; one of 64 KiB always after 0.9 s. Two peers, one origin request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from enum import Enum

import trio

from nydusfs.sources.base import Priority

DIRECT = 4 << 20  # bytes: the longest request, and the largest blob, that a modern peer takes to the registry itself
PIECE = DIRECT + 4096
PIECE_HEADER = ("X-Dragonfly-Piece-Length", str(PIECE))  # part of the task's identity: goes with every request
MAX_BLOBS = 256
# A modern peer whose scheduler is frozen answers after 10 s what it asks the scheduler for, and small requests at once.
# Over a slow link it only takes its time, and the piece is there soon, though its first reader was served elsewhere.
LONG = 0.9  # seconds after which a request for a piece that came to nothing counts
HANGS = 3  # such requests in a row
FIRST_PAUSE, MAX_PAUSE = 30.0, 300.0  # seconds without requests for pieces


class Generation(Enum):
    UNKNOWN = "not heard of yet"
    NONE = "no Dragonfly"
    CLASSIC = "classic"
    MODERN = "modern"


def generation(headers: Mapping[str, str]) -> Generation:
    """By the headers (lower case) of an answer that carries data."""
    if "x-dragonfly-task-id" in headers:
        return Generation.MODERN
    return Generation.CLASSIC if "x-dragonfly-task" in headers else Generation.NONE


def proxy_headers(priority: Priority) -> list[tuple[str, str]]:
    """Reference 4.8; 6 lets Dragonfly ask its seed peer first, 3 leaves the fetch to this node's peer."""
    level = "3" if priority is Priority.PREFETCH else "6"
    return [
        ("X-Dragonfly-Use-P2P", "true"),
        ("X-Dragonfly-Prefetch", "true"),
        ("X-Dragonfly-Priority", level),
    ]


def names_dragonfly(headers: Iterable[tuple[str, str]]) -> bool:
    return any(name.lower().startswith("x-dragonfly-") for name, _ in headers)


class _Blob:
    """What is known of one blob behind one address."""

    def __init__(self) -> None:
        self.size = 0  # 0: not known
        self.here: set[int] = set()  # pieces
        self.coming: dict[int, trio.Event] = {}


class Peer:
    """One server as it is used, whatever it turns out to be; shared by all images. Addresses are those of blobs."""

    def __init__(self) -> None:
        self.generation = Generation.UNKNOWN
        self._blobs: OrderedDict[str, _Blob] = OrderedDict()
        self._hung = 0
        self._pause = 0.0
        self._paused_until = float("-inf")

    @property
    def by_range(self) -> bool:
        """Ranges must be those that every node asks for. True as long as the first answer is not here."""
        return self.generation in (Generation.UNKNOWN, Generation.CLASSIC)

    def hear(self, address: str, headers: Mapping[str, str]) -> None:
        """An answer with data."""
        self.generation = generation(headers)
        if self.generation is Generation.MODERN:
            total = headers.get("content-range", "").rpartition("/")[2]
            if total.isascii() and total.isdigit() and len(total) < 20:  # right in this generation; only ever a hint
                self._blob(address).size = int(total)

    def _blob(self, address: str) -> _Blob:
        known = self._blobs.get(address)
        if known is None:
            known = self._blobs[address] = _Blob()
            if len(self._blobs) > MAX_BLOBS:  # what somebody waits for stays
                del self._blobs[next(name for name, blob in self._blobs.items() if not blob.coming)]
        else:
            self._blobs.move_to_end(address)
        return known

    def coming(self, address: str, start: int, end: int) -> trio.Event | None:
        """Set when a request that is to bring a piece of this range has ended; None: there is none."""
        if self.generation is not Generation.MODERN:
            return None
        requests = self._blob(address).coming
        return next((requests[piece] for piece in _pieces(start, end) if piece in requests), None)

    def widened(self, address: str, start: int, end: int, now: float) -> tuple[int, int] | None:
        """The range (start, end) to ask for instead; None: just the one that is wanted."""
        if self.generation is not Generation.MODERN or now < self._paused_until:
            return None
        blob = self._blob(address)
        if all(piece in blob.here for piece in _pieces(start, end)):
            return None
        first, behind = start // PIECE * PIECE, -(-end // PIECE) * PIECE
        if blob.size >= end:
            behind = min(behind, blob.size)
        if behind - first <= DIRECT:  # the end of the blob: with what is before it
            first = max(0, first - PIECE)
        return (first, behind) if behind - first > DIRECT else None

    def begin(self, address: str, asked: tuple[int, int]) -> None:
        arrived = trio.Event()
        for piece in _pieces(*asked):
            self._blob(address).coming.setdefault(piece, arrived)

    def end(self, address: str, asked: tuple[int, int], seconds: float, now: float, *, arrived: bool) -> None:
        """A widened request is over, after so many seconds; `arrived`: what was wanted of it is here."""
        blob = self._blob(address)
        for piece in _pieces(*asked):
            if (event := blob.coming.pop(piece, None)) is not None:
                event.set()
        if arrived:
            blob.here.update(_pieces(*asked))
            self._hung, self._pause = 0, 0.0
        elif seconds >= LONG:
            self._hung += 1
            if self._hung >= HANGS:  # and after a pause at once
                self._pause = min(MAX_PAUSE, self._pause * 2 or FIRST_PAUSE)
                self._paused_until = now + self._pause

    def forget(self) -> None:
        """It failed: perhaps it is another process now, with another cache."""
        for blob in self._blobs.values():
            blob.here.clear()


def _pieces(start: int, end: int) -> range:
    return range(start // PIECE, -(-end // PIECE))
