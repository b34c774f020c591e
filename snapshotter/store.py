"""Snapshots: rows and directories as one thing. The rules are containerd's (snapshotter.md 1.5, 1.9).

A directory gets its final name inside the transaction that writes its row, so after a kill at any instant a row
always has its directory, and a directory without a row is a leftover. Leftovers of Remove are rows of their own
(`gone`); those of a kill are found at the next start.

The name of a directory is made durable by Commit, not by Prepare: that wait for the disk is half of Prepare's time. So
a power cut may leave the row of a young snapshot without its directory, which never held anything durable: it is made
again at the start (`_make_again`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from nydusfs.trees import disk_usage, small_usage
from snapshotter.database import Database
from snapshotter.directories import TEMPORARY, Fresh, has_record, write_record
from snapshotter.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from snapshotter.filters import Equals
from snapshotter.labels import OWN, SNAPSHOT_REF, UID_MAPPING, id_mapping

log = logging.getLogger(__name__)


class Kind(IntEnum):
    """Numbers of the wire and of the database."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


_KINDS = {int(kind): kind for kind in Kind}


class Snapshot(NamedTuple):
    """A tuple: List makes one for each there is, and a frozen dataclass takes three times as long to make."""

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
_TO_COMMIT = """
SELECT s.id, s.kind, s.parent, coalesce(p.key, ''), s.labels, EXISTS (SELECT 1 FROM snapshots WHERE key = ?)
FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent WHERE s.key = ?
"""
_TO_REMOVE = "SELECT id, kind, EXISTS (SELECT 1 FROM snapshots c WHERE c.parent = s.id) FROM snapshots s WHERE key = ?"

_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True)

# field of a filter -> column with an index; the most selective first
_INDEXED = {("name",): "s.key", ("labels", SNAPSHOT_REF): "s.ref", ("parent",): "p.key"}


