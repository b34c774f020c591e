"""A log file that is moved aside when it is full, with the names and rules of upstream's (lumberjack)."""

from __future__ import annotations

import gzip
import logging
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import IO


class RotatingFile(logging.Handler):
    """`NAME-2026-01-31T23-59-59.000.log` beside `NAME.log`, `.gz` when `compress`.

    `limit` bytes, 0: never moved. `backups`: how many are kept, 0: all. `days`: how long, 0: for ever. Raises OSError
    when the file cannot be opened.
    """

    def __init__(
        self, path: Path, *, limit: int, backups: int, days: int = 0, local_time: bool = True, compress: bool = True
    ) -> None:
        super().__init__()
        self.baseFilename = str(path)
        self._path, self._limit, self._backups, self._days = path, limit, backups, days
        self._clock = time.localtime if local_time else time.gmtime
        self._compress = compress
        self._milling = threading.Lock()
        self._file = self._open()
        self._mill_behind()

    def _open(self) -> IO[str]:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
            size = self._file.tell()
            if self._limit and size and size + len(line) > self._limit:
                self._rotate()
            self._file.write(line)
            self._file.flush()
        except Exception:
            self.handleError(record)

    def _rotate(self) -> None:
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H-%M-%S", self._clock(now)) + f".{int(now * 1000) % 1000:03d}"
        aside = self._path.with_name(f"{self._path.stem}-{stamp}{self._path.suffix}")
        if not aside.exists():
            self._file.close()
            try:
                os.replace(self._path, aside)
            finally:
                self._file = self._open()
            self._mill_behind()

    def _mill_behind(self) -> None:
        threading.Thread(target=self._mill, name="log-rotation", daemon=True).start()

    def _mill(self) -> None:
        """Compress, and delete what is too many or too old. What fails is tried again after the next rotation."""
        with self._milling:
            try:
                for kept, path in enumerate(self.moved(), 1):
                    old = self._days and path.stat().st_mtime < time.time() - self._days * 86400
                    if old or (self._backups and kept > self._backups):
                        path.unlink()
                    elif self._compress and path.suffix != ".gz":
                        self._pack(path)
            except OSError:
                pass

    def moved(self) -> list[Path]:
        """Files moved aside, the newest first."""
        name = re.compile(
            re.escape(self._path.stem) + r"-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d{3}" + re.escape(self._path.suffix)
            + r"(\.gz)?"
        )  # fmt: skip
        return sorted((path for path in self._path.parent.iterdir() if name.fullmatch(path.name)), reverse=True)

    @staticmethod
    def _pack(path: Path) -> None:
        packed = path.with_name(path.name + ".gz")
        unfinished = path.with_name(packed.name + ".tmp")
        try:
            with path.open("rb") as source, gzip.open(unfinished, "wb", compresslevel=3) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            times = path.stat()
            os.utime(unfinished, ns=(times.st_atime_ns, times.st_mtime_ns))
            os.replace(unfinished, packed)
            path.unlink()
        finally:
            unfinished.unlink(missing_ok=True)

    def close(self) -> None:
        super().close()
        self._file.close()
