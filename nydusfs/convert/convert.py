"""`nydusify convert`: an image of one place (registry, layout, archive) becomes a Nydus image in another or the same.

Order: resolve the source, look layers up in the caches, build the missing ones in processes while finished ones are
being pushed, merge per platform, push bootstrap layers, configs, manifests and last the tag.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nydusfs.convert import manifests
from nydusfs.convert.assemble import ImageForm, NydusPlatform, assemble
from nydusfs.convert.backends import BackendChoice, BlobStore
from nydusfs.convert.cache import BuildCache, LocalCache
from nydusfs.convert.datalayers import DataLayers
from nydusfs.convert.dictionary import Dictionary, DictionaryChoice, load_dictionary
from nydusfs.convert.endpoints import Connections, Endpoint, Location
from nydusfs.convert.images import Descriptor, Image, ImageSet, load_images
from nydusfs.convert.layers import LayerSettings, build_options
from nydusfs.convert.platforms import Platform
from nydusfs.convert.progress import Progress, elapsed_text, size_text
from nydusfs.convert.pushing import RETRIES, RETRY_DELAY, Pusher
from nydusfs.convert.workdir import work_folder
from nydusfs.errors import ConvertError, NydusError
from nydusfs.registry import mediatypes as mt

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """`platforms` None: all; `explicit_platforms`: the user named them. Durations in seconds."""

    source: Location
    target: Location
    platforms: tuple[Platform, ...] | None = None
    explicit_platforms: bool = False
    settings: LayerSettings = field(default_factory=LayerSettings)
    prefetch: tuple[str, ...] | None = None  # None: the programs that the image starts with
    merge_platform: bool = False
    oci: bool = False
    referrer: bool = False
    work_dir: Path = Path("tmp")
    chunk_dict: DictionaryChoice | None = None
    backend: BackendChoice | None = None
    backend_force_push: bool = False
    build_cache: Location | None = None
    build_cache_version: str = "v1"
    build_cache_records: int = 200
    cache_dir: Path | None = None
    push_retry_count: int = RETRIES
    push_retry_delay: float = RETRY_DELAY
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
        store = stack.enter_context(options.backend.open()) if options.backend else None
        cache = None
        if options.build_cache is not None:
            place = stack.enter_context(options.build_cache.open(connections, create=True))
            cache = BuildCache(place, options.build_cache_version, options.build_cache_records)
        return _Conversion(options, progress, source, target, store, cache, folder).run(connections)


class _Conversion:
    def __init__(
        self,
        options: ConvertOptions,
        progress: Progress,
        source: Endpoint,
        target: Endpoint,
        store: BlobStore | None,
        cache: BuildCache | None,
        folder: Path,
    ) -> None:
        self.options = options
        self.progress = progress
        self.source = source
        self.target = target
        self.store = store
        self.cache = cache
        self.folder = folder
        self.result = ConvertResult()
        self.dictionary: Dictionary | None = None

    def run(self, connections: Connections) -> ConvertResult:
        options, progress, result = self.options, self.progress, self.result
        begun = time.monotonic()
        progress.say(f"pulling image {options.source}")
        found = load_images(self.source, options.platforms)
        images = plain_images(found, options.platforms if options.explicit_platforms else None)
        if options.settings.oci_ref:
            _require_gzip(images)
        self.target.require_writable()
        self._load_cache()
        settings = self._load_dictionary(connections)
        result.pull_elapsed = time.monotonic() - begun
        result.source_size = sum(image.size for image in images)
        progress.say(
            f"found image {options.source}: {len(images)} platform(s), {size_text(result.source_size)}, "
            f"elapsed {elapsed_text(result.pull_elapsed)}"
        )

        begun = time.monotonic()
        progress.say(f"converting image {options.source}")
        with Pusher(self.target, progress, options.push_retry_count, options.push_retry_delay) as pusher:
            data = DataLayers(
                options.source,
                settings,
                self.folder / "layers",
                pusher,
                progress,
                store=self.store,
                force_push=options.backend_force_push,
                cache=self.cache,
                local=LocalCache(options.cache_dir) if options.cache_dir else None,
                chunk_dict=self.dictionary.bootstrap if self.dictionary else None,
                workers=options.workers,
            )
            layers = data.convert(images)
            result.layers, result.cached = len(layers), data.cached
            form = ImageForm(
                builder_version(),
                options.merge_platform,
                options.oci,
                options.referrer,
                self.store is not None,
                options.prefetch,
                self.dictionary.bootstrap if self.dictionary else None,
            )
            # upstream records what the reference names, but for each of several platforms its own manifest
            source_digest = found.digest if len(images) == 1 else ""
            nydus = []
            for number, image in enumerate(images):
                converted = [layers[layer.digest] for layer in image.layers]
                folder = self.folder / f"image-{number}"
                one = assemble(
                    image, converted, settings, form, folder, lambda blob: self._foreign(blob, data), source_digest
                )
                pusher.file(one.bootstrap.digest, one.bootstrap.path)
                pusher.data(one.config)
                nydus.append(one)
            result.convert_elapsed = time.monotonic() - begun
            progress.say(
                f"converted image {options.source} (cached {result.cached}/{result.layers}), "
                f"elapsed {elapsed_text(result.convert_elapsed)}"
            )
            begun = time.monotonic()
            progress.say(f"pushing image {options.target}")
            halves = [self._push_oci_half(one.source, pusher) for one in nydus] if options.merge_platform else []
            if settings.oci_ref:
                self._push_originals(images, pusher)
            pusher.wait()
            self._push_images(found, nydus, halves, pusher)
        self._finish_cache(data)
        result.push_elapsed = time.monotonic() - begun
        progress.say(
            f"pushed image {options.target}@{result.digest} ({size_text(result.target_size)}), "
            f"elapsed {elapsed_text(result.push_elapsed)}"
        )
        return result

    # -- what conversion starts from

    def _load_cache(self) -> None:
        if self.cache is None:
            return
        name = self.cache.endpoint.name
        self.progress.say(f"pulling cache {name}")
        self.cache.load()
        self.progress.say(f"pulled cache {name}: {len(self.cache)} record(s)")

    def _load_dictionary(self, connections: Connections) -> LayerSettings:
        """The settings of every layer, the dictionary's mark included."""
        options = self.options
        if options.chunk_dict is None:
            return options.settings
        self.progress.say(f"pulling chunk dictionary {options.chunk_dict}")
        platforms, settings = options.platforms, options.settings
        platform = platforms[0] if platforms and len(platforms) == 1 else None
        folder = self.folder / "dictionary"
        self.dictionary = load_dictionary(options.chunk_dict, connections, folder, platform, build_options(settings))
        return replace(settings, dictionary=self.dictionary.checksum)

    # -- blobs that are not made here

    def _foreign(self, blob: str, data: DataLayers) -> Descriptor:
        """A blob of the chunk dictionary that the image refers to, on its way to where the image's own are."""
        if self.dictionary is None:
            raise ConvertError(f"blob {blob} of the merged image belongs to none of its layers")
        found = self.dictionary.blob(blob, self.target, self.store)
        if self.dictionary.endpoint is not None:
            data.take_over(self.dictionary.endpoint, found)
        return found

    def _push_originals(self, images: list[Image], pusher: Pusher) -> None:
        """An OCI-ref image reads its source's layers out of its own repository: elsewhere they are copied there."""
        for image in images:
            for layer in image.layers:
                pusher.copy(self.source, layer)

    # -- manifests

    def _push_images(
        self,
        found: ImageSet,
        nydus: list[NydusPlatform],
        halves: list[tuple[str, bytes, dict[str, Any]]],
        pusher: Pusher,
    ) -> None:
        options, result = self.options, self.result
        result.target_size = sum(one.size for one in nydus)
        entries: list[dict[str, Any]] = []
        for media_type, body, entry in halves:
            pusher.manifest(media_type, body)
            entries.append(entry)
        artifact = mt.NYDUS_MANIFEST_ARTIFACT if options.merge_platform else ""
        for one in nydus:
            platform = one.source.platform_json or _platform_of(one.source)
            entries.append(manifests.index_entry(one.media_type, one.body, platform, artifact_type=artifact))
        if len(entries) == 1:
            result.digest = pusher.image(nydus[0].media_type, nydus[0].body)
            return
        for one in nydus:
            pusher.manifest(one.media_type, one.body)
        if options.merge_platform:
            result.digest = pusher.image(mt.OCI_INDEX, manifests.merged_index(entries))
            return
        media_type = manifests.oci_type(found.index_media_type) if options.oci else found.index_media_type
        result.digest = pusher.image(media_type, manifests.converted_index(entries, media_type, found.index))

    def _push_oci_half(self, image: Image, pusher: Pusher) -> tuple[str, bytes, dict[str, Any]]:
        """The plain image of a merged index: its layers copied, an empty one below them. Media type, manifest and index
        entry; blobs are being pushed."""
        config, media_type, body = manifests.oci_half(image)
        for layer in image.layers:
            pusher.copy(self.source, layer)
        for data in (manifests.EMPTY_LAYER, config):
            pusher.data(data)
        annotations = {mt.ANNOTATION_SOURCE_DIGEST: image.digest}
        platform = image.platform_json or _platform_of(image)
        return media_type, body, manifests.index_entry(media_type, body, platform, annotations=annotations)

    def _finish_cache(self, data: DataLayers) -> None:
        """A cache that cannot be written is a warning: the image itself is complete."""
        if self.cache is None:
            return
        try:
            data.finish_cache()
        except (NydusError, OSError) as error:
            log.warning("build cache %s cannot be written: %s", self.cache.endpoint.name, error)


