"""Images in tar files: OCI archives (a packed OCI layout) and docker archives (`docker save`, podman, kaniko, bazel).

Both are read in place by the offsets of their members; a compressed archive is unpacked once into the working folder.
An OCI archive is written in the form containerd exports, with the `manifest.json` that `docker load` wants, so it
serves as either.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from nydusfs.convert.endpoints import docker, layout
from nydusfs.convert.endpoints.base import Endpoint, Manifest, Progress, missing
from nydusfs.convert.endpoints.connections import Connections
from nydusfs.convert.endpoints.files import FilePart
from nydusfs.convert.endpoints.tarindex import TarIndex
from nydusfs.errors import ConvertError
from nydusfs.registry import mediatypes as mt
from nydusfs.registry.reference import Reference, ReferenceError

_PIECE = 1 << 20
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd"}


@dataclass(frozen=True, slots=True)
class ArchiveLocation:
    """A tar file. `tag` chooses among several images; `reference` is the image's full name for annotations. `digests`:
    members of a docker archive by the digest of their bytes, filled by `prepare`."""

    path: Path
    tag: str = ""
    reference: str = ""
    digests: tuple[tuple[str, str], ...] = ()
    shown: str = ""

    @property
    def image(self) -> str:
        return self.reference or str(self)

    def prepare(self, folder: Path) -> ArchiveLocation:
        found = replace(self, path=_unpacked(self.path, folder).absolute(), shown=str(self))
        with TarIndex(found.path) as index:
            if "index.json" in index:
                return found
            return replace(found, digests=docker.member_digests(index, self))

    def open(self, connections: Connections, *, create: bool = False) -> Endpoint:
        if create:
            return ArchiveTarget(self)
        if not self.digests and _packing(self.path):
            raise ConvertError(f"{self} is compressed: unpack it first")
        index = TarIndex(self.path)
        if "index.json" in index:
            return OciArchive(self, index)
        return docker.DockerArchive(index, self, self.digests)

    def __str__(self) -> str:
        return self.shown or str(self.path) + (f":{self.tag}" if self.tag else "")


class OciArchive(Endpoint):
    """Read side."""

    def __init__(self, location: ArchiveLocation, index: TarIndex) -> None:
        self.name, self.image = str(location), location.image
        self._location = location
        self._index = index

    def manifest(self, digest: str = "") -> Manifest:
        if digest:
            return layout.read_manifest(self, digest)
        body = self._index.read("index.json", layout.MAX_MANIFEST)
        return layout.named_manifest(self, body, self._location, f"index.json of {self.name}")

    def open_blob(self, digest: str, size: int | None = None) -> FilePart:
        return self._open(digest, size, digest)

    def open_blob_ranges(self, digest: str, size: int) -> FilePart:
        return self._open(digest, size, "")

    def _open(self, digest: str, size: int | None, verify: str) -> FilePart:
        member, what = _member(digest), f"blob {digest} of {self.name}"
        if member not in self._index:
            raise missing(f"blob {digest}", self.name)
        found = self._index.size(member)
        if size is not None and found != size:
            raise ConvertError(f"{what} has {found} bytes, its descriptor says {size}")
        return self._index.open(member, what, verify)

    def blob_size(self, digest: str) -> int:
        member = _member(digest)
        if member not in self._index:
            raise missing(f"blob {digest}", self.name)
        return self._index.size(member)

    def has_blob(self, digest: str, size: int | None = None) -> bool:
        member = _member(digest)
        return member in self._index and (size is None or self._index.size(member) == size)

    def close(self) -> None:
        self._index.close()


class ArchiveTarget(Endpoint):
    """Write side: a layout beside the archive, packed into it by `push_image`. Packed in the order of names with fixed
    times and owners, so equal images give equal archives."""

    def __init__(self, location: ArchiveLocation) -> None:
        self.name, self.image = str(location), location.image
        self._location = location
        self._path = location.path
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self._path.name[:32]}-", suffix=".part", dir=self._path.parent))
        try:
            self._layout = layout.LayoutEndpoint(layout.LayoutLocation(self._folder), create=True)
        except BaseException:
            self.close()
            raise

    def manifest(self, digest: str = "") -> Manifest:
        return self._layout.manifest(digest)

    def open_blob(self, digest: str, size: int | None = None) -> Any:
        return self._layout.open_blob(digest, size)

    def open_blob_ranges(self, digest: str, size: int) -> Any:
        return self._layout.open_blob_ranges(digest, size)

    def blob_size(self, digest: str) -> int:
        return self._layout.blob_size(digest)

    def has_blob(self, digest: str, size: int | None = None) -> bool:
        return self._layout.has_blob(digest, size)

    def push_blob(
        self,
        digest: str,
        size: int,
        opener: Callable[[], BinaryIO],
        *,
        origin: Endpoint | None = None,
        progress: Progress | None = None,
    ) -> bool:
        return self._layout.push_blob(digest, size, opener, origin=origin, progress=progress)

    def push_manifest(self, media_type: str, body: bytes) -> str:
        return self._layout.push_manifest(media_type, body)

    def push_image(self, media_type: str, body: bytes) -> str:
        digest = self._layout.push_manifest(media_type, body)
        tag, reference = self._location.tag, self._location.reference
        entry = layout.index_entry(media_type, digest, len(body), tag, reference)
        index = {"schemaVersion": 2, "mediaType": mt.OCI_INDEX, "manifests": [entry]}
        documents = {"index.json": _compact(index), "manifest.json": _compact(self._docker_manifest(body))}
        staged = self._folder / "archive.tar"
        with staged.open("wb") as out:
            self._pack(out, documents)
            out.flush()
            os.fdatasync(out.fileno())
        os.rename(staged, self._path)
        return digest

    def _pack(self, out: BinaryIO, documents: dict[str, bytes]) -> None:
        def member(name: str, mode: int, size: int = 0, kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.mode, info.size, info.type = mode, size, kind
            out.write(info.tobuf(tarfile.GNU_FORMAT))

        member("blobs", 0o755, kind=tarfile.DIRTYPE)
        member("blobs/sha256", 0o755, kind=tarfile.DIRTYPE)
        for path in sorted((self._folder / "blobs" / "sha256").iterdir()):
            size = path.stat().st_size
            member(f"blobs/sha256/{path.name}", 0o444, size)
            with path.open("rb") as source:
                shutil.copyfileobj(source, out, _PIECE)
            out.write(bytes(-size % 512))
        for name, data, mode in (
            *((name, data, 0o644) for name, data in documents.items()),
            ("oci-layout", layout.LAYOUT_FILE, 0o444),
        ):
            member(name, mode, len(data))
            out.write(data + bytes(-len(data) % 512))
        out.write(bytes(1024))

    def _docker_manifest(self, body: bytes) -> list[dict[str, Any]]:
        """`manifest.json` of `docker save` for each image; an index gives one item per manifest it lists."""
        document = json.loads(body)
        if "manifests" in document:
            found: list[dict[str, Any]] = []
            for entry in document["manifests"]:
                found += self._docker_manifest(self._layout.manifest(entry["digest"]).body)
            return found
        name = self._location.reference
        return [
            {
                "Config": _member(document["config"]["digest"]),
                "RepoTags": [name] if name else None,
                "Layers": [_member(layer["digest"]) for layer in document["layers"]],
            }
        ]

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def archive_tag(reference: str) -> str:
    """The `org.opencontainers.image.ref.name` containerd gives an image of this name: its tag."""
    try:
        return Reference.parse(reference).tag
    except ReferenceError:
        return reference


def _member(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/', 1)}"


def _compact(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def _packing(path: Path) -> str:
    with path.open("rb") as file:
        return _PACKED.get(file.read(2), "")


def _unpacked(path: Path, folder: Path) -> Path:
    """The archive as a plain tar: itself, or its content in a file of `folder`."""
    kind = _packing(path)
    if not kind:
        return path
    from bootstrap.errors import RafsError
    from bootstrap.tar import open_layer

    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / "archive.tar"
    try:
        with path.open("rb") as packed, open_layer(packed) as source, plain.open("wb") as out:
            shutil.copyfileobj(source, out, _PIECE)
    except RafsError as error:
        raise ConvertError(f"archive {path}: {error}") from error
    return plain
