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
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from bootstrap.errors import RafsError
from bootstrap.reader import open_bootstrap
from snapshotter.bootstrapfile import PLACES, begins_like_one, is_plain_file
from snapshotter.tally import tally

log = logging.getLogger(__name__)

YOUNG = 60.0  # seconds: a blob may be there a moment before the bootstrap that names it
_BLOB = re.compile(r"([0-9a-f]{64})(?:\.(?:blob|chunk|segments)[a-z_.]*)?")


def bootstraps(snapshots: Path) -> Iterator[Path]:
    """Of every snapshot there is, committed or not; what could never be mounted is none."""
    for entry in os.scandir(snapshots):
        for name in PLACES:
            path = Path(entry.path, "fs", name)
            if is_plain_file(path) and begins_like_one(path):
                yield path


def used_blobs(paths: Iterable[Path], mounted: Collection[Path]) -> set[str]:
    """Ids of all blobs that these images read from.

    Raises RafsError for a mounted one that is damaged now: then nothing is known to be unused. Any other that cannot
    be read cannot be mounted either, and must not keep the cache full.
    """
    found: set[str] = set()
    for path in paths:
        try:
            with open_bootstrap(path) as image:
                for blob in image.blobs:
                    found |= {blob.id, blob.meta_digest.hex()}
        except FileNotFoundError:
            continue  # removed this moment
        except RafsError as error:
            if path in mounted:
                raise
            log.log(logging.WARNING if path.exists() else logging.DEBUG, "%s names no blobs: %s", path, error)
    return found


def orphans(cache: Path, snapshots: Path, mounted: Collection[Path] = ()) -> list[str]:
    """Blob ids in the cache that no bootstrap names. Empty when that of an image that is `mounted` cannot be read."""
    return look(cache, snapshots, mounted)[0]


def look(cache: Path, snapshots: Path, mounted: Collection[Path] = ()) -> tuple[list[str], float]:
    """The orphans, and in how many seconds those of them that are too young to tell will not be (0: there are none)."""
    try:
        names = [(match[1], entry) for entry in os.scandir(cache) if (match := _BLOB.fullmatch(entry.name))]
        if not names:
            return [], 0
        used = used_blobs(bootstraps(snapshots), mounted)
    except FileNotFoundError:
        return [], 0
    except (RafsError, OSError) as error:
        log.warning("the blob cache is not cleaned up: %s", error)
        return [], 0
    tally.set("snapshotter_cache_blobs_in_use", value=len({blob for blob, _ in names if blob in used}))
    age: dict[str, float] = {}  # of what changed last
    now = time.time()
    for blob, entry in names:
        if blob in used:
            continue
        try:
            age[blob] = min(age.get(blob, now), now - entry.stat().st_mtime)
        except FileNotFoundError:  # the cache gave it up this moment
            continue
    youngest = min(age.values(), default=YOUNG + 1)
    return sorted(blob for blob in age if age[blob] > YOUNG), max(0.0, YOUNG - youngest)


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
