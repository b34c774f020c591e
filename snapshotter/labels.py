"""Labels that travel from image builders and clients to the snapshotter, and what they mean here.

Only presence counts for the two layer marks: `nydus-blob=false` marks a data layer too, as upstream has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from snapshotter.errors import InvalidArgument, NotFound

PREFIX = "containerd.io/snapshot/"
SNAPSHOT_REF = "containerd.io/snapshot.ref"
META_LAYER = PREFIX + "nydus-bootstrap"
DATA_LAYER = PREFIX + "nydus-blob"
IMAGE_REF = PREFIX + "cri.image-ref"
NYDUS_REF = PREFIX + "nydus-ref"
LAYER_DIGEST = PREFIX + "cri.layer-digest"
MANIFEST_DIGEST = PREFIX + "cri.manifest-digest"
TOC_DIGEST = PREFIX + "stargz/toc.digest"
DIFF_ID = PREFIX + "diff-id"
SIGNATURE = PREFIX + "nydus-signature"
STARGZ = PREFIX + "stargz"
TARFS = PREFIX + "nydus-tarfs"
TARFS_HINT = PREFIX + "tarfs-hint"
IMAGE_BLOCK = PREFIX + "nydus-image-block"
LAYER_BLOCK = PREFIX + "nydus-layer-block"
PROXY = PREFIX + "nydus-proxy-mode"
INDEX_ALTERNATIVE = PREFIX + "nydus-index-alternative"
# Ours: digest of the Nydus manifest on the top layer of a plain image that runs as its twin, `layer` on those below.
TWIN = PREFIX + "nydus-twin"
TWIN_LAYER = "layer"
STARGZ_REFERENCE = PREFIX + "remote/stargz.reference"
VOLATILE = PREFIX + "overlay.volatile"
UID_MAPPING = PREFIX + "uidmapping"
GID_MAPPING = PREFIX + "gidmapping"
PULL_USER = PREFIX + "pullusername"
PULL_SECRET = PREFIX + "pullsecret"

RECOVERED = "nydus.recovered"  # on a layer that stands in for one unpacked by another snapshotter
STARGZ_TOC = PREFIX + "nydus-stargz-toc"  # ours: what the manifest says of the table, however it was learned
# What this program alone writes. A manifest's annotations below PREFIX become labels of its layers, and a layer is
# shared by all images with its chain id: who could write these could have another image's containers run his files.
OWN = frozenset({STARGZ, STARGZ_TOC, TARFS, TWIN, INDEX_ALTERNATIVE, PROXY, IMAGE_BLOCK, LAYER_BLOCK})

Labels = Mapping[str, str]
_UNPACK = re.compile(r"extract-\d+-\S+ (sha256:[0-9a-f]{64})")
_CHAIN = re.compile(r"sha256:[0-9a-f]{64}")


class IdMapping(NamedTuple):
    """A user namespace: ids from `inside` on are those from `host` on of this machine."""

    inside: int
    host: int
    length: int

    def __str__(self) -> str:
        return f"{self.inside}:{self.host}:{self.length}"


def is_meta(labels: Labels) -> bool:
    return META_LAYER in labels


def is_data(labels: Labels) -> bool:
    return DATA_LAYER in labels


def is_left_packed(labels: Labels) -> bool:
    """Whether it is a layer of a plain image that was not unpacked at the pull."""
    return STARGZ in labels or TARFS in labels or TWIN in labels


def is_layer_of_twin(labels: Labels) -> bool:
    """Not unpacked although plain, and no image by itself: it counts only below the layer that is."""
    return labels.get(TWIN) == TWIN_LAYER


def runs_lazily(labels: Labels) -> bool:
    """Whether everything up to this layer is one lazily read image."""
    return is_meta(labels) or STARGZ in labels or TARFS in labels or (TWIN in labels and not is_layer_of_twin(labels))


def image_label(labels: Labels) -> str:
    """Image reference that came with a snapshot, "" if none did."""
    return labels.get(IMAGE_REF) or labels.get(STARGZ_REFERENCE) or ""


def image_ref(labels: Labels, snapshot: str, why: str = "") -> str:
    """Image reference recorded on a meta layer at pull time. Raises NotFound naming the settings that bring it.

    `why`: the image is not known from elsewhere either.
    """
    if image := image_label(labels):
        return image
    raise NotFound(
        f"failed to find image ref of snapshot {snapshot}: label {IMAGE_REF} is missing"
        f"{f' ({why})' if why else ''}, so the registry of this Nydus image is unknown. "
        "Set disable_snapshot_annotations = false for containerd's CRI plugin (for the transfer "
        'service of containerd 2.1 and later: enable_remote_snapshot_annotations = "true" in '
        "proxy_plugins.nydus.exports), then remove the image and pull it again"
    )


def namespace_of(key: str) -> str:
    """containerd's namespace in a snapshot key `NAMESPACE/NUMBER/NAME`, "" in any other."""
    parts = key.split("/", 2)
    return parts[0] if len(parts) == 3 and parts[1].isdecimal() else ""


def unpacked_chain(key: str) -> str:
    """The chain id of the layer that a client unpacks under this key, "" if the key says none.

    `extract-NANOSECONDS-RANDOM CHAIN` is containerd's `UnpackKeyFormat`, of every client.
    """
    match = _UNPACK.fullmatch(key.rpartition("/")[2])
    return match[1] if match else ""


def chain_of(key: str, labels: Labels) -> str:
    """The chain id of a committed layer, by its label or else by the name that every client commits it under; "" if
    neither says."""
    name = key.rpartition("/")[2]
    return labels.get(SNAPSHOT_REF) or (name if _CHAIN.fullmatch(name) else "")


def id_mapping(labels: Labels) -> IdMapping | None:
    """Of the user namespace that the container will have; None without mapping labels.

    Both labels must be there and equal, one `container:host:length` triple of 32-bit numbers. Raises InvalidArgument.
    """
    uid, gid = labels.get(UID_MAPPING), labels.get(GID_MAPPING)
    if not uid and not gid:
        return None
    if uid != gid or not uid:
        raise InvalidArgument(f"labels {UID_MAPPING} ({uid!r}) and {GID_MAPPING} ({gid!r}) must be equal")
    parts = uid.split(":")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) <= 10 for part in parts):
        raise InvalidArgument(f"label {UID_MAPPING}: {uid!r} is not one container:host:length triple")
    inside, host, length = (int(part) for part in parts)
    if length < 1 or max(inside, host) + length > 1 << 32:
        raise InvalidArgument(f"label {UID_MAPPING}: {uid!r} leaves the 32-bit id range")
    return IdMapping(inside, host, length)
