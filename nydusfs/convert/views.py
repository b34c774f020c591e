"""File systems to compare, whatever shows them: mounts, a model made of tar layers, our reader."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from nydusfs.convert.facts import Facts, kept_xattrs
from nydusfs.convert.sourcetree import Node

_PIECE = 1 << 20


class View(Protocol):
    """A handle is what the view made of it; errors are OSError, RafsError or NydusError."""

    def root(self) -> object: ...
    def children(self, handle: object) -> dict[bytes, object]:
        """Of a directory; empty for anything else."""

    def facts(self, handle: object) -> tuple[Facts, object]:
        """Facts without digest, and what is the same for all names of one file."""

    def digest(self, handle: object) -> str:
        """SHA-256 of a file's content, in hex. Called from several threads."""


def hashed(pieces: Iterator[bytes]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


class TreeView:
    """The model of a plain image."""

    def __init__(self, top: Node) -> None:
        self._root = top

    def root(self) -> object:
        return self._root

    def children(self, handle: object) -> dict[bytes, object]:
        assert isinstance(handle, Node)
        return dict(handle.children or {})

    def facts(self, handle: object) -> tuple[Facts, object]:
        assert isinstance(handle, Node)
        return handle.facts, id(handle)

    def digest(self, handle: object) -> str:
        assert isinstance(handle, Node)
        return handle.facts.sha256


class MountView:
    """A mounted image; handles are paths. Times before 1970 count as unknown: see `overlay`."""

    def __init__(self, mountpoint: Path) -> None:
        self._root = os.fsencode(mountpoint)

    def root(self) -> object:
        return self._root

    def children(self, handle: object) -> dict[bytes, object]:
        assert isinstance(handle, bytes)
        return {name: os.path.join(handle, name) for name in os.listdir(handle)}

    def facts(self, handle: object) -> tuple[Facts, object]:
        assert isinstance(handle, bytes)
        found = os.lstat(handle)
        device = stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode)
        mtime = found.st_mtime_ns // 1_000_000_000
        facts = Facts(
            found.st_mode,
            found.st_uid,
            found.st_gid,
            found.st_size if stat.S_ISREG(found.st_mode) else 0,
            found.st_rdev if device else 0,
            mtime if mtime >= 0 else None,
            os.readlink(handle) if stat.S_ISLNK(found.st_mode) else b"",
        )
        names = [os.fsencode(name) for name in os.listxattr(handle, follow_symlinks=False)]
        facts.xattrs = kept_xattrs({name: os.getxattr(handle, name, follow_symlinks=False) for name in names})
        # with several lower layers overlayfs' inode numbers are only unique beside the device's
        return facts, (found.st_dev, found.st_ino)

    def digest(self, handle: object) -> str:
        assert isinstance(handle, bytes)
        return hashed(_pieces(handle))


def _pieces(path: bytes) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            yield piece
