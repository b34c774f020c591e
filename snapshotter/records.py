"""What must be known of nydusd processes and mounted images after this program died."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from snapshotter.database import Database


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
                writer.execute("DELETE FROM instances WHERE snapshot = ?", (record.snapshot,)),
                writer.execute(
                    "INSERT INTO instances (snapshot, daemon, image, bootstrap) VALUES (?, ?, ?, ?)",
                    (record.snapshot, record.daemon, record.image, str(record.bootstrap)),
                ),
            )
        )

    def forget_daemon(self, daemon: str) -> None:
        """With its instances."""
        self._write("DELETE FROM daemons WHERE id = ?", (daemon,))

    def instances(self) -> list[InstanceRecord]:
        """In order of mounting."""
        rows = self._database.query("SELECT snapshot, daemon, image, bootstrap FROM instances ORDER BY seq")
        return [InstanceRecord(row[0], row[1], row[2], Path(row[3])) for row in rows]

    def forget_instance(self, snapshot: int) -> None:
        self._write("DELETE FROM instances WHERE snapshot = ?", (snapshot,))

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        self._database.apply(lambda writer: writer.execute(statement, values) and None)
