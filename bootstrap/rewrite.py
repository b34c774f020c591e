"""An image taken apart to be written again with some of its chunks elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bootstrap.base import Bootstrap, Chunk
from bootstrap.chunktable import BlobInfo
from bootstrap.errors import BuildError
from bootstrap.flat import IMPLIED, FlatTree, Ints
from bootstrap.layout.common import MAX_BLOBS, BlobFeatures, SuperFlags, super_flags
from bootstrap.load import blob_info, load_tree
from bootstrap.overlay import overlay
from bootstrap.repack import NewBlob
from bootstrap.write_v5 import write_v5
from bootstrap.write_v6 import write_v6


@dataclass(slots=True)
class Draft:
    """`tree` is in G-order; the rest is what its bootstrap had."""

    tree: FlatTree
    version: int
    chunk_size: int
    flags: SuperFlags
    prefetch: list[bytes]

    def write(self) -> bytearray:
        """The bootstrap as it is now. Raises BuildError for what the version cannot hold."""
        blobs = self.tree.blobs
        if len(blobs) >= MAX_BLOBS:
            raise BuildError(f"{len(blobs)} data blobs; an image can have at most {MAX_BLOBS - 1}")
        flags = self.flags
        if self.version == 6 and not flags & SuperFlags.TARFS:
            secret = any(blob.features & BlobFeatures.ENCRYPTED for blob in blobs)
            flags |= SuperFlags.ENCRYPT_XTS if secret else SuperFlags.ENCRYPT_NONE
        write = write_v6 if self.version == 6 else write_v5
        return write(self.tree, chunk_size=self.chunk_size, flags=flags, prefetch=self.prefetch)

    def chunk(self, row: int) -> Chunk:
        """A row of the tree's chunks. Its blob is that of the image as long as `tree.blobs` is untouched."""
        name, *rest = self.tree.chunks[row].item()
        return Chunk(bytes(name), *rest)

    def append(self, made: NewBlob) -> int:
        """Put a new blob at the end of the blob table; the row of its first chunk."""
        tree = self.tree
        records = made.records.copy()
        records["blob"] = len(tree.blobs)
        first = len(tree.chunks)
        tree.chunks = np.concatenate((tree.chunks, records))
        tree.blobs = [*tree.blobs, made.info]
        return first


def draft(image: Bootstrap) -> Draft:
    """Take an image apart. Raises BuildError for kinds that cannot be, FormatError for bytes that break the format."""
    blobs: list[BlobInfo] = []
    for blob in image.blobs:
        info = blob_info(blob)
        info.features &= ~BlobFeatures.INLINED_FS_META  # what is written lies in a file of its own
        blobs.append(info)
    tree = load_tree(image, blobs)
    inodes = tree.inodes.copy()
    inodes["flags"] &= ~np.uint32(IMPLIED)  # no layers are put over each other here: keep the mark in the times
    tree.inodes = inodes
    flags = super_flags(image.compressor, image.digester)
    flags |= image.flags & (SuperFlags.EXPLICIT_UIDGID | SuperFlags.HAS_XATTR | SuperFlags.TARFS)
    return Draft(overlay([(tree, "none")]), image.version, image.chunk_size, flags, _prefetch(image))


def copy(image: Bootstrap) -> bytes | bytearray:
    """The bootstrap as it is; of a layer blob one that lies apart from its data, so that its blob keeps its name."""
    if any(blob.features & BlobFeatures.INLINED_FS_META for blob in image.blobs):
        return draft(image).write()
    return bytes(image.data)


def _prefetch(image: Bootstrap) -> list[bytes]:
    """The prefetch table as paths, in its order."""
    inodes = image.prefetch_inodes()
    paths = {image.root: b"/"}
    if set(inodes) - paths.keys():
        wanted = set(inodes)
        for path, entry in image.walk():
            if entry.ino in wanted:
                paths.setdefault(entry.ino, b"/" + path)
    return [paths[ino] for ino in inodes if ino in paths]


def places(tree: FlatTree, rows: Ints) -> Ints:
    """Numbers that are equal for chunk rows that are one chunk: v5 repeats the record of a chunk for each file."""
    chunks = tree.chunks[rows]
    found: Ints = chunks["blob"].astype(np.int64) << 32 | chunks["index"]
    return found
