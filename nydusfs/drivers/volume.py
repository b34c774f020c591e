"""What the FUSE driver serves: a volume is one image, or the directories that lead to the images.

Node numbers of the kernel are `index << 48 | ino`. Index 0 is the directory tree above the images; every image gets a
fresh index, so a number that outlives its image can only meet "no such image" (ESTALE), never another image.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from bootstrap.layout.common import BlobFeatures
from nydusfs.drivers.idmap import IdMap
from nydusfs.drivers.stats import FsStats
from nydusfs.errors import NydusError
from nydusfs.hands import Hands

Buffer = bytes | bytearray | memoryview
INDEX_SHIFT = 48
INO_MASK = (1 << INDEX_SHIFT) - 1
LINK_NUMBER = 1 << 47  # apart from handles, which are addresses in 32-byte units
CAP_TAR_TOC = BlobFeatures.CAP_TAR_TOC
MAX_INDEX = 0x7FFF  # keeps node numbers positive as signed 64-bit values
ROOT_ID = 1
PATH_MAX = 4096
LEAP = 1 << 24  # directories that a worker may have made since it saved their numbers last
# As upstream: 2^32 seconds. What an image holds never changes; umount sends invalidations.
FOREVER = float(1 << 32)


class AttrLike(Protocol):
    """The fields read from `bootstrap.reader.Attr`; `blocks` in units of 512 bytes, `mtime` in seconds."""

    @property
    def mode(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def nlink(self) -> int: ...
    @property
    def rdev(self) -> int: ...
    @property
    def mtime(self) -> int: ...
    @property
    def mtime_nsec(self) -> int: ...
    @property
    def blocks(self) -> int: ...


class DirEntryLike(Protocol):
    @property
    def name(self) -> bytes: ...
    @property
    def ino(self) -> int: ...
    @property
    def cookie(self) -> int: ...
    @property
    def dtype(self) -> int: ...


class Metadata(Protocol):
    """The part of `bootstrap.reader.Bootstrap` that is asked on every metadata request."""

    @property
    def root(self) -> int: ...
    @property
    def inode_count(self) -> int: ...
    def attr(self, ino: int) -> AttrLike: ...
    def lookup(self, parent: int, name: bytes) -> int: ...
    def list_dir(self, ino: int, cookie: int = 0) -> Iterator[DirEntryLike]: ...
    def readlink(self, ino: int) -> bytes: ...
    def xattrs(self, ino: int) -> dict[bytes, bytes]: ...
    def lacks_xattrs(self, ino: int) -> bool: ...


class ImageData(Protocol):
    """Where file content comes from (`nydusfs.image_reader.ImageReader`)."""

    async def read_parts(self, ino: int, offset: int, size: int) -> Sequence[Buffer]: ...
    def read_now(self, ino: int, offset: int, size: int, pid: int, hands: Hands) -> Sequence[Buffer] | None:
        """From any thread: the bytes if all of them are here, else None. They are good until `hands` begin anew."""


class MountExistsError(NydusError):
    """Something is mounted at this path of the tree already."""


class MountMissingError(NydusError):
    """Nothing is mounted at this path of the tree."""


class Volume(Protocol):
    """`child` numbers in answers are complete node numbers; 0 means there is none. All but `read` from any thread."""

    index: int  # 0: of no image
    stats: FsStats
    entry_timeout: float
    negative_timeout: float
    generation: int

    def attr(self, ino: int) -> AttrLike: ...
    def shown(self, node: int, ino: int) -> int: ...
    def lookup(self, parent: int, name: bytes) -> int: ...
    def list_dir(self, ino: int, cookie: int) -> Iterator[tuple[bytes, int, int, int]]: ...
    def readlink(self, ino: int) -> bytes: ...
    def xattrs(self, ino: int) -> dict[bytes, bytes]: ...
    def lacks_xattrs(self, ino: int) -> bool: ...
    async def read(self, ino: int, offset: int, size: int) -> Sequence[Buffer]: ...
    def read_now(self, ino: int, offset: int, size: int, pid: int, hands: Hands) -> Sequence[Buffer] | None: ...


class ImageVolume:
    """One mounted image. Keeps nothing per inode: every answer is read from the mapped bootstrap."""

    __slots__ = (
        "_link_number",
        "base",
        "data",
        "entry_timeout",
        "generation",
        "idmap",
        "index",
        "metadata",
        "negative_timeout",
        "root_ino",
        "serve_xattrs",
        "stats",
    )

    def __init__(
        self,
        index: int,
        generation: int,
        metadata: Metadata,
        data: ImageData,
        stats: FsStats,
        serve_xattrs: bool,
        idmap: IdMap | None = None,
    ) -> None:
        self.index = index
        self.base = index << INDEX_SHIFT
        self.generation = generation
        self.metadata = metadata
        self.data = data
        self.stats = stats
        self.serve_xattrs = serve_xattrs
        self.idmap = idmap
        self.root_ino = metadata.root
        old = any(not blob.features & CAP_TAR_TOC for blob in getattr(metadata, "blobs", ()))
        self._link_number = getattr(metadata, "link_number", None) if old else None
        self.entry_timeout = self.negative_timeout = FOREVER

    @property
    def root_node(self) -> int:
        return self.base | self.root_ino

    def attr(self, ino: int) -> AttrLike:
        attr = self.metadata.attr(ino)
        return attr if self.idmap is None else self.idmap.attr(attr)

    def shown(self, node: int, ino: int) -> int:
        """The inode number that programs see: equal for all names of a file, which is how they know hard links."""
        number = self._link_number(ino) if self._link_number is not None else 0
        return self.base | LINK_NUMBER | number if number else node

    def lookup(self, parent: int, name: bytes) -> int:
        ino = self.metadata.lookup(parent, name)
        return self.base | ino if ino else 0

    def list_dir(self, ino: int, cookie: int) -> Iterator[tuple[bytes, int, int, int]]:
        for entry in self.metadata.list_dir(ino, cookie):
            yield entry.name, self.base | entry.ino, entry.cookie, entry.dtype

    def readlink(self, ino: int) -> bytes:
        return self.metadata.readlink(ino)

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        found = self.metadata.xattrs(ino) if self.serve_xattrs else {}
        return found if self.idmap is None else self.idmap.xattrs(found)

    def lacks_xattrs(self, ino: int) -> bool:
        return not self.serve_xattrs or self.metadata.lacks_xattrs(ino)

    async def read(self, ino: int, offset: int, size: int) -> Sequence[Buffer]:
        return await self.data.read_parts(ino, offset, size)

    def read_now(self, ino: int, offset: int, size: int, pid: int, hands: Hands) -> Sequence[Buffer] | None:
        return self.data.read_now(ino, offset, size, pid, hands)


class _DirAttr(NamedTuple):
    mode: int = stat.S_IFDIR | 0o755
    uid: int = 0
    gid: int = 0
    size: int = 0
    nlink: int = 2
    rdev: int = 0
    mtime: int = 0
    mtime_nsec: int = 0
    blocks: int = 0


class _Node:
    __slots__ = ("children", "image", "name", "number", "parent")

    def __init__(self, number: int, parent: _Node | None, name: bytes) -> None:
        self.number = number
        self.parent = parent
        self.name = name
        self.children: dict[bytes, _Node] = {}
        self.image: ImageVolume | None = None


class TreeChange(NamedTuple):
    """What the kernel may have cached and must forget: the name in a directory, or the root's own attributes."""

    parent: int
    name: bytes


