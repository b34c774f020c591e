"""Snapshots: rows and directories as one thing. The rules are containerd's (snapshotter.md 1.5, 1.9).

A directory gets its final name inside the transaction that writes its row, so after a kill at any instant a row
always has its directory, and a directory without a row is a leftover (`leftovers`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from snapshotter.database import Database
from snapshotter.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from snapshotter.labels import SNAPSHOT_REF

log = logging.getLogger(__name__)

TEMPORARY = "new-"
FS_MODE = 0o755
WORK_MODE = 0o711


class Kind(IntEnum):
    """Numbers of the wire and of the database."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    id: int
    key: str
    parent: str  # key of the parent, "" for none
    kind: Kind
    created: int  # nanoseconds since the epoch
    updated: int
    size: int  # bytes at commit
    inodes: int
    labels: Mapping[str, str]


_COLUMNS = "s.id, s.key, coalesce(p.key, ''), s.kind, s.created, s.updated, s.size, s.inodes, s.labels"
_SELECT = f"SELECT {_COLUMNS} FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent"
_CHAIN = f"""
WITH RECURSIVE chain (id, parent, depth) AS (
    SELECT id, parent, 0 FROM snapshots WHERE key = ?
    UNION ALL
    SELECT up.id, up.parent, chain.depth + 1 FROM snapshots up JOIN chain ON up.id = chain.parent
)
SELECT {_COLUMNS} FROM chain JOIN snapshots s ON s.id = chain.id LEFT JOIN snapshots p ON p.id = s.parent
ORDER BY chain.depth
"""


