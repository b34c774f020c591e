"""Rereading what a cache holds: every complete segment against the digests of the images it is a part of."""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bootstrap.errors import RafsError
from nydusfs.cachetools.images import KnownImage, open_image
from nydusfs.cachetools.inventory import File, Inventory
from nydusfs.segments import Plain, Segment

AHEAD = 8  # segments under way for each thread


@dataclass(frozen=True, slots=True)
class Damage:
    store: Path
    blob_id: str
    name: str
    path: Path
    what: str


@dataclass
class Verdict:
    """`unsure`: why segments of a blob cannot be judged, with their number. `gone`: evicted or removed meanwhile."""

    segments: int = 0
    bytes: int = 0
    gone: int = 0
    damaged: list[Damage] = field(default_factory=list)
    unsure: dict[tuple[Path, str], tuple[int, str]] = field(default_factory=dict)


def verify_stores(
    stores: Sequence[Inventory],
    images: Mapping[Path, Mapping[str, int]],
    *,
    threads: int,
    advance: Callable[[int], None] = lambda size: None,
    found: Callable[[Damage], None] = lambda damage: None,
) -> Verdict:
    """`images`: bootstraps with the blobs they name. `advance` hears of bytes done, `found` of damage as it is met,
    both in this thread. Blocking; reads with `threads` threads."""
    verdict = Verdict()
    left = {(store.path, blob.blob_id): dict(blob.segments) for store in stores for blob in store.blobs.values()}
    folders = [store.path for store in stores]
    reasons: dict[str, str] = {}

    def done(outcome: tuple[int, Damage | None]) -> None:
        size, damage = outcome
        advance(max(0, size))
        if damage is not None:
            verdict.damaged.append(damage)
            found(damage)
        if size < 0:
            verdict.gone += 1
        else:
            verdict.segments += 1
            verdict.bytes += size

    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        for path, blobs in images.items():
            mine = [(key, files) for key, files in left.items() if key[1] in blobs and files]
            if not mine:
                continue
            try:
                with open_image(path, folders) as image:
                    _one_image(image, mine, pool, threads * AHEAD, done, reasons)
            except (RafsError, OSError) as error:
                for (_, blob_id), _ in mine:
                    reasons[blob_id] = f"bootstrap {path}: {error}"
    named = {blob_id for blobs in images.values() for blob_id in blobs}
    for key, files in left.items():
        files = {name: file for name, file in files.items() if _there(file, name)}
        if files:
            other = "no image here has these parts of it" if key[1] in named else "no bootstrap here names it"
            verdict.unsure[key] = (len(files), reasons.get(key[1], other))
    return verdict


def _there(file: File, name: str) -> bool:
    return file.path.exists() or file.path.with_name(name).exists()


def _one_image(
    image: KnownImage,
    mine: Iterable[tuple[tuple[Path, str], dict[str, File]]],
    pool: ThreadPoolExecutor,
    most: int,
    done: Callable[[tuple[int, Damage | None]], None],
    reasons: dict[str, str],
) -> None:
    """Takes what is of this image out of the dictionaries of files."""
    running: deque[Future[tuple[int, Damage | None]]] = deque()
    for (store, blob_id), files in mine:
        for blob in image.blobs(blob_id):
            if problem := image.need_table(blob):
                reasons[blob_id] = problem
        for name in list(files):
            segment = image.segment_named(blob_id, name)
            if segment is None:
                continue
            running.append(pool.submit(_check, image, segment, store, files.pop(name)))
            if len(running) >= most:
                done(running.popleft().result())
    while running:  # before the image is closed
        done(running.popleft().result())


def _check(image: KnownImage, segment: Segment, store: Path, file: File) -> tuple[int, Damage | None]:
    """Bytes read, -1 for a file that is gone, and what is wrong."""
    blob_id, path = segment.blob.id, file.path
    plain: Plain | None = None
    # it may get its durable name this moment
    for place in (path, path.with_name(segment.name)):
        try:
            plain = read_disk(place)
            break
        except FileNotFoundError:
            continue
        except OSError as error:
            return 0, Damage(store, blob_id, segment.name, place, f"it cannot be read: {error.strerror or error}")
    if plain is None:
        return -1, None
    what = image.judge(segment, plain)
    return len(plain), Damage(store, blob_id, segment.name, path, what) if what else None


def read_disk(path: Path) -> Plain:
    """A whole file, from the disk itself where the file system can: the page cache would hide what went wrong there.

    Raises OSError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return path.read_bytes()
    try:
        size = os.fstat(fd).st_size
        if not size:
            return b""
        buffer = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)  # O_DIRECT wants whole, aligned pages
        view, at = memoryview(buffer), 0
        try:
            while at < size and (got := os.preadv(fd, [view[at:]], at)):
                at += got
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return path.read_bytes()
        return view[: min(at, size)]
    finally:
        os.close(fd)
