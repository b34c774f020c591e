"""`nydusify commit`: what a container changed becomes new layers of its Nydus image.

Only while its files are read does the container stand still: what was read is pushed after. New layers lie above the
image's: the upper directory, then each folder of --with-path.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from nydusfs.containerd.containers import Container, Containers
from nydusfs.containerd.pausing import paused
from nydusfs.convert import manifests
from nydusfs.convert.bootstrap_layer import write_bootstrap_layer
from nydusfs.convert.container import Layers, image_of, layers_of, merged_view, root_of, user_namespace_of
from nydusfs.convert.derive import derived_manifest, prefetch_paths, push_layers
from nydusfs.convert.endpoints import Connections, Location
from nydusfs.convert.facts import shown
from nydusfs.convert.images import Descriptor, Image
from nydusfs.convert.layers import write_tail
from nydusfs.convert.nydusimage import NydusImage, unpack_image
from nydusfs.convert.progress import Progress, elapsed_text, size_text
from nydusfs.convert.pushing import Pusher
from nydusfs.convert.stored import StoredImage
from nydusfs.convert.streams import PieceStream
from nydusfs.convert.upperdir import ChangedError, Choice, folder_layer, upper_layer
from nydusfs.convert.workdir import work_folder
from nydusfs.errors import ConvertError
from nydusfs.registry import mediatypes as mt
from nydusfs.registry.hosts import ClientOptions

if TYPE_CHECKING:
    from bootstrap.options import BuildOptions

log = logging.getLogger(__name__)

_TRIES = 3
_CREATED_BY = "nydusify commit"


@dataclass(frozen=True, slots=True)
class CommitOptions:
    """`with_paths` and `without_paths` are absolute paths in the container. `maximum_times`: layers that commits
    may have added to the image already."""

    container: str
    target: Location
    address: str
    namespace: str = "default"
    source_client: ClientOptions = field(default_factory=ClientOptions)
    work_dir: Path = Path("tmp")
    maximum_times: int = 400
    with_paths: tuple[bytes, ...] = ()
    without_paths: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class CommitResult:
    """`layers`: digests of the new ones, lowest first; `stopped`: seconds the container stood still."""

    digest: str
    layers: list[str]
    stopped: float


@dataclass(frozen=True, slots=True)
class NewLayer:
    """`meta` is None for a layer without chunk table."""

    digest: str
    blob: Path
    bootstrap: Path
    meta: Path | None

    @property
    def descriptor(self) -> Descriptor:
        return manifests.blob_descriptor(self.digest, self.blob.stat().st_size)


def commit(options: CommitOptions, progress: Progress) -> CommitResult:
    """Raises NydusError. The container runs on whatever happens; the target's tag is written last."""
    if os.geteuid() != 0:
        raise ConvertError("must run as root: a container's files are read where containerd keeps them")
    with ExitStack() as stack:
        folder = stack.enter_context(work_folder(options.work_dir))
        containers = stack.enter_context(Containers(options.address, options.namespace, "nydusify-commit"))
        connections = stack.enter_context(Connections())
        container = containers.find(options.container)
        image = image_of(containers, container, connections, options.source_client)
        layers = layers_of(containers, container)
        base = unpack_image(image, folder / "base")
        committed = _committed(image)
        if len(committed) >= options.maximum_times:
            raise ConvertError(
                f"{image.name} has {len(committed)} committed layers, --maximum-times allows {options.maximum_times}: "
                "convert a new image from plain layers"
            )
        target = stack.enter_context(options.target.open(connections, create=True))
        pusher = stack.enter_context(Pusher(target, progress))
        endpoint = image.endpoint
        assert isinstance(endpoint, StoredImage)
        push_layers(pusher, endpoint.registry, image)
        stack.enter_context(containers.lease())
        containers.hold(f"snapshots/{container.snapshotter}", container.snapshot_key)

        reading = _Reading(containers, container, layers, base, options, folder, progress)
        fresh, stopped = reading.read()
        for layer in fresh:
            pusher.file(layer.digest, layer.blob)
        progress.say(f"pushing image {options.target}")
        media_type, body = assemble(base, fresh, committed, folder, pusher)
        pusher.wait()
        digest = pusher.image(media_type, body)
        progress.say(f"committed container {container.id} as {options.target}@{digest}")
        return CommitResult(digest, [layer.digest for layer in fresh], stopped)


def _committed(image: Image) -> list[str]:
    text = image.layers[-1].annotations.get(mt.ANNOTATION_COMMIT_BLOBS, "")
    return [one for one in text.split(",") if one]


