"""What a build can be asked for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bootstrap.crypt import Secret
from bootstrap.errors import BuildError
from bootstrap.layout.common import (
    DEFAULT_CHUNK_SIZE,
    MAX_BLOB_ID,
    Compressor,
    Digester,
    is_chunk_size,
)


@dataclass(frozen=True)
class BuildOptions:
    """Settings of one build; names and defaults are those of `nydus-image create` (RAFS format 5.12).

    `prefetch` holds absolute paths; `prefetch_policy` is none, fs or blob; `whiteout_spec` is oci, overlayfs or none
    and only matters for directories and builds on a parent. `repeatable` leaves owners out. `threads` is the number of
    threads that digest and compress; 1 works in the calling thread. `batch_size`: chunks below half of it are
    compressed together (v6), 0 for none. `secret`: encrypt with it (v6). `blob_offset`: where in the stored blob its
    first byte will lie. `chunk_dict`: a bootstrap whose chunks need not be stored again. `cache_dir`: where
    `CacheFilesMode` leaves its files. Raises BuildError for values that do not fit together.
    """

    fs_version: int = 6
    compressor: Compressor = Compressor.ZSTD
    digester: Digester = Digester.BLAKE3
    chunk_size: int = DEFAULT_CHUNK_SIZE
    aligned_chunk: bool = False
    whiteout_spec: str = "oci"
    inline_meta: bool = False
    blob_toc: bool = False
    prefetch: list[bytes] = field(default_factory=list)
    prefetch_policy: str = "none"
    blob_id: str | None = None
    repeatable: bool = False
    threads: int = 2
    batch_size: int = 0
    secret: Secret | None = None
    blob_offset: int = 0
    chunk_dict: Path | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.fs_version not in (5, 6):
            raise BuildError(f"RAFS version {self.fs_version} does not exist; use 5 or 6")
        if not is_chunk_size(self.chunk_size):
            raise BuildError(f"chunk size {self.chunk_size:#x} is not a power of two from 0x1000 to 0x1000000")
        if self.whiteout_spec not in ("oci", "overlayfs", "none"):
            raise BuildError(f"whiteout spec {self.whiteout_spec!r} is not oci, overlayfs or none")
        if self.prefetch_policy not in ("none", "fs", "blob"):
            raise BuildError(f"prefetch policy {self.prefetch_policy!r} is not none, fs or blob")
        if self.blob_toc and self.fs_version != 6:
            raise BuildError("the feature blob-toc needs RAFS version 6")
        if self.blob_id is not None and not 0 < len(self.blob_id.encode()) <= MAX_BLOB_ID:
            raise BuildError(f"blob id of {len(self.blob_id.encode())} bytes; 1 to {MAX_BLOB_ID} are possible")
        if self.secret is not None and self.fs_version != 6:
            raise BuildError("encryption (--encrypt) needs RAFS version 6")
        if self.batch_size:
            if self.fs_version != 6:
                raise BuildError("batches (--batch-size) need RAFS version 6")
            if not is_chunk_size(self.batch_size) or self.batch_size > self.chunk_size:
                raise BuildError(
                    f"batch size {self.batch_size:#x} is not a power of two from 0x1000 to the chunk size "
                    f"{self.chunk_size:#x}"
                )

    @property
    def aligned(self) -> bool:
        """Whether chunks start at multiples of 4096 in the uncompressed blob: always in v6."""
        return self.fs_version == 6 or self.aligned_chunk


@dataclass(frozen=True)
class BuildResult:
    """What a build wrote.

    `blob_id`: the builder's id (4.10), "" when there is no data and nothing was inlined. A layer blob in a registry is
    not known by it but by `blob_sha256`, which like `blob_size` is of all bytes written. `timings`: seconds by stage;
    `blobs`: ids in blob table order; sizes in bytes. `external_bootstrap`, `external_blobs`: the second image, of files
    whose content lies elsewhere (5.15), and the ids of its blobs.
    """

    blob_id: str
    blob_size: int
    blob_sha256: str
    bootstrap: bytes | bytearray
    chunk_count: int
    uncompressed_size: int
    inode_count: int
    timings: dict[str, float]
    blobs: list[str]
    external_bootstrap: bytes | bytearray | None = None
    external_blobs: list[str] = field(default_factory=list)
