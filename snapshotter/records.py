"""What must be known of nydusd processes and mounted images after this program died."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshotter.database import Database
from snapshotter.labels import IdMapping

INSTANCES = "SELECT name, daemon, image, bootstrap FROM instances ORDER BY seq"
_NAME = re.compile(r"(\d{1,18})(?:-userns-(\d{1,10})(?:-(\d{1,10})-(\d{1,10}))?)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class DaemonRecord:
    id: str
    shared: bool
    pid: int  # 0: not started
    started: int  # see system.start_time
    socket: Path
    mountpoint: Path


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    snapshot: int  # id of the meta layer
    daemon: str
    image: str
    bootstrap: Path
    mapping: IdMapping | None = None  # owners are shown as a user namespace has them

    @property
    def name(self) -> str:
        """Of the mount, the configuration, and in nydusd's API."""
        return instance_name(self.snapshot, self.mapping)


def instance_name(snapshot: int, mapping: IdMapping | None) -> str:
    """`12`, `12-userns-65536`: upstream's names. Mappings of another form than kubelet's have all of it in theirs."""
    if mapping is None:
        return str(snapshot)
    unusual = "" if (mapping.inside, mapping.length) == (0, 65536) else f"-{mapping.inside}-{mapping.length}"
    return f"{snapshot}-userns-{mapping.host}{unusual}"


def own_mountpoint(snapshots: Path, snapshot: int, mapping: IdMapping | None) -> Path:
    """Where a nydusd of its own mounts an image: `<snapshots>/12/mnt`, `<snapshots>/12/mnt-65536`."""
    name = "mnt" if mapping is None else "mnt" + instance_name(0, mapping).removeprefix("0-userns")
    return snapshots / str(snapshot) / name


def instance_of(name: str) -> tuple[int, IdMapping | None] | None:
    """What `instance_name` made; None for other names."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    host, inside, length = found[2], found[3] or "0", found[4] or "65536"
    return int(found[1]), IdMapping(int(inside), int(host), int(length)) if host else None


def instances_of(rows: Iterable[Sequence[Any]]) -> list[InstanceRecord]:
    """Of the rows that INSTANCES gives."""
    records = []
    for name, daemon, image, bootstrap in rows:
        snapshot, mapping = instance_of(name) or (0, None)
        records.append(InstanceRecord(snapshot, daemon, image, Path(bootstrap), mapping))
    return records


class Records:
    """Rows of the tables `daemons` and `instances`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def daemons(self) -> list[DaemonRecord]:
        rows = self._database.query("SELECT id, shared, pid, started, socket, mountpoint FROM daemons")
        return [DaemonRecord(row[0], bool(row[1]), row[2], row[3], Path(row[4]), Path(row[5])) for row in rows]

    def save_daemon(self, record: DaemonRecord) -> None:
        self._write(
            "INSERT INTO daemons VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET pid = excluded.pid,"
            " started = excluded.started",
            (record.id, record.shared, record.pid, record.started, str(record.socket), str(record.mountpoint)),
        )

    def add_instance(self, daemon: DaemonRecord, record: InstanceRecord) -> None:
        """With its daemon, whose row is left as it is if there is one."""
        self._database.apply(
            lambda writer: (
                writer.execute(
                    "INSERT INTO daemons VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                    (daemon.id, daemon.shared, daemon.pid, daemon.started, str(daemon.socket), str(daemon.mountpoint)),
                ),
                writer.execute("DELETE FROM instances WHERE name = ?", (record.name,)),
                writer.execute(
                    "INSERT INTO instances (name, snapshot, daemon, image, bootstrap) VALUES (?, ?, ?, ?, ?)",
                    (record.name, record.snapshot, record.daemon, record.image, str(record.bootstrap)),
                ),
            )
        )

    def forget_daemon(self, daemon: str) -> None:
        """With its instances."""
        self._write("DELETE FROM daemons WHERE id = ?", (daemon,))

    def instances(self) -> list[InstanceRecord]:
        """In order of mounting."""
        return instances_of(self._database.query(INSTANCES))

    def forget_instance(self, record: InstanceRecord) -> None:
        self._write("DELETE FROM instances WHERE name = ?", (record.name,))

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        self._database.apply(lambda writer: writer.execute(statement, values) and None)
