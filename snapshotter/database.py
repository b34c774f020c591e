"""The one SQLite file of a snapshotter root: schema and its older versions, readers, and writers that share commits.

A commit costs a wait for the disk, whatever it holds. So callers that come while one is under way are written together
by the next (`apply`): 64 clients then wait for the disk a few times, not 64 times.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from snapshotter.errors import ResourceExhausted, SnapshotterError, StartError

log = logging.getLogger(__name__)

NAME = "metadata.sqlite"
SPARE = "metadata.spare"  # the log's room while no snapshotter runs: SQLite takes the log away when it is closed
BUSY_SECONDS = 10.0
READERS = 4  # connections: queries take 20 µs, most of it under Python's lock
CACHE_KIB = 128  # pages of one connection; the kernel caches the file anyway
MOST_TOGETHER = 128  # callers of one commit
CLOSE_SECONDS = 5.0
RESERVED = 4608 << 10  # bytes; SQLite begins the log anew after 1000 pages
# A full or failing disk, a damaged file: no statement of one caller's own
_FOR_ALL = (sqlite3.OperationalError, sqlite3.InternalError)
T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)

_FIRST = """
-- One row per snapshot of any kind; active keys, view keys and committed names share one key space.
CREATE TABLE snapshots (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,  -- name of the directory; AUTOINCREMENT: never given out twice
    key     TEXT NOT NULL UNIQUE,               -- opaque text from the client
    parent  INTEGER REFERENCES snapshots (id),  -- without ON DELETE: a parent with children cannot go
    kind    INTEGER NOT NULL CHECK (kind IN (1, 2, 3)),  -- as on the wire: view, active, committed
    created INTEGER NOT NULL,                   -- nanoseconds since the epoch, UTC
    updated INTEGER NOT NULL,
    size    INTEGER NOT NULL DEFAULT 0,         -- disk usage at commit, bytes
    inodes  INTEGER NOT NULL DEFAULT 0,
    labels  TEXT NOT NULL DEFAULT '{}'          -- JSON object, text to text
) STRICT;
CREATE INDEX snapshots_parent ON snapshots (parent);

-- nydusd processes that were started and not yet destroyed; they outlive this program.
CREATE TABLE daemons (
    id         TEXT PRIMARY KEY,                -- 20 characters; names of directories in socket/, config/, logs/
    shared     INTEGER NOT NULL CHECK (shared IN (0, 1)),
    pid        INTEGER NOT NULL DEFAULT 0,      -- 0: about to be started
    started    INTEGER NOT NULL DEFAULT 0,      -- field 22 of /proc/PID/stat: a pid alone may have been reused
    socket     TEXT NOT NULL,
    mountpoint TEXT NOT NULL
) STRICT;

-- Images being served ("RAFS instances"): one per meta layer snapshot.
CREATE TABLE instances (
    seq       INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of mounting, kept by a remount
    snapshot  INTEGER NOT NULL UNIQUE,            -- id of the meta layer; not a reference: Remove comes before umount
    daemon    TEXT NOT NULL REFERENCES daemons (id) ON DELETE CASCADE,
    image     TEXT NOT NULL,                      -- image reference, for registry, repository and credentials
    bootstrap TEXT NOT NULL                       -- absolute path
) STRICT;

-- Facts about this root. floor: largest directory id that was there before this database.
CREATE TABLE facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
"""

_SECOND = """
-- What containerd looks skipped layers up by: a search by label alone would read every row.
ALTER TABLE snapshots ADD COLUMN ref TEXT
    GENERATED ALWAYS AS (json_extract(labels, '$."containerd.io/snapshot.ref"')) VIRTUAL;
CREATE INDEX snapshots_ref ON snapshots (ref) WHERE ref IS NOT NULL;