class _Reading:
    """From the container's files to layer blobs."""

    def __init__(
        self,
        containers: Containers,
        container: Container,
        layers: Layers,
        base: NydusImage,
        options: CommitOptions,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._containers = containers
        self._container = container
        self._namespace = user_namespace_of(container)
        self._layers = layers
        self._folder = folder
        self._progress = progress
        self._build = layer_options(base)
        self._with = [path.strip(b"/") for path in options.with_paths]
        self._without = [path.strip(b"/") for path in options.without_paths]
        if b"" in self._with:
            raise ConvertError(
                "--with-path /: what a container changed below / is committed anyway; name mounted folders"
            )

    def read(self) -> tuple[list[NewLayer], float]:
        """New layers, lowest first, and for how many seconds the container stood still."""
        task = self._containers.task(self._container.id)
        if self._with and not task.pid:
            raise ConvertError(f"container {self._container.id} does not run: --with-path has nothing to look into")
        name = self._container.id
        if task.running:
            self._progress.say(f"pausing container {name}")
        began = time.monotonic()
        with paused(self._containers, name) if task.running else nullcontext():
            found = [self._upper(), *(self._mounted(task.pid, number) for number in range(len(self._with)))]
        stopped = time.monotonic() - began if task.running else 0.0
        if task.running:
            self._progress.say(f"resumed container {name}, it stood still for {elapsed_text(stopped)}")
        return found, stopped

    def _upper(self) -> NewLayer:
        choice = Choice(left_out=self._without, replaced=self._with)
        upper = os.open(self._layers.upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with merged_view(self._layers, self._folder) as view:
                return self._layer(
                    "upper",
                    "what the container changed",
                    lambda: upper_layer(upper, choice, view, self._layers.marks, self._namespace),
                )
        finally:
            os.close(upper)

    def _mounted(self, pid: int, number: int) -> NewLayer:
        path, choice = self._with[number], Choice(left_out=self._without)
        with root_of(self._container, pid) as root:
            return self._layer(
                f"mount-{number}", f"/{shown(path)}", lambda: folder_layer(root, path, choice, self._namespace)
            )

    def _layer(self, name: str, what: str, pieces: Callable[[], Iterator[bytes]]) -> NewLayer:
        for attempt in range(1, _TRIES + 1):
            began = time.monotonic()
            try:
                layer = self._written(self._folder / name, pieces())
            except ChangedError as error:
                if attempt == _TRIES:
                    raise
                log.warning("%s; reading %s again", error, what)
                continue
            size = size_text(layer.blob.stat().st_size)
            self._progress.say(f"packed {what}, size {size}, elapsed {elapsed_text(time.monotonic() - began)}")
            return layer
        raise AssertionError("the loop returns or raises")

    def _written(self, folder: Path, pieces: Iterator[bytes]) -> NewLayer:
        from bootstrap.build import build_layer
        from bootstrap.errors import RafsError

        folder.mkdir(exist_ok=True)
        blob = folder / "blob"
        try:
            with blob.open("wb") as out:
                result = build_layer(cast(BinaryIO, PieceStream(pieces)), out, self._build)
            boot, meta, _ = write_tail(blob, folder)
        except RafsError as error:
            raise ConvertError(f"container {self._container.id}: {error}") from error
        return NewLayer(f"sha256:{result.blob_sha256}", blob, boot, meta)


def layer_options(base: NydusImage) -> BuildOptions:
    """Layers that go with the image's."""
    from bootstrap.errors import RafsError
    from bootstrap.layout.common import BlobFeatures, Compressor
    from bootstrap.options import BuildOptions
    from bootstrap.reader import open_bootstrap

    try:
        with open_bootstrap(str(base.bootstrap)) as image:
            compressor = image.compressor if image.compressor != Compressor.GZIP else Compressor.ZSTD
            return BuildOptions(
                fs_version=image.version,
                compressor=compressor,
                digester=image.digester,
                chunk_size=image.chunk_size,
                aligned_chunk=image.version == 5 and any(blob.features & BlobFeatures.ALIGNED for blob in image.blobs),
                whiteout_spec="none",
                inline_meta=True,
                blob_toc=image.version == 6,
            )
    except RafsError as error:
        raise ConvertError(f"{base.image.name}: bootstrap: {error}") from error


def assemble(
    base: NydusImage, fresh: list[NewLayer], committed: list[str], folder: Path, pusher: Pusher
) -> tuple[str, bytes]:
    """Media type and body of the new manifest; what it names is being pushed."""
    from bootstrap.errors import RafsError
    from bootstrap.merge import MergeSource, merge_layers

    boot = folder / "image.boot"
    sources = [MergeSource(layer.bootstrap, blob_digest=layer.digest.removeprefix("sha256:")) for layer in fresh]
    try:
        merge_layers(sources, boot, parent=base.bootstrap, prefetch=prefetch_paths(base.bootstrap))
    except RafsError as error:
        raise ConvertError(f"{base.image.name}: the new layers cannot be merged with it: {error}") from error
    metas = [(layer.digest.removeprefix("sha256:"), layer.meta) for layer in fresh if layer.meta is not None]
    packed = write_bootstrap_layer(boot, [*base.metas, *metas], folder / "bootstrap.tar.gz")
    pusher.file(packed.digest, packed.path)

    old = base.image.layers[-1]
    blobs = ",".join([*committed, *(layer.digest for layer in fresh)])
    last = Descriptor(
        old.media_type, packed.digest, packed.size, {**old.annotations, mt.ANNOTATION_COMMIT_BLOBS: blobs}
    )
    new = [layer.descriptor for layer in fresh]
    return derived_manifest(base.image, new, last, packed.diff_id, _CREATED_BY, pusher)
