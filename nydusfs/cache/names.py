"""What files of the cache are called, see `store`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nydusfs.segments import KEY_SIZE

SEGMENTS_SUFFIX = ".segments"
NAME = re.compile(rf"([0-9]{{1,12}})-([0-9a-f]{{{KEY_SIZE * 2}}})(?:\.([0-9a-z]+))?")  # number, key, ending


def unlink(path: str | Path) -> None:
    """Remove a file that may be gone."""
    try:
        os.unlink(path)
    except OSError:
        pass  # gone already, or the disk is in no state to care
