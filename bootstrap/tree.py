"""The tree a build works on: nodes as they are before they become a bootstrap. Their chunks are rows of a `ChunkTable`.

Reference: RAFS format 5.1. One object per path, for sources that meet one path at a time; what follows (overlay, merge,
writing) works on the tables of `flat`, which `flat.flatten` makes of it. Serving never builds a tree (see `reader`).
"""

from __future__ import annotations

import gc
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from bootstrap.errors import BuildError
from bootstrap.layout.common import MAX_NAME, MAX_XATTR_NAME

XATTR_NAMESPACES = (b"user.", b"trusted.", b"security.")
XATTR_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")


_NO_ROW = -1


class LinkGroup:
    """Identity of an inode with several names; `number` finds the first of them."""

    __slots__ = ("first",)

    def __init__(self) -> None:
        self.first: Node | None = None


class Node:
    """One path of the tree.

    `mode` has the type bits; `size` is that of a regular file; `rdev` is st_rdev in the 32-bit Linux encoding.
    `index` and `parent` mean nothing before `number`.
    """

    __slots__ = (
        "_rows",
        "children",
        "gid",
        "group",
        "implied",
        "index",
        "linked",
        "mode",
        "mtime",
        "mtime_nsec",
        "name",
        "parent",
        "rdev",
        "size",
        "source",
        "target",
        "uid",
        "xattrs",
    )

    def __init__(self, name: bytes, mode: int) -> None:
        self.name = name
        self.mode = mode
        self.uid = 0
        self.gid = 0
        self.rdev = 0
        self.size = 0
        self.mtime = 0
        self.mtime_nsec = 0
        self.xattrs: dict[bytes, bytes] | None = None
        self.target = b""
        self.children: dict[bytes, Node] | None = {} if stat.S_ISDIR(mode) else None
        self._rows: int | list[int] = _NO_ROW
        """Most files have one chunk, and a list for it would cost 100 bytes a file."""
        self.group: LinkGroup | None = None
        self.linked = False
        """A tar builder saw a hard link to it: v5 marks every such name."""
        self.implied = False
        """A directory no entry describes: it exists because something lies in it (see IMPLIED_NSEC)."""
        self.source: str | bytes | None = None
        """Where a directory build reads its content."""
        self.parent: Node | None = None
        self.index = 0

    @property
    def chunks(self) -> Sequence[int]:
        """Rows of the build's ChunkTable, in file order."""
        rows = self._rows
        if type(rows) is int:
            return () if rows == _NO_ROW else (rows,)
        return cast("list[int]", rows)

    def add_chunk(self, row: int) -> None:
        """The next chunk of a regular file, for all names that share its chunks too."""
        rows = self._rows
        if rows == _NO_ROW:
            self._rows = row
        elif type(rows) is int:
            self._rows = [rows, row]
        else:
            cast("list[int]", rows).append(row)

    def forget_chunks(self) -> None:
        self._rows = _NO_ROW

    def share_chunks(self, other: Node) -> None:
        """Have the chunks of `other`, those that are still to come included."""
        if type(other._rows) is int:
            other._rows = list(other.chunks)
        self._rows = other._rows

    @property
    def is_dir(self) -> bool:
        return self.children is not None

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)


IMPLIED_NSEC = 1
"""How a layer's bootstrap tells a merge that a directory is only implied: mtime 0 s + 1 ns, 0755, root:root.

An archive gives mtimes in whole seconds, so nothing else looks like this. The merge then keeps the attributes a lower
layer gives that directory, as unpacking one layer over another does, and stores mtime 0 where there is none. Upstream
always lets the made-up attributes win.
"""