class Store:
    """All methods are safe to call from several threads."""

    def __init__(self, root: Path, database: Database) -> None:
        """Settles what an earlier run left: unfinished directories go, unknown ones are `gone`, ids are not reused."""
        self.directory = root / "snapshots"
        self.directory.mkdir(mode=0o700, exist_ok=True)
        self.trash = self.directory.with_name("trash")  # same file system, unless somebody mounted over one of them
        self.missing: list[int] = []  # rows whose directory somebody deleted by hand
        self._path = str(self.directory)
        self._database = database
        self._changes = 0
        self._settle()

    # ---- queries

    def stat(self, key: str) -> Snapshot:
        """Raises NotFound."""
        rows = self._database.query(f"{_SELECT} WHERE s.key = ?", (key,))
        if not rows:
            raise NotFound(f"snapshot {key} not found")
        return _snapshot(rows[0])

    def by_id(self, identity: int) -> Snapshot | None:
        rows = self._database.query(f"{_SELECT} WHERE s.id = ?", (identity,))
        return _snapshot(rows[0]) if rows else None

    def chain(self, key: str) -> list[Snapshot]:
        """The snapshot, its parent, and so on up to the root. Raises NotFound."""
        if not (found := self._chain(key)):
            raise NotFound(f"snapshot {key} not found")
        return found

    def _chain(self, key: str) -> list[Snapshot]:
        return [_snapshot(row) for row in self._database.query(_CHAIN, (key,))]

    def all(self) -> list[Snapshot]:
        """All snapshots in byte order of their keys, read at once."""
        return [_snapshot(row) for row in self._database.query(f"{_SELECT} ORDER BY s.key")]

    def counts(self) -> dict[Kind, int]:
        """How many snapshots there are of each kind."""
        return {
            Kind(row[0]): row[1] for row in self._database.query("SELECT kind, count(*) FROM snapshots GROUP BY kind")
        }

    @property
    def changes(self) -> int:
        """Another value whenever a committed snapshot came or went."""
        return self._changes

    def candidates(self, alternatives: Iterable[Equals]) -> list[Snapshot]:
        """In the same order, no fewer than those for which all of one alternative's equalities hold.

        Of each, the first field that has an index is looked up; without one all snapshots are read.
        """
        found: dict[int, Snapshot] = {}
        for equals in alternatives:
            column = next((column for field, column in _INDEXED.items() if field in equals), None)
            if column is None:
                return self.all()
            value = equals[next(field for field in _INDEXED if field in equals)]
            if column == "p.key" and not value:
                return self.all()
            try:
                value.encode()
            except UnicodeEncodeError:
                continue  # bytes that are no UTF-8, which a quoted value may spell: no snapshot has such a text
            for row in self._database.query(f"{_SELECT} WHERE {column} = ?", (value,)):
                found[row[0]] = _snapshot(row)
        return sorted(found.values(), key=lambda snapshot: snapshot.key.encode("utf-8", "surrogatepass"))

    def mapped(self) -> list[list[Snapshot]]:
        """Chains of the snapshots that have the label of a user namespace."""
        wanted = f"{_SELECT} WHERE s.kind <> {Kind.COMMITTED:d} AND instr(s.labels, ?)"
        keys = [_snapshot(row).key for row in self._database.query(wanted, (UID_MAPPING,))]
        return [chain for key in keys if (chain := self._chain(key))]

    def ids(self) -> set[int]:
        return {row[0] for row in self._database.query("SELECT id FROM snapshots")}

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
        need(key, "key")
        now = time.time_ns()
        made = Snapshot(0, key, parent, kind, now, now, 0, 0, _kept(labels))

        def insert(writer: sqlite3.Connection) -> int:
            parent_id = _parent_id(writer, parent)
            if _find(writer, key) is not None:
                raise AlreadyExists(f"snapshot {key} already exists")
            identity = _insert(writer, made, parent_id)
            fresh.settle(identity, parent_id, host_id)
            return identity

        with Fresh(self._path, record_of(made), work=kind is Kind.ACTIVE) as fresh:
            identity = self._database.apply(insert, undo=fresh.unsettle)
            fresh.keep()
        return made._replace(id=identity)

    def commit_skipped(self, key: str, parent: str, ref: str, labels: Mapping[str, str]) -> Snapshot | None:
        """A layer whose data is never unpacked: committed at once, without an active snapshot in between.

        Its name is `ref`, the chain id; with `ref` taken by a snapshot on another parent (its layers were unpacked
        here under a namespaced name), any unique name will do: containerd finds it by label and parent.
        None: there is such a layer already. Raises as `create`.
        """
        need(key, "key")
        now = time.time_ns()
        made = Snapshot(0, ref, parent, Kind.COMMITTED, now, now, 0, 0, _kept(labels))

        def insert(writer: sqlite3.Connection) -> Snapshot | None:
            parent_id = _parent_id(writer, parent)
            if _find(writer, key) is not None:
                raise AlreadyExists(f"snapshot {key} already exists")
            same = "SELECT 1 FROM snapshots WHERE ref = ? AND parent IS ? AND kind = ?"
            if writer.execute(same, (ref, parent_id, Kind.COMMITTED)).fetchone():
                return None
            taken = _find(writer, ref) is not None
            identity = _insert(writer, made._replace(key=key) if taken else made, parent_id)
            named = made._replace(id=identity, key=f"{ref}.{identity}" if taken else ref)
            if taken:
                writer.execute("UPDATE snapshots SET key = ? WHERE id = ?", (named.key, identity))
                fresh.record(record_of(named))
            fresh.settle(identity, parent_id, None)
            return named

        with Fresh(self._path, record_of(made), work=False) as fresh:
            named = self._database.apply(insert, undo=fresh.unsettle)
            if named is not None:
                fresh.keep()
                self._changes += 1
        return named

    def commit(
        self,
        name: str,
        key: str,
        labels: Mapping[str, str],
        parent: str = "",
        complete: Callable[[Mapping[str, str]], Mapping[str, str]] | None = None,
    ) -> Snapshot:
        """The active snapshot `key` becomes the committed `name`. `parent`: rebase, only where there was none.

        `complete` makes the labels from those of the active one, instead of `labels`. Raises InvalidArgument, NotFound,
        AlreadyExists, FailedPrecondition; the active snapshot then stays as it was.
        """
        need(name, "name")
        need(key, "key")
        kept = _kept(labels)
        measured: tuple[int, int, int] | None = None  # id, bytes, inodes

        def change(writer: sqlite3.Connection) -> Snapshot | int:
            """What it is now, or the id of one whose tree is to be measured first."""
            row = writer.execute(_TO_COMMIT, (name, key)).fetchone()
            if row is None or (measured is not None and measured[0] != row[0]):
                raise NotFound(f"snapshot {key} not found")
            identity, kind, parent_id, parent_key, before, taken = row
            if taken:
                raise AlreadyExists(f"snapshot {name} already exists")
            if kind != Kind.ACTIVE:
                raise FailedPrecondition(
                    f"snapshot {key} is {Kind(kind).name.lower()}: only active ones can be committed"
                )
            if parent:
                parent_id, parent_key = _rebase(writer, key, parent_id, parent), parent
            usage = measured[1:] if measured else small_usage(self.upper(identity))
            if usage is None:
                return int(identity)
            given = _kept(complete(json.loads(before))) if complete else kept
            now = time.time_ns()
            done = Snapshot(identity, name, parent_key, Kind.COMMITTED, now, now, *usage, given)
            write_record(f"{self._path}/{identity}", record_of(done))
            writer.execute(
                "UPDATE snapshots SET key = ?, kind = ?, parent = ?, created = ?, updated = ?, size = ?, inodes = ?,"
                " labels = ? WHERE id = ?",
                (name, Kind.COMMITTED, parent_id, now, now, *usage, _dump(given), identity),
            )
            return done

        made = self._database.apply(change, before=self._sync, whole=True)
        if isinstance(made, int):
            # outside of the transaction: nobody else waits for the walk, and nothing writes to what is being committed
            measured = (made, *disk_usage(self.upper(made)))
            made = self._database.apply(change, before=self._sync, whole=True)
            assert isinstance(made, Snapshot)
        self._changes += 1
        return made

    def remove(self, key: str, identity: int | None = None) -> None:
        """Deletes the row; the directory is `gone` for a clean-up. Raises NotFound, FailedPrecondition (children).

        `identity`: of the one that is meant, should the key be another one's by now.
        """
        need(key, "key")

        def delete(writer: sqlite3.Connection) -> Kind:
            row = writer.execute(_TO_REMOVE, (key,)).fetchone()
            if row is None or identity not in (None, row[0]):
                raise NotFound(f"snapshot {key} not found")
            found, kind, children = row
            if children:
                raise FailedPrecondition(f"cannot remove snapshot with child: {key}")
            writer.execute("INSERT OR IGNORE INTO gone VALUES (?)", (found,))
            writer.execute("DELETE FROM snapshots WHERE id = ?", (found,))
            return Kind(kind)

        self._changes += self._database.apply(delete, whole=True) is Kind.COMMITTED

    def update(self, key: str, labels: Mapping[str, str], mask: Sequence[str]) -> Snapshot:
        """Changes labels only, as the field mask says, and never those of `OWN`.

        Raises NotFound; InvalidArgument for any path but labels.
        """
        for path in mask:
            if path != "labels" and not (path.startswith("labels.") and len(path) > len("labels.")):
                raise InvalidArgument(f"cannot update {path!r} of snapshot {key}: only labels can be changed")

        def change(writer: sqlite3.Connection) -> Snapshot:
            row = writer.execute(f"{_SELECT} WHERE s.key = ?", (key,)).fetchone()
            if row is None:
                raise NotFound(f"snapshot {key} not found")
            before = _snapshot(row)
            changed = dict(before.labels)
            for path in mask or ("labels",):
                if path == "labels":
                    changed = dict(labels)
                else:
                    name = path.removeprefix("labels.")
                    changed[name] = labels.get(name, "")
            changed = {name: value for name, value in changed.items() if name not in OWN}
            changed |= {name: value for name, value in before.labels.items() if name in OWN}
            after = before._replace(labels=_kept(changed), updated=time.time_ns())
            writer.execute(
                "UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?",
                (_dump(after.labels), after.updated, after.id),
            )
            write_record(f"{self._path}/{after.id}", record_of(after))
            return after

        return self._database.apply(change)

    def mark(self, key: str, labels: Mapping[str, str]) -> None:
        """Adds labels of `OWN`, which no client can. Raises NotFound."""

        def change(writer: sqlite3.Connection) -> None:
            row = writer.execute(f"{_SELECT} WHERE s.key = ?", (key,)).fetchone()
            if row is None:
                raise NotFound(f"snapshot {key} not found")
            before = _snapshot(row)
            after = before._replace(labels=_kept({**before.labels, **labels}), updated=time.time_ns())
            values = (_dump(after.labels), after.updated, after.id)
            writer.execute("UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?", values)
            write_record(f"{self._path}/{after.id}", record_of(after))

        self._database.apply(change)

    # ---- directories

    def upper(self, identity: int) -> Path:
        return self.directory / str(identity) / "fs"

    def path(self, identity: int) -> Path:
        return self.directory / str(identity)

    def gone(self) -> list[int]:
        """Ids whose mounts and directories are to be taken away."""
        return [row[0] for row in self._database.query("SELECT id FROM gone ORDER BY id")]

    def forget(self, identities: Sequence[int]) -> None:
        """They have been."""
        if identities:
            rows = [(identity,) for identity in identities]
            self._database.apply(lambda writer: writer.executemany("DELETE FROM gone WHERE id = ?", rows) and None)

    def write_records(self) -> int:
        """Directories of before there were records get theirs. Returns the count. Raises OSError."""
        written = 0
        for snapshot in self.all():
            if not has_record(f"{self._path}/{snapshot.id}"):
                write_record(f"{self._path}/{snapshot.id}", record_of(snapshot))
                written += 1
        return written

    def _sync(self) -> None:
        """A row is durable when its transaction is; its directory must not be less so."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _settle(self) -> None:
        """Before any call is served.

        No new id may meet an old directory: of a rolled-back transaction, or of a database that was lost. Only what
        this database once gave out a number for is known to be nobody's; a foreign name or a directory older than
        the database is somebody's data and stays.
        """
        names = [entry.name for entry in os.scandir(self.directory)]
        for name in names:
            if name.startswith(TEMPORARY):
                shutil.rmtree(f"{self._path}/{name}", ignore_errors=True)
        found = {int(name) for name in names if name.isdecimal() and name.isascii() and len(name) < 19}
        known = self.ids()
        self.missing = [identity for identity in sorted(known - found) if not self._make_again(identity)]
        highest = max(found, default=0)

        def write(writer: sqlite3.Connection) -> None:
            sequence = writer.execute("SELECT seq FROM sqlite_sequence WHERE name = 'snapshots'").fetchone()
            # one without a sequence is new as well: who made it died, or found the disk full, before this was written
            if (self._database.created or sequence is None) and highest:
                log.warning(
                    "%s holds snapshots up to %d that this database does not know; they are left alone. If the "
                    "database was lost, stop this program and run containerd-nydus-grpc --repair with the same flags",
                    self.directory,
                    highest,
                )
                writer.execute("INSERT OR REPLACE INTO facts VALUES ('floor', ?)", (highest,))
            row = writer.execute("SELECT value FROM facts WHERE name = 'floor'").fetchone()
            floor = int(row[0]) if row else 0
            left = [(identity,) for identity in found - known if identity > floor]
            writer.executemany("INSERT OR IGNORE INTO gone VALUES (?)", left)
            if sequence is None:
                writer.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('snapshots', ?)", (highest,))
            elif sequence[0] < highest:
                writer.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'snapshots'", (highest,))

        self._database.apply(write)

    def _make_again(self, identity: int) -> bool:
        """The directory of a row that has none: empty, if that is no lie. False for an unpacked layer: it is lost."""
        snapshot = self.by_id(identity)
        if snapshot is None or (snapshot.kind is Kind.COMMITTED and snapshot.inodes):
            return False
        parent = self.stat(snapshot.parent).id if snapshot.parent else None
        try:
            mapping = id_mapping(snapshot.labels) if snapshot.kind is not Kind.COMMITTED else None
        except InvalidArgument:
            mapping = None  # an update made them so; Mounts says it
        try:
            with Fresh(self._path, record_of(snapshot), work=snapshot.kind is Kind.ACTIVE) as fresh:
                fresh.settle(identity, parent, mapping[1] if mapping else None)
                fresh.keep()
        except FileNotFoundError:  # its parent is lost
            return False
        log.warning("snapshot %d (%s) had no directory after a power cut: it is empty now", identity, snapshot.key)
        return True


def record_of(snapshot: Snapshot) -> dict[str, object]:
    """What the directory remembers; the parent by its key, which is unique and never changes once committed."""
    return {
        "key": snapshot.key,
        "parent": snapshot.parent,
        "kind": int(snapshot.kind),
        "created": snapshot.created,
        "updated": snapshot.updated,
        "size": snapshot.size,
        "inodes": snapshot.inodes,
        "labels": dict(snapshot.labels),
    }


def _snapshot(row: Sequence[object]) -> Snapshot:
    identity, key, parent, kind, created, updated, size, inodes, labels = row
    return Snapshot(identity, key, parent, _KINDS[kind], created, updated, size, inodes, json.loads(labels))  # type: ignore[arg-type,index]


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


def _insert(writer: sqlite3.Connection, made: Snapshot, parent: int | None) -> int:
    cursor = writer.execute(
        "INSERT INTO snapshots (key, parent, kind, created, updated, labels) VALUES (?, ?, ?, ?, ?, ?)",
        (made.key, parent, made.kind, made.created, made.updated, _dump(made.labels)),
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _kept(labels: Mapping[str, str]) -> dict[str, str]:
    """containerd's stores drop labels without a value when they write."""
    return {key: value for key, value in labels.items() if value}


def _dump(labels: Mapping[str, str]) -> str:
    return _JSON.encode(dict(labels))


def need(text: str, what: str) -> None:
    if not text:
        raise InvalidArgument(f"snapshot {what} is required")
