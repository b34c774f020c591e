"""`--repair`: a new database from what directories say and the lost one still gives; daemons from their files.

Nothing is deleted. A directory nobody can tell the key of stays where it is, unknown to containerd, which then pulls
its image again; so does whatever was built on it: a container must not be put on fewer layers than it had.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snapshotter.bootstrapfile import find_bootstrap
from snapshotter.database import NAME, Database
from snapshotter.directories import read_record, write_record
from snapshotter.errors import SnapshotterError, StartError
from snapshotter.labels import IdMapping, image_ref, is_meta
from snapshotter.records import DaemonRecord, InstanceRecord, Records, instance_of, own_mountpoint
from snapshotter.store import Kind, Snapshot, record_of

log = logging.getLogger(__name__)

_SALVAGE = "SELECT key, parent, kind, created, updated, size, inodes, labels FROM snapshots WHERE id = ?"


@dataclass
class Report:
    snapshots: int = 0
    daemons: int = 0
    images: int = 0
    kept: str = ""  # where the old database is now, "" if there was none
    removed: list[int] = field(default_factory=list)  # an older directory of a key that was used again
    unknown: list[int] = field(default_factory=list)  # directories without a readable record
    orphans: list[int] = field(default_factory=list)  # on a parent that is unknown

    def lines(self) -> list[str]:
        said = [
            f"{self.snapshots} snapshots, {self.daemons} nydusd and {self.images} mounted images are on record again",
        ]
        if self.kept:
            said.append(f"the old database is {self.kept}: delete it when all is well")
        for numbers, why in ((self.unknown, "cannot be told the key of"), (self.orphans, "lie on one of those")):
            if numbers:
                said.append(
                    f"snapshots {', '.join(map(str, numbers))} {why}: they are left alone. Remove their images in "
                    "containerd and pull them again"
                )
        return said


def repair(root: Path) -> Report:
    """The caller holds the lock of the root. Can be run again after a death at any point. Raises StartError."""
    snapshots, current = root / "snapshots", root / NAME
    if not snapshots.is_dir():
        raise StartError(f"{root} holds no snapshots: nothing to repair (is this the right --root?)")
    for left in root.glob("repair-*"):
        shutil.rmtree(left, ignore_errors=True)
    report = Report()
    ids = sorted(int(entry.name) for entry in os.scandir(snapshots) if _is_id(entry.name))
    found = _choose(_collect(snapshots, current, ids, report), report)
    rows = _with_parents(found, report)
    new = root / f"{NAME}.new"
    _unlink_all(new)
    database = Database(new)
    database.apply(lambda writer: _insert(writer, rows, report.removed, max(ids, default=0)))
    _daemons(root, database, {snapshot.id: snapshot for snapshot in rows}, report)
    report.snapshots = len(rows)
    database.close()  # folds the log into the file
    if new.with_name(f"{new.name}-wal").exists():
        raise StartError(f"{new} is in use by another process")
    report.kept = _exchange(current, new)
    for snapshot in rows:
        try:
            write_record(str(snapshots / str(snapshot.id)), record_of(snapshot))
        except OSError as error:
            log.warning("snapshot %d: its record cannot be written: %s", snapshot.id, error.strerror)
    return report


def _is_id(name: str) -> bool:
    return name.isdecimal() and name.isascii() and len(name) < 19


def _collect(snapshots: Path, database: Path, ids: Iterable[int], report: Report) -> list[Snapshot]:
    """Every directory by its own record; one without by its row, if that page of the old database is readable."""
    rows = _Salvaged(database)
    found = []
    for identity in ids:
        record = read_record(snapshots / str(identity)) or rows.row(identity)
        snapshot = _snapshot(identity, record) if record is not None else None
        if snapshot is None or not (snapshots / str(identity) / "fs").is_dir():
            report.unknown.append(identity)
        else:
            found.append(snapshot)
    rows.close()
    return found


class _Salvaged:
    """Reads what can be read, from a copy: opening a database changes its files."""

    def __init__(self, path: Path) -> None:
        self._connection: sqlite3.Connection | None = None
        self._folder = tempfile.mkdtemp(prefix="repair-", dir=path.parent)
        try:
            for name in (path.name, f"{path.name}-wal"):
                if path.with_name(name).exists():
                    shutil.copyfile(path.with_name(name), f"{self._folder}/{name}")
            if os.path.exists(f"{self._folder}/{path.name}"):
                self._connection = sqlite3.connect(f"{self._folder}/{path.name}")
        except (sqlite3.Error, OSError) as error:
            log.debug("nothing can be read from %s: %s", path, error)

    def row(self, identity: int) -> dict[str, object] | None:
        try:
            if self._connection is None:
                return None
            row = self._connection.execute(_SALVAGE, (identity,)).fetchone()
            if row is None:
                return None
            names = ("key", "parent", "kind", "created", "updated", "size", "inodes", "labels")
            record = dict(zip(names, row, strict=True))
            record["labels"] = json.loads(row[7])
            above = self._connection.execute("SELECT key FROM snapshots WHERE id = ?", (row[1],)).fetchone()
            if row[1] is not None and above is None:
                return None
            record["parent"] = above[0] if above else ""
            return record
        except (sqlite3.Error, ValueError):
            return None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _snapshot(identity: int, record: dict[str, Any]) -> Snapshot | None:
    try:
        created, updated, size, inodes = (int(record[name]) for name in ("created", "updated", "size", "inodes"))
        key, parent, kind, labels = record["key"], record["parent"], Kind(record["kind"]), record["labels"]
        texts = [key, parent, *labels, *labels.values()]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if not key or not all(isinstance(text, str) for text in texts):
        return None
    return Snapshot(identity, key, parent, kind, created, updated, size, inodes, labels)


def _choose(found: Iterable[Snapshot], report: Report) -> dict[str, Snapshot]:
    """By key. A key is used again only after Remove: the older directory waits to be deleted."""
    chosen: dict[str, Snapshot] = {}
    for snapshot in found:
        older = chosen.get(snapshot.key)
        if older is not None:
            report.removed.append(older.id)
        chosen[snapshot.key] = snapshot
    return chosen


def _with_parents(chosen: dict[str, Snapshot], report: Report) -> list[Snapshot]:
    """Parents before their children; without those whose chain is broken."""
    ordered: list[Snapshot] = []
    state: dict[str, bool] = {"": True}

    def settle(key: str) -> None:
        path: list[Snapshot] = []
        good: bool | None = None
        while good is None:
            snapshot = chosen.get(key)
            if path and key and (snapshot is None or snapshot.kind is not Kind.COMMITTED or snapshot in path):
                good = False
            elif key in state:
                good = state[key]
            elif snapshot is not None:
                path.append(snapshot)
                key = snapshot.parent
        for snapshot in reversed(path):
            state[snapshot.key] = good
            if good:
                ordered.append(snapshot)
            else:
                report.orphans.append(snapshot.id)

    for key in chosen:
        settle(key)
    return ordered


def _insert(writer: sqlite3.Connection, rows: Iterable[Snapshot], removed: Iterable[int], highest: int) -> None:
    ids: dict[str, int] = {}
    for snapshot in rows:
        ids[snapshot.key] = snapshot.id
        writer.execute(
            "INSERT INTO snapshots (id, key, parent, kind, created, updated, size, inodes, labels)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                snapshot.id,
                snapshot.key,
                ids[snapshot.parent] if snapshot.parent else None,
                snapshot.kind,
                snapshot.created,
                snapshot.updated,
                snapshot.size,
                snapshot.inodes,
                json.dumps(dict(snapshot.labels), ensure_ascii=False, sort_keys=True),
            ),
        )
    writer.executemany("INSERT INTO gone VALUES (?)", [(identity,) for identity in removed])
    # what has no row now is not known to be nobody's
    writer.execute("INSERT INTO facts VALUES ('floor', ?)", (highest,))


def _daemons(root: Path, database: Database, snapshots: dict[int, Snapshot], report: Report) -> None:
    """From the configurations they run with: `config/<id>/<snapshot>/` of a shared one, `config/<id>/` of one's own.

    Which of them live is found out by the next start, as always.
    """
    records = Records(database)
    for folder in sorted((root / "config").glob("*")):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        served = [one for name in names if (one := instance_of(name)) is not None]
        shared = not (folder / "config.json").exists()
        socket = root / "socket" / folder.name / "api.sock"
        if not shared:
            served = [one] if (one := _served_alone(folder / "config.json")) is not None else []
        elif not socket.exists() and not served:
            continue
        mountpoint = root / "mnt" if shared else own_mountpoint(root / "snapshots", *(served or [(0, None)])[0])
        daemon = DaemonRecord(folder.name, shared, 0, 0, socket, mountpoint)
        records.save_daemon(daemon)
        report.daemons += 1
        for identity, mapping in served:
            snapshot = snapshots.get(identity)
            if snapshot is None or not is_meta(snapshot.labels):
                continue
            try:
                image = image_ref(snapshot.labels, str(identity))
                bootstrap = find_bootstrap(root / "snapshots" / str(identity) / "fs", image)
            except (SnapshotterError, OSError) as error:
                log.warning("%s", error)
                continue
            records.add_instance(daemon, InstanceRecord(identity, daemon.id, image, bootstrap, mapping))
            report.images += 1


def _served_alone(path: Path) -> tuple[int, IdMapping | None] | None:
    """What a daemon's own configuration is for; None if it does not say."""
    try:
        name = str(json.loads(path.read_bytes())["device"]["id"]).lstrip("/")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return instance_of(name)


def _exchange(current: Path, new: Path) -> str:
    """The new file takes the old one's name, in one step; the old one and its log are kept beside it."""
    if not current.exists():
        _unlink_all(current)
        os.replace(new, current)
        return ""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = (f"{current.name}.damaged-{stamp}{more}" for more in ("", *(f"-{number}" for number in range(2, 1000))))
    kept = next(path for name in names if not (path := current.with_name(name)).exists())
    # The log first: beside a new database it would be replayed into it.
    for suffix in ("-wal", "-shm"):
        if current.with_name(current.name + suffix).exists():
            os.replace(current.with_name(current.name + suffix), kept.with_name(kept.name + suffix))
    os.link(current, kept)
    os.replace(new, current)
    descriptor = os.open(current.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return str(kept)


def _unlink_all(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
