"""Files that commands write: they appear whole or not at all."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bootstrap.outputs import replaceable


@contextmanager
def output_file(path: Path, *, pipes: bool = False) -> Iterator[BinaryIO]:
    """A file open for reading and writing that gets its name when all is written, and is gone after a failure.

    `pipes`: what is there and cannot be replaced (a FIFO, a terminal, /dev/stdout) is written directly, front to
    back. An OSError names `path`, unless it is of another file.
    """
    partial: Path | None = None
    try:
        target = replaceable(path)
        if pipes and target is None:
            with open(path, "wb") as out:
                yield out
            return
        target = target or path
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(partial, "x+b") as out:
                yield out
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if error.filename in (None, str(partial)):
            error.filename = str(path)
        raise


class LogFile(logging.FileHandler):
    """A log file that takes any name of a file; that it cannot be written is said once and stops nothing."""

    _said = False

    def __init__(self, path: str) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._path = path

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not self._said:
            self._said = True
            reason = getattr(error, "strerror", None) or error
            print(f"log file {self._path}: {reason}; lines are lost", file=sys.stderr)
