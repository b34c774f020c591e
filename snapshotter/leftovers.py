"""Files of daemons and images that no record names: left by a program killed between an end and its last file."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from snapshotter.records import instance_of

log = logging.getLogger(__name__)

_DAEMON = re.compile(r"[0-9a-v]{20}")


def sweep(root: Path, log_dir: Path, served: Callable[[], Mapping[str, set[str]]]) -> None:
    """`served`: ids of all daemons on record, each with the names of the images it serves. Other names stay.

    Nothing is touched where another implementation keeps its own daemons (nydus.db): theirs have such names too.
    """
    if (root / "nydus.db").exists():
        return
    # looked at before `served` is asked: daemons and images that come now are on record before they have files
    places = [root / "config", root / "socket"]
    if log_dir.resolve().is_relative_to(root):  # elsewhere another snapshotter may keep its logs too
        places.append(log_dir)
    found = {place: {daemon: _names(place / daemon) for daemon in _names(place)} for place in places}
    known = served()
    for place, daemons in found.items():
        for daemon, names in daemons.items():
            path = place / daemon
            if daemon not in known:
                if _DAEMON.fullmatch(daemon):
                    log.debug("%s is of no nydusd on record", path)
                    shutil.rmtree(path, ignore_errors=True)
            elif place.name == "config":
                for name in names:
                    if instance_of(name) is not None and name not in known[daemon]:
                        shutil.rmtree(path / name, ignore_errors=True)


def _names(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
