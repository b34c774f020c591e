"""`--chunk-dict`: chunks of another image that need not be stored again.

    bootstrap:registry:REFERENCE   a Nydus image of a registry (or any other place an image can lie)
    bootstrap:local:FILE           its bootstrap alone; its blobs must be where the target's blobs go

Reference: nydusd.md 7.4, RAFS format 5.11. Upstream takes the file of the second form for a reference and fails.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nydusfs.convert.backends import BlobStore
from nydusfs.convert.endpoints import Connections, Endpoint, Location, parse_location
from nydusfs.convert.images import Descriptor, load_images
from nydusfs.convert.nydusimage import pick_nydus, unpack_image
from nydusfs.convert.platforms import Platform
from nydusfs.errors import ConvertError, NotFoundError
from nydusfs.registry.hosts import ClientOptions

if TYPE_CHECKING:
    from bootstrap.options import BuildOptions

_FORMS = "bootstrap:registry:REFERENCE or bootstrap:local:FILE"


@dataclass(frozen=True, slots=True)
class DictionaryChoice:
    """One of the two."""

    location: Location | None = None
    file: Path | None = None

    @classmethod
    def parse(cls, text: str, options: ClientOptions) -> DictionaryChoice:
        """Raises ConvertError, ReferenceError."""
        kind, _, rest = text.partition(":")
        where, _, name = rest.partition(":")
        if kind != "bootstrap" or where not in ("registry", "local") or not name:
            raise ConvertError(f"--chunk-dict {text!r} is not {_FORMS}")
        if where == "local":
            return cls(file=Path(name))
        return cls(location=parse_location(name, options))

    def __str__(self) -> str:
        return str(self.location or self.file)


@dataclass(frozen=True, slots=True)
class Dictionary:
    """`blobs`: what its chunks lie in, by hex digest, empty when only the bootstrap is known; `endpoint` is where they
    are. `checksum`: SHA-256 of the bootstrap."""

    name: str
    bootstrap: Path
    checksum: str
    endpoint: Endpoint | None = None
    blobs: dict[str, Descriptor] = field(default_factory=dict)

    def blob(self, hexed: str, target: Endpoint, store: BlobStore | None) -> Descriptor:
        """A blob of the dictionary that an image refers to whose own blobs go to `store`, else `target`. Raises
        ConvertError if it is nowhere."""
        if hexed in self.blobs:
            return self.blobs[hexed]
        digest = f"sha256:{hexed}"
        size: int | None
        if store is not None:
            size = store.size(hexed)
        else:
            try:
                size = target.blob_size(digest)
            except NotFoundError:
                size = None
        if size is None:
            raise ConvertError(
                f"chunk dictionary {self.name}: its blob {digest} is not in {(store or target).name}; push the "
                "dictionary's image there, or name it with bootstrap:registry:"
            )
        return Descriptor("", digest, size)


def load_dictionary(
    choice: DictionaryChoice, connections: Connections, folder: Path, platform: Platform | None, options: BuildOptions
) -> Dictionary:
    """Fetches a dictionary below `folder` and looks whether builds with these options can use it. Raises NydusError."""
    if choice.file is not None:
        return Dictionary(str(choice), choice.file, _checked(choice.file, str(choice), options))
    assert choice.location is not None
    endpoint = choice.location.open(connections)
    image, _ = pick_nydus(load_images(endpoint, [platform] if platform else None))
    unpacked = unpack_image(image, folder)
    checksum = _checked(unpacked.bootstrap, str(choice), options)
    blobs = {layer.hex: layer for layer in unpacked.data_layers}
    return Dictionary(str(choice), unpacked.bootstrap, checksum, endpoint, blobs)


def _checked(path: Path, name: str, options: BuildOptions) -> str:
    """SHA-256 of the bootstrap."""
    from bootstrap.chunkdict import require_like
    from bootstrap.errors import BuildError, RafsError
    from bootstrap.reader import open_bootstrap

    try:
        with contextlib.closing(open_bootstrap(str(path))) as image:
            require_like(image, f"chunk dictionary {name}", options)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except BuildError as error:
        raise ConvertError(str(error)) from error
    except RafsError as error:
        raise ConvertError(f"chunk dictionary {name}: {error}") from error
    except OSError as error:
        raise ConvertError(f"chunk dictionary {name}: {error.strerror or error}") from error
