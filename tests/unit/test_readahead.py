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
