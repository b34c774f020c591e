"""OCI image layouts: a directory with `oci-layout`, `index.json` and `blobs/sha256/`.

Written so that a reader never sees a half image: blobs appear under their names whole and synced, `index.json` is
replaced last. What an interrupted conversion left behind is found again by its digest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from nydusfs.convert.endpoints.base import Endpoint, Manifest, Progress, missing
from nydusfs.convert.endpoints.connections import Connections
from nydusfs.convert.endpoints.files import FilePart
from nydusfs.errors import ConvertError
from nydusfs.registry import mediatypes as mt
from nydusfs.registry.reference import SHA256_DIGEST

MAX_MANIFEST = 8 << 20
LAYOUT_FILE = b'{"imageLayoutVersion":"1.0.0"}'
REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"
_PIECE = 1 << 20
_DEAD_AFTER = 3600.0


@dataclass(frozen=True, slots=True)
class LayoutLocation:
    """`tag` names an entry of index.json ("": the only one); `reference` is the image's full name for annotations."""

    path: Path
    tag: str = ""
    reference: str = ""

    @property
    def image(self) -> str:
        return self.reference or str(self)

    def prepare(self, folder: Path) -> LayoutLocation:
        return LayoutLocation(self.path.absolute(), self.tag, self.reference)

    def open(self, connections: Connections, *, create: bool = False) -> LayoutEndpoint:
        return LayoutEndpoint(self, create=create)

    def __str__(self) -> str:
        return f"oci:{self.path}" + (f":{self.tag}" if self.tag else "")


