"""What lies in a cache directory, entry by entry. Nothing is opened, so it may be done beside anybody."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nydusfs.cache.foreign import FOREIGN_SUFFIXES
from nydusfs.cache.names import NAME, SEGMENTS_SUFFIX
from nydusfs.cache.outside import STAGED
from nydusfs.cache.store import boot_id
from nydusfs.cachetools.places import IMPORTED, WORKER

_ID = re.compile(r"[0-9a-f]{64}")
_OWN = (".lock", ".maps", ".erofs", STAGED, IMPORTED)


@dataclass(frozen=True, slots=True)
class File:
    """`allocated`: bytes of the disk; `used`: when it was last read or written, as far as the file system tells, in
    seconds since the epoch."""

    path: Path
    size: int
    allocated: int
    used: float
    changed: float

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(slots=True)
class BlobFiles:
    """`segments`: complete ones, by `<number>-<key>`. `stale`: of an earlier boot, never to be used. `parts`: being
    written, or left by a writer that was killed. `foreign`: upstream's files."""

    blob_id: str
    segments: dict[str, File] = field(default_factory=dict)
    stale: list[File] = field(default_factory=list)
    parts: list[File] = field(default_factory=list)
    foreign: list[File] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    changed: float = 0.0  # the newest of all of it

    @property
    def filed(self) -> int:
        """Bytes of complete segments with the gaps between their chunks."""
        return sum(file.size for file in self.segments.values())

    def files(self) -> Iterator[File]:
        yield from self.segments.values()
        yield from self.stale
        yield from self.parts
        yield from self.foreign

    @property
    def allocated(self) -> int:
        return sum(file.allocated for file in self.files())

    @property
    def used(self) -> float:
        return max((file.used for file in self.files()), default=self.changed)


@dataclass(slots=True)
class Inventory:
    """One store: a cache directory, or a `.worker-N` below it that a second process uses. `unknown`: nothing that
    nydusd, ours or upstream's, is known to make."""

    path: Path
    blobs: dict[str, BlobFiles] = field(default_factory=dict)
    unknown: list[Path] = field(default_factory=list)

    @property
    def allocated(self) -> int:
        return sum(blob.allocated for blob in self.blobs.values())


def take(store: Path) -> Inventory:
    """Raises OSError when the directory cannot be read; what goes away meanwhile is left out."""
    found = Inventory(store)
    boot = boot_id()
    for entry in os.scandir(store):
        name = entry.name
        if name in _OWN or WORKER.fullmatch(name):
            continue
        facts = _facts(entry)
        if facts is None:
            continue
        if entry.is_dir(follow_symlinks=False):
            _folder(found, entry, boot, facts.changed)
            continue
        blob_id = foreign_id(name) if entry.is_file(follow_symlinks=False) else ""
        if blob_id:
            blob = found.blobs.setdefault(blob_id, BlobFiles(blob_id))
            blob.foreign.append(facts)
            blob.changed = max(blob.changed, facts.changed)
        else:
            found.unknown.append(Path(entry.path))
    found.unknown.sort()
    return found


def foreign_id(name: str) -> str:
    """Of which blob this is a file of upstream's, "" for other names."""
    if _ID.fullmatch(name):
        return name
    for suffix in FOREIGN_SUFFIXES:
        blob_id = name.removesuffix(suffix)
        if blob_id != name and blob_id and (_ID.fullmatch(blob_id) or suffix.startswith(".blob.")):
            return blob_id
    return ""


def _folder(found: Inventory, entry: os.DirEntry[str], boot: str, changed: float) -> None:
    """A directory is a blob's when its name is an id or it holds segments and nothing else."""
    blob_id = entry.name.removesuffix(SEGMENTS_SUFFIX)
    blob = BlobFiles(blob_id)
    strange = []
    try:
        entries = list(os.scandir(entry.path))
    except OSError:
        found.unknown.append(Path(entry.path))
        return
    for each in entries:
        match = NAME.fullmatch(each.name)
        facts = _facts(each)
        if facts is None:
            continue
        if match is None or not each.is_file(follow_symlinks=False):
            strange.append(Path(each.path))
            continue
        changed = max(changed, facts.changed)
        if match[3] in (None, boot):
            blob.segments.setdefault(f"{match[1]}-{match[2]}", facts)
        elif match[3] == "part":
            blob.parts.append(facts)
        else:
            blob.stale.append(facts)
    if not _ID.fullmatch(blob_id) and (strange or not entries):
        found.unknown.append(Path(entry.path))
        return
    found.unknown += strange
    kept = found.blobs.setdefault(blob_id, BlobFiles(blob_id))
    kept.segments.update(blob.segments)
    kept.stale += blob.stale
    kept.parts += blob.parts
    kept.folders.append(Path(entry.path))
    kept.changed = max(kept.changed, changed)


def _facts(entry: os.DirEntry[str]) -> File | None:
    try:
        facts = entry.stat(follow_symlinks=False)
    except OSError:
        return None
    used = max(facts.st_atime, facts.st_mtime)
    return File(Path(entry.path), facts.st_size, facts.st_blocks * 512, used, facts.st_mtime)
