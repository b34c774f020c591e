"""The daemon's log in upstream's form, rotation included, and the ring of errors behind `/daemon/events`."""

from __future__ import annotations

import collections
import glob
import gzip
import io
import json
import logging
import os
import shutil
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

TRACE = 5
OFF = 100
LEVELS = {
    "off": OFF,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": TRACE,
}
_NAMES = {logging.CRITICAL: "ERROR", logging.WARNING: "WARN", TRACE: "TRACE"}
_COLOURS = {"ERROR": "31", "WARN": "33", "DEBUG": "34", "TRACE": "35"}
KEPT_FILES = 10


class UpstreamFormatter(logging.Formatter):
    """`[YYYY-MM-DD HH:MM:SS.ffffff +ZZ:ZZ] LEVEL message`; from DEBUG down with `[file:line]` before the message."""

    def __init__(self, *, colour: bool = False) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        local = time.localtime(record.created)
        minutes, sign = divmod(abs(local.tm_gmtoff), 60)[0], "-" if local.tm_gmtoff < 0 else "+"
        zone = f"{sign}{minutes // 60:02d}:{minutes % 60:02d}"
        stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', local)}.{int(record.created % 1 * 1_000_000):06d} {zone}"
        name = _NAMES.get(record.levelno, record.levelname)
        if self._colour and name in _COLOURS:
            name = f"\x1b[{_COLOURS[name]}m{name}\x1b[0m"
        place = f"[{record.filename}:{record.lineno}] " if record.levelno < logging.INFO else ""
        # One record is one line: whoever greps must never find half a message, and no text from a server or an image
        # may forge a line of its own.
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        if record.exc_info:
            message += " | " + self.formatException(record.exc_info).replace("\n", " \\n ")
        return f"[{stamp}] {name} {place}{message}"


class JsonFormatter(logging.Formatter):
    """The snapshotter's keys, so that both logs go into one index."""

    def format(self, record: logging.LogRecord) -> str:
        seconds, fraction = divmod(int(record.created * 1e9), 10**9)
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        level = "trace" if record.levelno == TRACE else record.levelname.lower()
        return json.dumps(
            {"level": level, "msg": message, "time": f"{when}.{fraction:09d}Z", "logger": record.name},
            ensure_ascii=False,
        )


class RotatingFile(logging.Handler):
    """A log file; at `limit` bytes it is moved aside with a timestamp and compressed; ten are kept."""

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__()
        self.path = path
        self.limit = limit
        self._packing = threading.Lock()
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._file = self._open()

    def _open(self) -> IO[str]:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._file.write(self.format(record) + "\n")
            self._file.flush()
            if self.limit and self._file.tell() >= self.limit:
                self._rotate()
        except OSError:
            pass  # a full disk must not stop the daemon, and there is no other place to say so

    def _rotate(self) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime()) + f".{time.time_ns() % 10**9:09d}"
        with suppress(FileNotFoundError):  # moved already, when there was no room for the next one
            os.replace(self.path, self.path.with_name(f"{self.path.name}.{stamp}"))
        full, self._file = self._file, self._open()
        threading.Thread(target=self._pack, name="log-rotation", daemon=True).start()
        full.close()

    def _pack(self) -> None:
        """Behind the back of who logs, which is the task that answers readers: a second for 100 MB. What fails, or is
        cut off by the end of the process, is tried again after the next rotation."""
        with self._packing:
            names = glob.glob(f"{glob.escape(str(self.path))}.[0-9]*T[0-9]*.[0-9]*")
            for number, name in enumerate(sorted({name.removesuffix(".gz") for name in names}, reverse=True)):
                moved, packed = Path(name), Path(name + ".gz")
                with suppress(OSError):
                    if number >= KEPT_FILES:
                        packed.unlink(missing_ok=True)
                        moved.unlink(missing_ok=True)
                    elif moved.exists():
                        _compress(moved, packed)


def _compress(moved: Path, packed: Path) -> None:
    try:
        with moved.open("rb") as source, gzip.open(packed, "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except OSError:
        packed.unlink(missing_ok=True)
        raise
    moved.unlink()


class ErrorRing(logging.Handler):
    """The latest errors, at most 500 entries and 50 KiB. Totals count these, as upstream's do."""

    MAX_ERRORS = 500
    MAX_SIZE = 50 << 10

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._entries: collections.deque[str] = collections.deque()
        self._size = 0

    def emit(self, record: logging.LogRecord) -> None:
        when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(record.created))
        entry = f"{when} - {record.getMessage()}"
        self._entries.append(entry)
        self._size += len(entry)
        while len(self._entries) > self.MAX_ERRORS or self._size > self.MAX_SIZE:
            self._size -= len(self._entries.popleft())

    def public(self) -> dict[str, Any]:
        return {
            "max_errors": self.MAX_ERRORS,
            "total_errors": len(self._entries),
            "max_size": self.MAX_SIZE,
            "total_size": self._size,
            "errors": list(self._entries),
        }


def set_level(name: str) -> None:
    """KeyError for an unknown name; any case."""
    logging.getLogger().setLevel(LEVELS[name.lower()])


def set_up(level: str, log_file: str | None, rotation_mb: int, form: str = "text") -> ErrorRing:
    """Send all logging to stdout or to `log_file` (`.log` is added to a name without extension). `form`: text, json."""
    logging.addLevelName(TRACE, "TRACE")
    handler: logging.Handler
    if log_file:
        path = Path(log_file)
        handler = RotatingFile(path if path.suffix else path.with_suffix(".log"), rotation_mb << 20)
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):  # strict in most locales, and names of files are any bytes
            sys.stdout.reconfigure(errors="backslashreplace")
        handler = logging.StreamHandler(sys.stdout)
    colour = not log_file and sys.stdout.isatty()
    handler.setFormatter(JsonFormatter() if form == "json" else UpstreamFormatter(colour=colour))
    ring = ErrorRing()
    root = logging.getLogger()
    root.handlers[:] = [handler, ring]
    set_level(level)
    # Libraries' own chatter is of no use to an operator below their warnings.
    for library in ("h11", "httpx", "httpcore", "trio"):
        logging.getLogger(library).setLevel(logging.WARNING)
    return ring
