"""Files of daemons and images that no record names: left by a program killed between an end and its last file."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from snapshotter.records import instance_of

log = logging.getLogger(__name__)

_DAEMON = re.compile(r"[0-9a-v]{20}")


def sweep(root: Path, log_dir: Path, served: Mapping[str, set[str]]) -> None:
    """`served`: ids of all daemons on record, each with the names of the images it serves. Other names stay.

    Nothing is touched where another implementation keeps its own daemons (nydus.db): theirs have such names too.
    """
    if (root / "nydus.db").exists():
        return
    for place in (root / "config", root / "socket", log_dir):
        for daemon in _names(place):
            path = place / daemon
            if daemon not in served:
                if _DAEMON.fullmatch(daemon):
                    log.debug("%s is of no nydusd on record", path)
                    shutil.rmtree(path, ignore_errors=True)
            elif place.name == "config":
                for name in _names(path):
                    if instance_of(name) is not None and name not in served[daemon]:
                        shutil.rmtree(path / name, ignore_errors=True)


def _names(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