class Store:
    """All methods are safe to call from several threads."""

    def __init__(self, root: Path, database: Database) -> None:
        self.directory = root / "snapshots"
        self.directory.mkdir(mode=0o700, exist_ok=True)
        self.trash = self.directory.with_name("trash")  # same file system, unless somebody mounted over one of them
        self._database = database
        self._settle_ids()

    # ---- queries

    def stat(self, key: str) -> Snapshot:
        """Raises NotFound."""
        row = self._database.reader().execute(f"{_SELECT} WHERE s.key = ?", (key,)).fetchone()
        if row is None:
            raise NotFound(f"snapshot {key} not found")
        return _snapshot(row)

    def chain(self, key: str) -> list[Snapshot]:
        """The snapshot, its parent, and so on up to the root. Raises NotFound."""
        rows = self._database.reader().execute(_CHAIN, (key,)).fetchall()
        if not rows:
            raise NotFound(f"snapshot {key} not found")
        return [_snapshot(row) for row in rows]

    def all(self) -> list[Snapshot]:
        """All snapshots in byte order of their keys, read at once: no lock is held while a client takes its time."""
        return [_snapshot(row) for row in self._database.reader().execute(f"{_SELECT} ORDER BY s.key").fetchall()]

    def ids(self) -> set[int]:
        return {row[0] for row in self._database.reader().execute("SELECT id FROM snapshots")}

    # ---- changes

    def create(
        self,
        kind: Kind,
        key: str,
        parent: str,
        labels: Mapping[str, str],
        host_id: int | None = None,
    ) -> Snapshot:
        """Prepare or View: row and directory, owned by `host_id` (user namespaces) or else by the parent's owner.

        Raises InvalidArgument (empty key, parent not committed), NotFound (parent), AlreadyExists (key).
        """
        _need(key, "key")
        with _fresh_directory(self.directory, work=kind is Kind.ACTIVE) as fresh, self._database.write() as writer:
            parent_id = _parent_id(writer, parent)
            if _find(writer, key) is not None:
                raise AlreadyExists(f"snapshot {key} already exists")
            now = time.time_ns()
            identity = _insert(writer, key, parent_id, kind, now, labels)
            fresh.settle(identity, parent_id, host_id)
        return Snapshot(identity, key, parent, kind, now, now, 0, 0, _kept(labels))

    def commit_skipped(self, key: str, parent: str, ref: str, labels: Mapping[str, str]) -> Snapshot | None:
        """A layer whose data is never unpacked: committed at once, without an active snapshot in between.

        Its name is `ref`, the chain id; with `ref` taken by a snapshot on another parent (its layers were unpacked
        here under a namespaced name), any unique name will do: containerd finds it by label and parent.
        None: there is such a layer already. Raises as `create`.
        """
        _need(key, "key")
        with _fresh_directory(self.directory, work=False) as fresh, self._database.write() as writer:
            parent_id = _parent_id(writer, parent)
            if _find(writer, key) is not None:
                raise AlreadyExists(f"snapshot {key} already exists")
            siblings = writer.execute(
                "SELECT labels FROM snapshots WHERE parent IS ? AND kind = ?", (parent_id, Kind.COMMITTED)
            )
            if any(json.loads(text).get(SNAPSHOT_REF) == ref for (text,) in siblings):
                return None
            now = time.time_ns()
            taken = _find(writer, ref) is not None
            identity = _insert(writer, key if taken else ref, parent_id, Kind.COMMITTED, now, labels)
            if taken:
                writer.execute("UPDATE snapshots SET key = ? WHERE id = ?", (f"{ref}.{identity}", identity))
            fresh.settle(identity, parent_id, None)
            name = f"{ref}.{identity}" if taken else ref
        return Snapshot(identity, name, parent, Kind.COMMITTED, now, now, 0, 0, _kept(labels))

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str = "") -> None:
        """The active snapshot `key` becomes the committed `name`. `parent`: rebase, only where there was none.

        Raises InvalidArgument, NotFound, AlreadyExists, FailedPrecondition; the active snapshot then stays as it was.
        """
        _need(name, "name")
        _need(key, "key")
        active = self.stat(key)
        # The walk may take long: outside of the transaction. Nothing writes to a snapshot that is being committed.
        size, inodes = disk_usage(self.upper(active.id)) if active.kind is Kind.ACTIVE else (0, 0)
        with self._database.write() as writer:
            if _find(writer, name) is not None:
                raise AlreadyExists(f"snapshot {name} already exists")
            row = writer.execute("SELECT id, kind, parent FROM snapshots WHERE key = ?", (key,)).fetchone()
            if row is None:
                raise NotFound(f"snapshot {key} not found")
            identity, kind, parent_id = row
            if kind != Kind.ACTIVE:
                raise FailedPrecondition(
                    f"snapshot {key} is {Kind(kind).name.lower()}: only active ones can be committed"
                )
            if parent:
                parent_id = _rebase(writer, key, parent_id, parent)
            now = time.time_ns()
            writer.execute(
                "UPDATE snapshots SET key = ?, kind = ?, parent = ?, created = ?, updated = ?, size = ?, inodes = ?,"
                " labels = ? WHERE id = ?",
                (name, Kind.COMMITTED, parent_id, now, now, size, inodes, _dump(labels), identity),
            )

    def remove(self, key: str) -> Snapshot:
        """Deletes the row; the directory stays for `leftovers`. Raises NotFound, FailedPrecondition (has children)."""
        _need(key, "key")
        with self._database.write() as writer:
            row = writer.execute(f"{_SELECT} WHERE s.key = ?", (key,)).fetchone()
            if row is None:
                raise NotFound(f"snapshot {key} not found")
            gone = _snapshot(row)
            if writer.execute("SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1", (gone.id,)).fetchone():
                raise FailedPrecondition(f"cannot remove snapshot with child: {key}")
            writer.execute("DELETE FROM snapshots WHERE id = ?", (gone.id,))
        return gone

    def update(self, key: str, labels: Mapping[str, str], mask: Sequence[str]) -> Snapshot:
        """Changes labels only, as the field mask says. Raises NotFound; InvalidArgument for any path but labels."""
        for path in mask:
            if path != "labels" and not (path.startswith("labels.") and len(path) > len("labels.")):
                raise InvalidArgument(f"cannot update {path!r} of snapshot {key}: only labels can be changed")
        with self._database.write() as writer:
            row = writer.execute(f"{_SELECT} WHERE s.key = ?", (key,)).fetchone()
            if row is None:
                raise NotFound(f"snapshot {key} not found")
            changed = dict(_snapshot(row).labels)
            for path in mask or ("labels",):
                if path == "labels":
                    changed = dict(labels)
                else:
                    name = path.removeprefix("labels.")
                    changed[name] = labels.get(name, "")
            writer.execute(
                "UPDATE snapshots SET labels = ?, updated = ? WHERE key = ?", (_dump(changed), time.time_ns(), key)
            )
            row = writer.execute(f"{_SELECT} WHERE s.key = ?", (key,)).fetchone()
        return _snapshot(row)

    # ---- directories

    def upper(self, identity: int) -> Path:
        return self.directory / str(identity) / "fs"

    def leftovers(self) -> list[tuple[int, Path]]:
        """Directories that this database once named and no longer does: (id, path).

        Anything else without a row (a directory older than the database, a foreign name) is somebody's data and stays.
        """
        # Directory first, then rows under the writer's lock: a Prepare whose directory is listed has then either
        # written its row or taken its directory back.
        found = [(int(entry.name), Path(entry.path)) for entry in os.scandir(self.directory) if entry.name.isdecimal()]
        with self._database.write() as writer:
            known = {row[0] for row in writer.execute("SELECT id FROM snapshots")}
        floor = self._fact("floor")
        return [(identity, path) for identity, path in found if identity > floor and identity not in known]

    def sweep_temporary(self) -> int:
        """Deletes what an interrupted Prepare left under a temporary name; only before serving. Returns the count."""
        names = [entry.path for entry in os.scandir(self.directory) if entry.name.startswith(TEMPORARY)]
        for path in names:
            shutil.rmtree(path, ignore_errors=True)
        return len(names)

    def missing(self) -> list[int]:
        """Ids of rows without a directory: somebody deleted it by hand."""
        return sorted(identity for identity in self.ids() if not self.upper(identity).is_dir())

    def _fact(self, name: str) -> int:
        row = self._database.reader().execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return int(row[0]) if row else 0

    def _settle_ids(self) -> None:
        """No new id may meet an old directory: of a rolled-back transaction, or of a database that was lost."""
        highest = max((int(entry.name) for entry in os.scandir(self.directory) if entry.name.isdecimal()), default=0)
        highest = min(highest, 1 << 62)
        with self._database.write() as writer:
            if self._database.created and highest:
                log.warning(
                    "%s holds snapshots up to %d that this database does not know; they are left alone",
                    self.directory,
                    highest,
                )
                writer.execute("INSERT OR REPLACE INTO facts VALUES ('floor', ?)", (highest,))
            row = writer.execute("SELECT seq FROM sqlite_sequence WHERE name = 'snapshots'").fetchone()
            if row is None:
                writer.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('snapshots', ?)", (highest,))
            elif row[0] < highest:
                writer.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'snapshots'", (highest,))


