"""A RAFS image as the tar of an OCI layer. Reference: RAFS format 6.7.

Depth-first in name order without the root; the first name of a file carries its content, later ones are hard links.
Sockets have no form in a tar and are left out. So are directories no entry of the source tar described (their
attributes are made up, see IMPLIED_NSEC): their children imply them again, and a layer unpacked over another one must
not change what the lower one says about them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

from bootstrap import tarwrite
from bootstrap.base import S_IFDIR, S_IFMT, S_IFREG, Attr, Bootstrap
from bootstrap.blobsource import Blobs, Part
from bootstrap.errors import FormatError
from bootstrap.packing import Packer
from bootstrap.reader_v6 import BootstrapV6
from bootstrap.tarwrite import Member, pack_member, padding
from bootstrap.tree import IMPLIED_NSEC

_KINDS = {
    0o010000: tarwrite.FIFO,
    0o020000: tarwrite.CHAR,
    S_IFDIR: tarwrite.DIRECTORY,
    0o060000: tarwrite.BLOCK_DEVICE,
    S_IFREG: tarwrite.FILE,
    0o120000: tarwrite.SYMLINK,
}
_Item = bytes | memoryview | Part
_DEVICES = (tarwrite.CHAR, tarwrite.BLOCK_DEVICE)


def unpack(blobs: Blobs, out: BinaryIO, *, threads: int = 2, progress: Callable[[int], None] | None = None) -> int:
    """Write the tar of an image to `out`, front to back; the number of entries.

    Chunks are decoded and verified in `threads`; what lies between reading and writing is a few MB, whatever the
    image. `progress` is called with bytes of content written. Same image, same bytes. Raises RafsError for content
    that is damaged or not there, FormatError when a file's chunks are not of its size.
    """

    def work(items: list[_Item]) -> list[bytes | memoryview]:
        return [blobs.decode(item) for item in items]

    def write(items: list[_Item], done: list[bytes | memoryview]) -> None:
        for data in done:
            out.write(data)
        if progress is not None:
            progress(sum(map(len, done)))

    count = 0
    with Packer(work, write, threads) as packer:
        for member, ino in members(blobs.image):
            packer.add(pack_member(member), tarwrite.BLOCK)
            count += 1
            if not member.size:
                continue
            left = member.size
            for part in blobs.file_parts(ino):
                size = part.length if isinstance(part, Part) else len(part)
                left -= size
                if left < 0:
                    break
                packer.add(part, size)
            if left:
                raise FormatError("inode", 0, f"{os.fsdecode(member.name)!r}: its chunks are not of its size")
            packer.add(padding(member.size), 0)
        packer.flush()
    out.write(tarwrite.END_OF_ARCHIVE)
    return count


def members(image: Bootstrap) -> Iterator[tuple[Member, int]]:
    """The entries in order, each with its inode."""
    names: dict[int, bytes] = {}
    for path, entry in image.walk():
        attr = image.attr(entry.ino)
        kind = _KINDS.get(attr.mode & S_IFMT)
        if kind is None or _is_implied(image, entry.ino, attr):
            continue
        member = Member(path, kind, attr.mode, attr.uid, attr.gid, 0, attr.mtime, attr.mtime_nsec)
        member.xattrs = image.xattrs(entry.ino)
        linked = attr.nlink > 1 and kind != tarwrite.DIRECTORY
        first = names.setdefault(_identity(image, entry.ino), path) if linked else path
        if first is not path:
            member.kind, member.link = tarwrite.HARD_LINK, first
        elif kind == tarwrite.SYMLINK:
            member.link = image.readlink(entry.ino)
        elif kind in _DEVICES:
            member.major, member.minor = os.major(attr.rdev), os.minor(attr.rdev)
        elif kind == tarwrite.FILE:
            member.size = attr.size
        yield member, entry.ino


def _identity(image: Bootstrap, ino: int) -> int:
    """The same for all names of a file. Some v6 files are stored once per name, with equal inode numbers (1.11)."""
    return image.inode_number(ino) if isinstance(image, BootstrapV6) else ino


def _is_implied(image: Bootstrap, ino: int, attr: Attr) -> bool:
    return (
        attr.mtime_nsec == IMPLIED_NSEC
        and (attr.mode, attr.uid, attr.gid, attr.mtime) == (S_IFDIR | 0o755, 0, 0, 0)
        and not image.xattrs(ino)
    )
