"""Merges layer bootstraps into the bootstrap of an image. Reference: RAFS format 5.9, 5.10 and 6.2."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bootstrap.chunktable import BlobInfo
from bootstrap.errors import BuildError, FormatError
from bootstrap.flat import FlatTree
from bootstrap.inlined import extract_bootstrap
from bootstrap.layout.common import (
    DEFAULT_CHUNK_SIZE,
    MAX_BLOB_ID,
    BlobFeatures,
    Compressor,
    Digester,
    SuperFlags,
    super_flags,
)
from bootstrap.load import blob_info, load_tree
from bootstrap.overlay import overlay
from bootstrap.reader import Bootstrap, open_bootstrap
from bootstrap.tree import clean_patterns
from bootstrap.write_v5 import write_v5
from bootstrap.write_v6 import write_v6

__all__ = ["InconsistentError", "MergeResult", "MergeSource", "extract_bootstrap", "merge_layers"]


class InconsistentError(BuildError):
    """Layers that do not fit together: another version, chunk size or digest. `nydus-image merge` exits with 2."""


@dataclass(frozen=True)
class MergeSource:
    """One layer of a merge: its bootstrap (or a blob with one inside) and what replaces fields of its blob entry.

    Without any of them the blob id is the file's name up to its first dot. `blob_digest` (hex) is the id, or for
    OCI-ref layers the digest of the meta blob; `blob_size` accordingly compressed_size or size of the meta blob.
    """

    path: Path
    blob_digest: str | None = None
    original_blob_id: str | None = None
    blob_size: int | None = None
    toc_digest: str | None = None
    toc_size: int | None = None


@dataclass(frozen=True)
class MergeResult:
    """`blobs`: ids in blob table order, only those still referenced; `inode_count`: paths in the merged tree."""

    blobs: list[str]
    fs_version: int
    compressor: Compressor
    digester: Digester
    inode_count: int
    size: int


@dataclass(frozen=True)
class _Format:
    """What all layers must agree in."""

    version: int
    chunk_size: int
    explicit_owners: bool
    digester: Digester | None

    def difference(self, other: _Format) -> str:
        for name, mine, theirs in (
            ("RAFS version", self.version, other.version),
            ("chunk size", hex(self.chunk_size), hex(other.chunk_size)),
            ("ownership flag", self.explicit_owners, other.explicit_owners),
            ("digest algorithm", self.digester, other.digester),
        ):
            if mine != theirs:
                return f"{name} {theirs} instead of {mine}"
        return ""


def merge_layers(
    sources: Sequence[MergeSource],
    out: Path,
    *,
    prefetch: Sequence[bytes] = (),
    parent: Path | None = None,
) -> MergeResult:
    """Overlay the layers, lowest first, and write the bootstrap of the image to `out`.

    OCI whiteouts are applied and vanish, in the lowest layer too. `prefetch` holds absolute paths for the prefetch
    table. `parent`: a bootstrap to put all layers onto. Raises InconsistentError for layers that do not fit together,
    BuildError and FormatError for those that cannot be read.
    """
    if not sources:
        raise BuildError("nothing to merge: give at least one layer bootstrap")
    pool: dict[str, BlobInfo] = {}
    layers: list[tuple[FlatTree, str]] = []
    expected: _Format | None = None
    owner: Path | None = None
    flags = SuperFlags(0)
    encrypted = False
    chunk_size = 0
    version, compressor, digester = 6, Compressor.ZSTD, Digester.BLAKE3
    inputs: list[tuple[Path, MergeSource | None]] = [(source.path, source) for source in sources]
    if parent is not None:
        inputs.insert(0, (parent, None))
    for path, source in inputs:
        with _named(path), open_bootstrap(path) as image:
            found = _format_of(image)
            if expected is None:
                expected, owner = found, path
            elif difference := expected.difference(found):
                raise InconsistentError(f"{path} does not fit {owner}: {difference}")
            blobs = _blobs_of(image, path, source, pool)
            if blobs and not chunk_size:
                chunk_size = blobs[0].chunk_size
            layers.append((load_tree(image, blobs), "oci"))
            version, compressor, digester = image.version, image.compressor, image.digester
            flags = super_flags(compressor, digester) | image.flags & SuperFlags.EXPLICIT_UIDGID
            encrypted = encrypted or bool(image.flags & SuperFlags.ENCRYPT_XTS)
    if version == 6:
        flags |= SuperFlags.ENCRYPT_XTS if encrypted else SuperFlags.ENCRYPT_NONE
        flags |= SuperFlags.HAS_XATTR  # upstream's v6 merges say so whether or not it is true
    tree = overlay(layers)
    tree.drop_unused_blobs()
    write = write_v6 if version == 6 else write_v5
    patterns = clean_patterns(list(prefetch))[0]
    data = write(tree, chunk_size=chunk_size or DEFAULT_CHUNK_SIZE, flags=flags, prefetch=patterns)
    write_file(out, data)
    return MergeResult([blob.id for blob in tree.blobs], version, compressor, digester, len(tree.names), len(data))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Damage is said with the file it is in: there may be a hundred."""
    try:
        yield
    except FormatError as error:
        raise BuildError(f"{path}: {error}") from error


def _format_of(image: Bootstrap) -> _Format:
    return _Format(
        version=image.version,
        chunk_size=image.chunk_size,
        explicit_owners=bool(image.flags & SuperFlags.EXPLICIT_UIDGID),
        digester=image.digester if image.version == 5 else None,
    )


def _blobs_of(image: Bootstrap, path: Path, source: MergeSource | None, pool: dict[str, BlobInfo]) -> list[BlobInfo]:
    """The image's blob table with the ids the merged image will use; layers with equal ids share an entry."""
    if source is not None and len(image.blobs) > 1:
        raise BuildError(
            f"{path} refers to {len(image.blobs)} data blobs, a layer has one; chunk dictionaries are not supported yet"
        )
    found = []
    for blob in image.blobs:
        info = blob_info(blob)
        info.features &= ~BlobFeatures.INLINED_FS_META
        if source is not None:
            _rename(info, path, source)
        found.append(pool.setdefault(info.id, info))
    return found


def _rename(info: BlobInfo, path: Path, source: MergeSource) -> None:
    info.id = source.original_blob_id or path.name.split(".", 1)[0]
    separate = bool(info.features & BlobFeatures.SEPARATE)
    if source.blob_digest is not None:
        if separate:
            info.meta_digest = _digest(source.blob_digest)
        else:
            info.id = source.blob_digest
    if source.blob_size is not None:
        if separate:
            info.meta_size = source.blob_size
        else:
            info.compressed_size = source.blob_size
    if source.toc_digest is not None:
        info.toc_digest = _digest(source.toc_digest)
    if source.toc_size is not None:
        info.toc_size = source.toc_size
    if not 0 < len(info.id.encode()) <= MAX_BLOB_ID:
        raise BuildError(f"{path}: {info.id!r} cannot be a blob id (1 to {MAX_BLOB_ID} bytes)")


def _digest(text: str) -> bytes:
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise BuildError(f"{text!r} is not a SHA-256 digest in hex")
    return raw


def write_file(out: Path, data: bytes) -> None:
    """Write a bootstrap so that a reader never sees half of it; pipes and devices are written directly."""
    try:
        if out.exists() and not out.is_file():
            out.write_bytes(data)
            return
        partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            partial.write_bytes(data)
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(f"cannot write {out}: {error.strerror}") from error
