"""Places that hold images: one interface for registries, OCI layouts and archives.

A `Location` says where an image lies; it is plain data, so that worker processes can be given it. Opened it is an
`Endpoint`: manifests, blobs as streams, and pushing where the place can take images.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Protocol, Self

from nydusfs.errors import ConvertError, NotFoundError, RegistryError
from nydusfs.registry.client import Manifest

if TYPE_CHECKING:
    from nydusfs.convert.endpoints.connections import Connections

__all__ = ["Endpoint", "Location", "Manifest", "copy_blob"]

Progress = Callable[[int], None]
_PIECE = 1 << 20


class Location(Protocol):
    """Where one image lies, or shall lie. `str()` of it is what messages show."""

    def __hash__(self) -> int: ...

    @property
    def image(self) -> str:
        """The image's name as annotations record it: a reference, or what stands for one."""
        ...

    def prepare(self, folder: Path) -> Location:
        """This location with all done that is done once, files in `folder`: a compressed archive unpacked, layers
        digested. What workers are given. Raises NydusError, OSError."""
        ...

    def open(self, connections: Connections, *, create: bool = False) -> Endpoint:
        """`create`: as a target, which need not exist yet. Raises NydusError, OSError."""
        ...


class Endpoint(ABC):
    """One image's place, opened. Thread-safe. Every method raises RegistryError or ConvertError; those that touch local
    files raise OSError as well. `name` is for messages, `image` what annotations
    record: see Location."""

    name: str
    image: str

    # -- reading

    @abstractmethod
    def manifest(self, digest: str = "") -> Manifest:
        """The manifest or index that the location names, or another one of the same place by its digest."""

    @abstractmethod
    def open_blob(self, digest: str, size: int | None = None) -> io.RawIOBase:
        """The whole blob as a stream; its last read raises if size or digest are wrong."""

    @abstractmethod
    def open_blob_ranges(self, digest: str, size: int) -> io.RawIOBase:
        """Seekable; bytes are not verified, only their number."""

    @abstractmethod
    def has_blob(self, digest: str, size: int | None = None) -> bool: ...

    @abstractmethod
    def blob_size(self, digest: str) -> int:
        """Bytes of a blob that exists, else NotFoundError."""

    def blob(self, digest: str, limit: int) -> bytes:
        """A small blob in memory, verified. Raises an error as well if it is larger than `limit` bytes."""
        with self.open_blob(digest) as stream:
            data = bytearray()
            while piece := stream.read(min(_PIECE, limit + 1)):
                data += piece
                if len(data) > limit:
                    raise ConvertError(f"blob {digest} of {self.name} is larger than {limit} bytes")
            return bytes(data)

    def blob_folder(self) -> Path | None:
        """A directory that holds every blob as a file named by its digest's hex; None where there is none."""
        return None

    # -- writing

    def require_writable(self) -> None:  # noqa: B027 -- most places are
        """Before long work: raises AuthError where pushing is known to be forbidden."""

    def push_blob(
        self,
        digest: str,
        size: int,
        opener: Callable[[], BinaryIO],
        *,
        origin: Endpoint | None = None,
        progress: Progress | None = None,
    ) -> bool:
        """Stores a blob unless it is there; False if nothing was sent. `opener` gives the bytes from the start, once
        per try. `origin` is where they come from, for places that can take them over without moving bytes."""
        raise ConvertError(f"{self.name} cannot take images")

    def push_file(
        self, digest: str, path: Path, *, origin: Endpoint | None = None, progress: Progress | None = None
    ) -> bool:
        return self.push_blob(digest, path.stat().st_size, lambda: path.open("rb"), origin=origin, progress=progress)

    def push_bytes(self, digest: str, data: bytes) -> bool:
        return self.push_blob(digest, len(data), lambda: io.BytesIO(data))

    def push_manifest(self, media_type: str, body: bytes) -> str:
        """Stores a manifest or index under its digest, which is returned."""
        raise ConvertError(f"{self.name} cannot take images")

    def push_image(self, media_type: str, body: bytes) -> str:
        """The last step of a push: stores a manifest or index under the location's name and makes what was pushed
        visible. Returns its digest."""
        raise ConvertError(f"{self.name} cannot take images")

    # -- end

    def close(self) -> None:  # noqa: B027 -- most hold nothing
        """Frees what the endpoint holds; a target that never got its image leaves nothing half written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def copy_blob(origin: Endpoint, target: Endpoint, digest: str, size: int, *, progress: Progress | None = None) -> bool:
    """A blob from one place to another: taken over where the target can, else streamed through. False if nothing was
    sent."""

    def opener() -> BinaryIO:
        return io.BufferedReader(origin.open_blob(digest, size), _PIECE)

    return target.push_blob(digest, size, opener, origin=origin, progress=progress)


def missing(what: str, name: str) -> RegistryError:
    return NotFoundError(f"{what} does not exist in {name}", status=404)