-- Ids of removed snapshots whose mounts and directories have not been taken away yet.
CREATE TABLE gone (id INTEGER PRIMARY KEY) STRICT;
"""

_THIRD = """
-- One image may be mounted several times: once, and once for each user namespace (`12`, `12-userns-65536`).
CREATE TABLE served (
    seq       INTEGER PRIMARY KEY AUTOINCREMENT,
    name      TEXT NOT NULL UNIQUE,
    snapshot  INTEGER NOT NULL,
    daemon    TEXT NOT NULL REFERENCES daemons (id) ON DELETE CASCADE,
    image     TEXT NOT NULL,
    bootstrap TEXT NOT NULL
) STRICT;
INSERT INTO served SELECT seq, CAST(snapshot AS TEXT), snapshot, daemon, image, bootstrap FROM instances;
DROP TABLE instances;
ALTER TABLE served RENAME TO instances;
"""

# Statements that lead from version N to N+1; PRAGMA user_version says where a file stands. Only ever append.
MIGRATIONS = (_FIRST, _SECOND, _THIRD)

_WAY_OUT = (
    "run containerd-nydus-grpc --repair with the same flags: it rebuilds the database from the directories and the "
    "running daemons, and keeps the damaged one beside it"
)


class _Job(Generic[T]):
    """One caller's statements. Its lock is free once there is something to know: done, or its turn to lead."""

    __slots__ = ("before", "done", "error", "result", "undo", "wake", "whole", "work")

    def __init__(
        self,
        work: Callable[[sqlite3.Connection], T],
        before: Callable[[], None] | None,
        undo: Callable[[], None] | None,
        whole: bool,
    ) -> None:
        self.work, self.before, self.undo, self.whole = work, before, undo, whole
        self.wake = threading.Lock()
        self.wake.acquire()
        self.done = False
        self.result: T | None = None
        self.error: BaseException | None = None