@contextmanager
def no_collector() -> Iterator[None]:
    """Keep the collector of cycles away while a tree grows: it would look at all nodes again and again, and find
    nothing. 12 to 25 % of the processor time of a layer of small files."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def new_root() -> Node:
    """The root a layer has that does not describe it: 0755, root, epoch."""
    return Node(b"/", stat.S_IFDIR | 0o755)


def number(root: Node) -> list[Node]:
    """All nodes in G-order (5.1) with `index`, `parent` and the link groups filled in; sorts all children.

    The index of `order[i]` is i + 1; only directories and the first names of links get one. Siblings are neighbours in
    the result.
    """
    order = [root]
    groups: set[LinkGroup] = set()
    root.index = 1
    root.parent = root
    stack = [root]
    append = order.append
    while stack:
        directory = stack.pop()
        children = directory.children
        assert children is not None
        subdirs = []
        if len(children) > 1:
            children = directory.children = dict(sorted(children.items()))
        for child in children.values():
            append(child)
            child.parent = directory
            if child.children is not None:
                child.index = len(order)
                subdirs.append(child)
            elif child.group is not None and child.group not in groups:
                child.index = len(order)
                child.group.first = child
                groups.add(child.group)
        subdirs.reverse()
        stack += subdirs
    return order


def dismantle(order: Sequence[Node]) -> None:
    """Take a numbered tree apart, so that its memory is free at once and needs no search for cycles."""
    for node in order:
        node.parent = None
        node.children = None


def path_of(node: Node) -> str:
    """For messages: the absolute path, undecodable bytes escaped. Needs `number` to have run."""
    parts: list[bytes] = []
    at = node
    while at.parent is not None and at.parent is not at:
        parts.append(at.name)
        at = at.parent
    return "/" + b"/".join(reversed(parts)).decode("utf-8", "backslashreplace")


def find(root: Node, path: bytes) -> Node | None:
    """The node at an absolute path; links are not followed."""
    node: Node | None = root
    for part in path.split(b"/"):
        if part:
            if node is None or node.children is None:
                return None
            node = node.children.get(part)
    return node


def check_name(name: bytes, where: str) -> None:
    """Refuse names no file system can show. `where` names the entry in the message."""
    if not name or len(name) > MAX_NAME or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise BuildError(f"{where}: {name[:300]!r} is not a usable file name (1 to {MAX_NAME} bytes, no slash, no NUL)")


def storable_xattr(name: bytes) -> bool:
    """Whether the format has a place for an attribute of this namespace (1.7)."""
    return name.startswith(XATTR_NAMESPACES) or name in XATTR_ACLS


def check_xattr(name: bytes, value: bytes, limit: int, where: str) -> None:
    """Refuse attributes that are too long: `limit` is that of the RAFS version for values, in bytes."""
    if len(name) > MAX_XATTR_NAME:
        raise BuildError(f"{where}: attribute name of {len(name)} bytes ({name[:40]!r}...), at most {MAX_XATTR_NAME}")
    if len(value) > limit:
        raise BuildError(f"{where}: attribute {name!r} has {len(value)} bytes, this RAFS version keeps at most {limit}")


def clean_patterns(lines: list[bytes]) -> tuple[list[bytes], list[str]]:
    """Prefetch patterns as a build uses them, and warnings for those it drops (5.7).

    A pattern equal to or below an earlier one adds nothing; relative paths and those with ".." name nothing.
    """
    kept: dict[bytes, None] = {}
    warnings: list[str] = []
    for line in lines:
        raw = line.strip()
        if not raw:
            continue
        shown = raw.decode("utf-8", "backslashreplace")
        parts = [part for part in raw.split(b"/") if part not in (b"", b".")]
        if not raw.startswith(b"/") or b".." in parts:
            warnings.append(f"prefetch pattern {shown!r} is left out: not an absolute path without '..'")
            continue
        *above, pattern = (b"/" + b"/".join(parts[:depth]) for depth in range(len(parts) + 1))
        prefix = next((path for path in (*above, pattern) if path in kept), None)
        if prefix is not None:
            warnings.append(f"prefetch pattern {shown!r} is covered by {prefix.decode('utf-8', 'backslashreplace')!r}")
            continue
        kept[pattern] = None
    return list(kept), warnings
