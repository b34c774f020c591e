"""Counters of one mounted image, in the units and buckets of upstream's `/api/v1/metrics`."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from enum import IntEnum
from typing import Any

from nydusfs.counters import SIZE_EDGES

READ_LATENCY_LIMITS = (200, 1_000, 20_000, 50_000, 500_000, 1_000_000, 2_000_000)  # microseconds, upper bounds


SLOW = 2_000_000  # nanoseconds: no cached read takes this long, but where the disk does
MAX_SLOW = 128  # files


class Fop(IntEnum):
    GETATTR = 0
    READLINK = 1
    OPEN = 2
    RELEASE = 3
    READ = 4
    STATFS = 5
    GETXATTR = 6
    LISTXATTR = 7
    OPENDIR = 8
    LOOKUP = 9
    READDIR = 10
    READDIRPLUS = 11
    ACCESS = 12
    FORGET = 13
    BATCH_FORGET = 14


_READ = int(Fop.READ)


class _FileStats:
    __slots__ = ("blocks", "data_read", "errors", "first", "hits", "reads")

    def __init__(self) -> None:
        self.hits = [0] * len(Fop)
        self.errors = [0] * len(Fop)
        self.blocks = [0] * 8
        self.data_read = 0
        self.reads = 0
        self.first = 0  # ns of wall clock at the first read


class FsStats:
    """Counters grow for ever. Per-file counters exist only when the configuration asks for them."""

    def __init__(
        self, mount_id: str, *, files: bool = False, access_pattern: bool = False, latest_files: bool = False
    ) -> None:
        self.id = mount_id
        self.files_enabled = files
        self.pattern_enabled = access_pattern
        self.latest_enabled = latest_files
        self.hits = [0] * len(Fop)
        self.errors = [0] * len(Fop)
        self.latency = [0] * len(Fop)  # nanoseconds
        self.data_read = 0
        self.blocks = [0] * 8
        self.read_latency = [0] * 8
        self.first_read = 0  # ns of wall clock at the end of the first read
        self.first_took = 0  # ns
        self.slow: dict[int, list[int]] = {}  # inode -> reads of SLOW and more, their ns, the longest's
        self._least_slow = 0  # nanoseconds of the last that made room
        self.failed: dict[int, int] = {}  # inode -> reads that failed
        self._per_file = files or access_pattern
        self._files: dict[int, _FileStats] = {}
        self._latest: set[int] = set()
        self._watch = self._per_file or latest_files

    @property
    def watched(self) -> bool:
        """Whether every read is of interest, and which file it is of."""
        return self._watch

    def count(self, fop: int, ino: int, nanoseconds: int, failed: bool) -> None:
        self.hits[fop] += 1
        self.latency[fop] += nanoseconds
        if failed:
            self.errors[fop] += 1
            if fop == _READ and (ino in self.failed or len(self.failed) < MAX_SLOW):
                self.failed[ino] = self.failed.get(ino, 0) + 1
        if self._per_file:
            record = self._file(ino)
            record.hits[fop] += 1
            record.errors[fop] += failed

    def count_read(self, ino: int, asked: int, returned: int, nanoseconds: int) -> None:
        """A read that was answered."""
        self.hits[_READ] += 1
        self.latency[_READ] += nanoseconds
        bucket = bisect_right(SIZE_EDGES, asked)
        self.data_read += returned
        self.blocks[bucket] += 1
        self.read_latency[bisect_left(READ_LATENCY_LIMITS, nanoseconds // 1000)] += 1
        if nanoseconds >= SLOW:
            self._note_slow(ino, nanoseconds)
        if not self.first_read:
            self.first_read, self.first_took = time.time_ns(), nanoseconds
        if not self._watch:
            return
        if self.latest_enabled:
            self._latest.add(ino)
        if self._per_file:
            record = self._file(ino)
            record.hits[_READ] += 1
            record.first = record.first or time.time_ns()
            record.reads += 1
            record.data_read += returned
            record.blocks[bucket] += 1

    def _note_slow(self, ino: int, nanoseconds: int) -> None:
        entry = self.slow.get(ino)
        if entry is None:
            if len(self.slow) >= MAX_SLOW:
                if nanoseconds <= self._least_slow:  # on a busy machine every read is slow: 20 us to look for the least
                    return
                # another thread may do the same at this moment
                least, (_, self._least_slow, _) = min(list(self.slow.items()), key=lambda one: one[1][1])
                self.slow.pop(least, None)
            entry = self.slow[ino] = [0, 0, 0]
        entry[0] += 1
        entry[1] += nanoseconds
        entry[2] = max(entry[2], nanoseconds)

    def _file(self, ino: int) -> _FileStats:
        record = self._files.get(ino)
        if record is None:
            record = self._files[ino] = _FileStats()
        return record

    def public(self) -> dict[str, Any]:
        return {
            "files_account_enabled": self.files_enabled,
            "access_pattern_enabled": self.pattern_enabled,
            "record_latest_read_files_enabled": self.latest_enabled,
            "measure_latency": True,
            "id": self.id,
            "nr_opens": self.hits[Fop.OPEN],
            "data_read": self.data_read,
            "block_count_read": list(self.blocks),
            "fop_hits": list(self.hits),
            "fop_errors": list(self.errors),
            "fop_cumulative_latency_total": [total // 1000 for total in self.latency],
            "read_latency_dist": list(self.read_latency),
        }

    def files(self) -> dict[str, Any]:
        if not self.files_enabled:
            return {}
        return {
            str(ino): {
                "total_fops": sum(record.hits),
                "data_read": record.data_read,
                "block_count_read": record.blocks,
                "fop_hits": record.hits,
                "fop_errors": record.errors,
            }
            for ino, record in sorted(self._files.items())
        }

    def take_latest(self) -> list[list[int]]:
        """Inodes read since the last call, as ranges: `[[1, 5], [8]]`. Asking clears the list."""
        ranges: list[list[int]] = []
        for ino in sorted(self._latest):
            if ranges and ino == ranges[-1][-1] + 1:
                ranges[-1] = [ranges[-1][0], ino]
            else:
                ranges.append([ino])
        self._latest.clear()
        return ranges

    def pattern(self) -> list[dict[str, int]]:
        if not self.pattern_enabled:
            return []
        return [
            {
                "ino": ino,
                "nr_read": record.reads,
                "first_access_time_secs": record.first // 10**9,
                "first_access_time_nanos": record.first % 10**9,
            }
            for ino, record in sorted(self._files.items())
            if record.reads
        ]
