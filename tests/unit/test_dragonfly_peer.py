"""What a modern Dragonfly is asked for: pieces it does not have yet as a whole, the rest as it is wanted."""

from __future__ import annotations

from nydusfs.sources.dragonfly import DIRECT, FIRST_PAUSE, HANGS, LONG, MAX_BLOBS, PIECE, Generation, Peer

BLOB = "http://peer/v2/a/b/blobs/sha256:x"
SIZE = 3 * PIECE + 1000
MODERN = {"x-dragonfly-task-id": "t", "content-range": f"bytes 0-9/{SIZE}"}


def modern() -> Peer:
    peer = Peer()
    assert peer.by_range and peer.widened(BLOB, 0, 10, 0.0) is None  # nothing is known of it
    peer.hear(BLOB, MODERN)
    assert not peer.by_range
    return peer


def fetch(peer: Peer, start: int, end: int, now: float = 0.0, *, arrived: bool = True) -> tuple[int, int] | None:
    asked = peer.widened(BLOB, start, end, now)
    if asked is not None:
        peer.begin(BLOB, asked)
        assert peer.coming(BLOB, start, end) is not None
        peer.end(BLOB, asked, 0.0 if arrived else LONG, now, arrived=arrived)
        assert peer.coming(BLOB, start, end) is None
    return asked


def test_generations_tell_themselves_apart() -> None:
    peer = Peer()
    for headers, generation, by_range in (
        ({"x-dragonfly-task": "t"}, Generation.CLASSIC, True),
        ({"x-dragonfly-task-id": "t"}, Generation.MODERN, False),
        ({"server": "nginx"}, Generation.NONE, False),
    ):
        peer.hear(BLOB, headers)
        assert (peer.generation, peer.by_range) == (generation, by_range)


def test_pieces_are_asked_for_once_and_as_a_whole() -> None:
    peer = modern()
    assert fetch(peer, 100, 200) == (0, PIECE)
    assert fetch(peer, 300, PIECE) is None  # here by now
    assert fetch(peer, PIECE - 10, PIECE + 10) == (0, 2 * PIECE)
    assert PIECE > DIRECT
    assert peer.widened("http://peer/another", 100, 200, 0.0) == (0, PIECE)
    peer.forget()  # another process
    assert fetch(peer, 100, 200) == (0, PIECE)


def test_who_waits_for_a_piece_is_told_however_many_blobs_are_asked_for_meanwhile() -> None:
    peer = modern()
    asked = peer.widened(BLOB, 0, 10, 0.0)
    assert asked is not None
    peer.begin(BLOB, asked)
    coming = peer.coming(BLOB, 0, 10)
    for number in range(2 * MAX_BLOBS):
        peer.widened(f"{BLOB}{number}", 0, 10, 0.0)
    peer.end(BLOB, asked, 1.0, 1.0, arrived=True)
    assert coming is not None and coming.is_set()
    assert len(peer._blobs) == MAX_BLOBS


def test_the_end_of_a_blob_is_asked_for_with_what_is_before_it() -> None:
    peer = modern()
    assert fetch(peer, SIZE - 10, SIZE) == (2 * PIECE, SIZE)
    small = Peer()
    small.hear(BLOB, {**MODERN, "content-range": "bytes 0-9/5000"})
    assert small.widened(BLOB, 0, 10, 0.0) is None  # peers never share it


def test_a_frozen_scheduler_is_asked_for_nothing_for_a_while() -> None:
    peer = modern()
    for _ in range(HANGS):
        assert fetch(peer, 0, 10, 1.0, arrived=False) is not None
    assert fetch(peer, 0, 10, 2.0) is None
    assert fetch(peer, 0, 10, 1.1 + FIRST_PAUSE, arrived=False) is not None
    assert fetch(peer, 0, 10, 1.2 + 2 * FIRST_PAUSE) is None  # twice as long
    assert fetch(peer, 0, 10, 1.2 + 3 * FIRST_PAUSE) is not None
    assert fetch(peer, PIECE, PIECE + 10, 1.3 + 3 * FIRST_PAUSE, arrived=False) is not None
    assert fetch(peer, PIECE, PIECE + 10, 1.4 + 3 * FIRST_PAUSE) is not None  # one that came makes good
