"""Filling a cache from what is at hand: upstream's cache files, another node's cache, blobs as files.

Every byte is verified against the digests of an image whose bootstrap is here, written to a staging directory, made
durable, and only then becomes part of the cache, by a rename. So an import may be killed at any moment, and whatever
lies in a source can at worst be of no use. Nothing is evicted for it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bootstrap import blobmeta
from bootstrap.base import Blob
from bootstrap.blobsource import Blobs, Folder
from bootstrap.errors import RafsError
from bootstrap.tarmap import TarMap
from nydusfs.cache.foreign import META_SUFFIX, ForeignBlob
from nydusfs.cache.names import NAME, SEGMENTS_SUFFIX
from nydusfs.cache.outside import STAGED
from nydusfs.cachetools import holder
from nydusfs.cachetools.images import KnownImage, open_image
from nydusfs.cachetools.inventory import foreign_id
from nydusfs.cachetools.places import IMPORTED, stores
from nydusfs.errors import CacheError
from nydusfs.segments import Plain, Segment
from nydusfs.tables import check_rows, kept_name, read_kept, write_kept

BATCH = 16  # segments that become part of the cache at a time: 4 MiB, what a limit may be overstepped by meanwhile
AHEAD = 4  # segments under way for each thread


@dataclass
class BlobResult:
    """Of one blob and image. `there`: segments the cache had already. `damaged`: segment files of the source whose
    bytes are wrong, by path; they are left out. `absent`: what the source does not have, or not rightly."""

    blob_id: str
    image: Path
    taken: int = 0
    bytes: int = 0
    there: int = 0
    absent: int = 0
    damaged: list[str] = field(default_factory=list)
    problem: str = ""


@dataclass
class Gathered:
    """`full`: why it ended early, "" if it did not. `unclaimed`: blobs of the source that no image here names."""

    blobs: list[BlobResult] = field(default_factory=list)
    full: str = ""
    unclaimed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Source:
    """A directory with any of: segments of another node's cache, upstream's cache files, blobs named by their digest
    (`<hex>`, `sha256:<hex>`), also as an OCI layout. Raises CacheError when it is no directory that can be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            os.listdir(path)
        except OSError as error:
            raise CacheError(f"{path}: {error.strerror or error}") from None
        self.stores = stores(path)
        layout = path / "blobs" / "sha256"
        self.folders = [path, layout] if layout.is_dir() else [path]

    def bootstraps(self) -> list[Path]:
        """`*.boot` in it, and those an earlier import left."""
        return sorted(path for folder in (self.path, self.path / IMPORTED) for path in folder.glob("*.boot"))

    def blob_ids(self) -> set[str]:
        found = set()
        for folder in (*self.folders, *self.stores[1:]):
            for entry in os.scandir(folder):
                name = entry.name.removeprefix("sha256:")
                if entry.is_file() and (blob_id := foreign_id(name)):
                    found.add(blob_id)
                elif entry.is_dir(follow_symlinks=False) and not name.startswith("."):
                    try:
                        if any(NAME.fullmatch(each) for each in os.listdir(entry.path)):
                            found.add(name.removesuffix(SEGMENTS_SUFFIX))
                    except OSError:
                        continue
        return found

    def blob_file(self, blob_id: str) -> Path | None:
        """The stored blob itself."""
        for folder in self.folders:
            for name in (blob_id, f"sha256:{blob_id}"):
                path = folder / name
                if "/" not in blob_id and path.is_file():
                    return path
        return None


class _Blob:
    """What a source has of one blob. `take` is for worker threads."""

    def __init__(self, source: Source, blob_id: str) -> None:
        self._folders = [
            folder
            for store in source.stores
            for folder in (store / blob_id, store / f"{blob_id}{SEGMENTS_SUFFIX}")
            if folder.is_dir()
        ]
        self._names = [set(os.listdir(folder)) for folder in self._folders]
        self._foreign: list[ForeignBlob] = []
        if (found := ForeignBlob.find(source.path, blob_id)) is not None:
            self._foreign.append(found)
        file = source.blob_file(blob_id)
        if file is not None and file != source.path / blob_id:
            self._foreign += filter(None, [ForeignBlob.of_file(file)])
        self.damaged: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._folders or self._foreign)

    def take(self, image: KnownImage, segment: Segment) -> Plain | None:
        """Its verified bytes."""
        for folder, names in zip(self._folders, self._names, strict=True):
            if segment.name in names:
                candidates = [segment.name]
            else:
                candidates = [name for name in names if name.startswith(f"{segment.name}.") and "part" not in name]
            for name in candidates:
                try:
                    plain = (folder / name).read_bytes()
                except OSError as error:
                    self.damaged.append(f"{folder / name}: {error.strerror or error}")
                    continue
                what = image.judge(segment, plain)
                if not what:
                    return plain[: segment.size]
                self.damaged.append(f"{folder / name}: {what}")
        for foreign in self._foreign:
            found = foreign.take(image.chunks, segment)
            if found is not None:
                return found
        return None

    def close(self) -> None:
        for foreign in self._foreign:
            foreign.close()