class _fresh_directory:
    """A snapshot directory under a temporary name; gone again unless its transaction was committed."""

    def __init__(self, parent: Path, *, work: bool) -> None:
        self._snapshots = parent
        self._work = work
        self._path = ""
        self._settled = False

    def __enter__(self) -> _fresh_directory:
        self._path = tempfile.mkdtemp(prefix=TEMPORARY, dir=self._snapshots)
        for name, mode in (("fs", FS_MODE), ("work", WORK_MODE)) if self._work else (("fs", FS_MODE),):
            os.mkdir(f"{self._path}/{name}")
            os.chmod(f"{self._path}/{name}", mode)  # whatever the umask
        return self

    def settle(self, identity: int, parent: int | None, host_id: int | None) -> None:
        """Last step inside the transaction."""
        owner = (host_id, host_id)
        if host_id is None:
            above = os.stat(self._snapshots / str(parent) / "fs") if parent is not None else os.stat(self._path)
            owner = (above.st_uid, above.st_gid)
        os.chown(f"{self._path}/fs", *owner)  # type: ignore[arg-type]
        if host_id is not None and self._work:
            os.chown(f"{self._path}/work", host_id, host_id)
        final = str(self._snapshots / str(identity))
        os.rename(self._path, final)
        self._path = final
        # The row is durable when the transaction is; its directory must not be less so.
        descriptor = os.open(self._snapshots, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._settled = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or not self._settled:
            shutil.rmtree(self._path, ignore_errors=True)


def disk_usage(path: Path) -> tuple[int, int]:
    """(bytes on disk, inodes) of a tree, each inode once. Files that vanish meanwhile are not counted."""
    size = 0
    seen: set[tuple[int, int]] = set()
    pending = [str(path)]
    try:
        top = os.lstat(path)
    except FileNotFoundError:
        return 0, 0
    size += top.st_blocks * 512
    seen.add((top.st_dev, top.st_ino))
    while pending:
        try:
            entries = os.scandir(pending.pop())
        except (FileNotFoundError, NotADirectoryError):
            continue
        with entries:
            for entry in entries:
                try:
                    stat = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                if (stat.st_dev, stat.st_ino) not in seen:
                    seen.add((stat.st_dev, stat.st_ino))
                    size += stat.st_blocks * 512
    return size, len(seen)


def _snapshot(row: Sequence[object]) -> Snapshot:
    identity, key, parent, kind, created, updated, size, inodes, labels = row
    return Snapshot(identity, key, parent, Kind(kind), created, updated, size, inodes, json.loads(labels))  # type: ignore[arg-type]


def _find(connection: sqlite3.Connection, key: str) -> tuple[int, int] | None:
    row: tuple[int, int] | None = connection.execute("SELECT id, kind FROM snapshots WHERE key = ?", (key,)).fetchone()
    return row


def _parent_id(connection: sqlite3.Connection, parent: str) -> int | None:
    if not parent:
        return None
    found = _find(connection, parent)
    if found is None:
        # clients and issue reports match "missing parent" and "bucket"
        raise NotFound(f'missing parent "{parent}" bucket: not found')
    if found[1] != Kind.COMMITTED:
        raise InvalidArgument(f"parent {parent} is not a committed snapshot")
    return found[0]


def _rebase(connection: sqlite3.Connection, key: str, current: int | None, parent: str) -> int:
    found = _find(connection, parent)
    if found is None:
        raise NotFound(f'missing parent "{parent}" bucket: not found')
    if found[1] != Kind.COMMITTED:
        raise FailedPrecondition(f"parent {parent} is not a committed snapshot")
    if current is not None and current != found[0]:
        raise InvalidArgument(f"snapshot {key} has another parent than {parent}")
    return found[0]


def _insert(
    connection: sqlite3.Connection, key: str, parent: int | None, kind: Kind, now: int, labels: Mapping[str, str]
) -> int:
    cursor = connection.execute(
        "INSERT INTO snapshots (key, parent, kind, created, updated, labels) VALUES (?, ?, ?, ?, ?, ?)",
        (key, parent, kind, now, now, _dump(labels)),
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _kept(labels: Mapping[str, str]) -> dict[str, str]:
    """containerd's stores drop labels without a value when they write."""
    return {key: value for key, value in labels.items() if value}


def _dump(labels: Mapping[str, str]) -> str:
    return json.dumps(_kept(labels), ensure_ascii=False, sort_keys=True)


def _need(text: str, what: str) -> None:
    if not text:
        raise InvalidArgument(f"snapshot {what} is required")
