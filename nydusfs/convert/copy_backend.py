"""Images whose blobs lie in a storage backend become images of a registry: the blobs move in as layers."""

from __future__ import annotations

import copy
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from nydusfs.convert import manifests
from nydusfs.convert.backends import BlobStore
from nydusfs.convert.endpoints import Endpoint
from nydusfs.convert.images import load_image
from nydusfs.convert.nydusimage import unpack_image
from nydusfs.convert.pushing import Pusher, verified_stream
from nydusfs.errors import ConvertError
from nydusfs.registry.client import Manifest

_HEX = re.compile(r"[0-9a-f]{64}")
_OLD_LIST = "containerd.io/snapshot/nydus-blob-ids"  # named all blobs, before v1.0; clients of today stumble over it


def filled_from_backend(
    source: Endpoint, store: BlobStore, found: Manifest, pusher: Pusher, folder: Path
) -> dict[str, Any] | None:
    """The manifest with a layer for each blob of its bootstrap, all of which are being pushed, as is its new config.
    None for what is no Nydus image. Raises ConvertError for blobs that are not named by their digest, as layers are."""
    image = load_image(source, found)
    if not image.is_nydus:
        return None
    nydus = unpack_image(image, Path(tempfile.mkdtemp(prefix="backend-", dir=folder)))
    have = {layer.hex for layer in image.layers}
    layers: list[dict[str, Any]] = []
    for blob_id in _blob_ids(nydus.bootstrap, image.name):
        if blob_id in have:
            continue
        if not _HEX.fullmatch(blob_id):
            raise ConvertError(f"{image.name}: blob {blob_id!r} is not named by a digest: it cannot become a layer")
        size = store.size(blob_id)
        if size is None:
            raise ConvertError(f"{image.name}: blob {blob_id} does not exist in {store.name}")
        digest = f"sha256:{blob_id}"
        pusher.stream(digest, size, partial(verified_stream, store, blob_id))
        layers.append(manifests.blob_descriptor(digest, size).to_json())
    document = copy.deepcopy(image.manifest)
    for layer in document["layers"]:
        (layer.get("annotations") or {}).pop(_OLD_LIST, None)
    config = copy.deepcopy(image.config)
    config["rootfs"]["diff_ids"] = [*(layer["digest"] for layer in layers), *image.diff_ids]
    body = manifests.compact(config)
    document["config"] = {**document["config"], "digest": pusher.data(body), "size": len(body)}
    document["layers"] = [*layers, *document["layers"]]
    return document


def _blob_ids(bootstrap: Path, name: str) -> list[str]:
    from bootstrap.errors import RafsError
    from bootstrap.reader import open_bootstrap

    try:
        with open_bootstrap(str(bootstrap)) as image:
            return list(dict.fromkeys(blob.id for blob in image.blobs))
    except RafsError as error:
        raise ConvertError(f"{name}: bootstrap: {error}") from error
