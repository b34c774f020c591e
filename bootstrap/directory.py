"""A directory as the source of a layer. Rules: RAFS format 5.6 and 5.8."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import BinaryIO, NoReturn

from bootstrap.errors import BuildError
from bootstrap.layout.v6 import encode_rdev
from bootstrap.tree import LinkGroup, Node, check_xattr, path_of, storable_xattr

log = logging.getLogger(__name__)

_U32 = 0xFFFFFFFF


def scan(source: str | bytes, *, xattr_limit: int) -> Node:
    """The tree below `source`, without reading any content. `xattr_limit`: longest attribute value in bytes.

    The root's mtime is 0, so that a copy of a directory gives the same image. Raises BuildError.
    """
    top = os.fsencode(source)
    groups: dict[tuple[int, int], LinkGroup] = {}
    try:
        if not os.path.isdir(top):
            raise BuildError(f"{os.fsdecode(top)} is not a directory")
        root = _node(b"/", top, os.stat(top), xattr_limit, groups)
        root.mtime = root.mtime_nsec = 0
        stack = [(root, top)]
        while stack:
            directory, path = stack.pop()
            children = directory.children
            assert children is not None
            with os.scandir(path) as entries:
                for entry in entries:
                    node = _node(entry.name, entry.path, entry.stat(follow_symlinks=False), xattr_limit, groups)
                    children[node.name] = node
                    if node.children is not None:
                        stack.append((node, entry.path))
    except OSError as error:
        raise BuildError(f"cannot read {os.fsdecode(error.filename or top)}: {error.strerror}") from error
    return root


def _node(
    name: bytes, path: bytes, found: os.stat_result, xattr_limit: int, groups: dict[tuple[int, int], LinkGroup]
) -> Node:
    node = Node(name, found.st_mode)
    node.uid, node.gid = found.st_uid & _U32, found.st_gid & _U32
    node.mtime, node.mtime_nsec = divmod(found.st_mtime_ns, 10**9)
    if found.st_rdev:
        node.rdev = encode_rdev(os.major(found.st_rdev), os.minor(found.st_rdev))
    if stat.S_ISREG(found.st_mode):
        node.size = found.st_size
        node.source = path
    elif stat.S_ISLNK(found.st_mode):
        node.target = os.readlink(path)
        node.size = len(node.target)
    if found.st_nlink > 1 and node.children is None:
        node.group = groups.setdefault((found.st_dev, found.st_ino), LinkGroup())
    node.xattrs = _xattrs(path, xattr_limit)
    return node


def _xattrs(path: bytes, limit: int) -> dict[bytes, bytes] | None:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError:  # a file system without attributes
        return None
    if not names:
        return None
    kept = {}
    for text in sorted(names):
        name = os.fsencode(text)
        if not storable_xattr(name):
            log.warning("%s: attribute %s has no place in an image and is left out", os.fsdecode(path), text)
            continue
        value = os.getxattr(path, name, follow_symlinks=False)
        check_xattr(name, value, limit, os.fsdecode(path))
        kept[name] = value
    return kept or None


def dump_order(order: Iterable[Node], patterns: list[bytes]) -> tuple[list[Node], list[Node]]:
    """Regular files with data in the order they go into the blob: those that prefetch patterns match, and the rest.

    `order` is G-order; a file matches the nearest pattern that is itself or a directory above it.
    """
    position = {PurePosixPath(os.fsdecode(pattern)): rank for rank, pattern in enumerate(patterns)}
    ahead: list[tuple[int, Node]] = []
    rest: list[Node] = []
    for node in order:
        if not node.is_file or not node.size:
            continue
        rank = _rank(node, position) if position else None
        if rank is None:
            rest.append(node)
        else:
            ahead.append((rank, node))
    ahead.sort(key=lambda pair: pair[0])
    return [node for _, node in ahead], rest


def _rank(node: Node, position: dict[PurePosixPath, int]) -> int | None:
    names: list[str] = []
    at = node
    while at.parent is not None and at.parent is not at:
        names.append(os.fsdecode(at.name))
        at = at.parent
    path = PurePosixPath("/", *reversed(names))
    for candidate in (path, *path.parents):
        if candidate in position:
            return position[candidate]
    return None


class _File:
    """The content of one file of a directory, for a mode."""

    position = -1

    def __init__(self, file: BinaryIO, node: Node) -> None:
        self._file = file
        self._node = node
        self.done = 0

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes; BuildError if the file cannot be read or has become shorter."""
        try:
            data = _exactly(self._file, size)
        except OSError as error:
            raise _unreadable(self._node, error) from error
        self.done += len(data)
        if len(data) < size:
            self.changed(self.done)
        return data

    def changed(self, now: int) -> NoReturn:
        node = self._node
        raise BuildError(f"{path_of(node)} changed while it was read ({node.size} bytes before, {now} now)")


def read_file(node: Node, take: Callable[[Node, _File], None]) -> None:
    """Hand the content of a file to `take`; other names of it share the result.

    Raises BuildError if the file cannot be read or does not have the size it had before.
    """
    group = node.group
    if group is not None and group.first is not None and group.first is not node:
        first = group.first
        if first.chunks or first.size == 0:
            node.share_chunks(first)
            return
    node.forget_chunks()
    with open_file(node) as file:
        content = _File(file, node)
        take(node, content)
        if more := _exactly(file, 1):
            content.changed(node.size + len(more))


def open_file(node: Node) -> BinaryIO:
    """The file a node was made from; BuildError if it cannot be opened."""
    assert node.source is not None
    try:
        return open(node.source, "rb", buffering=0)
    except OSError as error:
        raise _unreadable(node, error) from error


def _unreadable(node: Node, error: OSError) -> BuildError:
    return BuildError(f"cannot read {path_of(node)}: {error.strerror}")


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) == size or not data:
        return bytes(data)
    pieces = [data]
    got = len(data)
    while got < size:
        more = file.read(size - got)
        if not more:
            break
        pieces.append(more)
        got += len(more)
    return b"".join(pieces)
