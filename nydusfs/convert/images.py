"""Images: index, manifest and config as read, checked for shape before anything uses them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nydusfs.convert.endpoints import Endpoint
from nydusfs.convert.platforms import Platform
from nydusfs.errors import ConvertError
from nydusfs.registry import mediatypes as mt
from nydusfs.registry.client import Manifest
from nydusfs.registry.reference import SHA256_DIGEST

MAX_CONFIG = 8 << 20
MAX_LAYERS = 1000
MAX_INDEX = 500


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a manifest says of a blob."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def hex(self) -> str:
        return self.digest.removeprefix("sha256:")

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            document["annotations"] = dict(sorted(self.annotations.items()))
        return document


@dataclass(frozen=True, slots=True)
class Image:
    """One manifest with its config, and where its blobs are. `platform_json` is the index descriptor's `platform`, None
    without an index."""

    endpoint: Endpoint = field(repr=False, compare=False)
    digest: str
    media_type: str
    manifest: dict[str, Any]
    manifest_body: bytes
    config: dict[str, Any]
    config_body: bytes
    config_descriptor: Descriptor
    layers: list[Descriptor]
    platform_json: dict[str, Any] | None = None
    artifact_type: str = ""

    @property
    def is_nydus(self) -> bool:
        """Recognised as upstream does: by the bootstrap annotation of the last layer."""
        return bool(self.layers) and mt.ANNOTATION_BOOTSTRAP in self.layers[-1].annotations

    @property
    def is_docker(self) -> bool:
        return self.media_type == mt.DOCKER_MANIFEST

    @property
    def platform(self) -> Platform:
        return Platform.of(self.platform_json or self.config)

    @property
    def diff_ids(self) -> list[str]:
        return list(self.config["rootfs"]["diff_ids"])

    @property
    def size(self) -> int:
        """Bytes of config and layers as stored."""
        return len(self.config_body) + sum(layer.size for layer in self.layers)

    @property
    def name(self) -> str:
        return f"{self.endpoint.name} ({self.platform})" if self.platform_json else self.endpoint.name


@dataclass(frozen=True, slots=True)
class ImageSet:
    """What a location names: one image, or an index with the images that were asked for. `digest` is that of the
    manifest or index itself."""

    name: str
    digest: str
    images: list[Image]
    index: dict[str, Any] | None = None
    index_media_type: str = ""


def load_images(endpoint: Endpoint, platforms: Sequence[Platform] | None) -> ImageSet:
    """Images of these platforms (None: all), Nydus ones included. Raises RegistryError, ConvertError."""
    name = endpoint.name
    found = endpoint.manifest()
    if found.media_type not in mt.INDEXES:
        return ImageSet(name, found.digest, [load_image(endpoint, found)])
    index = parse_object(found.body, f"index of {name}")
    entries = index.get("manifests")
    if not isinstance(entries, list) or len(entries) > MAX_INDEX:
        raise ConvertError(f"{name}: its index has no usable list of manifests")
    images: list[Image] = []
    seen: list[str] = []
    for entry in entries:
        descriptor = parse_descriptor(entry, f"index of {name}")
        platform_json = entry.get("platform")
        platform_json = platform_json if isinstance(platform_json, dict) else {}
        platform = Platform.of(platform_json)
        # attestations of build tools ("unknown/unknown") are no images
        if descriptor.media_type not in mt.MANIFESTS or platform.os in ("", "unknown"):
            continue
        seen.append(str(platform))
        if platforms is not None and not any(wanted.matches(platform) for wanted in platforms):
            continue
        body = endpoint.manifest(descriptor.digest)
        artifact = str(entry.get("artifactType") or "")
        features = platform_json.get("os.features")
        if isinstance(features, list) and mt.OS_FEATURE_NYDUS in features:
            artifact = mt.NYDUS_MANIFEST_ARTIFACT
        images.append(load_image(endpoint, body, platform_json, artifact))
    if not images:
        wanted_text = ", ".join(str(one) for one in platforms or [])
        raise ConvertError(
            f"{name} has no image for {wanted_text or 'any platform'}; it has: "
            f"{', '.join(sorted(set(seen))) or 'none'} (choose with --platform)"
        )
    return ImageSet(name, found.digest, images, index, found.media_type)


def load_image(
    endpoint: Endpoint,
    found: Manifest,
    platform_json: dict[str, Any] | None = None,
    artifact_type: str = "",
) -> Image:
    """Manifest and config of one image. Raises RegistryError, ConvertError."""
    name = endpoint.name
    if found.media_type not in mt.MANIFESTS:
        raise ConvertError(f"{name}: manifest type {found.media_type or 'unknown'!r} is not supported")
    document = parse_object(found.body, f"manifest of {name}")
    config_descriptor = parse_descriptor(document.get("config"), f"config of {name}")
    layers = parse_layers(document, name)
    body = endpoint.blob(config_descriptor.digest, MAX_CONFIG)
    config = parse_object(body, f"config of {name}")
    rootfs = config.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or not all(isinstance(one, str) for one in diff_ids):
        raise ConvertError(f"{name}: config {config_descriptor.digest} is not that of a container image (no rootfs)")
    return Image(
        endpoint,
        found.digest,
        found.media_type,
        document,
        found.body,
        config,
        body,
        config_descriptor,
        layers,
        platform_json,
        artifact_type,
    )


def parse_layers(manifest: dict[str, Any], name: str) -> list[Descriptor]:
    layers = manifest.get("layers")
    if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
        raise ConvertError(f"{name}: its manifest has no usable list of layers")
    return [parse_descriptor(layer, f"layer {number} of {name}") for number, layer in enumerate(layers)]


def parse_descriptor(value: object, what: str) -> Descriptor:
    """Raises ConvertError for anything that is not a descriptor with a SHA-256 digest."""
    if not isinstance(value, dict):
        raise ConvertError(f"{what}: descriptor missing")
    digest, size, media_type = value.get("digest"), value.get("size"), value.get("mediaType")
    if not isinstance(digest, str) or not SHA256_DIGEST.fullmatch(digest):
        raise ConvertError(f"{what}: {digest!r} is not a sha256 digest")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 60:
        raise ConvertError(f"{what}: {size!r} is not a size")
    annotations = value.get("annotations") or {}
    if not isinstance(annotations, dict) or not all(isinstance(one, str) for one in annotations.values()):
        raise ConvertError(f"{what}: annotations are not text")
    return Descriptor(media_type if isinstance(media_type, str) else "", digest, size, annotations)


def parse_object(body: bytes, what: str) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise ConvertError(f"{what} is not JSON") from None
    if not isinstance(document, dict):
        raise ConvertError(f"{what} is not a JSON object")
    return document