def plain_images(found: ImageSet, wanted: tuple[Platform, ...] | None) -> list[Image]:
    """What can be converted of a source; `wanted`: platforms the user named. Raises ConvertError."""
    images = [image for image in found.images if not image.artifact_type and not image.is_nydus]
    if not images:
        raise ConvertError(f"{found.name} is a Nydus image already: nothing to convert (--reverse makes it plain)")
    others = [image for image in images if image.platform.os not in ("", "linux")]
    for image in others:
        log.warning("%s is left out: only Linux images can be converted", image.name)
    images = [image for image in images if image not in others]
    if not images:
        raise ConvertError(f"{found.name}: only Linux images can be converted")
    for image in images:
        actual = image.platform
        if found.index is None and wanted and actual.architecture and not any(one.matches(actual) for one in wanted):
            raise ConvertError(f"{image.name} is for {actual}, not {', '.join(map(str, wanted))}")
        if not image.layers:
            raise ConvertError(f"{image.name} has no layers")
        if len(image.diff_ids) != len(image.layers):
            raise ConvertError(
                f"{image.name}: its config names {len(image.diff_ids)} layers, its manifest {len(image.layers)}"
            )
        for layer in image.layers:
            if layer.media_type.endswith("+encrypted"):
                raise ConvertError(f"{image.name}: layer {layer.digest} is encrypted; decrypt the image first")
    return images


def _require_gzip(images: list[Image]) -> None:
    """Before others are converted; the builder looks at the bytes themselves."""
    for image in images:
        for layer in image.layers:
            if layer.media_type.endswith(("+zstd", ".zstd")):
                raise ConvertError(
                    f"{image.name}: layer {layer.digest} is compressed with zstd, which has no random access: "
                    "--oci-ref needs gzip (or plain) layers"
                )


def _platform_of(image: Image) -> dict[str, Any]:
    names = ("architecture", "os", "os.version", "os.features", "variant")
    return {name: image.config[name] for name in names if image.config.get(name)}
