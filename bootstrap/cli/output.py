"""Files that commands write: they appear whole or not at all."""

from __future__ import annotations

import os
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