def _make_private(path: Path) -> None:
    """SQLite gives its log and index the mode of the file, and the file what the umask leaves of 0644."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        os.chmod(path, 0o600)


class Database:
    """WAL, synchronous=FULL: what a call was told is there after a power cut. Readers never wait for writers."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file. Raises StartError for a damaged or newer database."""
        self.path = path
        self._queue: deque[_Job[Any]] = deque()
        self._guard = threading.Lock()  # of the queue and of `_led`
        self._led = False
        self._idle: queue.LifoQueue[sqlite3.Connection | None] = queue.LifoQueue()
        for _ in range(READERS):
            self._idle.put(None)  # connected when first needed
        try:
            _make_private(path)
            path.with_name(SPARE).unlink(missing_ok=True)
        except OSError as error:
            raise StartError(f"snapshot database {path}: {error.strerror}") from None
        try:
            self._writer = self._connect()
            self.created = self._migrate()
            (verdict,) = self._writer.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.Error as error:
            # the log's index is written through a map, whose pages that cannot be had are an "I/O error"
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL or not os.statvfs(path).f_bavail:
                raise StartError(f"snapshot database {path}: {error}: the disk is full, free some space") from None
            raise StartError(f"snapshot database {path}: {error}. If it is damaged, {_WAY_OUT}") from None
        if verdict != "ok":
            self._writer.close()
            raise StartError(f"snapshot database {path} is damaged ({_first_line(verdict)}): {_WAY_OUT}")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        return connection

    def _migrate(self) -> bool:
        """True: the file is new."""
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        newest = len(MIGRATIONS)
        if version > newest:
            raise StartError(
                f"snapshot database {self.path} has version {version}, this program knows {newest}: "
                "it was written by a newer release, which must be installed again"
            )
        if version < newest:
            steps = "".join(MIGRATIONS[version:])
            self._writer.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {newest}; COMMIT;")
            if version:
                log.info("snapshot database %s: version %d is now %d", self.path, version, newest)
        return bool(version == 0)

    # ---- reading

    def query(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows at once: nothing is held while a client takes its time. Raises SnapshotterError."""
        connection = self._idle.get()
        try:
            if connection is None:
                connection = self._connect()
            return connection.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            raise self._translated(error) from error
        finally:
            self._idle.put(connection)

    # ---- writing

    def apply(
        self,
        work: Callable[[sqlite3.Connection], T],
        *,
        before: Callable[[], None] | None = None,
        undo: Callable[[], None] | None = None,
        whole: bool = False,
    ) -> T:
        """Runs `work` in a transaction, alone or with others; returns when that is on disk.

        What `work` raises undoes its own statements only. `before` runs before the commit, once for all callers that
        gave the same one. `undo` runs if the commit fails after `work` succeeded, while nothing else is written.
        `whole`: what `work` raises it raises before it writes a row, so that no savepoint is needed.
        SQLite's own errors come out as SnapshotterError.
        """
        job = _Job(work, before, undo, whole)
        with self._guard:
            self._queue.append(job)
            leads = not self._led
            self._led = True
        if not leads:
            job.wake.acquire()
        if not job.done:
            self._lead()
        if job.error is not None:
            raise job.error
        return job.result  # type: ignore[return-value]

    def _lead(self) -> None:
        """Writes what has gathered, the caller's own included, and hands the lead to who came meanwhile."""
        with self._guard:
            jobs = [self._queue.popleft() for _ in range(min(len(self._queue), MOST_TOGETHER))]
        try:
            self._write(jobs)
        finally:
            with self._guard:
                following = self._queue[0] if self._queue else None
                self._led = following is not None
            # first: its wait for the disk passes while these answer
            if following is not None:
                following.wake.release()
            for job in jobs:
                job.done = True
                job.wake.release()

    def _write(self, jobs: Sequence[_Job[Any]]) -> None:
        writer = self._writer
        kept: list[_Job[Any]] = []
        try:
            writer.execute("BEGIN IMMEDIATE")
            for job in jobs:
                # a lone caller's statements are rolled back with the transaction
                savepoint = len(jobs) > 1 and not job.whole
                if savepoint:
                    writer.execute("SAVEPOINT job")
                written = writer.total_changes
                try:
                    job.result = job.work(writer)
                    kept.append(job)
                except BaseException as error:
                    half = job.whole and writer.total_changes != written
                    if isinstance(error, _FOR_ALL) or not writer.in_transaction or half:
                        raise
                    job.error = self._translated(error) if isinstance(error, sqlite3.Error) else error
                    if savepoint:
                        writer.execute("ROLLBACK TO job")
                if savepoint:
                    writer.execute("RELEASE job")
            if not kept:
                writer.execute("ROLLBACK")
                return
            for before in {job.before for job in kept if job.before is not None}:
                before()
            writer.execute("COMMIT")
        except BaseException as error:
            try:
                if writer.in_transaction:
                    writer.execute("ROLLBACK")
            except sqlite3.Error as second:
                log.error("snapshot database %s: %s", self.path, second)
            for job in jobs:
                job.error = job.error or (self._translated(error) if isinstance(error, sqlite3.Error) else error)
            for job in kept:
                try:
                    if job.undo is not None:
                        job.undo()
                except OSError as third:
                    log.error("a snapshot that could not be written leaves a directory until the next start: %s", third)

    def _translated(self, error: sqlite3.Error) -> SnapshotterError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return ResourceExhausted(f"snapshot database {self.path}: {error}")
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return SnapshotterError(f"snapshot database {self.path}: {error}: stop this program, then {_WAY_OUT}")
        return SnapshotterError(f"snapshot database {self.path}: {error}")

    def reserve(self) -> None:
        """Room on the disk for the log, as much as it grows to in time: where the disk is full, snapshots can still be
        removed. What cannot be had is done without."""
        keep_size = 1  # FALLOC_FL_KEEP_SIZE
        # no locks of SQLite are on this file, which closing it would take away
        _allocate(Path(f"{self.path}-wal"), os.O_RDWR, keep_size, RESERVED)

    def close(self) -> None:
        """After the last call; one under way is waited for. The last to close folds the log into the file."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._led and time.monotonic() < deadline:
            time.sleep(0.01)
        while not self._idle.empty():
            connection = self._idle.get()
            if connection is not None:
                connection.close()
        self._writer.close()
        if not os.path.exists(f"{self.path}-wal"):
            _allocate(self.path.with_name(SPARE), os.O_RDWR | os.O_CREAT, 0, RESERVED + (64 << 10))  # and its index


def _allocate(path: Path, flags: int, mode: int, size: int) -> None:
    """Blocks for a file. What cannot be had is done without."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        log.debug("snapshot database: no room is reserved in %s: %s", path, error.strerror)
        return
    try:
        if _libc.fallocate(descriptor, mode, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
            log.debug("snapshot database: no room is reserved in %s: %s", path, os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)


def _first_line(text: str) -> str:
    return " ".join(text.split("\n")[:2])
