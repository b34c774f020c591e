"""Images whose metadata is at hand: what segments of a cache are parts of, and what their bytes must be."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bootstrap import blobmeta
from bootstrap.base import Blob, Bootstrap
from bootstrap.blobsource import local_meta
from bootstrap.chunkmap import ChunkMap
from bootstrap.decode import verify
from bootstrap.errors import RafsError
from bootstrap.reader import open_bootstrap
from bootstrap.tarmap import TarMap
from nydusfs.cache.foreign import META_SUFFIX
from nydusfs.cachetools.inventory import Inventory
from nydusfs.segments import SEGMENT_SIZE, Plain, Segment, make_segment
from nydusfs.tables import check_rows, kept_name, read_kept


class KnownImage:
    """One open image. `segment` raises what `make_segment` does."""

    def __init__(self, path: Path, bootstrap: Bootstrap, folders: Iterable[Path]) -> None:
        self.path = path
        self.bootstrap = bootstrap
        self.chunks = ChunkMap.open(bootstrap, None)
        self._folders = list(folders)

    def blobs(self, blob_id: str) -> list[Blob]:
        return [blob for blob in self.bootstrap.blobs if blob.id == blob_id]

    def need_table(self, blob: Blob) -> str:
        """Attach the blob's own table if it needs one: from beside the bootstrap or a cache directory. What is wrong
        if that cannot be done, else ""."""
        if not self.chunks.lacks_meta(blob.index):
            return ""
        problem = "its chunk table is in no cache here"
        for folder in self._folders:
            kept = read_kept(str(folder / ".maps" / kept_name(blob)))
            if kept is not None:
                try:
                    self._attach(blob, kept)
                    return ""
                except RafsError as error:
                    problem = f"its chunk table is not usable: {error}"
        if isinstance(self.chunks, TarMap):
            return problem
        looks = [partial(local_meta, self.bootstrap, blob), *(partial(_left, path, blob) for path in self._folders)]
        for look in looks:
            try:
                meta = look()
                if meta is not None:
                    check_rows(self.chunks, blob, meta)
                    self.chunks.attach(blob.index, meta)
                    return ""
            except RafsError as error:
                problem = f"its chunk table is not usable: {error}"
        return problem

    def _attach(self, blob: Blob, kept: memoryview) -> None:
        if isinstance(self.chunks, TarMap):
            self.chunks.attach_digests(blob.index, bytes(kept))
            return
        meta = blobmeta.open_cache_form(blob, kept)
        check_rows(self.chunks, blob, meta)
        self.chunks.attach(blob.index, meta)

    def segment(self, blob: Blob, number: int) -> Segment:
        return make_segment(self.chunks, blob, number)

    def segment_named(self, blob_id: str, name: str) -> Segment | None:
        """None when this image has no such segment, as far as its tables tell."""
        number = int(name.partition("-")[0])
        for blob in self.blobs(blob_id):
            if self.chunks.lacks_meta(blob.index):
                continue
            try:
                segment = self.segment(blob, number)
            except (KeyError, ValueError, IndexError, RafsError):
                continue
            if segment.name == name:
                return segment
        return None

    def segments(self, blob: Blob) -> Iterator[Segment]:
        """All segments of a blob that the image uses. Raises RafsError."""
        last = -1
        for row in self.chunks.blob_rows(blob.index):
            number = self.chunks.anchor(blob.index, row) // SEGMENT_SIZE
            if number > last:
                last = number
                yield self.segment(blob, number)

    def judge(self, segment: Segment, plain: Plain) -> str:
        """What is wrong with the bytes of a segment file, "" if they are right. Thread-safe."""
        if len(plain) != segment.size and not segment.size <= len(plain) <= segment.padded:
            return f"it has {len(plain)} bytes instead of {segment.size}"
        view = memoryview(plain)
        try:
            for row in segment.rows:
                chunk = self.chunks.chunk(row)
                begin = segment.place(chunk.uncompressed_offset)
                verify(chunk, segment.blob, view[begin : begin + chunk.uncompressed_size])
        except RafsError as error:
            return str(error)
        return ""


def _left(folder: Path, blob: Blob) -> blobmeta.BlobMeta | None:
    """What upstream left in its work directory. Read rather than mapped: it may change."""
    try:
        data = (folder / f"{blob.id}{META_SUFFIX}").read_bytes()
    except OSError:
        return None
    return blobmeta.open_cache_form(blob, memoryview(data))


@contextmanager
def open_image(path: Path, folders: Iterable[Path]) -> Iterator[KnownImage]:
    """`folders`: where tables of its blobs may be. Raises RafsError, OSError."""
    with open_bootstrap(os.fspath(path)) as bootstrap:
        image = KnownImage(path, bootstrap, folders)
        try:
            yield image
        finally:
            image.chunks.close()


def cached_bytes(stores: Iterable[Inventory], images: Mapping[Path, Mapping[str, int]]) -> dict[tuple[Path, str], int]:
    """Bytes of chunks in the segments of each store's blobs. A segment that no image explains, or only one whose tables
    are not here, counts as its file does, with the gaps between chunks."""
    left = {(store.path, blob.blob_id): dict(blob.segments) for store in stores for blob in store.blobs.values()}
    folders = {path for path, _ in left}
    found = dict.fromkeys(left, 0)
    for path, blobs in images.items():
        mine = [(key, files) for key, files in left.items() if key[1] in blobs and files]
        if not mine:
            continue
        try:
            with open_image(path, folders) as image:
                for key, files in mine:
                    for blob in image.blobs(key[1]):
                        image.need_table(blob)
                    for name in list(files):
                        if (segment := image.segment_named(key[1], name)) is not None:
                            del files[name]
                            found[key] += sum(image.chunks.chunk(row).uncompressed_size for row in segment.rows)
        except (RafsError, OSError):
            continue  # whoever lists bootstraps says what is wrong with it
    for key, files in left.items():
        found[key] += sum(file.size for file in files.values())
    return found


def blob_sizes(paths: Iterable[Path]) -> tuple[dict[Path, dict[str, int]], dict[Path, str]]:
    """Of each bootstrap that can be read: its blobs and their plain sizes, those of separate tables included (0). And
    what is wrong with the others, for people; one that went away meanwhile is no problem."""
    found: dict[Path, dict[str, int]] = {}
    problems = {}
    for path in paths:
        try:
            with open_bootstrap(os.fspath(path)) as bootstrap:
                sizes: dict[str, int] = {}
                for blob in bootstrap.blobs:
                    if any(blob.meta_digest):
                        sizes.setdefault(blob.meta_digest.hex(), 0)
                    sizes[blob.id] = max(sizes.get(blob.id, 0), blob.uncompressed_size)
                found[path] = sizes
        except FileNotFoundError:
            continue
        except (RafsError, OSError) as error:
            if path.exists():
                problems[path] = f"bootstrap {path}: {getattr(error, 'strerror', None) or error}"
    return found, problems
