"""Opening a bootstrap of either version.

with open_bootstrap("image.boot") as image:
    for path, entry in image.walk():
        print(path, image.attr(entry.ino))
"""

from __future__ import annotations

import mmap
import os
from dataclasses import replace

from bootstrap.base import Attr, Blob, Bootstrap, ChunkRef, DirEntry, Extent
from bootstrap.errors import FormatError, RafsError
from bootstrap.layout import toc, v5, v6
from bootstrap.layout.common import INLINE_BLOB_ID, BlobFeatures
from bootstrap.reader_v5 import BootstrapV5
from bootstrap.reader_v6 import BootstrapV6

__all__ = [
    "Attr",
    "Blob",
    "Bootstrap",
    "BootstrapV5",
    "BootstrapV6",
    "ChunkRef",
    "DirEntry",
    "Extent",
    "open_bootstrap",
]

_V5_HEAD = v5.SUPER_MAGIC.to_bytes(4, "little") + v5.SUPER_VERSION.to_bytes(4, "little")
_V6_MAGIC = v6.SUPER_MAGIC.to_bytes(4, "little")


def open_bootstrap(path: str | os.PathLike[str]) -> Bootstrap:
    """The bootstrap in a file, or inside a layer blob that carries one; in time independent of the number of inodes.

    A blob id of 64 "x" (a layer bootstrap) becomes the file's name up to its first dot (reference 4.10).
    Raises FormatError for bytes that are no usable image, RafsError when the file cannot be read.
    """
    where = os.fspath(path)
    try:
        with open(where, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise FormatError("bootstrap", 0, "the file is empty")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise RafsError(f"cannot open bootstrap {where}: {error.strerror}") from error
    except ValueError as error:
        raise RafsError(f"cannot map bootstrap {where}: {error}") from error
    inline_id = os.path.basename(where).split(".", 1)[0] or INLINE_BLOB_ID
    try:
        return _open(where, data, inline_id)
    except BaseException:
        data.close()
        raise


def _version(data: mmap.mmap) -> int:
    if data[:8] == _V5_HEAD:
        return 5
    return 6 if data[v6.SUPER_OFFSET : v6.SUPER_OFFSET + 4] == _V6_MAGIC else 0


def _open(where: str, data: mmap.mmap, inline_id: str) -> Bootstrap:
    version = _version(data)
    inlined = not version or _has_trailer(data)
    if inlined:
        data = _inlined(data)
        version = _version(data)
    if version in (5, 6):
        image = (BootstrapV5 if version == 5 else BootstrapV6)(where, data, inline_id)
        if inlined:
            _adopt_name(image, inline_id)
        return image
    raise FormatError("bootstrap", 0, "neither a RAFS v5 or v6 bootstrap nor a blob with one inside")


def _adopt_name(image: Bootstrap, name: str) -> None:
    """Before 2.2 a layer's bootstrap held an id of its own making: its file's name is right (reference 4.10)."""
    if len(image.blobs) == 1 and not image.blobs[0].features & BlobFeatures.CAP_TAR_TOC:
        image.blobs[0] = replace(image.blobs[0], id=name)


def _has_trailer(data: mmap.mmap) -> bool:
    """Whether what starts like a bootstrap is a layer blob: one without any file data begins with its bootstrap."""
    if len(data) % toc.TAR_HEADER_SIZE:
        return False
    try:
        header = toc.parse_tar_header(data[-toc.TAR_HEADER_SIZE :])
    except FormatError:
        return False
    return header.name in (toc.IMAGE_BOOT, toc.BLOB_TOC)


def _inlined(blob: mmap.mmap) -> mmap.mmap:
    """The bootstrap of a layer blob, unpacked into anonymous memory."""
    from bootstrap.inlined import extract_bootstrap

    try:
        content = extract_bootstrap(blob, len(blob))
    except FormatError as error:
        raise FormatError(
            "bootstrap", 0, f"neither a RAFS v5 or v6 bootstrap nor a blob with one inside ({error})"
        ) from error
    blob.close()
    if not content:
        raise FormatError("bootstrap", 0, "the one inside the blob is empty")
    unpacked = mmap.mmap(-1, len(content))
    unpacked.write(content)
    return unpacked
