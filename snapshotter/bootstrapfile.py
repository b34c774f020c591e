"""The file that makes a snapshot a Nydus image.

Its layer's author is not trusted: a link would have nydusd read a file of the host or another image's, a pipe would
have it wait for ever.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from snapshotter.errors import NotFound

PLACES = ("image/image.boot", "image.boot")  # below the layer; the second is that of old v5 images
_V5_MAGIC, _V6_MAGIC = 0x52414653, 0xE0F5E1E2


def find_bootstrap(upper: Path, image: str) -> Path:
    """The bootstrap a meta layer brought. Raises NotFound when it is missing or is none, OSError."""
    for place in PLACES:
        path = upper / place
        if not os.path.lexists(path):
            continue
        if not is_plain_file(path):
            raise NotFound(f"image {image}: {path} is not a regular file: this is no Nydus image")
        if not begins_like_one(path):
            raise NotFound(
                f"image {image}: {path} is no RAFS bootstrap (v5 or v6): its last layer is damaged, pull it again"
            )
        return path
    raise NotFound(
        f"image {image}: its layer labelled nydus-bootstrap holds no image/image.boot in {upper}: convert it again"
    )


def is_plain_file(path: Path) -> bool:
    """A regular file, and no link on the way there. `path` is absolute and its snapshot's part has no link."""
    return os.path.realpath(path) == str(path) and path.is_file()


def begins_like_one(path: Path) -> bool:
    """Raises OSError."""
    with path.open("rb") as file:
        head = file.read(1028)
    v5 = len(head) >= 8 and struct.unpack_from("<II", head) == (_V5_MAGIC, 0x500)
    return v5 or (len(head) == 1028 and struct.unpack_from("<I", head, 1024)[0] == _V6_MAGIC)
