"""The EROFS metadata image of a bootstrap: a derived file, made once, checked when it is used again.

Its devices are segment files of the cache (`nydusfs.segments`); the table names each by `<blob index>/<file name>`, so
a second start needs neither the chunks nor the blob's own tables. Behind the image lie its file map (`filemap`) and one
block that binds all to its bootstrap and to itself.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from bootstrap.base import Bootstrap
from bootstrap.erofs_devices import read_devices
from bootstrap.errors import FormatError
from nydusfs.drivers.erofs.filemap import ROW_SIZE, FileMap
from nydusfs.errors import NydusError
from nydusfs.segments import BLOCK, SEGMENT_SIZE

if TYPE_CHECKING:
    from nydusfs.drivers.erofs.making import Parts

MAGIC = b"nydus erofs img\0"
VERSION = 3
TRAILER = Struct("<16sIIQ32s32s")
"""magic, version, per cent of its bytes that are in small files, rows of the file map, fingerprint, BLAKE3 of all that
comes before."""
PARTIAL = ".image-"
SMALL_FILE = 64 << 10
SCATTERED = 50
"""Per cent of bytes in small files from which on an image is not read with `directio`: see `mount.open_erofs`."""

DEVICE_MEMORY = 2048
"""Bytes that a mount's device takes for as long as it has it, above all the kernel's: open file, inode, name, mark."""
MEMORY_SHARE = 50
"""Which part of this machine's memory devices may take before images that need not be the kernel's stay with FUSE."""


class UnsuitableError(NydusError):
    """This image cannot be an EROFS mount; the text says why."""


class DeviceFile(NamedTuple):
    """A device of an image: which segment file, and how large it is when complete, in bytes."""

    blob_index: int
    name: str
    size: int


def most_devices() -> int:
    """That all mounts should have together: of 16 GiB, 168,000, 80 images of 500 MB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MEMORY_SHARE // DEVICE_MEMORY


def fingerprint(bootstrap: Bootstrap, xattrs: bool) -> bytes:
    """Of everything an image follows from."""
    hasher = blake3(b"%d %d %d %d " % (VERSION, SEGMENT_SIZE, xattrs, bootstrap.version))
    with memoryview(bootstrap.data) as view:
        hasher.update(view)
    found: bytes = hasher.digest()
    return found


def open_image(path: Path, mark: bytes) -> list[DeviceFile] | None:
    """The devices of a written image; None when it is missing, damaged or of something else.

    Reading all of it has a second use: a mount whose metadata is not in the page cache made Linux 6.18 log a warning.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = len(data) - BLOCK
            magic, version, _, _, found, checksum = TRAILER.unpack_from(data, end)
            if end <= 0 or (magic, version, found) != (MAGIC, VERSION, mark):
                return None
            with memoryview(data) as view, view[:end] as body, view[end + TRAILER.size :] as rest:
                if blake3(body).digest() != checksum or any(rest):
                    return None
                return [_device(tag, blocks) for tag, blocks in read_devices(body)]
    except (OSError, ValueError, StructError, FormatError):
        return None


def listed_devices(fd: int) -> list[DeviceFile]:
    """Those of an image in the making. Raises OSError, ValueError, FormatError."""
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
        return [_device(tag, blocks) for tag, blocks in read_devices(view)]


def is_scattered(path: Path) -> bool:
    """Whether an image that `open_image` found good is one of small files. Raises OSError, StructError."""
    small, _, _ = _summary(path)
    return small >= SCATTERED


def open_file_map(path: Path, mark: bytes, chunk_size: int) -> FileMap | None:
    """Of an image that `open_image` found good; None when it has none, or is gone."""
    try:
        _, rows, found = _summary(path)
        if found != mark or not rows:
            return None
        end = path.stat().st_size - BLOCK
        return FileMap(path, end - -(-rows * ROW_SIZE // BLOCK) * BLOCK, rows, chunk_size)
    except (OSError, ValueError, StructError):
        return None


def _summary(path: Path) -> tuple[int, int, bytes]:
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size - BLOCK
        _, _, small, rows, mark, _ = TRAILER.unpack(os.pread(file.fileno(), TRAILER.size, max(0, end)))
    return small, rows, mark


def _device(tag: str, blocks: int) -> DeviceFile:
    blob, _, name = tag.partition("/")
    return DeviceFile(int(blob), name, blocks * BLOCK)


def write_image(
    reader: Parts, path: Path, mark: bytes, xattrs: bool, listed: Callable[[int], None] = lambda fd: None
) -> None:
    """Make the image of a bootstrap and put it at `path`. All its blobs' own tables must be there. For a worker thread.
    Nothing waits for the disk: what a power cut makes of it is not right by its checksum and is made again. `listed` is
    called when `listed_devices` knows the file's.

    Raises `UnsuitableError`, RafsError for bad metadata, OSError.
    """
    from nydusfs.drivers.erofs.making import make_body  # numpy: 17 MB and 0.1 s, which only who makes images is to pay

    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=PARTIAL, delete=False) as file:
        try:
            rows, small = make_body(reader, file, xattrs, lambda: listed(file.fileno()))
            file.flush()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as body:
                trailer = TRAILER.pack(MAGIC, VERSION, small, rows, mark, blake3(body).digest())
            file.seek(0, os.SEEK_END)
            file.write(trailer.ljust(BLOCK, b"\0"))
            file.flush()
            os.rename(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def write_and_open(reader: Parts, path: Path, mark: bytes, xattrs: bool) -> list[DeviceFile]:
    """`write_image`, then `open_image`. Raises what the first does."""
    write_image(reader, path, mark, xattrs)
    files = open_image(path, mark)
    if files is None:
        raise UnsuitableError(f"{path} is not what was written there")
    return files
