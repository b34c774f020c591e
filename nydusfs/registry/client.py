"""OCI distribution client: manifests, blobs, uploads. Synchronous; one object per registry, to be shared by threads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import httpx

from nydusfs.errors import RegistryError, WrongBytesError
from nydusfs.registry.blobstream import BlobStream, RangedBlob
from nydusfs.registry.credentials import Credentials
from nydusfs.registry.hosts import ClientOptions
from nydusfs.registry.mediatypes import ACCEPT_MANIFESTS, DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from nydusfs.registry.reference import Reference
from nydusfs.registry.referrers import add_to_tag, referrers, subject_of
from nydusfs.registry.transport import Transport
from nydusfs.registry.uploads import BlobUpload, has_blob, pull_scope, push_scope, start_upload

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

    def manifest(self, repository: str, selector: str, *, mirrors: bool = True) -> Manifest:
        """The manifest or index under a tag or digest. Without `mirrors` as the registry has it now: theirs may be
        old. Whether there is none is the registry's to say."""
        failure: RegistryError | None = None
        for endpoint in self.transport.pull_endpoints() if mirrors else [self.transport.server]:
            try:
                with self.transport.request(
                    "GET",
                    f"/v2/{repository}/manifests/{selector}",
                    scope=pull_scope(repository),
                    endpoint=endpoint,
                    headers={"Accept": ACCEPT_MANIFESTS},
                ) as response:
                    return self._read_manifest(response, repository, selector)
            except RegistryError as error:
                failure = error
        raise failure or RegistryError(f"registry {self.host} has no address")

    def manifest_digest(self, repository: str, selector: str) -> str | None:
        """Digest of what a tag names, without fetching it; None if there is no such manifest or no answer to that."""
        with self.transport.request(
            "HEAD",
            f"/v2/{repository}/manifests/{selector}",
            scope=pull_scope(repository),
            headers={"Accept": ACCEPT_MANIFESTS},
        ) as response:
            if response.status_code == 404:
                return None
            if response.status_code != 200:
                self.transport.raise_for(response, self._image(repository, selector))
            digest: str | None = response.headers.get("docker-content-digest")
            return digest

    def push_manifest(self, repository: str, selector: str, media_type: str, body: bytes) -> str:
        """Stores a manifest under a tag or digest and returns its digest. One with a `subject` can afterwards be found
        by `referrers`, whether or not the registry knows of subjects."""
        knows_subjects = self.put_manifest(repository, selector, media_type, body)
        subject = subject_of(body)
        if subject and not knows_subjects:
            add_to_tag(self, repository, subject, media_type, body)
        return f"sha256:{hashlib.sha256(body).hexdigest()}"

    def put_manifest(self, repository: str, selector: str, media_type: str, body: bytes) -> bool:
        """The request alone; whether the registry understood the manifest's `subject`."""
        with self.transport.request(
            "PUT",
            f"/v2/{repository}/manifests/{selector}",
            scope=push_scope(repository),
            headers={"Content-Type": media_type},
            body=lambda: iter((body,)),
            size=len(body),
        ) as response:
            if response.status_code not in (200, 201, 202):
                self.transport.raise_for(response, f"pushing {self._image(repository, selector)}")
            return "oci-subject" in response.headers

    def referrers(self, repository: str, digest: str) -> list[dict[str, Any]]:
        """Descriptors of the manifests whose subject is `digest`."""
        return referrers(self, repository, digest)

    # -- blobs

    def open_blob(self, repository: str, digest: str, size: int | None = None) -> BlobStream:
        """The whole blob as a stream, verified at its end. Nothing is sent before the first read."""
        return BlobStream(self.transport, repository, digest, size)

    def open_blob_ranges(self, repository: str, digest: str, size: int) -> RangedBlob:
        return RangedBlob(self.transport, repository, digest, size)

    def blob(self, repository: str, digest: str, limit: int) -> bytes:
        """A small blob in memory, verified; RegistryError if it is larger than `limit` bytes."""
        while True:
            mirrors = self.transport.mirrors()
            try:
                return self._whole_blob(repository, digest, limit)
            except WrongBytesError:
                if self.transport.mirrors() == mirrors:
                    raise  # no mirror was left out for them: they are the registry's own

    def _whole_blob(self, repository: str, digest: str, limit: int) -> bytes:
        with self.open_blob(repository, digest) as stream:
            data = bytearray()
            while piece := stream.read(min(_PIECE, limit + 1)):
                data += piece
                if len(data) > limit:
                    raise RegistryError(f"blob {digest} of {self.host}/{repository} is larger than {limit} bytes")
            return bytes(data)

    def has_blob(self, repository: str, digest: str, *, pushing: bool = False) -> bool:
        return has_blob(self.transport, repository, digest, pushing=pushing)

    def blob_size(self, repository: str, digest: str) -> int:
        """Bytes of a blob. Raises NotFoundError if there is none."""
        what = f"blob {digest} of {self.host}/{repository}"
        with self.transport.request(
            "HEAD", f"/v2/{repository}/blobs/{digest}", scope=pull_scope(repository)
        ) as response:
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

        `opener` gives the bytes from the start, once per try; a broken upload is taken up again. `mount_from` names
        another repository of this registry that may hold the blob. With `chunk_size` the bytes go in several requests
        of that size (for proxies that limit bodies). `progress` is called with numbers of bytes handed to the
        connection.
        """
        return BlobUpload(
            self.transport,
            repository,
            digest,
            size,
            opener,
            mount_from=mount_from,
            chunk_size=chunk_size,
            progress=progress,
        ).run()

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

    def require_push(self, repository: str) -> None:
        """Begins an upload and takes it back: raises AuthError where pushing is not allowed."""
        location = start_upload(self.transport, repository)
        if location is not None:
            self._cancel(repository, location)

    def mount_blob(self, repository: str, digest: str, source_repository: str) -> bool:
        """Makes a blob of another repository of this registry known here; False if the registry would not."""
        if self.has_blob(repository, digest, pushing=True):
            return True
        location = start_upload(self.transport, repository, digest, source_repository)
        if location is not None:
            self._cancel(repository, location)
        return location is None

    def _cancel(self, repository: str, location: str) -> None:
        """Registries drop abandoned uploads by themselves: whether this works does not matter."""
        with (
            contextlib.suppress(RegistryError),
            self.transport.request("DELETE", location, scope=push_scope(repository), retry=False),
        ):
            pass

    # -- helpers

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
