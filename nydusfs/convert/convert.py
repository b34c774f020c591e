"""`nydusify convert`: an image of one place (registry, layout, archive) becomes a Nydus image in another or the same.

Order: resolve the source, look layers up in the caches, build the missing ones in processes while finished ones are
being pushed, merge per platform, push bootstrap layers, configs, manifests and last the tag.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from nydusfs.convert import manifests
from nydusfs.convert.bootstrap_layer import write_bootstrap_layer
from nydusfs.convert.cache import BuildCache, LocalCache
from nydusfs.convert.endpoints import Connections, Endpoint, Location, copy_blob
from nydusfs.convert.images import Descriptor, Image, ImageSet, load_images
from nydusfs.convert.layers import ConvertedLayer, LayerJob, LayerSettings
from nydusfs.convert.platforms import Platform
from nydusfs.convert.pool import convert_layers, cpu_count
from nydusfs.convert.progress import Progress, elapsed_text, size_text
from nydusfs.convert.threads import DaemonPool
from nydusfs.convert.workdir import work_folder
from nydusfs.errors import AuthError, ConvertError, NotFoundError, RegistryError
from nydusfs.registry import mediatypes as mt

log = logging.getLogger(__name__)

_PUSH_THREADS = 3


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """`platforms` None: all; `explicit_platforms`: the user named them. Durations in seconds."""

    source: Location
    target: Location
    platforms: tuple[Platform, ...] | None = None
    explicit_platforms: bool = False
    settings: LayerSettings = field(default_factory=LayerSettings)
    prefetch: tuple[str, ...] = ()
    merge_platform: bool = False
    oci: bool = False
    referrer: bool = False
    work_dir: Path = Path("tmp")
    build_cache: Location | None = None
    build_cache_version: str = "v1"
    build_cache_records: int = 200
    cache_dir: Path | None = None
    push_retry_count: int = 3
    push_retry_delay: float = 5.0
    workers: int = 0


@dataclass(slots=True)
class ConvertResult:
    """Sizes in bytes, elapsed times in seconds."""

    digest: str = ""
    source_size: int = 0
    target_size: int = 0
    pull_elapsed: float = 0.0
    convert_elapsed: float = 0.0
    push_elapsed: float = 0.0
    layers: int = 0
    cached: int = 0
    origins: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Nydus:
    """One converted platform."""

    source: Image
    media_type: str
    body: bytes
    size: int


def builder_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"nydus-py-v{version('nydus-py')}"
    except PackageNotFoundError:
        return "nydus-py"


def convert(options: ConvertOptions, progress: Progress) -> ConvertResult:
    """Raises NydusError (RegistryError, AuthError, ConvertError) with the reason; the tag is written last, so a failed
    conversion leaves no half image behind it."""
    with ExitStack() as stack:
        folder = stack.enter_context(work_folder(options.work_dir))
        connections = stack.enter_context(Connections())
        options = replace(options, source=options.source.prepare(folder / "source"))
        source = stack.enter_context(options.source.open(connections))
        target = stack.enter_context(options.target.open(connections, create=True))
        cache = None
        if options.build_cache is not None:
            place = stack.enter_context(options.build_cache.open(connections, create=True))
            cache = BuildCache(place, options.build_cache_version, options.build_cache_records)
        return _Conversion(options, progress, source, target, cache, folder).run()


class _Conversion:
    def __init__(
        self,
        options: ConvertOptions,
        progress: Progress,
        source: Endpoint,
        target: Endpoint,
        cache: BuildCache | None,
        folder: Path,
    ) -> None:
        self.options = options
        self.progress = progress
        self.source = source
        self.target = target
        self.folder = folder
        self.result = ConvertResult()
        self.pushed: dict[str, Future[None]] = {}
        self.local = LocalCache(options.cache_dir) if options.cache_dir else None
        self.cache = cache

    def run(self) -> ConvertResult:
        options, progress, result = self.options, self.progress, self.result
        begun = time.monotonic()
        progress.say(f"pulling image {options.source}")
        found = load_images(self.source, options.platforms)
        images = self._sources(found)
        self._load_cache()
        result.pull_elapsed = time.monotonic() - begun
        result.source_size = sum(image.size for image in images)
        progress.say(
            f"found image {options.source}: {len(images)} platform(s), {size_text(result.source_size)}, "
            f"elapsed {elapsed_text(result.pull_elapsed)}"
        )

        begun = time.monotonic()
        progress.say(f"converting image {options.source}")
        with DaemonPool(_PUSH_THREADS, "push") as pushers:
            layers = self._layers(images, pushers)
            nydus = [self._assemble(image, layers, pushers, number) for number, image in enumerate(images)]
            result.convert_elapsed = time.monotonic() - begun
            progress.say(
                f"converted image {options.source} (cached {result.cached}/{result.layers}), "
                f"elapsed {elapsed_text(result.convert_elapsed)}"
            )
            begun = time.monotonic()
            progress.say(f"pushing image {options.target}")
            for pushed in self.pushed.values():
                pushed.result()
            self._push_images(found, nydus)
        self._push_cache(layers)
        result.push_elapsed = time.monotonic() - begun
        progress.say(
            f"pushed image {options.target}@{result.digest} ({size_text(result.target_size)}), "
            f"elapsed {elapsed_text(result.push_elapsed)}"
        )
        return result

    # -- source

    def _sources(self, found: ImageSet) -> list[Image]:
        images = [image for image in found.images if not image.artifact_type and not image.is_nydus]
        if not images:
            raise ConvertError(f"{self.options.source} is a Nydus image already: nothing to convert")
        for image in images:
            wanted = self.options.platforms
            if found.index is None and wanted and self.options.explicit_platforms:
                actual = image.platform
                if actual.architecture and not any(one.matches(actual) for one in wanted):
                    raise ConvertError(f"{image.name} is for {actual}, not {', '.join(map(str, wanted))}")
            if len(image.diff_ids) != len(image.layers):
                raise ConvertError(
                    f"{image.name}: its config names {len(image.diff_ids)} layers, its manifest {len(image.layers)}"
                )
            for layer in image.layers:
                if layer.media_type.endswith("+encrypted"):
                    raise ConvertError(f"{image.name}: layer {layer.digest} is encrypted; decrypt the image first")
        return images

    def _load_cache(self) -> None:
        if self.cache is None:
            return
        name = self.cache.endpoint.name
        self.progress.say(f"pulling cache {name}")
        self.cache.load()
        self.progress.say(f"pulled cache {name}: {len(self.cache)} record(s)")

    # -- layers

    def _layers(self, images: list[Image], pushers: DaemonPool) -> dict[str, ConvertedLayer]:
        """Every different source layer once: source digest -> converted layer; pushes are under way."""
        options, result = self.options, self.result
        wanted = {layer.digest: layer for image in images for layer in image.layers}
        result.layers = len(wanted)
        found: dict[str, ConvertedLayer] = {}
        jobs: list[LayerJob] = []
        for number, layer in enumerate(wanted.values()):
            folder = self.folder / "layers" / str(number)
            cached = self.local.find(layer, options.settings) if self.local else None
            if cached is None and self.cache is not None:
                cached = self.cache.find(layer, options.settings, folder)
            if cached is not None:
                found[layer.digest] = cached
                result.cached += 1
                self._push_layer(cached, pushers)
                continue
            jobs.append(LayerJob(number, options.source, layer, options.settings, folder))
        for job in jobs:
            self.progress.start(job.source.digest, f"layer {job.source.hex[:12]}", job.source.size)
        workers = options.workers or cpu_count()
        building = convert_layers(jobs, workers, lambda job, count: self.progress.advance(job.source.digest, count))
        with closing(building):
            for job, built in building:
                self.progress.finish(job.source.digest)
                found[job.source.digest] = built
                self._push_layer(built, pushers)
                if self.local is not None:
                    self.local.add(built, options.settings)
        result.origins = {digest: layer.origin for digest, layer in found.items()}
        return found

    def _push_layer(self, layer: ConvertedLayer, pushers: DaemonPool) -> None:
        if layer.digest not in self.pushed:
            self.pushed[layer.digest] = pushers.submit(self._retried, lambda: self._send_layer(layer))

    def _send_layer(self, layer: ConvertedLayer) -> None:
        if layer.blob is not None:
            key = f"push {layer.digest}"
            self.progress.start(key, f"push  {layer.hex[:12]}", layer.size)
            self.target.push_file(layer.digest, layer.blob, progress=lambda count: self.progress.advance(key, count))
            self.progress.finish(key)
            return
        cache = self.cache
        assert cache is not None, "only the build cache gives layers without a file"
        copy_blob(cache.endpoint, self.target, layer.digest, layer.size)

    # -- images

    def _assemble(self, image: Image, layers: dict[str, ConvertedLayer], pushers: DaemonPool, number: int) -> _Nydus:
        """Merged bootstrap, its layer, config and manifest of one platform; blobs are being pushed."""
        from bootstrap.errors import RafsError
        from bootstrap.merge import MergeSource, merge_layers

        options = self.options
        folder = self.folder / f"image-{number}"
        folder.mkdir(parents=True)
        converted = [layers[layer.digest] for layer in image.layers]
        if not converted:
            raise ConvertError(f"{image.name} has no layers")
        boot = folder / "image.boot"
        try:
            merge_layers(
                [MergeSource(layer.bootstrap, blob_digest=layer.hex) for layer in converted],
                boot,
                prefetch=[pattern.encode("utf-8", "surrogateescape") for pattern in options.prefetch],
            )
        except RafsError as error:
            raise ConvertError(f"{image.name}: its layers cannot be merged: {error}") from error
        metas = [(layer.hex, layer.meta) for layer in converted if layer.meta is not None]
        packed = write_bootstrap_layer(boot, metas, folder / "bootstrap.tar.gz")
        boot.unlink()
        self._submit(pushers, packed.digest, packed.path)

        descriptors = [manifests.blob_descriptor(layer.digest, layer.size) for layer in converted]
        version = options.settings.fs_version
        descriptors.append(manifests.bootstrap_descriptor(image, packed.digest, packed.size, version, options.oci))
        config = manifests.nydus_config(image, [*(layer.digest for layer in converted), packed.diff_id])
        config_digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
        config_path = folder / "config.json"
        config_path.write_bytes(config)
        self._submit(pushers, config_digest, config_path)
        config_type = manifests.config_media_type(image, oci=options.oci, merged=options.merge_platform)
        media_type, body = manifests.nydus_manifest(
            image,
            Descriptor(config_type, config_digest, len(config)),
            descriptors,
            fs_version=version,
            builder_version=builder_version(),
            oci=options.oci,
            referrer=options.referrer,
        )
        return _Nydus(image, media_type, body, len(config) + sum(one.size for one in descriptors))

    def _submit(self, pushers: DaemonPool, digest: str, path: Path) -> None:
        if digest not in self.pushed:
            self.pushed[digest] = pushers.submit(self._retried, lambda: self.target.push_file(digest, path))

    def _push_images(self, found: ImageSet, nydus: list[_Nydus]) -> None:
        options, result = self.options, self.result
        result.target_size = sum(one.size for one in nydus)
        entries: list[dict[str, Any]] = []
        if options.merge_platform:
            entries += [self._push_oci_half(one.source) for one in nydus]
        artifact = mt.NYDUS_MANIFEST_ARTIFACT if options.merge_platform else ""
        for one in nydus:
            platform = one.source.platform_json or _platform_of(one.source)
            entries.append(manifests.index_entry(one.media_type, one.body, platform, artifact_type=artifact))
        if len(entries) == 1:
            result.digest = self._push_manifest(self.target.push_image, nydus[0].media_type, nydus[0].body)
            return
        for one in nydus:
            self._push_manifest(self.target.push_manifest, one.media_type, one.body)
        docker = found.index_media_type == mt.DOCKER_LIST or (not found.index and nydus[0].source.is_docker)
        media_type = mt.DOCKER_LIST if docker and not options.oci else mt.OCI_INDEX
        body = manifests.index(entries, media_type, merged=options.merge_platform)
        result.digest = self._push_manifest(self.target.push_image, media_type, body)

    def _push_oci_half(self, image: Image) -> dict[str, Any]:
        """The plain image of a merged index: its layers copied, an empty one below them."""
        config, media_type, body = manifests.oci_half(image, oci=self.options.oci)
        for layer in {layer.digest: layer for layer in image.layers}.values():
            self._retried(partial(copy_blob, self.source, self.target, layer.digest, layer.size))
        for data in (manifests.EMPTY_LAYER, config):
            self._retried(partial(self.target.push_bytes, _digest(data), data))
        self._push_manifest(self.target.push_manifest, media_type, body)
        annotations = {mt.ANNOTATION_SOURCE_DIGEST: image.digest}
        platform = image.platform_json or _platform_of(image)
        return manifests.index_entry(media_type, body, platform, annotations=annotations)

    def _push_manifest(self, push: Callable[[str, bytes], str], media_type: str, body: bytes) -> str:
        self._retried(lambda: push(media_type, body))
        return _digest(body)

    def _push_cache(self, layers: dict[str, ConvertedLayer]) -> None:
        """A cache that cannot be written is a warning: the image itself is complete."""
        if self.cache is None:
            return
        for layer in reversed(layers.values()):
            self.cache.add(layer, self.options.settings)
        try:
            self.cache.push(list(layers.values()), self.target)
        except RegistryError as error:
            log.warning("build cache %s cannot be written: %s", self.cache.endpoint.name, error)

    def _retried(self, push: Callable[[], object]) -> None:
        """The client retries single requests; this repeats a whole push, with a fresh upload session."""
        for attempt in range(self.options.push_retry_count + 1):
            try:
                push()
                return
            except (AuthError, NotFoundError):
                raise
            except RegistryError as error:
                if attempt == self.options.push_retry_count or 400 <= error.status < 500:
                    raise
                log.warning("%s; trying again in %.0f s", error, self.options.push_retry_delay)
                time.sleep(self.options.push_retry_delay)


def _digest(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def _platform_of(image: Image) -> dict[str, Any]:
    names = ("architecture", "os", "os.version", "os.features", "variant")
    return {name: image.config[name] for name in names if image.config.get(name)}
