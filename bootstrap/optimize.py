"""The chunks a container reads first, together in a blob of their own. Reference: RAFS format 5.16, `optimize`.

A list of files (and ranges in them) becomes one more data blob at the end of the table, marked
IS_SEPARATED_WITH_PREFETCH_FILES, which nydusd fetches as a whole; the listed files refer to it. Their old chunks stay
where they are, so other images keep sharing those blobs. Upstream's v6 output cannot be opened; this one is an ordinary
v6 blob with its own blob meta.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bootstrap.blobsource import Blobs
from bootstrap.errors import BuildError
from bootstrap.flat import FlatTree, Ints
from bootstrap.layout.common import BlobFeatures, SuperFlags
from bootstrap.repack import repack
from bootstrap.rewrite import Draft, draft, places

MAX_LIST = 64 << 20
VERSION = "v1"


@dataclass(frozen=True)
class Wanted:
    """A file of the list, or a directory for all files in it; `ranges` of (offset, size) in bytes, None: everything."""

    path: bytes
    ranges: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Optimized:
    """`bootstrap`: the new one, None when no chunk was listed; `blobs`: ids in table order, `blob` the new one's.

    `missing`: paths of the list that the image does not have; `size`: uncompressed bytes of the new blob.
    """

    bootstrap: bytearray | None
    blobs: list[str]
    blob: str
    chunk_count: int
    size: int
    missing: list[bytes]


def parse_list(text: bytes) -> list[Wanted]:
    """The list in upstream's JSON, or plain: one absolute path a line. Raises BuildError for what is neither."""
    if len(text) > MAX_LIST:
        raise BuildError(f"a prefetch list of {len(text)} bytes; at most {MAX_LIST} are read")
    if not text.lstrip().startswith((b"{", b"[")):
        return [Wanted(_path(line.strip(), f"line {number}"), None)
                for number, line in enumerate(text.splitlines(), 1) if line.strip()]  # fmt: skip
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BuildError(f"failed to parse prefetch file as JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("files"), list):
        raise BuildError('failed to parse prefetch file as JSON: {"version": "v1", "files": [...]} is expected')
    if document.get("version") != VERSION:
        raise BuildError(f"unsupported prefetch file version: {document.get('version')}")
    return [_wanted(item, f"files[{number}]") for number, item in enumerate(document["files"])]


def _wanted(item: Any, where: str) -> Wanted:
    if not isinstance(item, dict) or not isinstance(item.get("path"), str):
        raise BuildError(f"prefetch file: {where} has no path")
    try:
        path = _path(item["path"].encode("utf-8", "surrogateescape"), where)
    except UnicodeEncodeError:
        raise BuildError(f"prefetch file: {where}: {item['path']!r} is no file name") from None
    given = item.get("ranges")
    if given is None:
        return Wanted(path)
    ranges = []
    for pair in given if isinstance(given, list) else [given]:
        if not _is_range(pair):
            raise BuildError(f"prefetch file: {where}.ranges: {pair!r} is not [offset, size]")
        ranges.append((pair[0], pair[1]))
    return Wanted(path, tuple(ranges))


def _is_range(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and 0 <= n < 1 << 63 for n in pair)


def _path(path: bytes, where: str) -> bytes:
    if not path.startswith(b"/"):
        raise BuildError(f"prefetch file: {where}: {path!r} is not an absolute path")
    return path


def optimize(
    blobs: Blobs,
    wanted: list[Wanted],
    folder: Path,
    *,
    threads: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Optimized:
    """Write the listed chunks, in the order of the list, as a blob to `folder`, and the image that uses it.

    Raises BuildError for images that cannot be taken apart, RafsError for data that is damaged or not there.
    """
    image = blobs.image
    if image.flags & SuperFlags.TARFS:
        raise BuildError(f"{image.path}: a tarfs image has all its data in one tar, nothing can be moved out of it")
    work = draft(image)
    positions, missing = _listed(work.tree, wanted, work.chunk_size)
    if not len(positions):
        return Optimized(None, [blob.id for blob in image.blobs], "", 0, 0, missing)
    tree = work.tree
    rows = tree.refs[positions]
    _, first, numbers = np.unique(places(tree, rows), return_index=True, return_inverse=True)
    order = np.argsort(first)  # the unique ones as the list first names them
    chunks = [work.chunk(row) for row in rows[first[order]].tolist()]
    made = repack(
        blobs,
        chunks,
        folder,
        features=BlobFeatures.IS_SEPARATED_WITH_PREFETCH_FILES,
        threads=threads,
        progress=progress,
    )
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    _redirect(work, positions, work.append(made) + rank[numbers.reshape(-1)])
    return Optimized(
        work.write(),
        [blob.id for blob in work.tree.blobs],
        made.info.id,
        made.info.chunk_count,
        sum(chunk.uncompressed_size for chunk in chunks),
        missing,
    )


def _redirect(work: Draft, positions: Ints, rows: Ints) -> None:
    refs = work.tree.refs.copy()
    refs[positions] = rows
    work.tree.refs = refs


def _listed(tree: FlatTree, wanted: list[Wanted], chunk_size: int) -> tuple[Ints, list[bytes]]:
    """Where in `refs` the listed chunks are, in the order of the list, and the paths that are not in the image.

    All names of a file are changed together: in v6 they share their addresses.
    """
    inodes = tree.inodes
    names: dict[int, list[int]] = {}
    for row in np.flatnonzero(inodes["link"] > 0).tolist():
        names.setdefault(int(inodes["link"][row]), []).append(row)
    found: dict[int, None] = {}
    missing = []
    for item in wanted:
        top = tree.find(item.path)
        if top < 0:
            missing.append(item.path)
            continue
        for row in _files(tree, top):
            inode = inodes[row]
            parts = _parts(int(inode["count"]), int(inode["size"]), item.ranges, chunk_size)
            for other in names.get(int(inode["link"]), [row]) if inode["link"] > 0 else [row]:
                begin = int(inodes["first"][other])
                found.update(dict.fromkeys(begin + part for part in parts))
    return np.fromiter(found, np.int64, len(found)), missing


def _files(tree: FlatTree, top: int) -> Iterator[int]:
    """The rows of all regular files with data at or below a row, in G-order of their directories."""
    stack = [top]
    while stack:
        row = stack.pop()
        inode = tree.inodes[row]
        kind = stat.S_IFMT(int(inode["mode"]))
        if kind == stat.S_IFREG and inode["count"]:
            yield row
        elif kind == stat.S_IFDIR:
            stack += reversed(range(int(inode["first"]), int(inode["first"]) + int(inode["count"])))


def _parts(count: int, size: int, ranges: tuple[tuple[int, int], ...] | None, chunk_size: int) -> list[int]:
    """Numbers of the chunks of a file that some range touches, ascending."""
    if ranges is None:
        return list(range(count))
    found: set[int] = set()
    for offset, length in ranges:
        end = min(offset + length, size)
        if end > offset:
            found.update(range(offset // chunk_size, min(-(-end // chunk_size), count)))
    return sorted(found)
