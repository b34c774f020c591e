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
ROOM = 256  # bytes of a record that are blank: what a commit or an update changes fits in
_SECTOR = 512
_ONE_WRITE = 4096  # within one page, which a kill never tears
_numbers = itertools.count()
_JSON = json.JSONEncoder(ensure_ascii=False)  # made once: `json.dumps` makes one for each call


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
        _write(f"{self._path}/{RECORD}", _encoded(record))

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
    """The first record of a directory, or the next: whoever dies here leaves the one before or this one.

    It goes over the one before where that has room for it, by one write: a new file with its name costs ten times as
    much, and ext4 sends a file that replaces another to the disk at once. Raises OSError.
    """
    path, data = f"{directory}/{RECORD}", _encoded(record)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        pass
    else:
        try:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            if len(data.rstrip()) <= size <= _ONE_WRITE:
                data = data.rstrip().ljust(size)
                if os.pwrite(descriptor, data, 0) != size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
                return
        finally:
            os.close(descriptor)
    new = f"{path}.{next(_numbers)}"
    try:
        _write(new, data)
        os.rename(new, path)
    except FileNotFoundError:
        return  # somebody deleted the directory by hand: not this call's concern
    except BaseException:
        try:
            os.unlink(new)
        except OSError:
            pass
        raise


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


def _encoded(record: Mapping[str, object]) -> bytes:
    """With blanks behind it."""
    data = _JSON.encode(record).encode("utf-8", "surrogatepass")
    return data.ljust(-(-(len(data) + ROOM) // _SECTOR) * _SECTOR)


def _write(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    finally:
        os.close(descriptor)
