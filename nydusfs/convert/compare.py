"""Compares a source tree with a converted image, entry by entry and byte by byte."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nydusfs.convert.facts import Facts, differences, kept_xattrs, shown
from nydusfs.convert.sourcetree import Node
from nydusfs.convert.threads import DaemonPool

if TYPE_CHECKING:
    from bootstrap.base import Bootstrap

log = logging.getLogger(__name__)

_PIECE = 1 << 20
_READERS = 4
_AHEAD = 64
_ROOT = "/"


class View(Protocol):
    """A mounted or unmounted image. A handle is what the view made of it; errors are OSError or RafsError."""

    def root(self) -> object: ...
    def children(self, handle: object) -> dict[bytes, object]: ...
    def facts(self, handle: object) -> tuple[Facts, int]:
        """Facts without digest, and the inode number."""

    def pieces(self, handle: object) -> Iterator[bytes]: ...


@dataclass(slots=True)
class Comparison:
    """`differences` are lines fit for a user, at most `limit`; `count` is their true number; `content` counts bytes."""

    limit: int = 100
    count: int = 0
    entries: int = 0
    content: int = 0
    differences: list[str] = field(default_factory=list)

    def add(self, path: bytes, text: str) -> None:
        self.count += 1
        if len(self.differences) < self.limit:
            self.differences.append(f"{shown(path)}: {text}")


def compare(source: Node, view: View, limit: int = 100) -> Comparison:
    """The root directory's own attributes are left out, as containers never see them. Raises nothing for what the
    image does wrong: an unreadable entry is a difference."""
    result = Comparison(limit)
    with DaemonPool(_READERS, "compare") as pool:
        _Comparer(view, result, pool).run(source)
    return result


class _Comparer:
    def __init__(self, view: View, result: Comparison, pool: DaemonPool) -> None:
        self._view = view
        self._result = result
        self._pool = pool
        self._reads: deque[tuple[bytes, str, Future[str]]] = deque()
        self._inodes: dict[int, int] = {}  # id of source node -> inode of the target, for hard links

    def run(self, source: Node) -> None:
        stack: list[tuple[bytes, Node, object]] = [(b"", source, self._view.root())]
        while stack:
            path, node, handle = stack.pop()
            try:
                children = self._view.children(handle)
            except Exception as error:
                self._failed(path or b"/", "cannot be listed", error)
                continue
            wanted = node.children or {}
            for name in sorted(children.keys() - wanted.keys()):
                self._result.add(path + b"/" + name, "only in the target")
            for name in sorted(wanted):
                below = path + b"/" + name
                if name not in children:
                    self._result.add(below, "missing in the target")
                    continue
                if self._entry(below, wanted[name], children[name]) and wanted[name].children is not None:
                    stack.append((below, wanted[name], children[name]))
        self._drain(0)

    def _entry(self, path: bytes, node: Node, handle: object) -> bool:
        """Compares one entry; False if it cannot be looked into."""
        self._result.entries += 1
        try:
            facts, inode = self._view.facts(handle)
        except Exception as error:
            self._failed(path, "cannot be examined", error)
            return False
        for text in differences(node.facts, facts):
            self._result.add(path, text)
        if node.facts.kind != facts.kind:
            return False
        if facts.kind == "file":
            known = self._inodes.setdefault(id(node), inode)
            if known != inode:
                self._result.add(path, "is a hard link in the source, a file of its own in the target")
            if node.facts.size == facts.size:
                self._result.content += facts.size
                self._reads.append((path, node.facts.sha256, self._pool.submit(self._digest, handle)))
                self._drain(_AHEAD)
        return True

    def _digest(self, handle: object) -> str:
        found = hashlib.sha256()
        for piece in self._view.pieces(handle):
            found.update(piece)
        return found.hexdigest()

    def _drain(self, left: int) -> None:
        while len(self._reads) > left:
            path, expected, future = self._reads.popleft()
            try:
                found = future.result()
            except Exception as error:
                self._failed(path, "cannot be read", error)
                continue
            if found != expected:
                self._result.add(path, f"content: source sha256 {expected}, target sha256 {found}")

    def _failed(self, path: bytes, what: str, error: Exception) -> None:
        log.debug("%s: %s", shown(path), what, exc_info=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self._result.add(path, f"{what} in the target: {reason or type(error).__name__}")


class MountView:
    """A mounted image; handles are paths."""

    def __init__(self, mountpoint: Path) -> None:
        self._root = os.fsencode(mountpoint)

    def root(self) -> object:
        return self._root

    def children(self, handle: object) -> dict[bytes, object]:
        assert isinstance(handle, bytes)
        return {name: os.path.join(handle, name) for name in os.listdir(handle)}

    def facts(self, handle: object) -> tuple[Facts, int]:
        assert isinstance(handle, bytes)
        found = os.lstat(handle)
        device = stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode)
        facts = Facts(
            found.st_mode,
            found.st_uid,
            found.st_gid,
            found.st_size if stat.S_ISREG(found.st_mode) else 0,
            found.st_rdev if device else 0,
            int(found.st_mtime_ns // 1_000_000_000),
            os.readlink(handle) if stat.S_ISLNK(found.st_mode) else b"",
        )
        names = [os.fsencode(name) for name in os.listxattr(handle, follow_symlinks=False)]
        facts.xattrs = kept_xattrs({name: os.getxattr(handle, name, follow_symlinks=False) for name in names})
        return facts, found.st_ino

    def pieces(self, handle: object) -> Iterator[bytes]:
        assert isinstance(handle, bytes)
        with open(handle, "rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                yield piece


class ReaderView:
    """An image through our reader alone, with whole blobs as files of a directory; handles are inodes."""

    def __init__(self, bootstrap: Bootstrap, blobs: Path) -> None:
        from bootstrap.blobsource import open_blobs

        self._bootstrap = bootstrap
        self._blobs = open_blobs(bootstrap, blobs)

    def close(self) -> None:
        self._blobs.close()

    def root(self) -> object:
        return self._bootstrap.root

    def children(self, handle: object) -> dict[bytes, object]:
        assert isinstance(handle, int)
        return {entry.name: entry.ino for entry in self._bootstrap.list_dir(handle)}

    def facts(self, handle: object) -> tuple[Facts, int]:
        assert isinstance(handle, int)
        attr = self._bootstrap.attr(handle)
        regular, link = stat.S_ISREG(attr.mode), stat.S_ISLNK(attr.mode)
        facts = Facts(
            attr.mode,
            attr.uid,
            attr.gid,
            attr.size if regular else 0,
            attr.rdev,
            attr.mtime,
            self._bootstrap.readlink(handle) if link else b"",
            kept_xattrs(self._bootstrap.xattrs(handle)),
        )
        return facts, handle

    def pieces(self, handle: object) -> Iterator[bytes]:
        assert isinstance(handle, int)
        for part in self._blobs.read_file(handle):
            yield bytes(part)
