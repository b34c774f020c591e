"""`nydusify optimize`: what a container reads first goes into a data blob of its own, which comes with the image.

Only the bootstrap and the listed chunks are fetched. The other layers stay as they are, and are copied only into
another repository.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nydusfs.convert import manifests
from nydusfs.convert.backends import BackendChoice, BlobStore
from nydusfs.convert.blobreader import LayerReader, StoreReader
from nydusfs.convert.bootstrap_layer import write_bootstrap_layer
from nydusfs.convert.derive import derived_manifest, push_layers
from nydusfs.convert.endpoints import Connections, Location
from nydusfs.convert.images import Descriptor, load_images
from nydusfs.convert.nydusimage import NydusImage, pick_nydus, unpack_image
from nydusfs.convert.platforms import Platform
from nydusfs.convert.progress import Progress, elapsed_text, size_text
from nydusfs.convert.pushing import Pusher
from nydusfs.convert.workdir import work_folder
from nydusfs.errors import ConvertError
from nydusfs.registry import mediatypes as mt

if TYPE_CHECKING:
    from bootstrap.optimize import Wanted

log = logging.getLogger(__name__)

_LIST_NAME = "prefetch.files"  # the list in the bootstrap layer, beside image.boot
_CREATED_BY = "nydusify optimize"


@dataclass(frozen=True, slots=True)
class OptimizeOptions:
    """`prefetch_files`: a list in upstream's JSON, or with one absolute path a line. `backend` holds blobs that the
    manifest does not name; the new one then goes there."""

    source: Location
    target: Location
    prefetch_files: Path
    platform: Platform | None = None
    backend: BackendChoice | None = None
    work_dir: Path = Path("tmp")


@dataclass(frozen=True, slots=True)
class OptimizeResult:
    """`blob`: the new one's id; `fetched`: bytes of data layers that were read for it."""

    digest: str
    blob: str
    chunks: int
    fetched: int


def optimize(options: OptimizeOptions, progress: Progress) -> OptimizeResult:
    """Raises NydusError."""
    from bootstrap.errors import RafsError
    from bootstrap.optimize import parse_list

    try:
        text = options.prefetch_files.read_bytes()  # once: it may be a pipe
        wanted = parse_list(text)
    except OSError as error:
        raise ConvertError(f"prefetch files {options.prefetch_files}: {error.strerror}") from error
    except RafsError as error:
        raise ConvertError(f"prefetch files {options.prefetch_files}: {error}") from error
    with ExitStack() as stack:
        folder = stack.enter_context(work_folder(options.work_dir))
        connections = stack.enter_context(Connections())
        source = stack.enter_context(options.source.prepare(folder / "source").open(connections))
        store = stack.enter_context(options.backend.open()) if options.backend else None
        progress.say(f"pulling bootstrap of {options.source}")
        image, _ = pick_nydus(load_images(source, [options.platform] if options.platform else None))
        base = unpack_image(image, folder / "base")

        reader = _Reader(base, store)
        began = time.monotonic()
        boot = folder / "image.boot"
        try:
            blob_id, chunks = _build(base, reader, wanted, folder, boot)
        except RafsError as error:
            raise ConvertError(f"{image.name}: {error}") from error
        blob = folder / blob_id
        progress.say(
            f"built blob {blob_id}: {chunks} chunks, {size_text(blob.stat().st_size)}; "
            f"{size_text(reader.fetched)} fetched, elapsed {elapsed_text(time.monotonic() - began)}"
        )

        target = stack.enter_context(options.target.open(connections, create=True))
        pusher = stack.enter_context(Pusher(target, progress))
        progress.say(f"pushing image {options.target}")
        push_layers(pusher, source, image)
        new: list[Descriptor] = []
        if store is not None and not base.data_layers:
            store.put_file(blob_id, blob)
        else:
            new.append(manifests.blob_descriptor(f"sha256:{blob_id}", blob.stat().st_size))
            pusher.file(f"sha256:{blob_id}", blob)
        kept = folder / _LIST_NAME
        kept.write_bytes(text)
        packed = write_bootstrap_layer(boot, base.metas, folder / "bootstrap.tar.gz", [(_LIST_NAME, kept)])
        pusher.file(packed.digest, packed.path)
        old = image.layers[-1]
        notes = {**old.annotations, mt.ANNOTATION_PREFETCH_BLOB: blob_id}
        last = Descriptor(old.media_type, packed.digest, packed.size, notes)
        media_type, body = derived_manifest(image, new, last, packed.diff_id, _CREATED_BY, pusher)
        pusher.wait()
        digest = pusher.image(media_type, body)
        progress.say(f"optimized image {options.source} as {options.target}@{digest}")
        return OptimizeResult(digest, blob_id, chunks, reader.fetched)


class _Reader:
    """Layers of the image, and blobs that are no layers from the backend."""

    def __init__(self, base: NydusImage, store: BlobStore | None) -> None:
        self.fetched = 0
        self._layers = LayerReader(base.image, self._count)
        self._store = StoreReader(store) if store is not None else None
        self._named = self._layers.names()

    def _count(self, size: int) -> None:
        self.fetched += size

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        if self._store is None or blob_id in self._named:
            return self._layers.read(blob_id, offset, size)
        self._count(size)
        return self._store.read(blob_id, offset, size)

    def close(self) -> None:
        """What it reads from is its opener's."""


def _build(base: NydusImage, reader: _Reader, wanted: list[Wanted], folder: Path, boot: Path) -> tuple[str, int]:
    """The id of the new blob, which lies in `folder`, and the number of its chunks. Raises RafsError, ConvertError."""
    from bootstrap.blobsource import open_blobs
    from bootstrap.merge import write_file
    from bootstrap.optimize import optimize as make
    from bootstrap.reader import open_bootstrap

    with open_bootstrap(str(base.bootstrap)) as image, open_blobs(image, reader) as blobs:
        made = make(blobs, wanted, folder)
    for path in made.missing:
        log.warning("%s has no %s: it is left out", base.image.name, os.fsdecode(path))
    if made.bootstrap is None:
        raise ConvertError(f"{base.image.name} has none of the listed files, or they have no data: nothing to optimize")
    with (folder / made.blob).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != made.blob:
        raise ConvertError(f"blob {made.blob} has the digest {digest}: it cannot become a layer")
    write_file(boot, made.bootstrap)
    return made.blob, made.chunk_count