class LayoutEndpoint(Endpoint):
    def __init__(self, location: LayoutLocation, *, create: bool = False) -> None:
        self.name, self.image = str(location), location.image
        self._location = location
        self._root = location.path
        self._blobs = self._root / "blobs" / "sha256"
        if create:
            self._create()
        elif not (self._root / "index.json").is_file():
            raise ConvertError(f"{self._root} is not an OCI layout: it has no index.json")

    def _create(self) -> None:
        marker = self._root / "oci-layout"
        self._root.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            if any(path.suffix != ".part" for path in self._root.iterdir()):
                raise ConvertError(f"{self._root} is neither empty nor an OCI layout: nothing is written there")
            with _fresh_file(marker) as out:
                out.write(LAYOUT_FILE)
        self._blobs.mkdir(parents=True, exist_ok=True)
        for part in self._blobs.glob(".*.part"):  # of writers that were killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - part.stat().st_mtime > _DEAD_AFTER:
                    part.unlink()

    # -- reading

    def manifest(self, digest: str = "") -> Manifest:
        if digest:
            return read_manifest(self, digest)
        path = self._root / "index.json"
        with path.open("rb") as file:
            body = file.read(MAX_MANIFEST + 1)
        return named_manifest(self, body, self._location, str(path))

    def open_blob(self, digest: str, size: int | None = None) -> io.RawIOBase:
        return self._open(digest, size, digest)

    def open_blob_ranges(self, digest: str, size: int) -> io.RawIOBase:
        return self._open(digest, size, "")

    def _open(self, digest: str, size: int | None, verify: str) -> FilePart:
        path = self._path(digest)
        what = f"blob {digest} of {self.name}"
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if size is not None and found != size:
                    raise ConvertError(f"{what} has {found} bytes, its descriptor says {size}")
                return FilePart(file.fileno(), 0, found, what, verify)
        except FileNotFoundError:
            raise missing(f"blob {digest}", self.name) from None

    def blob_size(self, digest: str) -> int:
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            raise missing(f"blob {digest}", self.name) from None

    def has_blob(self, digest: str, size: int | None = None) -> bool:
        try:
            found = self._path(digest).stat()
        except FileNotFoundError:
            return False
        return size is None or found.st_size == size

    def _path(self, digest: str) -> Path:
        if not SHA256_DIGEST.fullmatch(digest):
            raise ConvertError(f"{self.name}: {digest!r} is not a sha256 digest")
        return self._blobs / digest.removeprefix("sha256:")

    def blob_folder(self) -> Path | None:
        return self._blobs

    # -- writing

    def push_blob(
        self,
        digest: str,
        size: int,
        opener: Callable[[], BinaryIO],
        *,
        origin: Endpoint | None = None,
        progress: Progress | None = None,
    ) -> bool:
        if self.has_blob(digest, size):
            return False
        path = self._path(digest)
        with _fresh_file(path) as out, opener() as source:
            summed, count = hashlib.sha256(), 0
            while piece := source.read(_PIECE):
                summed.update(piece)
                out.write(piece)
                count += len(piece)
                if progress:
                    progress(len(piece))
            if count != size or f"sha256:{summed.hexdigest()}" != digest:
                raise ConvertError(
                    f"writing blob {digest} to {self.name}: got {count} bytes with digest sha256:{summed.hexdigest()}"
                )
        return True

    def push_manifest(self, media_type: str, body: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        self.push_bytes(digest, body)
        return digest

    def push_image(self, media_type: str, body: bytes) -> str:
        digest = self.push_manifest(media_type, body)
        entry = index_entry(media_type, digest, len(body), self._location.tag, self._location.reference)
        with self._locked():
            kept = [one for one in self._entries() if not _replaces(entry, one)]
            document = {"schemaVersion": 2, "mediaType": mt.OCI_INDEX, "manifests": [*kept, entry]}
            with _fresh_file(self._root / "index.json") as out:
                out.write(json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode())
        return digest

    def _entries(self) -> list[Any]:
        path = self._root / "index.json"
        if not path.exists():
            return []
        return parse_index(path.read_bytes(), str(path))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


# -- rules shared with archives, which hold the same files


class Named(Protocol):
    @property
    def tag(self) -> str: ...
    @property
    def reference(self) -> str: ...
    @property
    def image(self) -> str: ...


def named_manifest(endpoint: Endpoint, index: bytes, location: Named, where: str) -> Manifest:
    """The manifest that a location means in an index.json: by its tag, else the only one, else the one with its
    reference. Raises NydusError that lists the names there are."""
    name = location.tag
    entries = parse_index(index, where)
    if not entries:
        raise ConvertError(f"{where} lists no image")
    found = [entry for entry in entries if name in _names(entry)] if name else entries
    if not found and name:
        known = sorted({one for entry in entries for one in _names(entry)})
        raise missing(f"image {name!r}", f"{endpoint.name} (it has {', '.join(known) or 'only images without a name'})")
    if not name and len(found) > 1:
        found = [entry for entry in found if location.reference in _names(entry)] or found
    digests = {str(entry.get("digest")) for entry in found}
    if len(digests) > 1:
        if not any(_names(entry) - {str(entry.get("digest"))} for entry in found) and all(
            isinstance(entry.get("platform"), dict) for entry in found
        ):
            # several platforms, none with a name: the file itself is the image's index
            return Manifest(f"sha256:{hashlib.sha256(index).hexdigest()}", mt.OCI_INDEX, index)
        known = sorted({one for entry in found for one in _names(entry)})
        raise ConvertError(f"{endpoint.name} holds {len(digests)} images: choose one of {', '.join(known)}")
    entry = found[0]
    return read_manifest(endpoint, str(entry.get("digest")), str(entry.get("mediaType") or ""))


def read_manifest(endpoint: Endpoint, digest: str, media_type: str = "") -> Manifest:
    body = endpoint.blob(digest, MAX_MANIFEST)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ConvertError(f"manifest {digest} of {endpoint.name} is not a JSON object")
    said = document.get("mediaType")
    if not isinstance(said, str) or not said:
        said = media_type or (mt.OCI_INDEX if "manifests" in document else mt.OCI_MANIFEST)
    return Manifest(digest, said, body)


def parse_index(body: bytes, where: str) -> list[Any]:
    """Entries of an index.json. Raises ConvertError."""
    try:
        document = json.loads(body) if len(body) <= MAX_MANIFEST else None
        entries = document["manifests"] if isinstance(document, dict) else None
    except (ValueError, RecursionError, KeyError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConvertError(f"{where} is not an index of images")
    return entries


def index_entry(media_type: str, digest: str, size: int, tag: str, reference: str) -> dict[str, Any]:
    """As containerd exports them: the tag and, where known, the whole name."""
    entry: dict[str, Any] = {"mediaType": media_type, "digest": digest, "size": size}
    names = {CONTAINERD_NAME: reference, REF_NAME: tag}
    if annotations := {key: value for key, value in names.items() if value}:
        entry["annotations"] = annotations
    return entry


def _names(entry: dict[str, Any]) -> set[str]:
    annotations = entry.get("annotations")
    annotations = annotations if isinstance(annotations, dict) else {}
    names = {str(annotations[key]) for key in (REF_NAME, CONTAINERD_NAME) if annotations.get(key)}
    return {*names, str(entry.get("digest"))}


def _replaces(entry: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether `old` is the same image's earlier version: the same name, or as nameless as this one."""

    def named(one: dict[str, Any]) -> object:
        annotations = one.get("annotations")
        return annotations.get(REF_NAME) if isinstance(annotations, dict) else None

    return named(entry) == named(old)


@contextmanager
def _fresh_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` when the block ends well: whole, synced, readable by all."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:16]}-", suffix=".part", dir=path.parent)
    try:
        with open(descriptor, "wb") as out:
            yield out
            out.flush()
            os.fchmod(out.fileno(), 0o644)
            os.fdatasync(out.fileno())
        os.rename(name, path)
    except BaseException:
        os.unlink(name)
        raise