def split_mountpoint(path: str) -> list[bytes]:
    """The parts of a mountpoint such as `/a/b`; [] for `/`. ValueError for relative paths and dot components."""
    raw = path.encode("utf-8", "surrogateescape")
    if not raw.startswith(b"/") or b"\0" in raw:
        raise ValueError(f"mountpoint {path!r} must be an absolute path")
    parts = [part for part in raw.split(b"/") if part]
    if any(part in (b".", b"..") or len(part) > 255 for part in parts):
        raise ValueError(f"mountpoint {path!r} must not hold '.', '..' or names above 255 bytes")
    if len(raw) >= PATH_MAX:
        raise ValueError(f"a mountpoint of {len(raw)} bytes is longer than a path can be")
    return parts


class PseudoTree:
    """Directories made for the mountpoints, and the places where images hang. Answers are short-lived.

    The directories of a path stay after umount, as upstream's do; the last one goes when it was made for the image.
    """

    def __init__(self) -> None:
        self.index = 0
        self.stats = FsStats("")
        # Names here change at mount and umount. Those send invalidations too; 0 for absent names keeps a name that
        # appears later from hiding behind a cached "no such file".
        self.entry_timeout = 1.0
        self.negative_timeout = 0.0
        self.generation = 0
        self._root = _Node(ROOT_ID, None, b"")
        self._nodes: dict[int, _Node] = {ROOT_ID: self._root}
        self._next = ROOT_ID + 1

    def numbers(self) -> tuple[list[tuple[str, int]], int]:
        """Path and number of each directory, parents first, and the first unused number: for `restore_numbers`."""
        found: list[tuple[str, int]] = []
        left = [(self._root, b"")]  # no recursion: a mountpoint may be deeper than that can go
        while left:
            node, path = left.pop()
            for name, child in node.children.items():
                found.append((os.fsdecode(path + b"/" + name), child.number))
                left.append((child, path + b"/" + name))
        return found, self._next

    def restore_numbers(self, numbers: Sequence[tuple[str, int]], next_number: int) -> None:
        """Make an empty tree's directories with the numbers that an earlier process gave them."""
        for path, number in numbers:
            *above, name = split_mountpoint(path)
            parent = self._walk(above)
            if parent is not None:
                self._nodes[number] = parent.children[name] = _Node(number, parent, name)
        # The kernel may know what was made since: its numbers must not be another directory's.
        self._next = next_number + LEAP

    @property
    def root_image(self) -> ImageVolume | None:
        return self._root.image

    def _walk(self, parts: list[bytes]) -> _Node | None:
        node: _Node | None = self._root
        for part in parts:
            node = node.children.get(part) if node else None
        return node

    def check_free(self, parts: list[bytes]) -> None:
        """Raise `MountExistsError` when an image sits at, above or below this place."""
        node = self._root
        for depth in range(len(parts) + 1):
            if node.image is not None:
                at = "/" + b"/".join(parts[:depth]).decode("utf-8", "replace")
                raise MountExistsError(f"an image is already mounted at {at}")
            if depth == len(parts):
                break
            child = node.children.get(parts[depth])
            if child is None:
                return
            node = child
        if self._has_image(node):
            raise MountExistsError("images are mounted below this path")

    def _has_image(self, node: _Node) -> bool:
        left = [node]
        while left:
            node = left.pop()
            if node.image is not None:
                return True
            left += node.children.values()
        return False

    def attach(self, parts: list[bytes], image: ImageVolume) -> TreeChange:
        self.check_free(parts)
        node = self._root
        first_new: TreeChange | None = None
        for part in parts:
            child = node.children.get(part)
            if child is None:
                child = _Node(self._next, node, part)
                self._next += 1
                self._nodes[child.number] = node.children[part] = child
                first_new = first_new or TreeChange(node.number, part)
            node = child
        node.image = image
        if node.parent is None:
            return TreeChange(0, b"")
        return first_new or TreeChange(node.parent.number, node.name)

    def detach(self, parts: list[bytes]) -> tuple[ImageVolume, TreeChange]:
        node = self._walk(parts)
        if node is None or node.image is None:
            raise MountMissingError("/" + b"/".join(parts).decode("utf-8", "replace") + " is not mounted")
        image, node.image = node.image, None
        if node.parent is None:
            return image, TreeChange(0, b"")
        if not node.children:
            del node.parent.children[node.name], self._nodes[node.number]
        return image, TreeChange(node.parent.number, node.name)

    def _child_number(self, node: _Node) -> int:
        return node.image.root_node if node.image is not None else node.number

    def _node(self, ino: int) -> _Node:
        node = self._nodes.get(ino)
        if node is None:
            raise KeyError(ino)
        return node

    def shown(self, node: int, ino: int) -> int:
        return node

    def attr(self, ino: int) -> AttrLike:
        return _DirAttr(nlink=2 + len(self._node(ino).children))

    def lookup(self, parent: int, name: bytes) -> int:
        child = self._node(parent).children.get(name)
        return self._child_number(child) if child is not None else 0

    def list_dir(self, ino: int, cookie: int) -> Iterator[tuple[bytes, int, int, int]]:
        # Node numbers only grow and a dict keeps insertion order, so the number itself is a stable cookie.
        for child in list(self._node(ino).children.values()):
            if child.number > cookie:
                yield child.name, self._child_number(child), child.number, stat.S_IFDIR >> 12

    def readlink(self, ino: int) -> bytes:
        raise KeyError(ino)

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        return {}

    def lacks_xattrs(self, ino: int) -> bool:
        return True

    async def read(self, ino: int, offset: int, size: int) -> Sequence[bytes]:
        raise KeyError(ino)

    def read_now(self, ino: int, offset: int, size: int, pid: int, hands: Hands) -> None:
        raise KeyError(ino)
