"""What a pull does, as pure functions: platform choice, chain ids, garbage collection labels, labels of a lazy pull.

Sources of the rules: OCI image specification (chain ids), containerd's unpacker and `pkg/snapshotters/annotations.go`
(the four `cri.*` labels, which despite the name every client sends), containerd's `images.ChildGCLabels`.
"""

from __future__ import annotations

import json
import platform as host_platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nydusfs.errors import NydusError
from nydusfs.registry.mediatypes import INDEXES, NYDUS_MANIFEST_ARTIFACT, OS_FEATURE_NYDUS
from nydusfs.registry.reference import SHA256_DIGEST

_PREFIX = "containerd.io/snapshot/"
LABEL_REF = "containerd.io/snapshot.ref"
LABEL_IMAGE_REF = _PREFIX + "cri.image-ref"
LABEL_LAYER_DIGEST = _PREFIX + "cri.layer-digest"
LABEL_IMAGE_LAYERS = _PREFIX + "cri.image-layers"
LABEL_MANIFEST_DIGEST = _PREFIX + "cri.manifest-digest"
LABEL_UNCOMPRESSED = "containerd.io/uncompressed"
LABEL_LIMIT = 4096  # bytes of key and value together; containerd refuses more

_USUAL = {"arm": "v7", "arm64": "v8"}  # what no variant means; v1 elsewhere
_LEVEL = re.compile(r"v?(\d+)", re.ASCII)
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386", "riscv64": "riscv64"}


