"""Merges layer bootstraps into the bootstrap of an image. Reference: RAFS format 5.9, 5.10 and 6.2."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from bootstrap.chunktable import BlobInfo
from bootstrap.errors import BuildError, FormatError
from bootstrap.flat import NO_BLOB, FlatTree
from bootstrap.inlined import extract_bootstrap
from bootstrap.layout.common import (
    MAX_BLOB_ID,
    BlobFeatures,
    Compressor,
    Digester,
    SuperFlags,
    super_flags,
)
from bootstrap.load import blob_info, load_tree
from bootstrap.outputs import replaceable
from bootstrap.overlay import overlay
from bootstrap.reader import Bootstrap, open_bootstrap
from bootstrap.tree import clean_patterns
from bootstrap.write_v5 import write_v5
from bootstrap.write_v6 import write_v6

__all__ = ["InconsistentError", "MergeResult", "MergeSource", "extract_bootstrap", "merge_layers"]


_HEX_DIGEST = re.compile("[0-9a-fA-F]{64}")


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
    """`blobs`: ids in blob table order, only those still referenced; `compressor`: of the first layer, as upstream
    reports it (the superblock has that of the last one); `digester`: of the last; `inode_count`: paths in the merged
    tree; `size`, `sha256`: of the bootstrap; `timings`: seconds by stage, under upstream's names."""

    blobs: list[str]
    fs_version: int
    compressor: Compressor
    digester: Digester
    inode_count: int
    size: int
    sha256: str
    timings: dict[str, float]


@dataclass(frozen=True)
class _Format:
    """What all layers, the parent and the dictionary must agree in (5.10, step 1)."""

    version: int
    chunk_size: int
    explicit_owners: bool
    tarfs: bool
    digester: Digester | None
    """v5 only: its inodes have digests, of all that lies in them."""

    def difference(self, other: _Format) -> str:
        for name, mine, theirs in (
            ("RAFS version", self.version, other.version),
            ("chunk size", hex(self.chunk_size), hex(other.chunk_size)),
            ("explicit owners", self.explicit_owners, other.explicit_owners),
            ("tarfs mode", self.tarfs, other.tarfs),
            ("digest algorithm", _label(self.digester), _label(other.digester)),
        ):
            if mine != theirs:
                return f"{name} {theirs} instead of {mine}"
        return ""


def _label(digester: Digester | None) -> str:
    return digester.label if digester is not None else ""


def merge_layers(
    sources: Sequence[MergeSource],
    out: Path,
    *,
    prefetch: Sequence[bytes] = (),
    parent: Path | None = None,
    chunk_dict: Path | None = None,
) -> MergeResult:
    """Overlay the layers, lowest first, and write the bootstrap of the image to `out`.

    OCI whiteouts are applied and vanish, in the lowest layer too. `prefetch` holds absolute paths for the prefetch
    table. `parent`: a bootstrap to put all layers onto. `chunk_dict`: the bootstrap whose chunks layers refer to; its
    blobs keep their ids. Raises InconsistentError for layers that do not fit together, BuildError for those that cannot
    be read.
    """
    if not sources:
        raise BuildError("nothing to merge: give at least one layer bootstrap")
    merge = _Merge()
    if chunk_dict is not None:
        merge.add_dictionary(chunk_dict)
    if parent is not None:
        merge.add(parent, None)
    for source in sources:
        merge.add(source.path, source)
    return merge.write(out, prefetch)


