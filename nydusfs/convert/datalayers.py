"""The data layers of a conversion: each different source layer once, from a cache or a worker, to its place.

A layer is on its way to the registry (or storage backend) as soon as it is there, while others are still converted; its
file is removed once nobody needs it any more.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from nydusfs.convert.backends import BlobStore
from nydusfs.convert.cache import BuildCache, LocalCache
from nydusfs.convert.endpoints import Endpoint, Location, copy_blob
from nydusfs.convert.images import Descriptor, Image
from nydusfs.convert.layers import ConvertedLayer, LayerJob, LayerSettings
from nydusfs.convert.pool import cpu_count, run_jobs
from nydusfs.convert.progress import Progress, size_text
from nydusfs.convert.pushing import Pusher
from nydusfs.errors import ConvertError, NydusError

log = logging.getLogger(__name__)

_PIECE = 1 << 20

Report = Callable[[int], None]


class DataLayers:
    """`store`: where data goes instead of the pusher's target; `chunk_dict`: bootstrap of the dictionary."""

    def __init__(
        self,
        source: Location,
        settings: LayerSettings,
        folder: Path,
        pusher: Pusher,
        progress: Progress,
        *,
        store: BlobStore | None = None,
        force_push: bool = False,
        cache: BuildCache | None = None,
        local: LocalCache | None = None,
        chunk_dict: Path | None = None,
        workers: int = 0,
    ) -> None:
        self._source = source
        self._settings = settings
        self._folder = folder
        self._pusher = pusher
        self._progress = progress
        self._store = store
        self._force_push = force_push
        self._cache = cache
        self._local = local
        self._chunk_dict = chunk_dict
        self._workers = workers or cpu_count()
        self._layers: dict[str, ConvertedLayer] = {}
        self.cached = 0

    def convert(self, images: Iterable[Image]) -> dict[str, ConvertedLayer]:
        """Source digest -> converted layer; pushes are under way. Raises NydusError, also that of a push which failed
        in the meantime."""
        wanted = {layer.digest: layer for image in images for layer in image.layers}
        jobs: list[LayerJob] = []
        for number, layer in enumerate(wanted.values()):
            folder = self._folder / str(number)
            cached = self._local.find(layer, self._settings) if self._local else None
            if cached is None and self._cache is not None:
                cached = self._cache.find(layer, self._settings, folder)
            if cached is None:
                jobs.append(LayerJob(number, self._source, layer, self._settings, folder, self._chunk_dict))
                continue
            self.cached += 1
            self._progress.note(f"layer {layer.hex[:12]}: known from {cached.origin}")
            self._ready(layer, cached)
        for job in jobs:
            self._progress.start(job.source.digest, f"layer {job.source.hex[:12]}", job.source.size)
        building = run_jobs(jobs, self._workers, lambda job, count: self._progress.advance(job.source.digest, count))
        with closing(building):
            for job, built in building:
                self._progress.finish(job.source.digest)
                self._progress.note(
                    f"layer {job.source.hex[:12]}: {size_text(job.source.size)} became {size_text(built.size)}, "
                    f"{len(self._layers) + 1}/{len(wanted)}"
                )
                if self._local is not None:
                    self._local.add(built, self._settings)
                self._ready(job.source, built)
                self._pusher.check()
        return {digest: self._layers[digest] for digest in wanted}

    def take_over(self, origin: Endpoint, blob: Descriptor) -> None:
        """A blob of another image that this one refers to."""
        if self._store is None:
            self._pusher.copy(origin, blob)
        else:
            self._pusher.submit(blob.digest, blob.size, lambda report: self._fetch_to_store(origin, blob, report))

    def finish_cache(self) -> None:
        if self._cache is not None:
            self._cache.finish(list(self._layers.values()), self._settings)

    def _ready(self, source: Descriptor, layer: ConvertedLayer) -> None:
        self._layers[source.digest] = layer
        self._pusher.submit(layer.digest, layer.size, lambda report: self._push(layer, report))

    def _push(self, layer: ConvertedLayer, report: Report) -> bool:
        if layer.blob is None:
            assert self._cache is not None, "only the build cache gives layers without a file"
            blob = Descriptor("", layer.digest, layer.size)
            if self._store is not None:
                return self._fetch_to_store(self._cache.endpoint, blob, report)
            return copy_blob(self._cache.endpoint, self._pusher.target, layer.digest, layer.size, progress=report)
        if self._store is not None:
            sent = self._store.put_file(layer.hex, layer.blob, force=self._force_push, progress=report)
        else:
            sent = self._pusher.target.push_file(layer.digest, layer.blob, progress=report)
        if self._cache is not None:
            try:
                self._cache.keep(layer, self._settings, None if self._store else self._pusher.target)
            except (NydusError, OSError) as error:
                log.warning("layer %s cannot be kept in %s: %s", layer.source_digest, self._cache.endpoint.name, error)
        if layer.origin == "built":
            layer.blob.unlink(missing_ok=True)
        return sent

    def _fetch_to_store(self, origin: Endpoint, blob: Descriptor, report: Report) -> bool:
        """Through a file: stores want to know a blob's size and to begin again."""
        assert self._store is not None
        if not self._force_push and self._store.size(blob.hex) == blob.size:
            return False
        path = self._folder / f"fetched-{blob.hex}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with origin.open_blob(blob.digest, blob.size) as stored, path.open("wb") as out:
                shutil.copyfileobj(stored, out, _PIECE)
            return self._store.put_file(blob.hex, path, force=self._force_push, progress=report)
        except OSError as error:
            raise ConvertError(f"blob {blob.digest}: {error.strerror or error}") from error
        finally:
            path.unlink(missing_ok=True)
