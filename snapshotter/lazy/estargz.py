"""eStargz layers as they are: the table of each is fetched when it is pulled; when a container needs the image, the
bootstraps made of them are merged."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING

from nydusfs.errors import NydusError
from nydusfs.registry.reference import SHA256_DIGEST, Reference
from nydusfs.trees import wait_for_disk
from snapshotter.errors import SnapshotterError, Unavailable
from snapshotter.labels import LAYER_DIGEST, TOC_DIGEST
from snapshotter.lazy.registries import Registries

if TYPE_CHECKING:
    from bootstrap.stargztoc import Toc
    from nydusfs.registry.client import RegistryClient

log = logging.getLogger(__name__)

TABLE = "layer.toc"  # in the snapshot's directory, beside `fs`
_HEAD = Struct("<QQ")


@dataclass(frozen=True, slots=True)
class Table:
    """The end of a layer, from its table of contents on. `digest` is what the image says of the table."""

    blob: str  # hex
    digest: str
    size: int  # of the layer
    start: int
    data: bytes

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset - self.start : offset - self.start + length] if offset >= self.start else b""

    def save(self, path: Path) -> None:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        with os.fdopen(descriptor, "wb") as file:
            file.write(_HEAD.pack(self.size, self.start) + self.data)
        wait_for_disk(Path(name))
        os.replace(name, path)

    @classmethod
    def load(cls, path: Path, blob: str, digest: str) -> Table:
        """Raises OSError, ValueError."""
        data = path.read_bytes()
        if len(data) < _HEAD.size:
            raise ValueError("cut short")
        size, start = _HEAD.unpack_from(data)
        return cls(blob, digest, size, start, data[_HEAD.size :])


class Estargz:
    def __init__(self, registries: Registries) -> None:
        self._registries = registries

    def claim(self, image: Reference, labels: Mapping[str, str], *, lowest: bool) -> Table | None:
        """The layer's table; None if it is no eStargz layer, or nobody vouches for its table: without a digest that the
        image's manifest holds, whoever changed the blob could change the files. Raises nothing."""
        from bootstrap.errors import RafsError
        from bootstrap.estargz import layer_bootstrap, read_toc

        digest = labels.get(TOC_DIGEST, "")  # an annotation of the layer, which clients make labels of
        if not SHA256_DIGEST.fullmatch(digest):
            return None
        try:
            with self._registries.open(image, labels) as client:
                table = _fetch(client, image, labels[LAYER_DIGEST], digest)
            if not lowest and (name := _unnamed(read_toc(table.read, table.size, digest))):
                raise SnapshotterError(f"it does not name its directory {name}, which would get other rights")
            layer_bootstrap(table.read, table.size, table.blob, toc_digest=digest)  # whether it can run so
            return table
        except (NydusError, RafsError, SnapshotterError) as error:
            log.warning("image %s: eStargz layer %s is unpacked: %s", image, labels.get(LAYER_DIGEST), error)
            return None

    def fetch(self, image: Reference, labels: Mapping[str, str], digest: str) -> Table:
        """The same of a layer that was claimed before and whose table got lost. Raises Unavailable."""
        from bootstrap.errors import RafsError

        try:
            with self._registries.open(image, labels) as client:
                return _fetch(client, image, labels[LAYER_DIGEST], digest)
        except (NydusError, RafsError) as error:
            raise Unavailable(f"image {image}: table of layer {labels.get(LAYER_DIGEST)}: {error}") from None


def _unnamed(toc: Toc) -> str:
    """A directory that has entries but none of its own. Merged with the layers below it would have the builder's mode
    and owner, where in an overlay those of the layers below show."""
    named, wanted = {b"."}, set[bytes]()
    for entry, _ in toc.files(toc.fitting_chunk_size()):
        path = os.path.normpath(entry.name.lstrip(b"/"))
        named.add(path)
        wanted.add(os.path.dirname(path) or b".")
    return min(wanted - named, default=b"").decode(errors="replace")


def _fetch(client: RegistryClient, image: Reference, layer: str, digest: str) -> Table:
    """Two small requests. Raises NydusError, RafsError."""
    from bootstrap.estargz import TAIL_SIZE, toc_range

    size = client.blob_size(image.repository, layer)
    with client.open_blob_ranges(image.repository, layer, size) as blob:

        def read(offset: int, length: int) -> bytes:
            blob.seek(offset)
            return blob.read(length)

        length = min(TAIL_SIZE, size)
        start, length = toc_range(read(size - length, length), size)
        return Table(layer.removeprefix("sha256:"), digest, size, start, read(start, size - start))


def merge(tables: Sequence[Table], out: Path) -> None:
    """Of the layers of an image, lowest first. `out` is complete or not there. Raises SnapshotterError."""
    from bootstrap.errors import RafsError
    from bootstrap.estargz import layer_bootstrap, read_toc
    from bootstrap.merge import MergeSource, merge_layers

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".new-") as folder:
        try:
            read = [read_toc(table.read, table.size, table.digest) for table in tables]
            # one for all; layers whose files are single chunks take any that is large enough
            own = {size for toc in read if (size := toc.chunk_size()) is not None}
            chunk_size = own.pop() if len(own) == 1 else max(toc.fitting_chunk_size() for toc in read)
            sources = []
            for number, table in enumerate(tables):
                path = Path(folder, f"{number}.boot")
                path.write_bytes(
                    layer_bootstrap(table.read, table.size, table.blob, chunk_size=chunk_size, toc_digest=table.digest)
                )
                sources.append(MergeSource(path, original_blob_id=table.blob))
            merge_layers(sources, Path(folder, "merged.boot"))
            wait_for_disk(Path(folder, "merged.boot"))
            os.replace(Path(folder, "merged.boot"), out)
        except RafsError as error:
            raise SnapshotterError(f"the layers' tables do not make an image: {error}") from None
