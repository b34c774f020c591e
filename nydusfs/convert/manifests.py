"""Manifests, configs and indexes of converted images, in the reference converter's form (RAFS format 6.3 to 6.5)."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from nydusfs.convert.images import Descriptor, Image
from nydusfs.registry import mediatypes as mt

# The empty layer that keeps the OCI half of a merged index from sharing snapshots with the source image:
# 1024 zero bytes, and their gzip form as the Go compressor writes it.
EMPTY_LAYER = bytes.fromhex("1f8b08000000000000ff621805a360148c5800080000ffff2eafb5ef00040000")
EMPTY_LAYER_DIGEST = "sha256:4f4fb700ef54461cfa02571ae0db9a0dc1e0cdb5577484a6d75e68dc38e8acc1"
EMPTY_LAYER_DIFF_ID = "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
_CREATOR = "Nydus Converter"

_TO_OCI = {
    mt.DOCKER_MANIFEST: mt.OCI_MANIFEST,
    mt.DOCKER_LIST: mt.OCI_INDEX,
    mt.DOCKER_CONFIG: mt.OCI_CONFIG,
    mt.DOCKER_LAYER: mt.OCI_LAYER,
    mt.DOCKER_LAYER_GZIP: mt.OCI_LAYER_GZIP,
}


def oci_type(media_type: str) -> str:
    """The OCI name of a Docker media type; OCI types stay."""
    return _TO_OCI.get(media_type, media_type)


def compact(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def indented(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False).encode()


def nydus_config(source: Image, diff_ids: list[str]) -> bytes:
    """The source's config with other diff ids and one history item more; key order kept."""
    config = copy.deepcopy(source.config)
    config["rootfs"]["diff_ids"] = diff_ids
    history = config.get("history") or []
    config["history"] = [*history, {"created_by": _CREATOR, "comment": "Nydus Bootstrap Layer"}]
    return compact(config)


def blob_descriptor(digest: str, size: int) -> Descriptor:
    return Descriptor(mt.NYDUS_BLOB, digest, size, {mt.ANNOTATION_BLOB: "true"})


def bootstrap_descriptor(source: Image, digest: str, size: int, fs_version: int, oci: bool) -> Descriptor:
    media_type = mt.DOCKER_LAYER_GZIP if source.is_docker and not oci else mt.OCI_LAYER_GZIP
    return Descriptor(
        media_type, digest, size, {mt.ANNOTATION_BOOTSTRAP: "true", mt.ANNOTATION_FS_VERSION: str(fs_version)}
    )


def nydus_manifest(
    source: Image,
    config: Descriptor,
    layers: list[Descriptor],
    *,
    fs_version: int,
    builder_version: str,
    oci: bool,
    referrer: bool = False,
) -> tuple[str, bytes]:
    """Media type and body."""
    media_type = oci_type(source.media_type) if oci else source.media_type
    annotations = {
        **_texts(source.manifest.get("annotations")),
        mt.ANNOTATION_BUILDER_VERSION: builder_version,
        mt.ANNOTATION_FS_VERSION: str(fs_version),
        mt.ANNOTATION_SOURCE_DIGEST: source.digest,
        mt.ANNOTATION_SOURCE_REFERENCE: source.endpoint.image,
    }
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": config.to_json(),
        "layers": [layer.to_json() for layer in layers],
    }
    if referrer:
        document["subject"] = {
            "mediaType": source.media_type,
            "digest": source.digest,
            "size": len(source.manifest_body),
        }
    document["annotations"] = dict(sorted(annotations.items()))
    return media_type, indented(document)


def config_media_type(source: Image, *, oci: bool, merged: bool) -> str:
    if merged:
        return mt.NYDUS_CONFIG
    media_type = source.config_descriptor.media_type
    return oci_type(media_type) if oci else media_type


def oci_half(source: Image, *, oci: bool) -> tuple[bytes, str, bytes]:
    """Config body, manifest media type and manifest body of the plain image in a merged index."""
    config = copy.deepcopy(source.config)
    config["rootfs"]["diff_ids"] = [EMPTY_LAYER_DIFF_ID, *config["rootfs"]["diff_ids"]]
    config["history"] = [{"created_by": _CREATOR, "comment": "Nydus Empty Layer"}, *(config.get("history") or [])]
    config_body = indented(config)

    def translated(media_type: str) -> str:
        return oci_type(media_type) if oci else media_type

    docker = source.is_docker and not oci
    empty = Descriptor(
        mt.DOCKER_LAYER_GZIP if docker else mt.OCI_LAYER_GZIP,
        EMPTY_LAYER_DIGEST,
        len(EMPTY_LAYER),
        {mt.ANNOTATION_EMPTY_LAYER: "true"},
    )
    layers = [Descriptor(translated(one.media_type), one.digest, one.size, one.annotations) for one in source.layers]
    media_type = translated(source.media_type)
    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": Descriptor(
            translated(source.config_descriptor.media_type), _digest(config_body), len(config_body)
        ).to_json(),
        "layers": [layer.to_json() for layer in [empty, *layers]],
        "annotations": dict(
            sorted({**_texts(source.manifest.get("annotations")), mt.ANNOTATION_SOURCE_DIGEST: source.digest}.items())
        ),
    }
    return config_body, media_type, indented(document)


def index_entry(
    media_type: str,
    body: bytes,
    platform: dict[str, Any],
    *,
    annotations: dict[str, str] | None = None,
    artifact_type: str = "",
) -> dict[str, Any]:
    entry: dict[str, Any] = {"mediaType": media_type, "digest": _digest(body), "size": len(body)}
    if annotations:
        entry["annotations"] = dict(sorted(annotations.items()))
    entry["platform"] = platform
    if artifact_type:
        entry["artifactType"] = artifact_type
    return entry


def index(entries: list[dict[str, Any]], media_type: str, *, merged: bool) -> bytes:
    """Upstream's merged indexes do not name their own type (seen with v2.4.4); Docker's lists must."""
    if merged and media_type == mt.OCI_INDEX:
        return indented({"schemaVersion": 2, "manifests": entries})
    return indented({"schemaVersion": 2, "mediaType": media_type, "manifests": entries})


def _digest(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def _texts(value: object) -> dict[str, str]:
    return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}
