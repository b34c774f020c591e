"""One layer: source -> decompression -> builder -> blob file, as a stream. Runs in worker processes.

Everything that crosses the process border is plain data. No secret does: a worker reads docker's configuration itself.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from nydusfs.convert.endpoints import Connections, Endpoint, Location
from nydusfs.convert.images import Descriptor
from nydusfs.errors import ConvertError, NydusError

log = logging.getLogger(__name__)

_REPORT_EVERY = 0.1
_PIECE = 1 << 20
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """What changes the bytes of a converted layer; equal settings and equal source give an equal blob."""

    fs_version: int = 6
    compressor: str = "zstd"
    chunk_size: int = 0x100000
    aligned_chunk: bool = False

    @property
    def key(self) -> str:
        """For caches. Prefetch patterns are no part of it: upstream also writes them into every layer's own table,
        where nothing reads them; ours enter the merged bootstrap alone: layers stay equal whatever is prefetched."""
        return f"v{self.fs_version}-{self.compressor}-{self.chunk_size:x}{'-aligned' if self.aligned_chunk else ''}"


@dataclass(frozen=True, slots=True)
class LayerJob:
    number: int
    location: Location
    source: Descriptor
    settings: LayerSettings
    folder: Path
    threads: int = 1


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
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def hex(self) -> str:
        return self.digest.removeprefix("sha256:")


def convert_layer(job: LayerJob, report: Callable[[int], None] | None = None) -> ConvertedLayer:
    """`report` gets numbers of compressed bytes read. Raises NydusError that names the layer."""
    from bootstrap.build import BuildOptions, build_layer
    from bootstrap.errors import RafsError
    from bootstrap.layout.common import Compressor
    from bootstrap.tar import open_layer

    settings = job.settings
    options = BuildOptions(
        fs_version=settings.fs_version,
        compressor={"none": Compressor.NONE, "lz4_block": Compressor.LZ4_BLOCK, "zstd": Compressor.ZSTD}[
            settings.compressor
        ],
        chunk_size=settings.chunk_size,
        aligned_chunk=settings.aligned_chunk,
        whiteout_spec="none",
        inline_meta=True,
        blob_toc=settings.fs_version == 6,
        threads=job.threads,
    )
    job.folder.mkdir(parents=True, exist_ok=True)
    blob_path = job.folder / "blob"
    what = f"layer {job.source.digest} of {job.location}"
    try:
        stream = cast(BinaryIO, _endpoint(job.location).open_blob(job.source.digest, job.source.size))
        counted = cast(BinaryIO, Counted(stream, report) if report else stream)
        with counted, blob_path.open("wb") as out:
            with open_layer(counted) as tar:
                result = build_layer(tar, out, options)
                # What lies behind the end of the tar is part of the digest: the bytes used so far are only
                # trustworthy once the whole blob was seen.
                while tar.read(_PIECE):
                    pass
            while not counted.closed and counted.read(_PIECE):
                pass
        (job.folder / "image.boot").write_bytes(result.bootstrap)
        bootstrap, meta = tail_of_blob(blob_path, job.folder)
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
        timings=dict(result.timings),
    )


@functools.cache
def _endpoint(location: Location) -> Endpoint:
    """One per process and image: connections and tokens are used again for the next layer."""
    return location.open(_connections())


@functools.cache
def _connections() -> Connections:
    return Connections()


def tail_of_blob(blob: Path, folder: Path) -> tuple[Path, Path | None]:
    with blob.open("rb") as file:
        return write_tail(file, blob.stat().st_size, folder)


def write_tail(blob: BinaryIO, size: int, folder: Path) -> tuple[Path, Path | None]:
    """Takes bootstrap and chunk table out of a layer blob, as every other tool will. Raises RafsError, OSError."""
    from bootstrap.merge import extract_bootstrap
    from nydusfs.convert.bootstrap_layer import chunk_table

    folder.mkdir(parents=True, exist_ok=True)
    bootstrap = folder / "image.boot"
    bootstrap.write_bytes(extract_bootstrap(blob, size))
    table = chunk_table(blob, size)
    if table is None:
        return bootstrap, None
    meta = folder / "blob.meta"
    meta.write_bytes(table)
    return bootstrap, meta


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


# -- in worker processes

_queue: Any = None


def start_worker(queue: Any, level: int) -> None:
    """Initializer of a worker: it dies with its parent and leaves Ctrl-C to it."""
    global _queue
    _queue = queue
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def run_job(job: LayerJob) -> ConvertedLayer | NydusError:
    """What the pool calls. Domain errors come back as values: exceptions with own constructors do not unpickle."""
    try:
        return convert_layer(job, lambda count: _queue.put((job.number, count)))
    except NydusError as error:
        return ConvertError(str(error))
