"""One layer: source -> decompression -> builder -> blob file, as a stream. Runs in worker processes."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from nydusfs.convert.endpoints import Connections, Endpoint, Location
from nydusfs.convert.images import Descriptor
from nydusfs.errors import ConvertError, WrongBytesError

if TYPE_CHECKING:
    from bootstrap.options import BuildOptions

log = logging.getLogger(__name__)

_REPORT_EVERY = 0.1
_PIECE = 1 << 20
_REST = 256 << 20  # bytes that are still fetched to see whether a layer that makes no sense is damaged
# a source whose bytes were wrong is asked again: the next time another mirror, or a connection without the fault
_TRIES = 3


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """What changes the bytes of a converted layer; equal settings and equal source give an equal blob.

    `oci_ref`: the blob only describes the source layer, which stays the data (zran). `dictionary`: SHA-256 of the chunk
    dictionary's bootstrap, "" without one.
    """

    fs_version: int = 6
    compressor: str = "zstd"
    chunk_size: int = 0x100000
    aligned_chunk: bool = False
    batch_size: int = 0
    oci_ref: bool = False
    dictionary: str = ""

    @property
    def key(self) -> str:
        """For caches. Prefetch patterns are no part of it: nothing reads the table of a single layer, the merged
        bootstrap has its own. In every layer we write `/`, as upstream does when no pattern is given: layers are then
        the same whatever is prefetched, and the same as upstream's."""
        parts = [
            f"v{self.fs_version}",
            "ref" if self.oci_ref else self.compressor,
            f"{self.chunk_size:x}",
            "aligned" if self.aligned_chunk else "",
            f"batch{self.batch_size:x}" if self.batch_size else "",
            f"dict{self.dictionary[:16]}" if self.dictionary else "",
        ]
        return "-".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """`digest` and `size` are the blob's; `blob` is None when the bytes are only in a registry (build cache); `meta` is
    None for layers without chunk table. `origin`: "built", "local cache" or "build cache"."""

    source_digest: str
    digest: str
    size: int
    bootstrap: Path
    meta: Path | None
    blob: Path | None
    origin: str = "built"
    toc_digest: str = ""
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def hex(self) -> str:
        return self.digest.removeprefix("sha256:")


@dataclass(frozen=True, slots=True)
class LayerJob:
    """`chunk_dict`: the dictionary's bootstrap file, with its SHA-256 in the settings."""

    number: int
    location: Location
    source: Descriptor
    settings: LayerSettings
    folder: Path
    chunk_dict: Path | None = None
    threads: int = 1

    @property
    def size(self) -> int:
        return self.source.size

    def run(self, report: Callable[[int], None]) -> ConvertedLayer:
        """Raises NydusError that names the layer."""
        for attempt in range(_TRIES):
            try:
                return _convert(self, report)
            except WrongBytesError as error:
                if attempt == _TRIES - 1:
                    raise
                log.warning("%s; converting this layer again", error)
        raise AssertionError("unreachable")


def build_options(settings: LayerSettings, chunk_dict: Path | None = None, threads: int = 1) -> BuildOptions:
    """What the builder is asked for (RAFS format 6.1). Raises BuildError for settings that do not fit together."""
    from bootstrap.layout.common import Compressor
    from bootstrap.options import BuildOptions

    compressors = {"none": Compressor.NONE, "lz4_block": Compressor.LZ4_BLOCK, "zstd": Compressor.ZSTD}
    return BuildOptions(
        fs_version=settings.fs_version,
        compressor=compressors[settings.compressor],
        chunk_size=settings.chunk_size,
        aligned_chunk=settings.aligned_chunk,
        batch_size=settings.batch_size,
        whiteout_spec="none",
        prefetch=[] if settings.oci_ref else [b"/"],
        prefetch_policy="fs",
        chunk_dict=chunk_dict,
        inline_meta=True,
        blob_toc=settings.fs_version == 6,
        threads=threads,
    )


def _convert(job: LayerJob, report: Callable[[int], None]) -> ConvertedLayer:
    from bootstrap.build import build_layer
    from bootstrap.errors import RafsError
    from bootstrap.kinds import KINDS

    settings = job.settings
    what = f"layer {job.source.digest} of {job.location}"
    blob_path = job.folder / "blob"
    try:
        kind = KINDS["targz-ref" if settings.oci_ref else "tar-rafs"]
        options = kind.settle(build_options(settings, job.chunk_dict, job.threads))
        job.folder.mkdir(parents=True, exist_ok=True)
        stream = worker_endpoint(job.location).open_blob(job.source.digest, job.source.size)
        counted = cast(BinaryIO, Counted(cast(BinaryIO, stream), report))
        with counted, blob_path.open("wb") as out:
            try:
                with kind.open(counted) as tar:
                    result = build_layer(tar, out, options, kind=kind)
                    # What lies behind the end of the tar is part of the digest: the bytes used so far are only
                    # trustworthy once the whole blob was seen.
                    _drain(tar)
            except RafsError:
                _drain(counted, _REST)  # if the bytes were wrong, that is the reason to give
                raise
            _drain(counted)
        bootstrap, meta, toc_digest = write_tail(blob_path, job.folder)
    except RafsError as error:
        raise ConvertError(f"{what}: {error}") from error
    except OSError as error:
        raise ConvertError(f"{what}: cannot write below {job.folder}: {error.strerror or error}") from error
    return ConvertedLayer(
        job.source.digest,
        f"sha256:{result.blob_sha256}",
        result.blob_size,
        bootstrap,
        meta,
        blob_path,
        toc_digest=toc_digest,
        timings=dict(result.timings),
    )


def _drain(stream: BinaryIO, limit: int = 1 << 62) -> None:
    while not stream.closed and limit > 0 and (piece := stream.read(_PIECE)):
        limit -= len(piece)


@functools.cache
def worker_endpoint(location: Location) -> Endpoint:
    """One per process and image: connections and tokens are used again for the next layer."""
    return location.open(_connections())


@functools.cache
def _connections() -> Connections:
    return Connections()


def write_tail(blob: Path, folder: Path) -> tuple[Path, Path | None, str]:
    with blob.open("rb") as file:
        return read_tail(file, blob.stat().st_size, folder)


def read_tail(blob: BinaryIO, size: int, folder: Path) -> tuple[Path, Path | None, str]:
    """Takes bootstrap and chunk table out of a layer blob, as every other tool will, into files of `folder`; the third
    is the SHA-256 of the table of contents' entries ("" for v5). Raises RafsError, OSError."""
    from bootstrap.merge import extract_bootstrap
    from nydusfs.convert.bootstrap_layer import chunk_table, toc_digest

    folder.mkdir(parents=True, exist_ok=True)
    bootstrap = folder / "image.boot"
    bootstrap.write_bytes(extract_bootstrap(blob, size))
    entries = toc_digest(blob, size)
    table = chunk_table(blob, size)
    if table is None:
        return bootstrap, None, entries
    meta = folder / "blob.meta"
    meta.write_bytes(table)
    return bootstrap, meta, entries


class Counted:
    """A readable that reports how much was taken from it."""

    def __init__(self, stream: BinaryIO, report: Callable[[int], None]) -> None:
        self._stream = stream
        self._report = report
        self._count = 0
        self._last = time.monotonic()

    def _seen(self, count: int) -> None:
        self._count += count
        now = time.monotonic()
        if count == 0 or now - self._last >= _REPORT_EVERY:
            self._report(self._count)
            self._count, self._last = 0, now

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._seen(len(data))
        return data

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)  # type: ignore[attr-defined]
        self._seen(count)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
