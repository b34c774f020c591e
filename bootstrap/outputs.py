"""What a path that is to be written leads to."""

from __future__ import annotations

import os
from pathlib import Path


def replaceable(path: Path) -> Path | None:
    """The file that gets this name by a rename, behind all links; None for what can only be written through.

    That is a FIFO, a device, and the name of an open file: a rename over /dev/stdout would take it from everyone.
    """
    if path.exists() and not path.is_file():
        return None
    step = str(path)
    for _ in range(40):  # as many links as the kernel follows
        if not os.path.islink(step):
            return Path(step)
        folder = os.path.realpath(os.path.dirname(step))
        if folder.startswith("/proc/"):
            return None
        step = os.path.join(folder, os.readlink(step))
    return path  # a circle: opening it says so
