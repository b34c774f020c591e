"""Directories of snapshots: `<id>/fs`, `<id>/work`, and `<id>/snapshot.json`, which says what the row said.

The file is for `--repair` alone: should the database be lost, every directory still tells its key, parent and labels.
It is written before the row is, never waited for, and the row counts as long as there is one.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

TEMPORARY = "new-"
FS_MODE = 0o755
WORK_MODE = 0o711
RECORD = "snapshot.json"
_numbers = itertools.count()


class Fresh:
    """A new snapshot's directory under a temporary name; gone at the end of the block unless `keep` was called."""

    def __init__(self, snapshots: str, record: Mapping[str, object], *, work: bool) -> None:
        """Raises OSError, with nothing left behind."""
        self._snapshots = snapshots
        self._work = work
        self._kept = False
        # one process owns the directory, and what an earlier one left was swept when this one started
        self._path = f"{snapshots}/{TEMPORARY}{os.getpid()}-{next(_numbers)}"
        os.mkdir(self._path, 0o700)
        try:
            _mkdir(f"{self._path}/fs", FS_MODE)
            if work:
                _mkdir(f"{self._path}/work", WORK_MODE)
            self.record(record)
        except BaseException:
            shutil.rmtree(self._path, ignore_errors=True)
            raise

    def record(self, record: Mapping[str, object]) -> None:
        _write(f"{self._path}/{RECORD}", record)

    def settle(self, identity: int, parent: int | None, host_id: int | None) -> None:
        """The final name; owned by `host_id`, or else as the parent is. The last step inside the transaction."""
        fs = f"{self._path}/fs"
        if host_id is not None:
            os.chown(fs, host_id, host_id)
            if self._work:
                os.chown(f"{self._path}/work", host_id, host_id)
        elif parent is not None:
            above = os.stat(f"{self._snapshots}/{parent}/fs")
            if (above.st_uid, above.st_gid) != (os.geteuid(), os.getegid()):
                os.chown(fs, above.st_uid, above.st_gid)
        final = f"{self._snapshots}/{identity}"
        os.rename(self._path, final)
        self._path = final

    def unsettle(self) -> None:
        """The transaction failed: the id may be given to another one now."""
        if not os.path.basename(self._path).startswith(TEMPORARY):
            back = f"{self._snapshots}/{TEMPORARY}{os.getpid()}-{next(_numbers)}"
            os.rename(self._path, back)
            self._path = back

    def keep(self) -> None:
        self._kept = True

    def __enter__(self) -> Fresh:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            shutil.rmtree(self._path, ignore_errors=True)


class Rewrite:
    """A new record for a directory, beside the old one until `apply`; gone at the end of the block without it."""

    def __init__(self, directory: str, record: Mapping[str, object]) -> None:
        self._directory = directory
        self._new: str | None = f"{directory}/{RECORD}.{next(_numbers)}"
        try:
            _write(self._new, record)
        except FileNotFoundError:
            self._new = None  # somebody deleted the directory by hand: not this call's concern

    def apply(self) -> None:
        if self._new is not None:
            os.rename(self._new, f"{self._directory}/{RECORD}")
            self._new = None

    def __enter__(self) -> Rewrite:
        return self

    def __exit__(self, *_: object) -> None:
        if self._new is not None:
            try:
                os.unlink(self._new)
            except OSError:
                pass


def read_record(directory: Path) -> dict[str, object] | None:
    """None: there is none, or it is not whole (a power cut: nobody waited for it to be written)."""
    try:
        record = json.loads((directory / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def has_record(directory: str) -> bool:
    return os.path.exists(f"{directory}/{RECORD}")


def write_record(directory: str, record: Mapping[str, object]) -> None:
    """For a directory made before there were records."""
    with Rewrite(directory, record) as new:
        new.apply()


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


def make_private(path: Path) -> None:
    """A directory for root alone, and those above it that are missing. Raises OSError."""
    for folder in (*reversed(path.parents), path):
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            pass


def _mkdir(path: str, mode: int) -> None:
    os.mkdir(path, mode)
    os.chmod(path, mode)  # whatever the umask


def _write(path: str, record: Mapping[str, object]) -> None:
    data = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    finally:
        os.close(descriptor)
