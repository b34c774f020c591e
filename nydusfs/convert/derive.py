"""Nydus images made from other Nydus images: what stays of manifest, config and prefetch list."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

from nydusfs.convert import manifests
from nydusfs.convert.endpoints import Endpoint
from nydusfs.convert.images import Descriptor, Image
from nydusfs.convert.pushing import Pusher, unique
from nydusfs.registry import mediatypes as mt


def derived_manifest(
    image: Image, new: list[Descriptor], last: Descriptor, diff_id: str, created_by: str, pusher: Pusher
) -> tuple[str, bytes]:
    """Media type and body of an image that has `new` data layers above those of `image`, and `last` as bootstrap layer,
    whose diff id is given. Its config is being pushed."""
    config = copy.deepcopy(image.config)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    config["created"] = now
    config["rootfs"]["diff_ids"] = [*image.diff_ids[:-1], *(layer.digest for layer in new), diff_id]
    if history := list(config.get("history") or []):  # one for each layer, the bootstrap's last
        added = [{"created": now, "created_by": created_by} for _ in new]
        config["history"] = [*history[:-1], *added, history[-1]]
    body = manifests.compact(config)
    digest = pusher.data(body)

    config_type = image.config_descriptor.media_type
    if config_type == mt.NYDUS_CONFIG:  # only for images inside a merged index
        config_type = mt.DOCKER_CONFIG if image.is_docker else mt.OCI_CONFIG
    manifest: dict[str, Any] = copy.deepcopy(image.manifest)
    manifest["config"] = Descriptor(config_type, digest, len(body)).to_json()
    manifest["layers"] = [layer.to_json() for layer in [*image.layers[:-1], *new, last]]
    return image.media_type, manifests.indented(manifest)


def push_layers(pusher: Pusher, origin: Endpoint, image: Image) -> None:
    """Data layers of the image, and the plain layers that reference layers point to."""
    for layer in unique(image.layers[:-1]):
        pusher.copy(origin, layer)
        if reference := layer.annotations.get(mt.ANNOTATION_REF):
            pusher.copy(origin, Descriptor("", reference, origin.blob_size(reference)))


def prefetch_paths(bootstrap: Path) -> list[bytes]:
    """The image's own list of what to fetch ahead, as paths in its order."""
    from bootstrap.reader import open_bootstrap

    with open_bootstrap(str(bootstrap)) as image:
        order = image.prefetch_inodes()
        wanted = set(order)
        paths = {image.root: b"/"} if image.root in wanted else {}
        if wanted - paths.keys():
            for path, entry in image.walk():
                if entry.ino in wanted:
                    paths.setdefault(entry.ino, b"/" + path.lstrip(b"/"))
        return [paths[ino] for ino in order if ino in paths]
