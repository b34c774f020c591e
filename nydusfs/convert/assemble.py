"""One platform's image from its converted layers: merged bootstrap, bootstrap layer, config, manifest. RAFS format 6.2
to 6.4, in OCI-ref mode 7.4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nydusfs.convert import manifests
from nydusfs.convert.bootstrap_layer import BootstrapLayer, write_bootstrap_layer
from nydusfs.convert.images import Descriptor, Image
from nydusfs.convert.layers import ConvertedLayer, LayerSettings
from nydusfs.convert.manifests import digest_of
from nydusfs.convert.startup import startup_files
from nydusfs.errors import ConvertError

if TYPE_CHECKING:
    from bootstrap.merge import MergeSource


@dataclass(frozen=True, slots=True)
class ImageForm:
    """What converted images look like, whatever their layers are. `in_backend`: data blobs lie outside of the registry.
    `prefetch`: absolute paths, None for the programs that each image starts with; `chunk_dict`: bootstrap of the
    dictionary."""

    builder_version: str
    merge_platform: bool = False
    oci: bool = False
    referrer: bool = False
    in_backend: bool = False
    prefetch: tuple[str, ...] | None = ()
    chunk_dict: Path | None = None


@dataclass(frozen=True, slots=True)
class NydusPlatform:
    """One converted platform, its bootstrap layer still a file. `size`: bytes of all it consists of."""

    source: Image
    media_type: str
    body: bytes
    config: bytes
    bootstrap: BootstrapLayer
    size: int


def assemble(
    image: Image,
    layers: Sequence[ConvertedLayer],
    settings: LayerSettings,
    form: ImageForm,
    folder: Path,
    foreign_blob: Callable[[str], Descriptor],
    source_digest: str = "",
) -> NydusPlatform:
    """`layers` are those of `image`, in order; `foreign_blob` finds a blob of the chunk dictionary by its hex digest;
    `source_digest` is what to record as the source, if not the image's own.
    Files go to `folder`. Raises ConvertError, OSError."""
    from bootstrap.errors import RafsError
    from bootstrap.merge import merge_layers

    folder.mkdir(parents=True)
    boot = folder / "image.boot"
    if form.prefetch is not None:
        patterns = list(form.prefetch)
    else:
        patterns = startup_files(image.config, [layer.bootstrap for layer in layers])
    try:
        merged = merge_layers(
            [_merge_source(layer, settings) for layer in layers],
            boot,
            prefetch=[pattern.encode("utf-8", "surrogateescape") for pattern in patterns],
            chunk_dict=form.chunk_dict,
        )
    except RafsError as error:
        raise ConvertError(f"{image.name}: its layers cannot be merged: {error}") from error
    own = {name for layer in layers for name in (layer.hex, layer.source_digest.removeprefix("sha256:"))}
    foreign = [foreign_blob(blob) for blob in merged.blobs if blob not in own]
    metas = [(layer.hex, layer.meta) for layer in layers if layer.meta is not None]
    packed = write_bootstrap_layer(boot, metas, folder / "bootstrap.tar.gz")
    boot.unlink()

    data = [
        manifests.blob_descriptor(layer.digest, layer.size, layer.source_digest if settings.oci_ref else "")
        for layer in layers
    ]
    data += [manifests.blob_descriptor(blob.digest, blob.size) for blob in foreign]
    diff_ids = [*(blob.digest for blob in data), packed.diff_id]
    last = manifests.bootstrap_descriptor(image, packed.digest, packed.size, settings.fs_version, form.oci)
    descriptors = [*data, last]
    if form.in_backend:
        config = manifests.nydus_config(image, diff_ids[-1:], alone=True)
        descriptors = [manifests.with_diff_id(last, packed.diff_id)]
    else:
        config = manifests.nydus_config(image, diff_ids)
    config_type = manifests.config_media_type(image, oci=form.oci, merged=form.merge_platform)
    media_type, body = manifests.nydus_manifest(
        image,
        Descriptor(config_type, digest_of(config), len(config)),
        descriptors,
        fs_version=settings.fs_version,
        builder_version=form.builder_version,
        oci=form.oci,
        referrer=form.referrer,
        source_digest=source_digest,
    )
    size = len(config) + packed.size + sum(blob.size for blob in data)
    return NydusPlatform(image, media_type, body, config, packed, size)


def _merge_source(layer: ConvertedLayer, settings: LayerSettings) -> MergeSource:
    from bootstrap.merge import MergeSource

    if not settings.oci_ref:
        return MergeSource(layer.bootstrap, blob_digest=layer.hex)
    # the size of the table of contents stays unsaid, as upstream leaves it
    return MergeSource(
        layer.bootstrap,
        blob_digest=layer.hex,
        original_blob_id=layer.source_digest.removeprefix("sha256:"),
        blob_size=layer.size,
        toc_digest=layer.toc_digest,
    )
