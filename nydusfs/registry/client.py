"""OCI distribution client: manifests, blobs, uploads. Synchronous; one object per registry, to be shared by threads."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self
from urllib.parse import urlencode, urljoin

import httpx

from nydusfs.errors import NotFoundError, RegistryError
from nydusfs.registry.blobstream import BlobStream, RangedBlob
from nydusfs.registry.credentials import Credentials
from nydusfs.registry.hosts import ClientOptions
from nydusfs.registry.mediatypes import ACCEPT_MANIFESTS, DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from nydusfs.registry.reference import Reference
from nydusfs.registry.transport import Body, Transport

log = logging.getLogger(__name__)

MAX_MANIFEST = 8 << 20
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest or index exactly as stored; `digest` is that of `body` and was compared with the one asked for."""

    digest: str
    media_type: str
    body: bytes


class RegistryClient:
    """`host` as in references. Every method raises RegistryError (AuthError, NotFoundError) and nothing else."""

    def __init__(
        self,
        host: str,
        options: ClientOptions | None = None,
        credentials: Callable[[], Credentials | None] | None = None,
    ) -> None:
        self.host = host
        self.transport = Transport(host, options, credentials)

    def close(self) -> None:
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- manifests

    def manifest(self, repository: str, selector: str) -> Manifest:
        """The manifest or index under a tag or digest."""
        failure: RegistryError | None = None
        for endpoint in self.transport.pull_endpoints():
            try:
                with self.transport.request(
                    "GET",
                    f"/v2/{repository}/manifests/{selector}",
                    scope=_pull(repository),
                    endpoint=endpoint,
                    headers={"Accept": ACCEPT_MANIFESTS},
                ) as response:
                    return self._read_manifest(response, repository, selector)
            except RegistryError as error:
                if failure is None or not isinstance(failure, NotFoundError):
                    failure = error
        raise failure or RegistryError(f"registry {self.host} has no address")

    def manifest_digest(self, repository: str, selector: str) -> str | None:
        """Digest of what a tag names, without fetching it; None if there is no such manifest or no answer to that."""
        with self.transport.request(
            "HEAD",
            f"/v2/{repository}/manifests/{selector}",
            scope=_pull(repository),
            headers={"Accept": ACCEPT_MANIFESTS},
        ) as response:
            if response.status_code == 404:
                return None
            if response.status_code != 200:
                self.transport.raise_for(response, self._image(repository, selector))
            digest: str | None = response.headers.get("docker-content-digest")
            return digest

    def push_manifest(self, repository: str, selector: str, media_type: str, body: bytes) -> str:
        """Stores a manifest under a tag or digest and returns its digest."""
        with self.transport.request(
            "PUT",
            f"/v2/{repository}/manifests/{selector}",
            scope=_push(repository),
            headers={"Content-Type": media_type},
            body=lambda: iter((body,)),
            size=len(body),
        ) as response:
            if response.status_code not in (200, 201, 202):
                self.transport.raise_for(response, f"pushing {self._image(repository, selector)}")
        return f"sha256:{hashlib.sha256(body).hexdigest()}"

    # -- blobs

    def open_blob(self, repository: str, digest: str, size: int | None = None) -> BlobStream:
        """The whole blob as a stream, verified at its end. Nothing is sent before the first read."""
        return BlobStream(self.transport, repository, digest, size)

    def open_blob_ranges(self, repository: str, digest: str, size: int) -> RangedBlob:
        return RangedBlob(self.transport, repository, digest, size)

    def blob(self, repository: str, digest: str, limit: int) -> bytes:
        """A small blob in memory, verified; RegistryError if it is larger than `limit` bytes."""
        with self.open_blob(repository, digest) as stream:
            data = bytearray()
            while piece := stream.read(min(_PIECE, limit + 1)):
                data += piece
                if len(data) > limit:
                    raise RegistryError(f"blob {digest} of {self.host}/{repository} is larger than {limit} bytes")
            return bytes(data)

    def has_blob(self, repository: str, digest: str, *, pushing: bool = False) -> bool:
        with self.transport.request(
            "HEAD", f"/v2/{repository}/blobs/{digest}", scope=(_push if pushing else _pull)(repository)
        ) as response:
            if response.status_code not in (200, 204, 404):
                self.transport.raise_for(response, f"blob {digest} of {self.host}/{repository}")
            return response.status_code != 404

    def blob_size(self, repository: str, digest: str) -> int:
        """Bytes of a blob. Raises NotFoundError if there is none."""
        what = f"blob {digest} of {self.host}/{repository}"
        with self.transport.request("HEAD", f"/v2/{repository}/blobs/{digest}", scope=_pull(repository)) as response:
            if response.status_code != 200:
                self.transport.raise_for(response, what)
            length = response.headers.get("content-length", "")
            if not length.isdigit():
                raise RegistryError(f"{what}: the registry does not say its size")
            return int(length)

    def push_blob(
        self,
        repository: str,
        digest: str,
        size: int,
        opener: Callable[[], BinaryIO],
        *,
        mount_from: str = "",
        chunk_size: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> bool:
        """Uploads unless the blob is there; False if nothing was sent.

        `opener` gives the bytes from the start, once per try. `mount_from` names another repository of this registry
        that may hold the blob. With `chunk_size` the bytes go in several requests of that size (for proxies that limit
        bodies).
        `progress` is called with numbers of bytes handed to the connection.
        """
        if self.has_blob(repository, digest, pushing=True):
            return False
        location = self._start_upload(repository, digest, mount_from)
        if location is None:
            return False
        if chunk_size and size > chunk_size:
            location = self._upload_chunks(repository, location, size, opener, chunk_size, progress)
            body: Body = lambda: iter(())  # noqa: E731 - the type is what matters here
            size = 0
        else:
            body = _reader(opener, progress)
        separator = "&" if "?" in location else "?"
        # no retry: the upload session is spent after a failed PUT; the caller's retry starts a new one
        with self.transport.request(
            "PUT",
            f"{location}{separator}{urlencode({'digest': digest})}",
            scope=_push(repository),
            headers={"Content-Type": "application/octet-stream"},
            body=body,
            size=size,
            retry=False,
        ) as response:
            if response.status_code not in (200, 201, 204):
                self.transport.raise_for(response, f"pushing blob {digest} to {self.host}/{repository}")
        return True

    def push_file(
        self,
        repository: str,
        digest: str,
        path: Path,
        *,
        mount_from: str = "",
        progress: Callable[[int], None] | None = None,
    ) -> bool:
        return self.push_blob(
            repository, digest, path.stat().st_size, lambda: path.open("rb"), mount_from=mount_from, progress=progress
        )

    def mount_blob(self, repository: str, digest: str, source_repository: str) -> bool:
        """Makes a blob of another repository of this registry known here; False if the registry would not."""
        if self.has_blob(repository, digest, pushing=True):
            return True
        location = self._start_upload(repository, digest, source_repository)
        if location is not None:
            with self.transport.request("DELETE", location, scope=_push(repository), retry=False):
                pass
        return location is None

    def _start_upload(self, repository: str, digest: str, mount_from: str) -> str | None:
        """The upload address; None if a mount made it needless."""
        path, scope = f"/v2/{repository}/blobs/uploads/", _push(repository)
        if mount_from and mount_from != repository:
            path += "?" + urlencode({"mount": digest, "from": mount_from})
            scope += f" {_pull(mount_from)}"
        with self.transport.request("POST", path, scope=scope, size=0) as response:
            if response.status_code == 201:
                return None
            if response.status_code != 202:
                self.transport.raise_for(response, f"pushing to {self.host}/{repository}")
            return self._location(response, repository)

    def _upload_chunks(
        self,
        repository: str,
        location: str,
        size: int,
        opener: Callable[[], BinaryIO],
        chunk_size: int,
        progress: Callable[[int], None] | None,
    ) -> str:
        with opener() as source:
            offset = 0
            while offset < size:
                data = source.read(min(chunk_size, size - offset))
                if not data:
                    raise RegistryError(f"pushing to {self.host}/{repository}: data ends at byte {offset} of {size}")
                with self.transport.request(
                    "PATCH",
                    location,
                    scope=_push(repository),
                    headers={
                        "Content-Type": "application/octet-stream",
                        "Content-Range": f"{offset}-{offset + len(data) - 1}",
                    },
                    body=lambda data=data: iter((data,)),  # type: ignore[misc]
                    size=len(data),
                    retry=False,
                ) as response:
                    if response.status_code not in (202, 204):
                        self.transport.raise_for(response, f"pushing to {self.host}/{repository}")
                    location = self._location(response, repository)
                offset += len(data)
                if progress:
                    progress(len(data))
        return location

    # -- helpers

    def _location(self, response: httpx.Response, repository: str) -> str:
        location: str | None = response.headers.get("location")
        if not location:
            raise RegistryError(f"pushing to {self.host}/{repository}: the registry names no upload location")
        return urljoin(str(response.request.url), location)

    def _read_manifest(self, response: httpx.Response, repository: str, selector: str) -> Manifest:
        image = self._image(repository, selector)
        if response.status_code != 200:
            self.transport.raise_for(response, image)
        body = bytearray()
        for piece in response.iter_raw():
            body += piece
            if len(body) > MAX_MANIFEST:
                raise RegistryError(f"{image}: manifest is larger than {MAX_MANIFEST} bytes")
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if selector.startswith("sha256:") and digest != selector:
            raise RegistryError(f"{image}: the registry's manifest has digest {digest}")
        media_type = response.headers.get("content-type", "").partition(";")[0].strip()
        return Manifest(digest, media_type_of(media_type, bytes(body)), bytes(body))

    def _image(self, repository: str, selector: str) -> str:
        return f"image {self.host}/{repository}{'@' if ':' in selector else ':'}{selector}"


def client_for(reference: Reference, options: ClientOptions | None = None) -> RegistryClient:
    return RegistryClient(reference.host, options)


def _pull(repository: str) -> str:
    return f"repository:{repository}:pull"


def _push(repository: str) -> str:
    return f"repository:{repository}:pull,push"


def _reader(opener: Callable[[], BinaryIO], progress: Callable[[int], None] | None) -> Body:
    def pieces() -> Iterator[bytes]:
        with opener() as source:
            while piece := source.read(_PIECE):
                yield piece
                if progress:
                    progress(len(piece))

    return pieces


def media_type_of(header: str, body: bytes) -> str:
    """The body's own `mediaType` wins: some registries send text/plain or application/json."""
    known = (OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return header
    if not isinstance(document, dict):
        return header
    for said in (document.get("mediaType"), header):
        if said in known:
            return str(said)
    return OCI_INDEX if "manifests" in document else OCI_MANIFEST if "layers" in document else header
