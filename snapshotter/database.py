"""The one SQLite file of a snapshotter root: schema, connections, one writer."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snapshotter.errors import ResourceExhausted, SnapshotterError, StartError

NAME = "metadata.sqlite"
SCHEMA_VERSION = 1
BUSY_SECONDS = 10.0

SCHEMA = """
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


class Database:
    """WAL, synchronous=FULL: what a call was told is there after a power cut. Writers queue, readers never wait."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file. Raises StartError for a damaged or newer database."""
        self.path = path
        self._write_lock = threading.Lock()
        self._local = threading.local()
        try:
            self._writer = self._connect()
            self.created = self._migrate()
        except sqlite3.Error as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise StartError(f"snapshot database {path}: {error}: free some space") from None
            raise StartError(
                f"snapshot database {path}: {error}. If it is damaged, stop containerd, move it away together with the "
                "snapshots directory beside it, remove the images in containerd and pull them again"
            ) from None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def _migrate(self) -> bool:
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version == SCHEMA_VERSION:
            return False
        if version != 0:
            raise StartError(
                f"snapshot database {self.path} has version {version}, this program knows {SCHEMA_VERSION}: "
                "it was written by a newer release"
            )
        self._writer.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        return True

    def reader(self) -> sqlite3.Connection:
        """This thread's connection for queries."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
        return connection

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction; any exception rolls it back. SQLite's own errors come out as SnapshotterError."""
        with self._write_lock:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                try:
                    yield self._writer
                    self._writer.execute("COMMIT")
                except BaseException:
                    if self._writer.in_transaction:
                        self._writer.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
                kind = ResourceExhausted if full else SnapshotterError
                raise kind(f"snapshot database {self.path}: {error}") from error

    def close(self) -> None:
        """Ends the writer after the transaction under way; readers end with their threads."""
        with self._write_lock:
            self._writer.close()
