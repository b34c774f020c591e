"""One plain layer of a Nydus image: chunks from wherever they are -> tar -> gzip file. Runs in worker processes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from nydusfs.convert.backends import BackendChoice, BlobStore
from nydusfs.convert.endpoints import Endpoint, Location
from nydusfs.convert.gzipped import GzipWriter
from nydusfs.convert.images import Descriptor
from nydusfs.convert.layers import Counted, worker_endpoint
from nydusfs.errors import ConvertError

log = logging.getLogger(__name__)

_WINDOW = 4 << 20  # bytes of one request for data
_WINDOWS = 4
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class PlainLayer:
    """Digests are `sha256:<hex>`; `size` is that of the gzip file, `path` None where that is a blob of the source."""

    digest: str
    diff_id: str
    size: int
    path: Path | None


@dataclass(frozen=True, slots=True)
class UnpackJob:
    """Exactly one of: `layer`, a data layer with its bootstrap inside; `original`, a layer that an OCI-ref image refers
    to; `bootstrap`, the file of a merged one. `data`: all data layers of the image, `backend`: what holds its blobs
    if it has none."""

    number: int
    location: Location
    image: str
    data: Sequence[Descriptor]
    folder: Path
    layer: Descriptor | None = None
    original: Descriptor | None = None
    bootstrap: Path | None = None
    backend: BackendChoice | None = None
    threads: int = 1

    @property
    def size(self) -> int:
        one = self.layer or self.original
        return one.size if one else sum(layer.size for layer in self.data) or 1 << 30

    @property
    def name(self) -> str:
        one = self.layer or self.original
        return one.hex[:12] if one else "all"

    def run(self, report: Callable[[int], None]) -> PlainLayer:
        """Raises NydusError that names image and layer."""
        from bootstrap.errors import RafsError

        what = f"{self.image}: " + (
            f"layer {(self.layer or self.original or self.data[0]).digest}: " if self.data else ""
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.original is not None:
                return _original(worker_endpoint(self.location), self.original, report)
            return self._unpack(report)
        except RafsError as error:
            raise ConvertError(f"{what}{error}") from error
        except OSError as error:
            raise ConvertError(f"{what}cannot write below {self.folder}: {error.strerror or error}") from error

    def _unpack(self, report: Callable[[int], None]) -> PlainLayer:
        from bootstrap.blobsource import open_blobs
        from bootstrap.reader import open_bootstrap
        from bootstrap.unpack import unpack

        endpoint = worker_endpoint(self.location)
        store = self.backend.open() if self.backend else None
        path = self.bootstrap
        if self.layer is not None:
            path = _inner_bootstrap(endpoint, self.layer, self.folder)
        assert path is not None
        reader = _Data(endpoint, self.data, self.layer, store, report)
        with contextlib.closing(open_bootstrap(str(path))) as image, open_blobs(image, reader) as blobs:
            out = self.folder / "layer.tar.gz"
            with out.open("wb") as file:
                packed = GzipWriter(file)
                unpack(blobs, cast(BinaryIO, packed), threads=self.threads)
                packed.finish()
        return PlainLayer(packed.digest, packed.diff_id, packed.size, out)


class _Data:
    """A `BlobReader`: stored bytes of the image's blobs, in windows. Nothing is verified here: each chunk is, with its
    digest. A blob id that is no layer's is the one `own` layer was built with."""

    def __init__(
        self,
        endpoint: Endpoint,
        layers: Sequence[Descriptor],
        own: Descriptor | None,
        store: BlobStore | None,
        report: Callable[[int], None],
    ) -> None:
        self._endpoint = endpoint
        self._layers = {layer.hex: layer for layer in layers}
        self._own = own
        self._store = store
        self._report = report
        self._sizes: dict[str, int] = {}
        self._windows: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        from bootstrap.errors import FormatError

        end = self._size(blob_id)
        if offset + size > end:
            raise FormatError(f"blob {blob_id}", offset, f"ends after {max(0, end - offset)} of {size} bytes")
        data = bytearray()
        while len(data) < size:
            at = offset + len(data)
            start = at - at % _WINDOW
            window = self._window(blob_id, start, min(_WINDOW, end - start))
            data += window[at - start : at - start + size - len(data)]
        return bytes(data)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def _descriptor(self, blob_id: str) -> Descriptor:
        found = self._layers.get(blob_id) or self._own
        if found is None:
            raise ConvertError(f"blob {blob_id} is not a layer of {self._endpoint.name}")
        return found

    def _size(self, blob_id: str) -> int:
        if self._store is None:
            return self._descriptor(blob_id).size
        size = self._sizes.get(blob_id)
        if size is None:
            size = self._store.size(blob_id)
            if size is None:
                raise ConvertError(f"blob {blob_id} does not exist in {self._store.name}")
            self._sizes[blob_id] = size
        return size

    def _window(self, blob_id: str, start: int, size: int) -> bytes:
        key = blob_id, start
        data = self._windows.get(key)
        if data is not None:
            self._windows.move_to_end(key)
            return data
        if self._store is not None:
            data = self._store.read(blob_id, start, size)
        else:
            layer = self._descriptor(blob_id)
            with self._endpoint.open_blob_ranges(layer.digest, layer.size) as stored:
                stored.seek(start)
                data = _exactly(cast(BinaryIO, stored), size)
        self._report(size)
        self._windows[key] = data
        while len(self._windows) > _WINDOWS:
            self._windows.popitem(last=False)
        return data


def has_bootstrap(endpoint: Endpoint, layer: Descriptor) -> bool:
    """Whether a data layer carries its own bootstrap, as converted ones do."""
    from bootstrap.errors import RafsError
    from bootstrap.inlined import sections
    from bootstrap.layout import toc

    try:
        with endpoint.open_blob_ranges(layer.digest, layer.size) as stored:
            return any(header.name == toc.IMAGE_BOOT for header, _ in sections(cast(BinaryIO, stored), layer.size))
    except RafsError:
        return False


def _inner_bootstrap(endpoint: Endpoint, layer: Descriptor, folder: Path) -> Path:
    from bootstrap.inlined import extract_bootstrap

    path = folder / layer.hex
    with endpoint.open_blob_ranges(layer.digest, layer.size) as stored:
        path.write_bytes(extract_bootstrap(cast(BinaryIO, stored), layer.size))
    return path


def _original(endpoint: Endpoint, layer: Descriptor, report: Callable[[int], None]) -> PlainLayer:
    """Only its diff id is to be found out."""
    from bootstrap.tar import open_layer

    plain = hashlib.sha256()
    stored = Counted(cast(BinaryIO, endpoint.open_blob(layer.digest, layer.size)), report)
    with stored, open_layer(cast(BinaryIO, stored)) as tar:
        while piece := tar.read(_PIECE):
            plain.update(piece)
        while stored.read(_PIECE):
            pass
    return PlainLayer(layer.digest, f"sha256:{plain.hexdigest()}", layer.size, None)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (piece := stream.read(size - len(data))):
        data += piece
    return bytes(data)
