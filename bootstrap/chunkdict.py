"""Chunk dictionaries: chunks of another image that a build need not store again. Reference: RAFS format 5.11."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from bootstrap.dedup import ChunkIndex
from bootstrap.errors import BuildError, FormatError
from bootstrap.layout.common import Compressor, SuperFlags
from bootstrap.layout.tables import CHUNK
from bootstrap.load import blob_info
from bootstrap.options import BuildOptions
from bootstrap.reader import Bootstrap, open_bootstrap

log = logging.getLogger(__name__)


def learn_dictionary(index: ChunkIndex, path: Path, options: BuildOptions) -> None:
    """Make the chunks of the bootstrap at `path` known to a build with these options.

    Its blobs enter the image's blob table when they are used. The chunk table counts and not the files: those of a
    generated dictionary (`chunkdict generate`) have no usable size. Raises BuildError naming the file.
    """
    table = index.table
    first = len(table)
    try:
        with open_bootstrap(path) as image:
            require_like(image, f"chunk dictionary {path}", options)
            records = np.array(list(image.chunk_records()), CHUNK)
            table.extend(records, [blob_info(blob) for blob in image.blobs])
    except FormatError as error:
        raise BuildError(f"chunk dictionary {path}: {error}") from error
    index.learn(range(first, len(table)))


def require_like(image: Bootstrap, what: str, options: BuildOptions) -> None:
    """Refuse another image whose chunks or inodes this build could not share: `what` names it in the message."""
    explicit = bool(image.flags & SuperFlags.EXPLICIT_UIDGID)
    for name, theirs, ours in (
        ("RAFS version", image.version, options.fs_version),
        ("chunk size", f"{image.chunk_size:#x}", f"{options.chunk_size:#x}"),
        ("explicit owners", explicit, not options.repeatable),
    ):
        if theirs != ours:
            raise BuildError(f"{what} does not fit this build: {name} {theirs} instead of {ours}")
    # One compressor for all blobs of a v5 image; those of v6 say theirs. What is stored raw fits any.
    if image.version == 5 and image.blobs and image.compressor not in (Compressor.NONE, options.compressor):
        label, own = image.compressor.label, options.compressor.label
        raise BuildError(f"{what} does not fit this build: compressor {label} instead of {own}")
    theirs, ours = image.digester.label, options.digester.label
    if theirs != ours:
        if image.version == 5:  # its inodes have digests too
            raise BuildError(f"{what} does not fit this build: digester {theirs} instead of {ours}")
        log.warning("%s has %s digests, this build %s: no chunk of it can be reused", what, theirs, ours)
