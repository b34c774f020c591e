"""Manifests, configs and indexes of converted images, in the reference converter's form (RAFS format 6.3 to 6.5)."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
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


def nydus_config(source: Image, diff_ids: list[str], *, alone: bool = False) -> bytes:
    """The source's config with other diff ids and one history item more, or with nothing but that (`alone`); key order
    kept."""
    config = copy.deepcopy(source.config)
    config["rootfs"]["diff_ids"] = diff_ids
    history = [] if alone else config.get("history") or []
    config["history"] = [*history, {"created_by": _CREATOR, "comment": "Nydus Bootstrap Layer"}]
    return compact(config)


def blob_descriptor(digest: str, size: int, reference: str = "") -> Descriptor:
    """`reference`: digest of the layer that is the data of an OCI-ref blob."""
    annotations = {mt.ANNOTATION_BLOB: "true"} | ({mt.ANNOTATION_REF: reference} if reference else {})
    return Descriptor(mt.NYDUS_BLOB, digest, size, annotations)


def bootstrap_descriptor(source: Image, digest: str, size: int, fs_version: int, oci: bool) -> Descriptor:
    media_type = mt.DOCKER_LAYER_GZIP if source.is_docker and not oci else mt.OCI_LAYER_GZIP
    return Descriptor(
        media_type, digest, size, {mt.ANNOTATION_BOOTSTRAP: "true", mt.ANNOTATION_FS_VERSION: str(fs_version)}
    )


def with_diff_id(layer: Descriptor, diff_id: str) -> Descriptor:
    """Upstream leaves this working annotation on the one layer of an image whose blobs are in a storage backend."""
    return replace(layer, annotations={**layer.annotations, mt.ANNOTATION_UNCOMPRESSED: diff_id})


def nydus_manifest(
    source: Image,
    config: Descriptor,
    layers: list[Descriptor],
    *,
    fs_version: int,
    builder_version: str,
    oci: bool,
    referrer: bool = False,
    source_digest: str = "",
) -> tuple[str, bytes]:
    """Media type and body. `source_digest`: the one to record, if not the source manifest's own."""
    media_type = oci_type(source.media_type) if oci else source.media_type
    annotations = {
        **_texts(source.manifest.get("annotations")),
        mt.ANNOTATION_BUILDER_VERSION: builder_version,
        mt.ANNOTATION_FS_VERSION: str(fs_version),
        mt.ANNOTATION_SOURCE_DIGEST: source_digest or source.digest,
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


def oci_half(source: Image) -> tuple[bytes, str, bytes]:
    """Config body, manifest media type and manifest body of the plain image in a merged index; its media types stay
    whatever they are. One that was made so before gets no second empty layer."""
    if source.layers and source.layers[0].digest == EMPTY_LAYER_DIGEST:
        return source.config_body, source.media_type, source.manifest_body
    config = copy.deepcopy(source.config)
    config["rootfs"]["diff_ids"] = [EMPTY_LAYER_DIFF_ID, *config["rootfs"]["diff_ids"]]
    config["history"] = [{"created_by": _CREATOR, "comment": "Nydus Empty Layer"}, *(config.get("history") or [])]
    config_body = indented(config)
    empty = Descriptor(
        mt.DOCKER_LAYER_GZIP if source.is_docker else mt.OCI_LAYER_GZIP,
        EMPTY_LAYER_DIGEST,
        len(EMPTY_LAYER),
        {mt.ANNOTATION_EMPTY_LAYER: "true"},
    )
    document = {
        "schemaVersion": 2,
        "mediaType": source.media_type,
        "config": Descriptor(source.config_descriptor.media_type, digest_of(config_body), len(config_body)).to_json(),
        "layers": [layer.to_json() for layer in [empty, *source.layers]],
        "annotations": dict(
            sorted({**_texts(source.manifest.get("annotations")), mt.ANNOTATION_SOURCE_DIGEST: source.digest}.items())
        ),
    }
    return config_body, source.media_type, indented(document)


def index_entry(
    media_type: str,
    body: bytes,
    platform: dict[str, Any],
    *,
    annotations: dict[str, str] | None = None,
    artifact_type: str = "",
) -> dict[str, Any]:
    entry: dict[str, Any] = {"mediaType": media_type, "digest": digest_of(body), "size": len(body)}
    if annotations:
        entry["annotations"] = dict(sorted(annotations.items()))
    entry["platform"] = platform
    if artifact_type:
        entry["artifactType"] = artifact_type
    return entry


def merged_index(entries: list[dict[str, Any]]) -> bytes:
    """Upstream's merged indexes do not name their own type (seen with v2.4.4)."""
    return indented({"schemaVersion": 2, "manifests": entries})


def converted_index(entries: list[dict[str, Any]], media_type: str, source: dict[str, Any] | None) -> bytes:
    """The index of several converted platforms; `source` is the one that named their sources."""
    document: dict[str, Any] = {"schemaVersion": 2, "mediaType": media_type, "manifests": entries}
    if annotations := _texts((source or {}).get("annotations")):
        document["annotations"] = dict(sorted(annotations.items()))
    return compact(document)


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def _texts(value: object) -> dict[str, str]:
    return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}
