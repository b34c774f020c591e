"""From tar entries to the tree of one layer. Rules: RAFS format 5.8; where upstream misplaces or refuses entries that
containerd unpacks (implied parents, paths through symbolic links, links to links), what containerd does."""

from __future__ import annotations

import logging
import stat

from bootstrap import tar
from bootstrap.errors import BuildError
from bootstrap.layout import v5
from bootstrap.layout.common import MAX_NAME
from bootstrap.layout.v6 import encode_rdev
from bootstrap.lower import LowerTree
from bootstrap.tree import LinkGroup, Node, check_name, check_xattr, new_root, storable_xattr

log = logging.getLogger(__name__)

MAX_SYMLINK = 4095  # a v6 reader takes 4096, the kernel 4095
MAX_FOLLOWED = 40

_TYPES = {
    tar.REGULAR: stat.S_IFREG,
    tar.SYMLINK: stat.S_IFLNK,
    tar.CHAR: stat.S_IFCHR,
    tar.BLOCKDEV: stat.S_IFBLK,
    tar.DIRECTORY: stat.S_IFDIR,
    tar.FIFO: stat.S_IFIFO,
}

_DOTS = (b".", b"..")
_LANDMARKS = frozenset((b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark"))
"""Files at the root that eStargz adds; they are no content of the image."""


class LayerTree:
    """The tree of one layer, grown entry by entry. `xattr_limit`: longest attribute value in bytes. `lower`: the image
    that the layer lies on, where it is known."""

    def __init__(self, xattr_limit: int, lower: LowerTree | None = None) -> None:
        self.root = new_root()
        self._lower = lower
        self.root.rdev = v5.NO_RDEV
        self.has_implied = False
        """Whether some directory was made because something lies in it (some may have got their entry later)."""
        self._xattr_limit = xattr_limit
        self._foreign: set[bytes] = set()
        # Entries of one directory follow each other: remembering it saves the walk for most of them.
        self._last_head: bytes | None = None
        self._last = self.root

    def add(self, entry: tar.Entry) -> Node | None:
        """Insert an entry; a later one with the same path replaces the earlier. The node, or None if it is left out.

        Raises BuildError, naming the entry, for paths with "..", links to nothing, unusable names and long attributes.
        """
        head, _, name = entry.name.rpartition(b"/")
        if head == self._last_head and name and name not in _DOTS:
            directory = self._last
        else:
            parts = _split(entry.name, entry)
            if not parts:
                if entry.type != tar.DIRECTORY:
                    raise BuildError(f"{entry.shown}: the root of the layer is not a directory")
                self._fill(self.root, entry)
                return self.root
            last = parts.pop()
            directory, _ = self._walk(parts, entry)
            self._last_head, self._last = head if last == name else None, directory
            name = last
        if directory is self.root and name in _LANDMARKS:
            return None
        if len(name) > MAX_NAME or b"\0" in name:
            check_name(name, entry.shown)
        children = directory.children
        assert children is not None
        old = children.get(name)
        if entry.type == tar.LINK:
            node = self._link(directory, name, entry)
            if node is None:  # a link to itself: nothing changes
                return None
        elif entry.type == tar.DIRECTORY and old is not None and old.children is not None:
            node = old
            self._fill(node, entry)
            return node
        else:
            node = Node(name, _TYPES[entry.type])
            self._fill(node, entry)
            if entry.type == tar.REGULAR:
                node.size = entry.size
            elif entry.type == tar.SYMLINK:
                if not 0 < len(entry.linkname) <= MAX_SYMLINK or b"\0" in entry.linkname:
                    raise BuildError(
                        f"{entry.shown}: link target of {len(entry.linkname)} bytes (1 to {MAX_SYMLINK}, no NUL)"
                    )
                node.target = entry.linkname
                node.size = len(entry.linkname)
        if old is not None:  # the remembered directory may be below it, or behind it if it was a symbolic link
            self._last_head = None
        children[name] = node
        return node

    def _walk(self, parts: list[bytes], entry: tar.Entry) -> tuple[Node, list[bytes]]:
        """The directory at `parts`, made with default attributes where it is missing, through symbolic links; and its
        own path."""
        trail = [self.root]
        names: list[bytes] = []
        todo = list(reversed(parts))
        followed = 0
        while todo:
            part = todo.pop()
            if part == b"..":  # only from a link's target
                if names:
                    names.pop()
                    trail.pop()
                continue
            children = trail[-1].children
            assert children is not None
            child = children.get(part)
            target = None
            if child is not None:
                target = child.target if child.is_symlink else None
            elif self._lower is not None:
                target = self._lower.link_target(self.root, [*names, part])
            if target is not None:
                followed += 1
                if followed > MAX_FOLLOWED:
                    raise BuildError(f"{entry.shown}: too many symbolic links on the way")
                if target.startswith(b"/"):
                    trail, names = [self.root], []
                todo += [p for p in reversed(target.split(b"/")) if p not in (b"", b".")]
                continue
            if child is None:
                check_name(part, entry.shown)
                child = children[part] = Node(part, stat.S_IFDIR | 0o755)
                child.rdev = v5.NO_RDEV
                child.implied = True
                self.has_implied = True
            if child.children is None:
                shown = part.decode("utf-8", "backslashreplace")
                raise BuildError(f"{entry.shown}: {shown!r} on the way is not a directory")
            trail.append(child)
            names.append(part)
        return trail[-1], names

    def _link(self, directory: Node, name: bytes, entry: tar.Entry) -> Node | None:
        """One more name of a node that is already here: its content and attributes, the mode and owner of the entry."""
        shown = entry.linkname.decode("utf-8", "backslashreplace")
        *parts, last = _split(entry.linkname, entry) or [b"."]
        there, above = self._walk(parts, entry)
        assert there.children is not None
        target = there.children.get(last)
        if target is None and self._lower is not None:
            target = self._lower.copy_up(self.root, [*above, last])
            if target is not None and target.children is None:
                there.children[last] = target
        if target is None:
            raise BuildError(f"{entry.shown}: hard link to {shown!r}, which is not in this layer before it")
        if target.children is not None:
            raise BuildError(f"{entry.shown}: hard link to {shown!r}, which is a directory")
        if there is directory and last == name:
            return None
        if target.group is None:
            target.group = LinkGroup()
        target.linked = True
        node = Node(name, stat.S_IFMT(target.mode) | entry.mode)
        node.uid, node.gid, node.mtime = entry.uid, entry.gid, entry.mtime
        node.xattrs = target.xattrs
        node.size, node.target, node.rdev = target.size, target.target, target.rdev
        node.share_chunks(target)
        node.group, node.linked = target.group, True
        return node

    def _fill(self, node: Node, entry: tar.Entry) -> None:
        node.mode = node.mode & 0o170000 | entry.mode
        node.implied = False
        node.uid = entry.uid
        node.gid = entry.gid
        node.mtime = entry.mtime
        if entry.type in (tar.CHAR, tar.BLOCKDEV, tar.FIFO):
            node.rdev = encode_rdev(entry.devmajor, entry.devminor)
        else:
            node.rdev = v5.NO_RDEV
        node.xattrs = self._xattrs(entry) if entry.xattrs else None

    def _xattrs(self, entry: tar.Entry) -> dict[bytes, bytes] | None:
        assert entry.xattrs is not None
        kept = {}
        for name, value in sorted(entry.xattrs.items()):  # no order is given; ours is by name
            if not storable_xattr(name):
                # Upstream ends the build here; containerd only logs it, and such layers (from macOS) exist.
                if name not in self._foreign:
                    self._foreign.add(name)
                    log.warning("%s: attribute %r has no place in an image and is left out", entry.shown, name)
                continue
            check_xattr(name, value, self._xattr_limit, entry.shown)
            kept[name] = value
        return kept or None


def _split(path: bytes, entry: tar.Entry) -> list[bytes]:
    """Components of a member's path, relative to the root; "..", which could leave it, is refused."""
    parts = path.split(b"/")
    if b"" in parts or b"." in parts:
        parts = [part for part in parts if part and part != b"."]
    if b".." in parts:
        raise BuildError(f"{entry.shown}: the path {path.decode('utf-8', 'backslashreplace')!r} contains '..'")
    return parts
