"""What the blob cache still holds of images that are gone, and its removal.

A blob is kept as long as any bootstrap below the snapshots directory names it, whoever unpacked it; so images that
share layers share them here too. What `nydusctl cache import` put there for an image that is not pulled yet waits for
it, a month long. Whatever does not look like a blob of ours is kept. `nydusctl cache gc` also looks at parts of blobs.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from bootstrap.errors import RafsError
from snapshotter.bootstrapfile import PLACES, begins_like_one, is_plain_file
from snapshotter.errors import SnapshotterError
from snapshotter.nydusd_api import ApiUnreachable
from snapshotter.tally import tally

log = logging.getLogger(__name__)

AWAITED = 30 * 86_400.0  # seconds that imported data waits for its image
YOUNG = 60.0  # seconds: a blob may be there a moment before the bootstrap that names it
KEPT = 10.0  # seconds until a nydusd is asked again that had an image open: an expected one is given up after 30
_BLOB = re.compile(r"([0-9a-f]{64})(?:\.(?:blob|chunk|segments)[a-z_.]*)?")


def bootstraps(snapshots: Path) -> Iterator[Path]:
    """Of every snapshot there is, committed or not; what could never be mounted is none."""
    for entry in os.scandir(snapshots):
        for name in PLACES:
            path = Path(entry.path, "fs", name)
            if is_plain_file(path) and begins_like_one(path):
                yield path


def awaited(cache: Path, pulled: list[set[str]]) -> Iterator[Path]:
    """Bootstraps of images that were imported and not pulled. `pulled`: the blobs of each image that was; what was
    waited for is waited for no more."""
    from nydusfs.cachetools.places import remembered

    for path in remembered(cache):
        try:
            wanted = used_blobs([path], [path])
            if time.time() - path.stat().st_mtime > AWAITED or any(wanted <= blobs for blobs in pulled):
                path.unlink(missing_ok=True)
            else:
                yield path
        except RafsError as error:
            log.warning("%s is deleted: %s", path, error)
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            continue


def used_blobs(paths: Iterable[Path], mounted: Collection[Path]) -> set[str]:
    """Ids of all blobs that these images read from.

    Raises RafsError for a mounted one that is damaged now: then nothing is known to be unused. Any other that cannot
    be read cannot be mounted either, and must not keep the cache full.
    """
    from bootstrap.reader import open_bootstrap

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
    from nydusfs.cachetools.places import stores

    try:
        found = (entry for store in stores(cache) for entry in os.scandir(store))
        names = [(match[1], entry) for entry in found if (match := _BLOB.fullmatch(entry.name))]
        if not names:
            return [], 0
        pulled = [used_blobs([path], mounted) for path in bootstraps(snapshots)]
        used = set().union(*pulled, used_blobs(awaited(cache, pulled), ()))
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
    """All files of a blob, ours or upstream's, of earlier processes as well; what is gone already is fine. A living
    process alone knows whether it is about to use them."""
    from nydusfs.cachetools.places import device_folders, lock_holder, stores

    left = [store for store in stores(cache) if lock_holder(store) is None]
    for folder in [folder for store in left for folder in device_folders(store, blob)]:
        shutil.rmtree(folder, ignore_errors=True)
    for entry in [entry for store in left for entry in os.scandir(store)]:
        match = _BLOB.fullmatch(entry.name)
        if match is None or match[1] != blob:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink(missing_ok=True)


class Dropper(Protocol):
    """A nydusd: it drops what it has of a blob, unless an image uses it that is open there. False: it does."""

    def drop_blob(self, blob_id: str) -> bool: ...


class Collector:
    """`daemons`: APIs of those that live; `mounted`: bootstraps of their images. `period` (seconds): collects by itself
    so often, 0: only when told."""

    def __init__(
        self,
        cache: Path,
        snapshots: Path,
        daemons: Callable[[], Iterable[Dropper]],
        mounted: Callable[[], Collection[Path]],
        *,
        enabled: bool,
        period: float,
    ) -> None:
        self._cache, self._snapshots, self._daemons, self._mounted = cache, snapshots, daemons, mounted
        self._enabled, self._period = enabled, period
        self._one = threading.Lock()
        self._patient = threading.Lock()  # held by the one collection that waits for blobs to be old enough
        self._closing = threading.Event()

    def start(self) -> None:
        if self._enabled and self._period:
            threading.Thread(target=self._forever, name="cache-gc-timer", daemon=True).start()

    def close(self) -> None:
        self._closing.set()

    def collect(self) -> None:
        """In the background: what the blob cache holds of removed images goes."""
        if self._enabled:
            threading.Thread(target=self._collect_all, name="cache-gc", daemon=True).start()

    def _collect_all(self) -> None:
        """Now, and again when the rest is old enough, so that an image's blobs do not outlive it by a day."""
        again = self._collect()
        if again and self._patient.acquire(blocking=False):
            try:
                while again and not self._closing.wait(again + 1):
                    again = self._collect()
            finally:
                self._patient.release()

    def _forever(self) -> None:
        while not self._closing.wait(self._period):
            self._collect()

    def _collect(self) -> float:
        """In how many seconds there is more to do, 0 for never."""
        with self._one:
            blobs, again = look(self._cache, self._snapshots, self._mounted())
            log.debug("blob cache: %d blobs are of no image any more", len(blobs))
            for blob in blobs:
                try:
                    if not all(daemon.drop_blob(blob) for daemon in self._daemons()):
                        again = min(again or KEPT, KEPT)  # pulled again since we looked, or not unmounted yet
                        continue
                    remove(self._cache, blob)
                    tally.count("snapshotter_cache_blobs_deleted_total")
                except (SnapshotterError, OSError) as error:
                    tally.count("snapshotter_cache_blob_deletion_errors_total")
                    log.warning("blob %s stays in the cache: %s", blob, error)
                    if isinstance(error, ApiUnreachable):
                        again = again or YOUNG
                        break  # one that hangs costs one wait, not one for each blob
        return again
