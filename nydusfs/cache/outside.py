"""What tools that work on a cache directory ask of the process it belongs to (`nydusctl cache`).

A file they delete is absent for everybody, but a process that has it open reads on; a file they add is not seen, and
not counted against the limit. So both are done by the process itself, where there is one.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nydusfs.cache.blob import BlobCache
from nydusfs.cache.names import NAME
from nydusfs.cache.spread import make_folder
from nydusfs.cache.store import CacheStore
from nydusfs.errors import CacheError

log = logging.getLogger("nydusfs.cache")

STAGED = ".staged"  # <work_dir>/.staged/<anything>/<blob id>/<segment>: verified and durable, not yet part of the cache


def report(store: CacheStore) -> dict[str, Any]:
    """Facts of a store, for JSON. `bytes` is None where no limit is set: then nobody counts."""
    quota = store.quota
    return {
        "path": str(store.path),
        "limit": quota.limit.size if quota is not None else 0,
        "min_free": quota.limit.floor if quota is not None else 0,
        "bytes": quota.total if quota is not None else None,
        "evictions": quota.evictions if quota is not None else 0,
        "blobs": {blob_id: blob.used for blob_id, blob in list(store._blobs.items())},
    }


def split(name: str) -> tuple[str, bytes] | None:
    """`<number>-<key>` and the key of a segment's name as it is durable; None for any other name."""
    match = NAME.fullmatch(name)
    return None if match is None or match[3] is not None else (name, bytes.fromhex(match[2]))


def drop(store: CacheStore, blob: BlobCache, names: Iterable[str], *, damaged: bool) -> list[str]:
    """Forget and delete segments. For a worker thread; the names of those that were there.

    `damaged`: what has the file open, a kernel mount too, is to get an error and not what is in it.
    """
    gone = []
    for parts in filter(None, map(split, names)):
        name, key = parts
        blob.forget(key)
        store.files.drop((blob.blob_id, key))
        there = False
        for path in (blob.path / f"{name}.{store.boot}", blob.path / name):
            try:
                if damaged and store.devices is not None:
                    os.truncate(path, 0)
                os.unlink(path)
                there = True
            except OSError:
                continue
        if there:
            gone.append(name)
        if store.devices is not None and damaged:
            store.devices.remove(blob.blob_id, name)
    return gone


def adopt(store: CacheStore, blob: BlobCache, names: Iterable[str], staged: str) -> tuple[list[str], str]:
    """Make verified, durable files of a staging directory part of the cache. For a worker thread.

    The names taken, and why there are not more: "" or a reason that will hold for the next ones as well. Nothing is
    evicted for them. Raises `CacheError` for a directory that is not a staging directory of this store.
    """
    folder = staging(store.path, staged) / blob.blob_id
    taken = []
    for parts in filter(None, map(split, names)):
        name, key = parts
        path, slot = folder / name, (blob.blob_id, key)
        try:
            size = path.stat().st_size
            if key in blob:
                if store.quota is not None:
                    store.quota.found(slot, name, size, time.time())
                path.unlink()
                taken.append(name)
                continue
            if store.quota is not None and not store.quota.admit(slot, name, size):
                return taken, "the cache's limit is reached"
            try:
                make_folder(blob.path)
                with blob.naming:
                    os.rename(path, blob.path / name)
                    blob.found(key)
                path.unlink(missing_ok=True)  # rename(2) does nothing when both are one file already
            except OSError:
                if store.quota is not None:
                    store.quota.failed(slot)
                raise
            finally:
                if store.quota is not None:
                    store.quota.written(slot)
        except OSError as error:
            return taken, f"{path}: {error.strerror or error}"
        taken.append(name)
    return taken, ""


def staging(store: Path, name: str) -> Path:
    """Raises `CacheError` for what is no simple name."""
    if not name or name.startswith(".") or "/" in name:
        raise CacheError(f"cache {store}: {name!r} is not the name of a staging directory")
    return store / STAGED / name
