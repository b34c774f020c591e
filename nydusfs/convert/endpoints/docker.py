"""Docker archives: `manifest.json` names config and layer files, which have no manifest and often no digest.

The image gets the manifest that pushing it would give: Docker media types, layers by the digest of their stored bytes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from nydusfs.convert.endpoints.base import Endpoint, Manifest, missing
from nydusfs.convert.endpoints.files import FilePart
from nydusfs.convert.endpoints.layout import Named
from nydusfs.convert.endpoints.tarindex import TarIndex
from nydusfs.errors import ConvertError
from nydusfs.registry import mediatypes as mt

_MAX_JSON = 8 << 20
_PIECE = 1 << 20
_MAX_LAYERS = 1000


class DockerArchive(Endpoint):
    """Read only. `digests`: see `member_digests`; computed here if empty."""

    def __init__(self, index: TarIndex, location: Named, digests: tuple[tuple[str, str], ...]) -> None:
        self.name, self.image = str(location), location.image
        self._index = index
        self._item = _item(index, location)
        digests = digests or member_digests(index, location)
        self._members = dict(digests)
        self._body = self._manifest({member: digest for digest, member in digests})
        self._digest = f"sha256:{hashlib.sha256(self._body).hexdigest()}"

    def _manifest(self, digest_of: dict[str, str]) -> bytes:
        config = self._item["Config"]

        def descriptor(media_type: str, member: str) -> dict[str, Any]:
            return {"mediaType": media_type, "digest": digest_of[member], "size": self._index.size(member)}

        layers = [descriptor(_layer_type(self._index, member), member) for member in self._item["Layers"]]
        document = {
            "schemaVersion": 2,
            "mediaType": mt.DOCKER_MANIFEST,
            "config": descriptor(mt.DOCKER_CONFIG, config),
            "layers": layers,
        }
        return json.dumps(document, indent=3).encode()

    def manifest(self, digest: str = "") -> Manifest:
        if digest not in ("", self._digest):
            raise missing(f"manifest {digest}", self.name)
        return Manifest(self._digest, mt.DOCKER_MANIFEST, self._body)

    def open_blob(self, digest: str, size: int | None = None) -> FilePart:
        return self._open(digest, size, digest)

    def open_blob_ranges(self, digest: str, size: int) -> FilePart:
        return self._open(digest, size, "")

    def _open(self, digest: str, size: int | None, verify: str) -> FilePart:
        member, what = self._members.get(digest), f"blob {digest} of {self.name}"
        if member is None:
            raise missing(f"blob {digest}", self.name)
        found = self._index.size(member)
        if size is not None and found != size:
            raise ConvertError(f"{what} has {found} bytes, not {size}")
        return self._index.open(member, what, verify)

    def blob_size(self, digest: str) -> int:
        member = self._members.get(digest)
        if member is None:
            raise missing(f"blob {digest}", self.name)
        return self._index.size(member)

    def has_blob(self, digest: str, size: int | None = None) -> bool:
        return digest in self._members

    def close(self) -> None:
        self._index.close()


def member_digests(index: TarIndex, location: Named) -> tuple[tuple[str, str], ...]:
    """(digest, member) of config and layers of one image. A plain layer's digest is its diff id, which reading it
    verifies; compressed ones are read once here. Raises ConvertError."""
    item, shown = _item(index, location), str(location)
    config = index.read(item["Config"], _MAX_JSON)
    try:
        diff_ids = json.loads(config)["rootfs"]["diff_ids"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ConvertError(f"{shown}: {item['Config']} is not the config of an image") from None
    layers = item["Layers"]
    if not isinstance(diff_ids, list) or len(diff_ids) != len(layers):
        raise ConvertError(f"{shown}: its config names other layers than manifest.json")
    found = {item["Config"]: f"sha256:{hashlib.sha256(config).hexdigest()}"}
    for member, diff_id in zip(layers, diff_ids, strict=True):
        if member not in found:
            found[member] = str(diff_id) if _layer_type(index, member) == mt.DOCKER_LAYER else _sha256(index, member)
    return tuple((digest, member) for member, digest in found.items())


def _item(index: TarIndex, location: Named) -> dict[str, Any]:
    """The entry of manifest.json for the image a location means, checked for shape."""
    name, shown = location.tag, str(location)
    try:
        items = json.loads(index.read("manifest.json", _MAX_JSON))
    except (ValueError, RecursionError):
        raise ConvertError(f"{shown}: its manifest.json is not JSON") from None
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ConvertError(f"{shown}: its manifest.json lists no image")

    def tags(item: dict[str, Any]) -> list[str]:
        given = item.get("RepoTags")
        return [str(one) for one in given] if isinstance(given, list) else []

    chosen = [
        item for item in items if not name or name in tags(item) or any(t.endswith(f":{name}") for t in tags(item))
    ]
    known = ", ".join(sorted({tag for item in items for tag in tags(item)})) or "images without a name"
    if not chosen:
        raise missing(f"image {name!r}", f"{shown} (it has {known})")
    if not name and len(chosen) > 1:
        chosen = [item for item in chosen if location.reference in tags(item)] or chosen
    if len(chosen) > 1:
        raise ConvertError(f"{shown} holds {len(chosen)} images: choose one of {known}")
    item: dict[str, Any] = chosen[0]
    config, layers = item.get("Config"), item.get("Layers")
    if not isinstance(config, str) or not isinstance(layers, list) or len(layers) > _MAX_LAYERS:
        raise ConvertError(f"{shown}: its manifest.json names no config and layers")
    for member in (config, *layers):
        if not isinstance(member, str) or member not in index:
            raise ConvertError(f"{shown}: {member!r} of its manifest.json is not in the archive")
    return item


def _layer_type(index: TarIndex, member: str) -> str:
    with index.open(member, member) as part:
        start = part.read(4)
    if start[:2] == b"\x1f\x8b":
        return mt.DOCKER_LAYER_GZIP
    return mt.OCI_LAYER_ZSTD if start == b"\x28\xb5\x2f\xfd" else mt.DOCKER_LAYER


def _sha256(index: TarIndex, member: str) -> str:
    summed = hashlib.sha256()
    with index.open(member, member) as part:
        while piece := part.read(_PIECE):
            summed.update(piece)
    return f"sha256:{summed.hexdigest()}"
