"""A bootstrap in the order builders number it, with the chunks of every file. For commands that judge whole images.

Reference: RAFS format 5.1 (G-order). Nothing is kept per path: a million files cost no memory but the open directories.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from bootstrap.base import Bootstrap, Chunk, DirEntry
from bootstrap.errors import FormatError
from bootstrap.layout.common import SuperFlags
from bootstrap.reader_v5 import BootstrapV5

_DIRECTORY = 4


def directories(image: Bootstrap) -> Iterator[tuple[bytes, int, list[DirEntry]]]:
    """All directories in G-order: path from the root, inode, entries sorted by name.

    Raises FormatError, in time linear in the file's size, for trees that loop or reach a directory twice.
    """
    seen = {image.root}
    left = image.size // 4  # no format needs fewer bytes for a name
    stack = [(b"", image.root)]
    while stack:
        path, ino = stack.pop()
        entries = list(image.list_dir(ino))
        left -= len(entries)
        if left < 0:
            raise FormatError("directory tree", 0, "more entries than fit the file: directories overlap")
        yield path, ino, entries
        below = []
        for entry in entries:
            if entry.dtype == _DIRECTORY:
                if entry.ino in seen:
                    shown = os.fsdecode(path + b"/" + entry.name)
                    raise FormatError("directory tree", 0, f"{shown!r} is reached twice")
                seen.add(entry.ino)
                below.append((path + b"/" + entry.name, entry.ino))
        stack += reversed(below)


class FileChunks:
    """The chunks of any file of one image, from its chunk records. Holds one tuple per chunk of a v6 image."""

    def __init__(self, image: Bootstrap) -> None:
        self._image = image
        self._records: dict[tuple[int, int, int], Chunk] = {}
        self._tarfs = bool(image.flags & SuperFlags.TARFS)
        if image.version == 6 and not self._tarfs:
            for record in image.chunk_records():
                self._records[record[1], record[8], record[6]] = Chunk._make(record)

    def of(self, ino: int) -> list[Chunk]:
        """All chunks of a regular file in file order; FormatError when one of them has no record.

        Their digests are zeros where the format has none (tarfs, external).
        """
        image = self._image
        if isinstance(image, BootstrapV5):
            return [Chunk._make(record) for record in image.file_records(ino)]
        refs = image.chunk_refs(ino)
        if self._tarfs:  # the addresses are all there is (reference 1.13)
            size, step = image.attr(ino).size, image.chunk_size
            return [
                Chunk(bytes(32), ref.blob_index, 0, part, part, ref.uncompressed_offset, ref.uncompressed_offset,
                      number * step, ref.chunk_index, 0)
                for number, ref in enumerate(refs)
                for part in [min(step, size - number * step)]
            ]  # fmt: skip
        try:
            return [self._records[ref.blob_index, ref.chunk_index, ref.uncompressed_offset] for ref in refs]
        except KeyError as missing:
            blob, index, offset = missing.args[0]
            raise FormatError("chunk table", 0, f"chunk {index} of blob {blob} at {offset:#x} has no record") from None