class ImageError(NydusError):
    """A manifest, index or config that cannot be used, or an image without the platform asked for."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Mapping[str, Any] = field(default_factory=dict)
    artifact_type: str = ""

    @classmethod
    def parse(cls, value: object, where: str) -> Descriptor:
        """ImageError unless `value` is a descriptor with a sha256 digest and a size of at least 0."""
        if not isinstance(value, dict):
            raise ImageError(f"{where}: a descriptor must be an object")
        media, digest, size = value.get("mediaType", ""), value.get("digest"), value.get("size")
        if not isinstance(media, str) or not isinstance(digest, str) or not SHA256_DIGEST.fullmatch(digest):
            raise ImageError(f"{where}: no mediaType, or digest {digest!r} is not sha256:<64 hex digits>")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ImageError(f"{where}: size of {digest} is {size!r}")
        annotations, platform = value.get("annotations") or {}, value.get("platform") or {}
        if not isinstance(annotations, dict) or not isinstance(platform, dict):
            raise ImageError(f"{where}: annotations and platform of {digest} must be objects")
        artifact = value.get("artifactType", "")
        return cls(
            media, digest, size, {str(key): str(text) for key, text in annotations.items()}, platform, str(artifact)
        )


@dataclass(frozen=True, slots=True)
class Platform:
    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """`os/arch[/variant]`; "" means this machine's. ImageError otherwise."""
        if not text:
            machine = host_platform.machine()
            return cls("linux", _ARCHITECTURES.get(machine, machine))
        parts = text.lower().split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise ImageError(f"platform {text!r}: want os/architecture[/variant], for example linux/amd64")
        architecture = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64"}.get(parts[1], parts[1])
        return cls(parts[0], architecture, parts[2] if len(parts) == 3 else "")

    def matches(self, platform: Mapping[str, Any]) -> bool:
        if platform.get("os") != self.os or platform.get("architecture") != self.architecture:
            return False
        other = str(platform.get("variant") or "")
        mine, theirs = self.level(self.variant), self.level(other)
        return other == self.variant if mine is None or theirs is None else theirs <= mine

    def level(self, variant: str) -> int | None:
        """Machines run what is of their own level and of those below. None for a name that tells none."""
        found = _LEVEL.fullmatch(variant or _USUAL.get(self.architecture, "v1"))
        return int(found[1]) if found else None

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def parse_document(body: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{where}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ImageError(f"{where}: not a JSON object")
    return document


def is_index(media_type: str) -> bool:
    return media_type in INDEXES


def choose_manifest(index: Mapping[str, Any], platform: Platform, where: str) -> tuple[Descriptor, bool]:
    """The manifest of an index for `platform`, a Nydus one before a plain one.

    The second value says whether it is also what containerd itself would choose (of the newest variant the first): if
    so, the index may be the image's target, else the manifest has to be.
    """
    entries = index.get("manifests")
    if not isinstance(entries, list):
        raise ImageError(f"{where}: an index without manifests")
    matching = [
        found
        for found in (Descriptor.parse(entry, where) for entry in entries)
        if found.platform and platform.matches(found.platform)
    ]
    if not matching:
        offered = sorted(
            {
                "/".join(str(entry["platform"].get(key) or "") for key in ("os", "architecture", "variant")).rstrip("/")
                for entry in entries
                if isinstance(entry, dict) and isinstance(entry.get("platform"), dict)
            }
        )
        raise ImageError(f"{where}: no image for platform {platform}; it has {', '.join(offered) or 'none'}")
    matching.sort(key=lambda found: -(platform.level(str(found.platform.get("variant") or "")) or 0))
    chosen = next((found for found in matching if _is_nydus(found)), matching[0])
    return chosen, chosen is matching[0] and all(Descriptor.parse(entry, where).platform for entry in entries)


def _is_nydus(found: Descriptor) -> bool:
    features = found.platform.get("os.features")
    return found.artifact_type == NYDUS_MANIFEST_ARTIFACT or (
        isinstance(features, list) and OS_FEATURE_NYDUS in features
    )


def snapshot_labels(
    reference: str, manifest_digest: str, layers: Sequence[Descriptor], number: int, chain_id: str
) -> dict[str, str]:
    """Labels of the Prepare of layer `number`: what tells a remote snapshotter which image this layer is of."""
    layer = layers[number]
    labels = {key: value for key, value in layer.annotations.items() if key.startswith(_PREFIX)}
    labels |= {
        LABEL_REF: chain_id,
        LABEL_IMAGE_REF: reference,
        LABEL_LAYER_DIGEST: layer.digest,
        LABEL_MANIFEST_DIGEST: manifest_digest,
    }
    above = ""
    for one in layers[number:]:
        longer = f"{above},{one.digest}" if above else one.digest
        if len(LABEL_IMAGE_LAYERS) + len(longer) > LABEL_LIMIT:
            break
        above = longer
    labels[LABEL_IMAGE_LAYERS] = above
    return {key: value for key, value in labels.items() if len(key) + len(value) <= LABEL_LIMIT}


def manifest_gc_labels(config: Descriptor, layers: Sequence[Descriptor]) -> dict[str, str]:
    """What the manifest keeps alive in the content store."""
    labels = {f"containerd.io/gc.ref.content.l.{number}": layer.digest for number, layer in enumerate(layers)}
    labels["containerd.io/gc.ref.content.config"] = config.digest
    return labels


def index_gc_labels(index: Mapping[str, Any], where: str) -> dict[str, str]:
    entries = [Descriptor.parse(entry, where) for entry in index.get("manifests", [])]
    return {f"containerd.io/gc.ref.content.m.{number}": entry.digest for number, entry in enumerate(entries)}


def parse_manifest(body: bytes, where: str) -> tuple[Descriptor, list[Descriptor]]:
    """(config, layers lowest first); ImageError when it is not an image manifest."""
    document = parse_document(body, where)
    layers = document.get("layers")
    if not isinstance(layers, list):
        raise ImageError(f"{where}: not an image manifest (no layers)")
    return Descriptor.parse(document.get("config"), where), [Descriptor.parse(layer, where) for layer in layers]


def parse_diff_ids(config: bytes, layers: Sequence[Descriptor], platform: Platform, where: str) -> list[str]:
    """`rootfs.diff_ids` of an image config for `platform`, as many as there are layers."""
    document = parse_document(config, where)
    if document.get("architecture") and not platform.matches(document):
        # containerd would later say of such an image that it is "not found"
        raise ImageError(f"{where}: it is for {document.get('os')}/{document['architecture']}, not for {platform}")
    rootfs = document.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or not all(
        isinstance(one, str) and SHA256_DIGEST.fullmatch(one) for one in diff_ids
    ):
        raise ImageError(f"{where}: config without a list of sha256 diff_ids: not a container image")
    if len(diff_ids) != len(layers):
        raise ImageError(f"{where}: {len(layers)} layers but {len(diff_ids)} diff_ids")
    return diff_ids
