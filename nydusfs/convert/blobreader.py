"""Stored blobs of an image by byte ranges, wherever they are: what `bootstrap.blobsource` reads from."""

from __future__ import annotations

from collections.abc import Callable

from bootstrap.errors import RafsError
from nydusfs.convert.backends import BlobStore
from nydusfs.convert.images import Image
from nydusfs.errors import NydusError
from nydusfs.registry import mediatypes as mt

# Bytes fetched at once: chunks of one file are neighbours, and a request costs as much as 100 KiB on usual links.
WINDOW = 128 << 10


class StoreReader:
    """Blobs of a storage backend."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        try:
            return self._store.read(blob_id, offset, size)
        except NydusError as error:
            raise RafsError(str(error)) from error

    def close(self) -> None:
        """The store is its opener's."""


class LayerReader:
    """Data layers of an image, and the plain layers behind reference layers, read in place. `taken` is told how many
    bytes were fetched."""

    def __init__(self, image: Image, taken: Callable[[int], None] | None = None) -> None:
        self._image = image
        self._sizes = {layer.hex: layer.size for layer in image.layers}
        for layer in image.layers:
            if reference := layer.annotations.get(mt.ANNOTATION_REF):
                self._sizes.setdefault(reference.removeprefix("sha256:"), -1)
        self._taken = taken
        self._windows: dict[str, tuple[int, bytes]] = {}

    def names(self) -> set[str]:
        """Ids of all blobs that can be read here."""
        return set(self._sizes)

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        start, window = self._windows.get(blob_id, (0, b""))
        if not start <= offset <= offset + size <= start + len(window):
            start, window = offset, self._fetch(blob_id, offset, size)
            self._windows[blob_id] = start, window
        return window[offset - start : offset - start + size]

    def _fetch(self, blob_id: str, offset: int, size: int) -> bytes:
        known = self._sizes.get(blob_id)
        if known is None:
            raise RafsError(f"blob {blob_id} is no layer of {self._image.name} (is it in a storage backend?)")
        digest = f"sha256:{blob_id}"
        try:
            if known < 0:
                known = self._sizes[blob_id] = self._image.endpoint.blob_size(digest)
            wanted = min(max(size, WINDOW), known - offset)
            with self._image.endpoint.open_blob_ranges(digest, known) as stream:
                stream.seek(offset)
                data = bytearray()
                while len(data) < wanted and (piece := stream.read(wanted - len(data))):
                    data += piece
        except NydusError as error:
            raise RafsError(str(error)) from error
        except OSError as error:
            raise RafsError(f"blob {blob_id} of {self._image.name}: {error.strerror or error}") from error
        if len(data) < size:
            raise RafsError(f"blob {blob_id} of {self._image.name} ends before byte {offset + size}")
        if self._taken is not None:
            self._taken(len(data))
        return bytes(data)

    def close(self) -> None:
        """The image's place is its opener's."""
