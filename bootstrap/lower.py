"""What a layer's archive can reach in the image below it (`--parent-bootstrap`): files to link to, links on the way.

Unpacking one layer over another shows the archive both; what it touches of the lower one is copied up, as in overlayfs.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence

from bootstrap.flat import S_IFMT, FlatTree
from bootstrap.layout import v5
from bootstrap.overlay import OCI_OPAQUE, OCI_PREFIX, OVERLAY_OPAQUE
from bootstrap.tree import Node


class LowerTree:
    """The tree below a layer with the whiteout spec `spec`. `first_row`: where its chunks begin in the chunk table."""

    def __init__(self, tree: FlatTree, first_row: int, spec: str) -> None:
        self._tree = tree
        self._first_row = first_row
        self._spec = spec

    def _row(self, upper: Node, parts: Sequence[bytes]) -> int:
        """The row at a path the layer with the root `upper` does not have itself; -1 if none is visible there."""
        at: Node | None = upper
        for part in parts:
            if at is None:
                break
            children = at.children
            if children is None or self._hides(at, part):
                return -1
            at = children.get(part)
        return self._tree.find(b"/".join(parts))

    def _hides(self, directory: Node, name: bytes) -> bool:
        children = directory.children or {}
        if self._spec == "oci":
            return OCI_PREFIX + name in children or OCI_OPAQUE in children
        return self._spec == "overlayfs" and (directory.xattrs or {}).get(OVERLAY_OPAQUE) == b"y"

    def link_target(self, upper: Node, parts: Sequence[bytes]) -> bytes | None:
        """Where the symbolic link at a path leads; None if there is none."""
        row = self._row(upper, parts)
        if row < 0 or not stat.S_ISLNK(int(self._tree.inodes["mode"][row])):
            return None
        return self._tree.targets[int(self._tree.inodes["first"][row])]

    def copy_up(self, upper: Node, parts: Sequence[bytes]) -> Node | None:
        """A node like the one at a path, with its chunks; None if there is none. A directory comes without children."""
        row = self._row(upper, parts)
        if row < 0:
            return None
        tree, inode = self._tree, self._tree.inodes[row]
        mode, first, count = int(inode["mode"]), int(inode["first"]), int(inode["count"])
        node = Node(parts[-1], mode)
        node.uid, node.gid = int(inode["uid"]), int(inode["gid"])
        node.mtime, node.mtime_nsec = int(inode["mtime"]), int(inode["mtime_nsec"])
        node.rdev = int(inode["rdev"])
        node.xattrs = tree.xattrs[inode["xattrs"]] if inode["xattrs"] >= 0 else None
        kind = mode & S_IFMT
        if kind == stat.S_IFREG:
            node.size = int(inode["size"])
            for row in (tree.refs[first : first + count] + self._first_row).tolist():
                node.add_chunk(row)
        elif kind == stat.S_IFLNK:
            node.target = tree.targets[first]
            node.size = len(node.target)
        if kind not in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO):
            node.rdev = v5.NO_RDEV
        return node
