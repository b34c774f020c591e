"""Statistics of images: sizes, chunks, and what they share. Reference: nydusd.md 7.3, `stat`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bootstrap.base import S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, Bootstrap, Chunk
from bootstrap.grouped import FileChunks, directories
from bootstrap.layout.common import Digester, round_up

FILE_SIZE_BITS = 45
CHUNK_SIZE_BITS = range(12, 21)
MAX_THRESHOLD = 20


@dataclass
class ImageInfo:
    """Counters of one or several images; names and order are those of the JSON.

    `file_sizes[n]` counts files whose size has n bits (the last: n or more), `chunk_sizes[n]` the chunks the files
    would have at a chunk size of 2^(12 + n). `comp_size` and `uncomp_size` are over all parts of all files; the
    latter has the padding to 4096 added in the end. `dedup_*`: distinct chunks over all images. `own_*`: distinct
    chunks of each image, summed; of a target those the base images do not have, which it shares as `ref_*`.
    """

    dirs: int = 0
    files: int = 0
    symlinks: int = 0
    chunks: int = 0
    file_size: int = 0
    comp_size: int = 0
    uncomp_size: int = 0
    padding_size: int = 0
    chunk_sizes: list[int] = field(default_factory=lambda: [0] * len(CHUNK_SIZE_BITS))
    file_sizes: list[int] = field(default_factory=lambda: [0] * FILE_SIZE_BITS)
    dedup_chunks: int = 0
    dedup_comp_size: int = 0
    dedup_uncomp_size: int = 0
    own_chunks: int = 0
    own_comp_size: int = 0
    own_uncomp_size: int = 0
    ref_chunks: int = 0
    ref_comp_size: int = 0
    ref_uncomp_size: int = 0


@dataclass
class Threshold:
    """What a dictionary of all chunks that at least `n` images have would save; sizes in bytes.

    `content`: all uses of chunks; `base`: the dictionary; `image`: what the images keep for themselves.
    """

    raw_chunks: int = 0
    dedup_chunks: int = 0
    comp_content_size: int = 0
    comp_base_size: int = 0
    comp_image_size: int = 0
    uncomp_content_size: int = 0
    uncomp_base_size: int = 0
    uncomp_image_size: int = 0


class ImageStat:
    """Adds up images: `add` each base image, then perhaps a target, then `finish`."""

    def __init__(self, *, dedup: bool = False, digester: Digester | None = None) -> None:
        self.dedup_enabled = dedup
        self.target_enabled = False
        self.base_image = ImageInfo()
        self.target_image = ImageInfo()
        self.thresholds = [Threshold() for _ in range(MAX_THRESHOLD)]
        self._digester = digester
        self._shared: dict[tuple[Digester, bytes], tuple[int, int, int]] = {}  # stored and plain size, images

    def add(self, image: Bootstrap, *, target: bool = False) -> None:
        """Count one image. Nothing of it is counted when it turns out to be damaged (FormatError)."""
        info, chunks = _count(image)
        digester = image.digester
        shared = self._shared
        for digest, (stored, plain) in chunks.items():
            known = shared.get((digester, digest))
            if target and known is not None and known[1] in (0, plain):
                info.ref_chunks += 1
                info.ref_comp_size += stored
                info.ref_uncomp_size += plain
                continue
            info.own_chunks += 1
            info.own_comp_size += stored
            info.own_uncomp_size += plain
            if not target and self._digester in (None, digester):
                shared[digester, digest] = (stored, plain, 1) if known is None else (*known[:2], known[2] + 1)
        if target:
            self.target_enabled = True
            self.target_image = info
        else:
            _sum(self.base_image, info)

    def finish(self) -> None:
        """Fill in what needs all images."""
        for info in (self.base_image, self.target_image):
            info.uncomp_size += info.padding_size
        if not self.dedup_enabled:
            return
        base = self.base_image
        for stored, plain, images in self._shared.values():
            base.dedup_chunks += 1
            base.dedup_comp_size += stored
            base.dedup_uncomp_size += plain
            for number, row in enumerate(self.thresholds, 1):
                row.raw_chunks += images
                row.comp_content_size += images * stored
                row.uncomp_content_size += images * plain
                if number <= images:
                    row.dedup_chunks += 1
                    row.comp_base_size += stored
                    row.uncomp_base_size += plain
                else:
                    row.dedup_chunks += images
                    row.comp_image_size += images * stored
                    row.uncomp_image_size += images * plain

    def as_json(self) -> dict[str, Any]:
        """The document upstream writes with -J."""
        return {
            "dedup_enabled": self.dedup_enabled,
            "target_enabled": self.target_enabled,
            "base_image": vars(self.base_image),
            "target_image": vars(self.target_image),
        }

    def as_text(self) -> Iterator[str]:
        """The lines upstream prints without -J."""
        if self.target_enabled:
            yield "Target Image Statistics:"
            yield from _table(self.target_image)
        yield "\n\nBase Image Statistics:"
        yield from _table(self.base_image)
        if self.dedup_enabled:
            yield "\n\nChunk Deduplication Statistics:"
            yield (
                "Global Dedup Thresh:\tRaw Chunks:\tDedup Chunks:\tComp Content Size:\tComp Base Size:\tComp Image "
                "Size:\tUncomp Content Size:\tUncomp Base Size\tUncomp Image Size"
            )
            for number, row in enumerate(self.thresholds, 1):
                if not row.dedup_chunks:
                    break
                yield f"{number:<24}" + "".join(f"0x{value:<14x}" for value in vars(row).values())


def _count(image: Bootstrap) -> tuple[ImageInfo, dict[bytes, tuple[int, int]]]:
    """Counters of one image, and its distinct chunks with stored and plain size."""
    info = ImageInfo(dirs=1)
    distinct: dict[bytes, tuple[int, int]] = {}
    parts = FileChunks(image)
    seen: set[int] = set()
    for _, _, entries in directories(image):
        for entry in entries:
            attr = image.attr(entry.ino)
            kind = attr.mode & S_IFMT
            if kind == S_IFDIR:
                info.dirs += 1
            elif kind == S_IFLNK:
                info.symlinks += 1
            elif kind == S_IFREG:
                info.files += 1
                if attr.nlink > 1:
                    if entry.ino in seen:
                        continue
                    seen.add(entry.ino)
                _count_file(info, attr.size, parts.of(entry.ino), distinct)
    return info, distinct


def _count_file(info: ImageInfo, size: int, parts: list[Chunk], distinct: dict[bytes, tuple[int, int]]) -> None:
    info.file_sizes[min(size.bit_length(), FILE_SIZE_BITS - 1)] += 1
    info.file_size += size
    info.padding_size += round_up(size, 4096) - size
    info.chunks += len(parts)
    for part in parts:
        info.comp_size += part.compressed_size
        info.uncomp_size += part.uncompressed_size
        distinct.setdefault(part.digest, (part.compressed_size, part.uncompressed_size))
    sizes = info.chunk_sizes
    for slot, bits in enumerate(CHUNK_SIZE_BITS):
        sizes[slot] += -(-size >> bits)


def _sum(total: ImageInfo, one: ImageInfo) -> None:
    mine = vars(total)
    for name, value in vars(one).items():
        if isinstance(value, list):
            mine[name] = [a + b for a, b in zip(mine[name], value, strict=True)]
        else:
            mine[name] += value


def _table(info: ImageInfo) -> Iterator[str]:
    yield ""
    yield f"Directories:            {info.dirs}"
    yield f"Files:                  {info.files}"
    yield f"Symlinks:               {info.symlinks}"
    yield f"Chunks:                 {info.chunks}"
    yield f"File Size:              {info.file_size}"
    yield f"Padding Size:           {info.padding_size}"
    yield f"Uncompressed Size:      {info.uncomp_size}"
    yield f"Compressed Size:        {info.comp_size}"
    yield "\nFile Size Bits:\t\tFile Count:"
    for bits, count in enumerate(info.file_sizes):
        yield f"{bits}:\t\t\t{count}"
    yield "\nChunk Size Bits:\tChunk Count:"
    for bits, count in zip(CHUNK_SIZE_BITS, info.chunk_sizes, strict=True):
        yield f"{bits}:\t\t\t{count}"
    yield f"\nRaw Content Size:\t{info.file_size}"
    yield f"Comp Content Size:\t{info.comp_size}"
    yield f"Raw Chunk Count:\t{info.chunks}"
    yield f"Dedup Comp Size:\t{info.dedup_comp_size}"
    yield f"Dedup Uncomp Size:\t{info.dedup_uncomp_size}"
    yield f"Dedup Chunk Count:\t{info.dedup_chunks}"
    yield f"Owned Comp Size:\t{info.own_comp_size}"
    yield f"Owned Uncomp Size:\t{info.own_uncomp_size}"
    yield f"Owned Chunk Count:\t{info.own_chunks}"
    yield f"Referenced Comp Size:\t{info.ref_comp_size}"
    yield f"Referenced Uncomp Size:\t{info.ref_uncomp_size}"
    yield f"Referenced Chunk Count:\t{info.ref_chunks}"