class Gatherer:
    """Into `store`. `room`: bytes that may still come after so many that did, None: no limit; a holder has its own.
    `advance` hears of bytes done."""

    def __init__(
        self,
        store: Path,
        find: holder.FindHolder,
        *,
        threads: int,
        room: Callable[[int], int | None] = lambda taken: None,
        advance: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.store = store
        self._find = find
        self._threads = threads
        self._room = room
        self._taken = 0
        self._advance = advance
        self._token = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._staged = store / STAGED / self._token

    def run(self, source: Source, bootstraps: Iterable[Path]) -> Gathered:
        """Of every blob that one of these images names. Raises CacheError when the store cannot be written."""
        result = Gathered()
        claimed: set[str] = set()
        present = source.blob_ids()
        try:
            try:
                self._staged.mkdir(mode=0o700, parents=True)
            except OSError as error:
                raise CacheError(f"cache {self.store}: {error.strerror or error}") from None
            with ThreadPoolExecutor(self._threads, thread_name_prefix="import") as pool:
                for path in bootstraps:
                    if result.full:
                        break
                    try:
                        with open_image(path, [self.store, *source.stores]) as image:
                            for blob in image.bootstrap.blobs:
                                claimed |= {blob.id, blob.meta_digest.hex()}
                                if blob.id in present and not result.full:
                                    self._one_blob(source, image, blob, pool, result)
                    except (RafsError, OSError) as error:
                        result.problems.append(f"bootstrap {path}: {getattr(error, 'strerror', None) or error}")
        finally:
            shutil.rmtree(self._staged, ignore_errors=True)
            try:
                (self.store / STAGED).rmdir()
            except OSError:
                pass  # another import is at it
        result.unclaimed = sorted(present - claimed)
        return result

    def _one_blob(
        self, source: Source, image: KnownImage, blob: Blob, pool: ThreadPoolExecutor, result: Gathered
    ) -> None:
        found = BlobResult(blob.id, image.path)
        result.blobs.append(found)
        parts = _Blob(source, blob.id)
        try:
            found.problem = self._table(source, image, blob)
            if found.problem:
                return
            os.makedirs(self._staged / blob.id, mode=0o700, exist_ok=True)
            self._segments(parts, image, blob, pool, found, result)
        except (RafsError, OSError) as error:
            found.problem = str(getattr(error, "strerror", None) or error)
        finally:
            found.damaged = parts.damaged
            parts.close()

    def _segments(
        self, parts: _Blob, image: KnownImage, blob: Blob, pool: ThreadPoolExecutor, found: BlobResult, result: Gathered
    ) -> None:
        running: deque[tuple[Segment, Future[bool]]] = deque()
        ready: list[Segment] = []

        failed: list[OSError] = []

        def finish(most: int) -> None:
            while len(running) > most:
                segment, future = running.popleft()
                try:
                    if future.result():
                        ready.append(segment)
                    else:
                        found.absent += 1
                except OSError as error:
                    failed.append(error)
                self._advance(segment.size)
                if len(ready) >= BATCH:
                    self._adopt(blob, ready, found, result)

        try:
            for segment in image.segments(blob):
                if result.full or failed:
                    break
                if self._has(blob.id, segment.name):
                    found.there += 1
                    self._advance(segment.size)
                    continue
                running.append((segment, pool.submit(self._stage, parts, image, segment)))
                finish(self._threads * AHEAD)
        finally:
            finish(0)
        if ready:
            self._adopt(blob, ready, found, result)
        if failed:
            result.full = result.full or f"{self.store}: {failed[0].strerror or failed[0]}"

    def _has(self, blob_id: str, name: str) -> bool:
        return any((self.store / folder / name).exists() for folder in (blob_id, f"{blob_id}{SEGMENTS_SUFFIX}"))

    def _stage(self, parts: _Blob, image: KnownImage, segment: Segment) -> bool:
        """Write the verified segment and have the disk take it. Raises OSError."""
        plain = parts.take(image, segment)
        if plain is None:
            return False
        path = self._staged / segment.blob.id / segment.name
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(plain)
            while view:
                view = view[os.write(fd, view) :]
            os.fdatasync(fd)
        finally:
            os.close(fd)
        return True

    def _adopt(self, blob: Blob, ready: list[Segment], found: BlobResult, result: Gathered) -> None:
        """Empties `ready`."""
        batch, ready[:] = ready[:], []
        if result.full:
            return
        room = self._room(self._taken)
        if room is not None and sum(segment.padded for segment in batch) > room:
            result.full = "the cache's limit is reached"
            return
        taken, why = holder.adopt(self._find, self.store, blob.id, [segment.name for segment in batch], self._token)
        done = set(taken)
        found.taken += len(done)
        self._taken += sum(segment.padded for segment in batch if segment.name in done)
        found.bytes += sum(segment.size for segment in batch if segment.name in done)
        result.full = why

    # ---- the blob's own table

    def _table(self, source: Source, image: KnownImage, blob: Blob) -> str:
        """Attach it, and keep it in the store if it came from the source: the image needs it to read the segments. What
        is wrong if it cannot be had, else ""."""
        if not image.chunks.lacks_meta(blob.index):
            return ""
        problem = image.need_table(blob)
        target = self.store / ".maps" / kept_name(blob)
        if not problem:
            if not target.exists() and (content := self._found_table(source, image, blob)) is not None:
                self._keep(target, content)
            return ""
        try:
            self._keep(target, self._read_table(source, image, blob))
        except (RafsError, OSError) as error:
            return f"{problem}, and {error}"
        return ""

    @staticmethod
    def _found_table(source: Source, image: KnownImage, blob: Blob) -> bytes | memoryview | None:
        """One that `need_table` accepted, if it came from the source."""
        for folder in source.stores:
            if (kept := read_kept(str(folder / ".maps" / kept_name(blob)))) is not None:
                return kept
        try:
            data = None if isinstance(image.chunks, TarMap) else (source.path / f"{blob.id}{META_SUFFIX}").read_bytes()
        except OSError:
            return None
        return data

    @staticmethod
    def _read_table(source: Source, image: KnownImage, blob: Blob) -> bytes:
        """From the stored blobs themselves."""
        reader = _Files(source)
        try:
            if isinstance(image.chunks, TarMap):
                Blobs(image.bootstrap, reader, image.chunks).need_meta(blob)
                return image.chunks.digests_of(blob.index)
            where = blobmeta.meta_range(blob, image.path.name.split(".", 1)[0])
            region, header = blobmeta.read_meta(blob, where, reader.read(*where[:3]))
            meta = blobmeta.BlobMeta(blob, region, header)
            check_rows(image.chunks, blob, meta)
            image.chunks.attach(blob.index, meta)
            return blobmeta.pack_cache_form(region, header)
        finally:
            reader.close()

    @staticmethod
    def _keep(target: Path, content: bytes | memoryview) -> None:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        write_kept(os.fspath(target), content)


class _Files(Folder):
    """Stored blobs of a source."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.path)
        self._source = source

    def path(self, blob_id: str) -> str:
        found = self._source.blob_file(blob_id)
        return str(found) if found is not None else super().path(blob_id)


# ---- images that are not here yet


def remember(store: Path, bootstrap: Path) -> Path:
    """Keep a bootstrap beside the data imported for it, so that the data is known to be of use until its image is here.
    Raises OSError."""
    data = bootstrap.read_bytes()
    folder = store / IMPORTED
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{hashlib.sha256(data).hexdigest()[:24]}.boot"
    if not path.exists():
        part = folder / f".{secrets.token_hex(6)}"
        part.write_bytes(data)
        os.chmod(part, stat.S_IRUSR | stat.S_IWUSR)
        os.rename(part, path)
    return path
