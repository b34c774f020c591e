"""Fewer and fuller data blobs for an image that was merged again and again. Reference: nydusd.md 7.3, `compact`.

Three steps, each switched by an option: blobs nobody refers to leave the table; of a blob whose files were mostly
removed by upper layers only the chunks still used are kept (`min_used_ratio`); small blobs become one
(`compact_blob_size`, `max_compact_size`). Blobs of a chunk dictionary, of original layers and tars stay as they are:
others share them, or they are not ours to cut. Upstream's 2.4 takes every blob for unused and then does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bootstrap.base import Blob, Bootstrap, Chunk
from bootstrap.blobsource import Blobs
from bootstrap.chunktable import BlobInfo
from bootstrap.errors import BuildError
from bootstrap.flat import Ints
from bootstrap.layout.common import BlobFeatures
from bootstrap.repack import NewBlob, repack
from bootstrap.rewrite import Draft, draft, places

_FIXED = BlobFeatures.SEPARATE | BlobFeatures.TARFS | BlobFeatures.EXTERNAL | BlobFeatures.IS_CHUNKDICT_GENERATED
_SHARED_UNITS = BlobFeatures.BATCH | BlobFeatures.ZRAN


@dataclass(frozen=True)
class CompactOptions:
    """Upstream's settings and defaults; sizes in bytes. `min_used_ratio` in percent, 0: never rebuild for it.

    `layers_to_compact`: do nothing with fewer blobs; 0: always look.
    """

    min_used_ratio: int = 0
    compact_blob_size: int = 10 << 20
    max_compact_size: int = 100 << 20
    layers_to_compact: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_used_ratio <= 99:
            raise BuildError(f"min used ratio {self.min_used_ratio} is not a percentage from 0 to 99")
        for name in ("compact_blob_size", "max_compact_size", "layers_to_compact"):
            if getattr(self, name) < 0:
                raise BuildError(f"{name.replace('_', ' ')} {getattr(self, name)} is below 0")


@dataclass(frozen=True)
class Compacted:
    """`bootstrap`: the new one, None when there was nothing to do. `blobs`: ids in table order, `new` those written."""

    bootstrap: bytearray | None
    blobs: list[str]
    new: list[str]
    dropped: list[str]


@dataclass(frozen=True)
class Usage:
    """How much of a blob an image needs: `chunks` are rows of the tree, one per chunk; sizes in bytes."""

    blob: Blob
    chunks: Ints
    stored: int
    plain: int

    @property
    def ratio(self) -> int:
        """Percent of the chunk data that is used."""
        if self.blob.features & _SHARED_UNITS:  # their chunks have no stored size of their own
            used, total = self.plain, self.blob.uncompressed_size
        else:
            used, total = self.stored, self.blob.data_size
        return min(100, used * 100 // total) if total else 100


def compact(
    blobs: Blobs,
    folder: Path,
    options: CompactOptions,
    *,
    dictionary: Sequence[str] = (),
    threads: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Compacted:
    """Compact an image; new blobs are written to `folder`, named by their ids. `dictionary`: ids of blobs to keep.

    Raises BuildError for images that cannot be taken apart, RafsError for data that is damaged or not there.
    """
    image = blobs.image
    names = [blob.id for blob in image.blobs]
    if options.layers_to_compact and len(names) < options.layers_to_compact:
        return Compacted(None, names, [], [])
    work = draft(image)
    used = usages(image, work)
    groups = plan(used, options, set(dictionary))
    dropped = [usage.blob.id for usage in used if not len(usage.chunks)]
    if not groups and not dropped:
        return Compacted(None, names, [], [])
    made = {}
    for head, members in groups.items():
        rows = np.concatenate([used[index].chunks for index in members])
        made[head] = _rebuild(blobs, work, rows, folder, threads, progress)
    gone = {index for members in groups.values() for index in members}
    gone |= {usage.blob.index for usage in used if not len(usage.chunks)}
    _assemble(work, made, gone)
    table = [blob.id for blob in work.tree.blobs]
    return Compacted(work.write(), table, [new.info.id for new, _ in made.values()], dropped)


def usages(image: Bootstrap, work: Draft) -> list[Usage]:
    """What the files of an image use of each of its blobs."""
    tree = work.tree
    rows = np.unique(tree.file_refs()[2])
    _, first = np.unique(places(tree, rows), return_index=True)
    rows = rows[first]  # by blob and number in it
    chunks = tree.chunks[rows]
    found = []
    for blob in image.blobs:
        own = rows[chunks["blob"] == blob.index]
        sizes = tree.chunks[own]
        stored, plain = int(sizes["compressed_size"].sum()), int(sizes["uncompressed_size"].sum())
        found.append(Usage(blob, own, stored, plain))
    return found


def plan(used: Sequence[Usage], options: CompactOptions, dictionary: set[str]) -> dict[int, list[int]]:
    """Which blobs become one: indexes of blobs by the index of that whose place in the table the new one takes."""
    groups: dict[int, list[int]] = {}
    small: list[tuple[int, int]] = []
    for index, usage in enumerate(used):
        if not len(usage.chunks) or usage.blob.features & _FIXED or usage.blob.id in dictionary:
            continue
        size = usage.blob.compressed_size or usage.stored
        if usage.ratio < options.min_used_ratio:
            groups[index] = [index]
            size = _weight(usage)
        if size < options.compact_blob_size:
            small.append((size, index))
    small.sort()
    target, weight = -1, 0
    for _, index in small:
        more = _weight(used[index])
        if target >= 0 and weight + more <= options.max_compact_size:
            groups.setdefault(target, [target]).append(index)
            groups.pop(index, None)
            weight += more
        else:
            target, weight = index, more
    return {head: sorted(members) for head, members in sorted(groups.items())}


def _weight(usage: Usage) -> int:
    """Bytes the used chunks will take in a new blob; of batched ones as much of theirs as is used."""
    if usage.blob.features & _SHARED_UNITS and usage.blob.uncompressed_size:
        return usage.plain * usage.blob.data_size // usage.blob.uncompressed_size
    return usage.stored


def _rebuild(
    blobs: Blobs, work: Draft, rows: Ints, folder: Path, threads: int, progress: Callable[[int], None] | None
) -> tuple[NewBlob, dict[int, int]]:
    """Write one new blob of these chunks; it, and the number of each chunk in it by `places`."""
    numbers: dict[int, int] = {}
    stored: dict[tuple[bytes, int], int] = {}
    kept: list[Chunk] = []
    for row, place in zip(rows.tolist(), places(work.tree, rows).tolist(), strict=True):
        chunk = work.chunk(row)
        key = (chunk.digest, chunk.uncompressed_size)
        number = stored.setdefault(key, len(kept))
        if number == len(kept):
            kept.append(chunk)
        numbers[place] = number
    return repack(blobs, kept, folder, threads=threads, progress=progress), numbers


def _assemble(work: Draft, made: dict[int, tuple[NewBlob, dict[int, int]]], gone: set[int]) -> None:
    """Put the new blobs into the table and let every reference go where its chunk is now."""
    tree = work.tree
    table: list[BlobInfo] = []
    moved = np.zeros(max(len(tree.blobs), 1), np.uint32)
    targets: dict[int, int] = {}  # row of the new chunk by the place of the old one
    records = [tree.chunks.copy()]
    end = len(tree.chunks)
    for index, blob in enumerate(tree.blobs):
        if index not in gone:
            moved[index] = len(table)
            table.append(blob)
        elif index in made:
            new, numbers = made[index]
            own = new.records.copy()
            own["blob"] = len(table)
            table.append(new.info)
            for place, number in numbers.items():
                targets[place] = end + number
            records.append(own)
            end += len(own)
    old = records[0]
    if targets:
        known = np.array(sorted(targets), np.int64)
        news = np.array([targets[place] for place in known.tolist()], np.int64)
        at = places(tree, tree.refs)
        found = np.minimum(np.searchsorted(known, at), len(known) - 1)
        tree.refs = np.where(known[found] == at, news[found], tree.refs)
    used = np.zeros(end, np.bool_)
    used[tree.refs] = True
    if len(old):
        stale = ~used[: len(old)]
        old["blob"] = moved[old["blob"]]
        old["blob"][stale] = 0  # no file refers to it any more
    tree.chunks = np.concatenate(records)
    tree.blobs = table
