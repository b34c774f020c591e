"""How much of the blob cache each snapshot accounts for: what containerd adds up to "images use so many bytes".

Every cached blob counts once, for the snapshot that came first of those that name it: a data layer by its digest, or
the image whose bootstrap names it where no layer does (zran keeps the original layer's blobs, images that were found
beside plain ones have no data layers here). Summed up twice, kubelet would evict images of a disk that is not full.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bootstrap.errors import RafsError
from nydusfs.trees import disk_usage
from snapshotter.bootstrapfile import PLACES, is_plain_file
from snapshotter.cachegc import used_blobs
from snapshotter.labels import LAYER_DIGEST, NYDUS_REF, STARGZ, TWIN, is_data, is_layer_of_twin, is_meta
from snapshotter.store import Kind, Snapshot, Store

log = logging.getLogger(__name__)

AGAIN_SECONDS = 10.0  # as CRI asks: while the bootstrap of an image is not there yet
_BLOB_ID = re.compile(r"[0-9a-f]{64}")
_FILES = (".blob.data", ".blob.data.chunk_map", ".blob.meta")


class CacheUsage:
    """Thread-safe. Whose a blob is, is found out again when snapshots came or went."""

    def __init__(self, cache: Path, store: Store) -> None:
        self._cache, self._store = cache, store
        self._lock = threading.Lock()
        self._seen, self._good_until = -1, 0.0
        self._blobs: dict[int, set[str]] = {}

    def of(self, snapshot: Snapshot) -> int:
        """Bytes on disk. Zero for layers that are no part of a lazy image."""
        if not (_names_blobs(snapshot) or _has_bootstrap(snapshot)):
            return 0
        with self._lock:
            changes, now = self._store.changes, time.monotonic()
            if changes != self._seen or now > self._good_until:
                self._blobs, complete = self._owners()
                self._seen, self._good_until = changes, math.inf if complete else now + AGAIN_SECONDS
            blobs = self._blobs.get(snapshot.id, ())
        return sum(map(self._size, blobs))

    def _owners(self) -> tuple[dict[int, set[str]], bool]:
        """Snapshot -> its blobs; False: a bootstrap is not there yet."""
        found: dict[int, set[str]] = {}
        taken: set[str] = set()
        complete = True
        lazy = [one for one in self._store.all() if one.kind is Kind.COMMITTED]
        lazy.sort(key=lambda one: one.id)
        for one in filter(_names_blobs, lazy):
            found[one.id] = set(_digests(one)) - taken
            taken |= found[one.id]
        for one in filter(_has_bootstrap, lazy):
            paths = [path for name in PLACES if is_plain_file(path := self._store.upper(one.id) / name)]
            try:
                named = used_blobs(paths, paths)
            except (RafsError, OSError) as error:
                log.debug("snapshot %d: %s", one.id, error)
                named = set()
            complete &= bool(paths)
            found[one.id] = found.get(one.id, set()) | (named - taken)
            taken |= named
        return found, complete

    def _size(self, blob: str) -> int:
        """Our directory of segments, or upstream's files."""
        size = 0
        for name in (blob, *(blob + ending for ending in _FILES)):
            path = self._cache / name
            if path.is_dir():
                size += disk_usage(path)[0]
            elif path.is_file():
                size += path.stat().st_blocks * 512
        return size


def _names_blobs(snapshot: Snapshot) -> bool:
    return is_data(snapshot.labels) or STARGZ in snapshot.labels


def _has_bootstrap(snapshot: Snapshot) -> bool:
    labels = snapshot.labels
    return is_meta(labels) or (TWIN in labels and not is_layer_of_twin(labels))


def _digests(snapshot: Snapshot) -> Iterator[str]:
    for label in (LAYER_DIGEST, NYDUS_REF):
        digest = snapshot.labels.get(label, "").rpartition(":")[2]
        if _BLOB_ID.fullmatch(digest):
            yield digest
