"""Sequences of reads: what goes on is read ahead of, what stopped is not taken up by reads from the cache."""

from __future__ import annotations

import pytest

from nydusfs import readahead
from nydusfs.readahead import SEQUENTIAL, STALE, FileStreams

READ = 128 * 1024


def test_a_sequence_goes_on_by_cached_reads_while_it_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(readahead.time, "monotonic", lambda: now[0])
    streams = FileStreams(lambda longest: min(longest, 1 << 20))
    offset, asked = 0, 0
    while not asked:
        start, asked = streams.note(7, offset, READ)
        offset += READ
        assert offset <= 4 * SEQUENTIAL
    ahead = start + asked
    for end in range(offset + READ, 4 << 20, READ):  # from now on all of it is cached
        if streams.due(7, end):
            start, size = streams.note(7, end - READ, READ)
            assert start in (0, ahead)
            ahead += size
        assert end < ahead, "the reader never comes to the end of what was asked for"
    later = next(end for end in range(end + READ, ahead, READ) if streams.due(7, end))
    now[0] += STALE + 0.1
    assert not streams.due(7, later), "another run of the program, say"
    start, size = streams.note(7, later, READ)  # a miss
    assert size > 0
    assert any(streams.due(7, end) for end in range(later + READ, start + size, READ)), "it is fresh again"


def test_what_comes_with_a_miss_is_no_gap_and_no_reading() -> None:
    """A reader whose chunks come whole is asked about at their beginnings, and here and there within."""
    streams = FileStreams(lambda longest: min(longest, 8 << 20))
    chunk, read = 1 << 20, 512 << 10
    streams.note(7, 0, read, chunk)
    assert streams.due(7, chunk), "the rest of the chunk is read: so he goes on"
    begun = 0
    for number in range(1, 6):
        at = number * chunk
        start, size = streams.note(7, at, read, at + chunk)
        if size:
            assert start == max(begun, at + chunk), "behind what is on its way"
            begun = start + size
    assert begun >= 10 * chunk

    streams = FileStreams(lambda longest: min(longest, 8 << 20))
    for number in range(20):  # the first page of each chunk: a sequence that reads little
        at = number * chunk
        assert streams.note(8, at, 4096, at + chunk) == (0, 0)
