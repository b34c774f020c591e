"""What is derived from images and kept beside their segments: chunk maps and the tables of blobs."""

from __future__ import annotations

import os
from pathlib import Path

from nydusfs.cache.health import Health

MAX_MAPS = 1024  # derived chunk maps (12 bytes per chunk) and tables of blobs (1 to 4 % of a gzip layer) kept


def map_path(folder: Path, name: str, health: Health) -> str | None:
    """Where to keep one of that name; the ones used longest ago make room. None when the disk does not take it. For a
    worker thread."""
    try:
        try:
            os.utime(folder / name)
            return str(folder / name)
        except FileNotFoundError:
            folder.mkdir(mode=0o700, exist_ok=True)
            (folder / name).touch(mode=0o600)
        if len(os.listdir(folder)) > MAX_MAPS:
            maps = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in maps[:-MAX_MAPS]:
                path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass  # another image's map was renamed into place this instant
    except OSError as error:
        health.failed(error)
        return str(folder / name) if os.path.exists(folder / name) else None
    return str(folder / name)
