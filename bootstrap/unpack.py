"""A RAFS image as the tar of an OCI layer. Reference: RAFS format 6.7.

Depth-first in name order without the root; the first name of a file carries its content, later ones are hard links.
Sockets have no form in a tar and are left out. So are directories no entry of the source tar described (their
attributes are made up, see IMPLIED_NSEC): their children imply them again, and a layer unpacked over another one must
not change what the lower one says about them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from bootstrap import tarwrite
from bootstrap.base import S_IFDIR, S_IFMT, S_IFREG, Attr, Bootstrap
from bootstrap.errors import FormatError
from bootstrap.reader_v6 import BootstrapV6
from bootstrap.tarwrite import Member, pack_member, padding
from bootstrap.tree import IMPLIED_NSEC

Content = Callable[[int, int], Iterable[bytes | memoryview]]
"""The bytes of a file, given its inode and size, in pieces and order."""

_KINDS = {
    0o010000: tarwrite.FIFO,
    0o020000: tarwrite.CHAR,
    S_IFDIR: tarwrite.DIRECTORY,
    0o060000: tarwrite.BLOCK_DEVICE,
    S_IFREG: tarwrite.FILE,
    0o120000: tarwrite.SYMLINK,
}
_DEVICES = (tarwrite.CHAR, tarwrite.BLOCK_DEVICE)


def unpack(image: Bootstrap, content: Content, out: BinaryIO, progress: Callable[[int], None] | None = None) -> int:
    """Write the tar of `image` to `out`, front to back; the number of entries.

    `progress` is called with bytes of content written. Same image, same bytes. Raises what `content` raises, and
    FormatError when a file's pieces are not of its size.
    """
    count = 0
    for member, ino in members(image):
        out.write(pack_member(member))
        count += 1
        if member.size:
            left = member.size
            for piece in content(ino, member.size):
                left -= len(piece)
                if left < 0:
                    break
                out.write(piece)
                if progress is not None:
                    progress(len(piece))
            if left:
                raise FormatError("inode", 0, f"{os.fsdecode(member.name)!r}: its chunks are not of its size")
            out.write(padding(member.size))
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
        if kind == tarwrite.SYMLINK:
            member.link = image.readlink(entry.ino)
        elif kind in _DEVICES:
            member.major, member.minor = os.major(attr.rdev), os.minor(attr.rdev)
        elif kind == tarwrite.FILE:
            # Only regular files: builders refuse a link to anything else (reference 5.8).
            first = path if attr.nlink < 2 else names.setdefault(_identity(image, entry.ino), path)
            if first is path:
                member.size = attr.size
            else:
                member.kind, member.link = tarwrite.HARD_LINK, first
        member.xattrs = image.xattrs(entry.ino)
        yield member, entry.ino


def _identity(image: Bootstrap, ino: int) -> int:
    """The same for all names of a file. Images of 2022 store it once per name, with equal inode numbers (1.11)."""
    return image.inode_number(ino) if isinstance(image, BootstrapV6) else ino


def _is_implied(image: Bootstrap, ino: int, attr: Attr) -> bool:
    return (
        attr.mtime_nsec == IMPLIED_NSEC
        and (attr.mode, attr.uid, attr.gid, attr.mtime) == (S_IFDIR | 0o755, 0, 0, 0)
        and not image.xattrs(ino)
    )
