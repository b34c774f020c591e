"""Images in registries."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from nydusfs.convert.endpoints.base import Endpoint, Manifest, Progress
from nydusfs.convert.endpoints.connections import Connections
from nydusfs.errors import ConvertError
from nydusfs.registry.client import RegistryClient
from nydusfs.registry.hosts import ClientOptions
from nydusfs.registry.reference import Reference


@dataclass(frozen=True, slots=True)
class RegistryLocation:
    """`chunk_size`: bytes of one request of a push, for proxies that limit them; 0: a blob goes in one."""

    reference: Reference
    options: ClientOptions = field(default_factory=ClientOptions)
    chunk_size: int = 0

    @property
    def image(self) -> str:
        return str(self.reference)

    def prepare(self, folder: Path) -> RegistryLocation:
        return self

    def open(self, connections: Connections, *, create: bool = False) -> RegistryEndpoint:
        if create and self.reference.digest:
            raise ConvertError(f"target {self.reference}: a digest cannot be pushed to; give a tag")
        client = connections.client(self.reference.host, self.options)
        return RegistryEndpoint(client, self.reference, chunk_size=self.chunk_size)

    def __str__(self) -> str:
        return str(self.reference)


class RegistryEndpoint(Endpoint):
    """A reference seen through a client, which stays open."""

    def __init__(self, client: RegistryClient, reference: Reference, *, chunk_size: int = 0) -> None:
        self.client = client
        self.reference = reference
        self.name = self.image = str(reference)
        self._chunk_size = chunk_size

    @property
    def repository(self) -> str:
        return self.reference.repository

    def manifest(self, digest: str = "") -> Manifest:
        return self.client.manifest(self.repository, digest or self.reference.selector)

    def open_blob(self, digest: str, size: int | None = None) -> io.RawIOBase:
        return self.client.open_blob(self.repository, digest, size)

    def blob(self, digest: str, limit: int) -> bytes:
        return self.client.blob(self.repository, digest, limit)

    def open_blob_ranges(self, digest: str, size: int) -> io.RawIOBase:
        return self.client.open_blob_ranges(self.repository, digest, size)

    def has_blob(self, digest: str, size: int | None = None) -> bool:
        return self.client.has_blob(self.repository, digest)

    def blob_size(self, digest: str) -> int:
        return self.client.blob_size(self.repository, digest)

    def require_writable(self) -> None:
        self.client.require_push(self.repository)

    def push_blob(
        self,
        digest: str,
        size: int,
        opener: Callable[[], BinaryIO],
        *,
        origin: Endpoint | None = None,
        progress: Progress | None = None,
    ) -> bool:
        mount_from = ""
        if isinstance(origin, RegistryEndpoint) and origin.client.host == self.client.host:
            mount_from = origin.repository
        return self.client.push_blob(
            self.repository,
            digest,
            size,
            opener,
            mount_from=mount_from,
            chunk_size=self._chunk_size,
            progress=progress,
        )

    def push_manifest(self, media_type: str, body: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        return self.client.push_manifest(self.repository, digest, media_type, body)

    def push_image(self, media_type: str, body: bytes) -> str:
        return self.client.push_manifest(self.repository, self.reference.selector, media_type, body)
