"""What the blob cache still holds of images that are gone.

A blob is kept as long as any bootstrap below the snapshots directory names it, whoever unpacked it; so images that
share layers share them here too. Whatever does not look like a blob of ours is kept.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from bootstrap.errors import RafsError
from bootstrap.reader import open_bootstrap
from snapshotter.tally import tally

log = logging.getLogger(__name__)

BOOTSTRAPS = ("image/image.boot", "image.boot")
YOUNG = 60.0  # seconds: a blob may be there a moment before the bootstrap that names it
_BLOB = re.compile(r"([0-9a-f]{64})(?:\.(?:blob|chunk|segments)[a-z_.]*)?")


def bootstraps(snapshots: Path) -> Iterator[Path]:
    """Of every snapshot there is, committed or not."""
    for entry in os.scandir(snapshots):
        for name in BOOTSTRAPS:
            path = Path(entry.path, "fs", name)
            if path.is_file():
                yield path


def used_blobs(paths: Iterable[Path]) -> set[str]:
    """Ids of all blobs that these images read from. Raises RafsError: then nothing is known to be unused."""
    found: set[str] = set()
    for path in paths:
        try:
            with open_bootstrap(path) as image:
                for blob in image.blobs:
                    found |= {blob.id, blob.meta_digest.hex()}
        except FileNotFoundError:
            continue  # removed this moment
        except RafsError as error:
            if path.exists():
                raise
            log.debug("%s is gone: %s", path, error)
    return found


def orphans(cache: Path, snapshots: Path) -> list[str]:
    """Blob ids in the cache that no bootstrap names. Empty when a bootstrap cannot be read."""
    try:
        names = [(match[1], entry) for entry in os.scandir(cache) if (match := _BLOB.fullmatch(entry.name))]
        if not names:
            return []
        used = used_blobs(bootstraps(snapshots))
    except FileNotFoundError:
        return []
    except (RafsError, OSError) as error:
        log.warning("the blob cache is not cleaned up: %s", error)
        return []
    tally.set("snapshotter_cache_blobs_in_use", value=len({blob for blob, _ in names if blob in used}))
    young = time.time() - YOUNG
    return sorted({blob for blob, entry in names if blob not in used and entry.stat().st_mtime < young})


def remove(cache: Path, blob: str) -> None:
    """All files of a blob, ours or upstream's; what is gone already is fine."""
    for entry in os.scandir(cache):
        match = _BLOB.fullmatch(entry.name)
        if match is None or match[1] != blob:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink(missing_ok=True)
