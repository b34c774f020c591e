"""Nydus images among others, and their bootstraps."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from nydusfs.convert.bootstrap_layer import unpack_bootstrap_layer
from nydusfs.convert.images import Descriptor, Image, ImageSet
from nydusfs.errors import ConvertError
from nydusfs.registry import mediatypes as mt

_PIECE = 1 << 20


def pick_nydus(found: ImageSet) -> tuple[Image, Image | None]:
    """The Nydus image, and the plain one beside it in a merged index. Raises ConvertError."""
    nydus = [image for image in found.images if image.is_nydus or image.artifact_type == mt.NYDUS_MANIFEST_ARTIFACT]
    plain = [image for image in found.images if image not in nydus]
    if not nydus:
        # a single image is judged by the rules, which say what is missing
        if found.index is None:
            return found.images[0], None
        raise ConvertError(f"{found.name} holds no Nydus image (converted with --merge-platform?)")
    same = [image for image in plain if image.platform.matches(nydus[0].platform)]
    return nydus[0], same[0] if same else None


def fetch_bootstrap(image: Image, folder: Path) -> tuple[Path, list[str]]:
    """Unpacks the bootstrap layer below `folder`: path of the bootstrap, and violations of its diff id."""
    from bootstrap.errors import RafsError
    from bootstrap.tar import open_layer

    layer = image.layers[-1]
    if layer.media_type.endswith("+encrypted"):
        raise ConvertError(f"{image.name}: bootstrap layer {layer.digest} is encrypted; decrypt the image first")
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with (
            image.endpoint.open_blob(layer.digest, layer.size) as stored,
            open_layer(cast(BinaryIO, stored)) as plain,
        ):
            hashing = _Hashing(plain, digest)
            boot = unpack_bootstrap_layer(cast(BinaryIO, hashing), folder, image.name)
            while hashing.read(_PIECE):
                pass
    except RafsError as error:
        raise ConvertError(f"{image.name}: bootstrap layer {layer.digest}: {error}") from error
    found = f"sha256:{digest.hexdigest()}"
    if image.diff_ids[-1:] != [found]:
        return boot, [f"config: the bootstrap layer's diff id is {found}, the config says {image.diff_ids[-1]}"]
    return boot, []


@dataclass(frozen=True, slots=True)
class NydusImage:
    """A Nydus image with its bootstrap layer unpacked. `metas`: (layer digest hex, chunk table file) in layer order."""

    image: Image
    bootstrap: Path
    metas: list[tuple[str, Path]]

    @property
    def has_data(self) -> bool:
        """Whether its files need any blob."""
        from bootstrap.reader import open_bootstrap

        with open_bootstrap(str(self.bootstrap)) as image:
            return bool(image.blobs)

    @property
    def data_layers(self) -> list[Descriptor]:
        return self.image.layers[:-1]


def unpack_image(image: Image, folder: Path) -> NydusImage:
    """To make another image of it. Raises ConvertError if it is no Nydus image, or not a sound one."""
    if not image.is_nydus:
        raise ConvertError(f"{image.name} is not a Nydus image (its last layer has no {mt.ANNOTATION_BOOTSTRAP})")
    if len(image.diff_ids) != len(image.layers):
        raise ConvertError(f"{image.name}: {len(image.diff_ids)} diff ids for {len(image.layers)} layers")
    boot, wrong = fetch_bootstrap(image, folder)
    if wrong:
        raise ConvertError(f"{image.name}: {wrong[0]}")
    tables = {path.name: path for path in boot.parent.glob("*.blob.meta")}
    metas = [(layer.hex, tables[name]) for layer in image.layers if (name := f"{layer.hex}.blob.meta") in tables]
    return NydusImage(image, boot, metas)


class _Hashing:
    def __init__(self, stream: BinaryIO, digest: Any) -> None:
        self._stream = stream
        self._digest = digest

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        return data
