"""The image of a container: manifests and layers as containerd keeps them, the rest from the registry it came from."""

from __future__ import annotations

import hashlib
import io
from typing import cast

from nydusfs.containerd.connection import Missing
from nydusfs.containerd.containers import Containers
from nydusfs.convert.endpoints import Endpoint, RegistryEndpoint
from nydusfs.convert.endpoints.base import Manifest
from nydusfs.convert.images import MAX_CONFIG
from nydusfs.registry.client import media_type_of

_MAX_BOOTSTRAP = 64 << 20  # kept in memory; larger ones come from the registry


class StoredImage(Endpoint):
    """By digest alone: what a tag names today may be another image than the one that runs."""

    def __init__(
        self, containers: Containers, target_type: str, target_digest: str, registry: RegistryEndpoint
    ) -> None:
        self.name = registry.name
        self.registry = registry
        self._containers = containers
        self._target_type = target_type
        self._target = target_digest

    def manifest(self, digest: str = "") -> Manifest:
        wanted = digest or self._target
        body = self._stored(wanted, MAX_CONFIG)
        if body is None:
            return self.registry.manifest(wanted)
        media_type = self._target_type if wanted == self._target else media_type_of("", body)
        return Manifest(wanted, media_type, body)

    def open_blob(self, digest: str, size: int | None = None) -> io.RawIOBase:
        data = self._stored(digest, _MAX_BOOTSTRAP) if size is None or size <= _MAX_BOOTSTRAP else None
        return self.registry.open_blob(digest, size) if data is None else cast(io.RawIOBase, io.BytesIO(data))

    def open_blob_ranges(self, digest: str, size: int) -> io.RawIOBase:
        return self.registry.open_blob_ranges(digest, size)

    def has_blob(self, digest: str, size: int | None = None) -> bool:
        return self.registry.has_blob(digest, size)

    def blob_size(self, digest: str) -> int:
        return self.registry.blob_size(digest)

    def _stored(self, digest: str, limit: int) -> bytes | None:
        """None if containerd does not have it, or (it happens after power cuts) has something else."""
        try:
            body = self._containers.read_content(digest, limit)
        except Missing:
            return None
        return body if digest == f"sha256:{hashlib.sha256(body).hexdigest()}" else None
