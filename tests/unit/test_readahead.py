"""Sequences of reads: what goes on is read ahead of, what stopped is not taken up by reads from the cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from nydusfs import readahead
from nydusfs.flights import Job, evenly
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


def test_requests_that_are_told_late_or_in_another_order_end_no_sequence() -> None:
    chunk, read = 1 << 20, 512 << 10
    streams = FileStreams(lambda longest: min(longest, 16 << 20), chunk)
    places = [number * read for number in range(64)]
    for number in range(0, 64, 4):  # by twos, and the last but one after those
        places[number : number + 4] = [places[number + at] for at in (1, 0, 3, 2)]
    asked = [streams.note(7, at, read) for at in places]
    begun = [one for one in asked if one[1]]
    assert len(begun) <= 8
    assert all(start % chunk == 0 and size % chunk == 0 for start, size in begun)
    assert [start for start, _ in begun[1:]] == [start + size for start, size in begun[:-1]], "each part once"
    assert streams.note(7, 61 * read, read) == (0, 0), "told late"
    start, size = begun[-1]
    assert streams.note(7, start + size - read, read)[1] >= 4 << 20, "and it goes on as if nothing had happened"
    streams.note(7, 2 * chunk, read)
    assert streams.note(7, 2 * chunk + read, read) == (0, 0), "who goes far back begins anew"
    assert streams.note(7, 3 * chunk, read) == (4 * chunk, 2 * chunk)


def test_what_the_kernel_reads_behind_a_fault_is_no_sequence() -> None:
    """Of a program's page faults, by EROFS: which segments are fetched is what the program reads, by either driver."""
    chunk, window = 256 << 10, 128 << 10
    streams = FileStreams(lambda longest: min(longest, 16 << 20), chunk)
    for fault in (19_300_352, 7_888_896, 72_351_744, 16_859_136):
        for number in range(5):
            at = fault + number * window
            assert streams.note(7, at, window, -(-(at + window) // chunk) * chunk) == (0, 0)


def test_a_file_of_some_chunks_is_fetched_by_few_requests() -> None:
    """As the kernel asks for what `cat` reads: a small request, then larger ones, of which those that a whole chunk
    answers are not told."""
    chunk = 1 << 20
    streams = FileStreams(lambda longest: min(longest, 16 << 20), chunk)
    assert streams.note(7, 0, 256 << 10) == (0, 0)
    assert streams.note(7, 768 << 10, chunk) == (2 * chunk, 3 * chunk)
    assert streams.note(7, 1792 << 10, chunk) == (5 * chunk, 3 * chunk)
    assert streams.note(7, 2816 << 10, chunk) == (0, 0)
    assert streams.note(7, 3840 << 10, chunk) == (8 * chunk, 6 * chunk)


def test_what_is_read_ahead_leaves_no_small_rest() -> None:
    def jobs(*sizes: int) -> list[Job]:
        return [
            cast(Job, SimpleNamespace(segment=SimpleNamespace(compressed_start=0, compressed_end=size)))
            for size in sizes
        ]

    half = 540_000
    assert evenly(jobs(half, half), 2 * half - 1000) >= 2 * half, "what is a hair too long is one request"
    assert evenly(jobs(half, half), half) < 2 * half, "but over a slow link"
    assert 5 * half <= evenly(jobs(*[half] * 9), 4.5 * half) < 7 * half, "two of about the same length"
    assert evenly(jobs(*[half] * 40), 1e9) < 20 * half, "and none of any length"