class _Merge:
    """The layers taken in so far."""

    def __init__(self) -> None:
        self._layers: list[tuple[FlatTree, str]] = []
        self._blobs: dict[str, BlobInfo] = {}
        self._dictionary: frozenset[str] = frozenset()
        self._expected: tuple[_Format, Path] | None = None
        self._encrypted = False
        self._shared = False
        """Some blob belongs to several layers."""
        self._first: Bootstrap | None = None
        self._last: Bootstrap | None = None
        self._started = time.perf_counter()

    def add_dictionary(self, path: Path) -> None:
        with _named(path), open_bootstrap(path) as image:
            self._fit(image, path)
            self._dictionary = frozenset(blob.id for blob in image.blobs)

    def add(self, path: Path, source: MergeSource | None) -> None:
        """The next layer; without `source` an image, whose blobs keep their ids."""
        with _named(path), open_bootstrap(path) as image:
            self._fit(image, path)
            self._layers.append((load_tree(image, self._blobs_of(image, path, source)), "oci"))
            self._encrypted = self._encrypted or bool(image.flags & SuperFlags.ENCRYPT_XTS)
            self._first, self._last = self._first or image, image

    def _fit(self, image: Bootstrap, path: Path) -> None:
        found = _Format(
            version=image.version,
            chunk_size=image.chunk_size,
            explicit_owners=bool(image.flags & SuperFlags.EXPLICIT_UIDGID),
            tarfs=bool(image.flags & SuperFlags.TARFS),
            digester=image.digester if image.version == 5 else None,
        )
        if self._expected is None:
            self._expected = found, path
            return
        expected, owner = self._expected
        if difference := expected.difference(found):
            raise InconsistentError(f"Inconsistent RAFS Filesystem: {path} does not fit {owner}: {difference}")

    def _blobs_of(self, image: Bootstrap, path: Path, source: MergeSource | None) -> list[BlobInfo]:
        """The image's blob table with the ids the merged image will use; layers with equal ids share an entry."""
        own = [blob for blob in image.blobs if blob.id not in self._dictionary]
        if source is not None and len(own) > 1:
            ids = ", ".join(blob.id[:12] for blob in own)
            raise BuildError(
                f"{path}: invalid per layer bootstrap, having multiple associated data blobs ({ids}): give the chunk "
                "dictionary it was built with"
            )
        found = []
        for blob in image.blobs:
            info = blob_info(blob)
            info.features &= ~BlobFeatures.INLINED_FS_META
            if source is not None and blob.id not in self._dictionary:
                _rename(info, path, source)
            known = self._blobs.setdefault(info.id, info)
            if known is not info:
                self._shared = True
                _unify(known, info, path)
            found.append(known)
        return found

    def write(self, out: Path, prefetch: Sequence[bytes]) -> MergeResult:
        loaded = time.perf_counter()
        first, last, expected = self._first, self._last, self._expected
        assert first is not None and last is not None and expected is not None
        flags = super_flags(last.compressor, last.digester)
        flags |= last.flags & (SuperFlags.EXPLICIT_UIDGID | SuperFlags.TARFS)
        if last.version == 6:
            flags |= SuperFlags.ENCRYPT_XTS if self._encrypted else SuperFlags.ENCRYPT_NONE
            flags |= SuperFlags.HAS_XATTR  # upstream's v6 merges say so whether or not it is true
        layers, self._layers = self._layers, []
        tree = overlay(layers)
        del layers
        tree.drop_unused_blobs()
        if self._shared and not last.flags & SuperFlags.TARFS:  # which has no digests
            _check_shared(tree)
        write = write_v6 if last.version == 6 else write_v5
        patterns = clean_patterns(list(prefetch))[0]
        data = write(tree, chunk_size=expected[0].chunk_size, flags=flags, prefetch=patterns)
        write_file(out, data)
        return MergeResult(
            blobs=[blob.id for blob in tree.blobs],
            fs_version=last.version,
            compressor=first.compressor,
            digester=last.digester,
            inode_count=len(tree.names),
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            timings={
                "load_tree_from_bootstrap": round(loaded - self._started, 6),
                "dump_bootstrap": round(time.perf_counter() - loaded, 6),
            },
        )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Damage is said with the file it is in: there may be a hundred."""
    try:
        yield
    except FormatError as error:
        raise BuildError(f"{path}: {error}") from error


def _rename(info: BlobInfo, path: Path, source: MergeSource) -> None:
    stem = path.name.split(".", 1)[0]
    info.id = source.original_blob_id or stem
    separate = bool(info.features & BlobFeatures.SEPARATE)
    if separate and _HEX_DIGEST.fullmatch(stem):  # the file is named after the blob that the bootstrap was taken from
        info.meta_digest = bytes.fromhex(stem)
    if source.blob_digest is not None:
        digest = _digest(source.blob_digest)
        if separate:
            info.meta_digest = digest
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


def _unify(known: BlobInfo, other: BlobInfo, path: Path) -> None:
    """Two layers name one blob: they must mean the same. An entry of a generated dictionary says less (5.11)."""
    generated = BlobFeatures.IS_CHUNKDICT_GENERATED
    if known.features & generated and not other.features & generated:
        for field in fields(BlobInfo):
            setattr(known, field.name, getattr(other, field.name))
    elif not other.features & generated:
        for name in ("chunk_count", "uncompressed_size", "compressor", "ci_offset", "ci_uncompressed_size", "cipher"):
            mine, theirs = getattr(known, name), getattr(other, name)
            if mine != theirs:
                raise BuildError(
                    f"{path}: blob {known.id} has {name} {theirs} here and {mine} in a layer before: two blobs cannot "
                    "have one id"
                )


def _check_shared(tree: FlatTree) -> None:
    """All layers must mean the same chunk by the same number: mixed up, one of them would read the other's data."""
    chunks = tree.chunks[np.unique(tree.refs)]
    chunks = chunks[chunks["blob"] != NO_BLOB]
    keys = chunks["blob"].astype(np.int64) << 32 | chunks["index"]
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    one, other = chunks[order[:-1][same]], chunks[order[1:][same]]
    differ = (one["digest"] != other["digest"]) | (one["uncompressed_offset"] != other["uncompressed_offset"])
    if differ.any():
        wrong = one[differ][0]
        blob = tree.blobs[wrong["blob"]].id
        raise BuildError(f"layers disagree about chunk {wrong['index']} of blob {blob}: two blobs cannot have one id")


def _digest(text: str) -> bytes:
    if not _HEX_DIGEST.fullmatch(text):
        raise BuildError(f"{text!r} is not a SHA-256 digest in hex")
    return bytes.fromhex(text)


def write_file(out: Path, data: bytes | bytearray) -> None:
    """Write a bootstrap so that a reader never sees half of it; pipes and devices are written directly."""
    try:
        target = replaceable(out)
        if target is None:
            out.write_bytes(data)
            return
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            partial.write_bytes(data)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(f"cannot write {out}: {error.strerror}") from error
