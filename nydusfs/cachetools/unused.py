"""What of a cache directory nothing uses any more, proven: every image of the node was read and none names it.

Whatever is not known to be nydusd's stays and is listed. What is derived from bootstraps and made again when needed
(`.maps`) goes with them.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from bootstrap.reader import open_bootstrap
from nydusfs.cache.outside import STAGED
from nydusfs.cache.store import boot_id
from nydusfs.cachetools.images import open_image
from nydusfs.cachetools.inventory import BlobFiles, File, Inventory
from nydusfs.tables import kept_name

YOUNG = 60.0  # seconds: a blob may be there a moment before the bootstrap that names it
LEFT = 3600.0  # seconds after which what is being written is the rest of a writer that was killed
_MAP = re.compile(r"[0-9a-f]{24}")
_TABLE = re.compile(r"table-[0-9a-f]{24}")


@dataclass(slots=True)
class Unused:
    """Of one store. `blobs`: all of them goes. `segments`: of blobs that stay, by blob id. `files`: rests of killed
    writers, of earlier boots, and what was derived from bootstraps that are gone; directories too. `unproven`: blobs
    of which single segments cannot be judged, with the reason."""

    store: Path
    blobs: dict[str, BlobFiles] = field(default_factory=dict)
    segments: dict[str, list[File]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)
    unproven: dict[str, str] = field(default_factory=dict)

    def size(self) -> int:
        """Bytes of the disk."""
        size = sum(blob.allocated for blob in self.blobs.values())
        size += sum(file.allocated for files in self.segments.values() for file in files)
        return size + sum(allocated(path) for path in self.files)


def find_unused(stores: Sequence[Inventory], images: Mapping[Path, Mapping[str, int]]) -> list[Unused]:
    """`images`: every bootstrap there is, with the blobs it names. To be read after the stores were looked at, so that
    no image comes between. Raises RafsError or OSError when one cannot be judged: then nothing is known to be unused.
    """
    named = {blob_id for blobs in images.values() for blob_id in blobs}
    found = []
    now = time.time()
    for store in stores:
        unused = Unused(store.path, unknown=list(store.unknown))
        for blob in store.blobs.values():
            if blob.blob_id not in named:
                if blob.changed < now - YOUNG:
                    unused.blobs[blob.blob_id] = blob
            else:
                unused.segments[blob.blob_id] = list(blob.segments.values())
                unused.files += [file.path for file in blob.stale]
                unused.files += [file.path for file in blob.parts if file.changed < now - LEFT]
        found.append(unused)
    _keep_used_segments(found, images)
    tables = _tables(images)
    for unused in found:
        unused.segments = {blob_id: files for blob_id, files in unused.segments.items() if files}
        unused.files += _derived(unused.store, images, tables, now)
    return found


def _tables(images: Mapping[Path, object]) -> set[str]:
    """Names of the tables that images have."""
    found = set()
    for path in images:
        try:
            with open_bootstrap(os.fspath(path)) as bootstrap:
                found |= {kept_name(blob) for blob in bootstrap.blobs}
        except FileNotFoundError:
            if path.exists():
                raise
    return found


def _keep_used_segments(found: Sequence[Unused], images: Mapping[Path, Mapping[str, int]]) -> None:
    """Takes out of `segments` what images use or cannot be told."""
    folders = [unused.store for unused in found]
    young = time.time() - YOUNG
    for path, blobs in images.items():
        if not any(blob_id in blobs for unused in found for blob_id in unused.segments):
            continue
        try:
            with open_image(path, folders) as image:
                for blob in image.bootstrap.blobs:
                    for unused in found:
                        files = unused.segments.get(blob.id)
                        if not files:
                            continue
                        if problem := image.need_table(blob):
                            unused.unproven[blob.id] = problem
                            unused.segments[blob.id] = []
                            continue
                        unused.segments[blob.id] = [
                            file
                            for file in files
                            if file.changed < young
                            and image.segment_named(blob.id, file.name.partition(".")[0]) is None
                        ]
        except FileNotFoundError:
            if path.exists():
                raise


def _derived(store: Path, images: Mapping[Path, object], tables: set[str], now: float) -> Iterator[Path]:
    """Files below the store's own directories that belong to nothing."""
    maps = {blake2b(os.path.realpath(path).encode(), digest_size=12).hexdigest() for path in images}
    for entry in _entries(store / ".maps"):
        if (_MAP.fullmatch(entry.name) and entry.name not in maps) or (
            _TABLE.fullmatch(entry.name) and entry.name not in tables
        ):
            if _age(entry, now) > YOUNG:
                yield Path(entry.path)
        elif entry.name.startswith(".") and _age(entry, now) > LEFT:
            yield Path(entry.path)  # a temporary file
    for entry in _entries(store / STAGED):
        if _age(entry, now) > LEFT:
            yield Path(entry.path)
    for entry in _entries(store / ".erofs"):
        if entry.name.startswith("files.") and entry.name != f"files.{boot_id()}":
            yield Path(entry.path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError:
        return []


def _age(entry: os.DirEntry[str], now: float) -> float:
    try:
        return now - entry.stat(follow_symlinks=False).st_mtime
    except OSError:
        return 0.0


def allocated(path: Path) -> int:
    """Bytes of the disk that a file, or all of a directory, takes. Hard links count once for each name."""
    try:
        if path.is_symlink() or not path.is_dir():
            return path.lstat().st_blocks * 512
        return sum(allocated(child) for child in path.iterdir())
    except OSError:
        return 0


__all__ = ["Unused", "allocated", "find_unused"]
