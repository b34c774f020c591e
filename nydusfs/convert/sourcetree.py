"""The source image's file system as a model: layers applied with whiteouts, contents as digests.

Made with the standard library's tar reader on purpose: our builder has its own, and a check that shared it would share
its mistakes. Costs about 60 us per entry and one SHA-256 over all contents; nothing is written to disk.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, cast

from nydusfs.convert.facts import Facts, kept_xattrs
from nydusfs.errors import ConvertError

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_RESERVED = b".wh..wh."
_XATTR = "SCHILY.xattr."
_PIECE = 1 << 20
MAX_FOLLOWED = 40  # symbolic links on one way, as Linux has it
# what 12 bytes of an octal header field hold; other times come from PAX records, which RAFS builders do not read
_MAX_TIME = 8**11

_TYPES = {
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


class Node:
    """`children` is None unless a directory. Names of one hard-linked file share one node. `implied`: a directory that
    the layer does not name itself; it has no attributes of its own."""

    __slots__ = ("children", "facts", "implied")

    def __init__(self, facts: Facts, implied: bool = False) -> None:
        self.facts = facts
        self.implied = implied
        self.children: dict[bytes, Node] | None = {} if stat.S_ISDIR(facts.mode) else None


def new_root() -> Node:
    return Node(Facts(stat.S_IFDIR | 0o755), implied=True)


def read_layer(stream: BinaryIO, what: str, progress: Callable[[int], None] | None = None) -> Node:
    """The tree of one uncompressed layer, whiteouts still in it. Raises ConvertError that names `what`."""
    root = new_root()
    try:
        with tarfile.open(
            fileobj=stream, mode="r|", encoding="utf-8", errors="surrogateescape", ignore_zeros=True
        ) as archive:
            while (member := archive.next()) is not None:
                _add(root, archive, member, what)
                cast(Any, archive).members.clear()  # it remembers every entry: 2 kB each
    except (tarfile.TarError, EOFError, UnicodeError, ValueError) as error:
        raise ConvertError(f"{what} is not a readable tar: {error}") from error
    return root


def _add(root: Node, archive: tarfile.TarFile, member: tarfile.TarInfo, what: str) -> None:
    parts = _parts(member.name, what)
    if not parts:
        if member.isdir():
            root.facts, root.implied = _facts(member, stat.S_IFDIR), False
        return
    parent = _directory(root, parts[:-1], member.name, what)
    assert parent.children is not None
    name = parts[-1]
    if member.islnk():
        *above, last = _parts(member.linkname, what) or [b"."]
        there = _directory(root, above, member.name, what).children
        target = there.get(last) if there is not None else None
        if target is None:
            raise ConvertError(
                f"{what}: hard link {member.name!r} to {member.linkname!r}, which this layer does not have"
            )
        own = _facts(member, 0)
        # one inode has one owner and mode: an unpacker leaves those of the last name
        target.facts.mode = stat.S_IFMT(target.facts.mode) | stat.S_IMODE(own.mode)
        target.facts.uid, target.facts.gid, target.facts.mtime = own.uid, own.gid, own.mtime
        parent.children[name] = target
        return
    if member.isreg():
        facts = _facts(member, stat.S_IFREG)
        facts.size = member.size
        facts.sha256 = _digest(archive, member)
    elif member.type in _TYPES:
        facts = _facts(member, _TYPES[member.type])
        if member.issym():
            facts.target = member.linkname.encode("utf-8", "surrogateescape")
        elif member.ischr() or member.isblk():
            facts.rdev = os.makedev(member.devmajor, member.devminor)
    else:
        raise ConvertError(f"{what}: entry {member.name!r} has the unknown type {member.type!r}")
    fresh = Node(facts)
    old = parent.children.get(name)
    if fresh.children is not None and old is not None and old.children is not None:
        fresh.children = old.children
    parent.children[name] = fresh


def _directory(root: Node, parts: Iterable[bytes], shown: str, what: str) -> Node:
    """Where an entry goes: missing directories are made, links of the layer are followed within it."""
    trail, todo, followed = [root], list(parts)[::-1], 0
    while todo:
        part = todo.pop()
        if part == b"..":  # only from a link
            del trail[max(1, len(trail) - 1) :]
            continue
        children = trail[-1].children
        assert children is not None
        child = children.get(part)
        if child is None:
            child = children[part] = Node(Facts(stat.S_IFDIR | 0o755), implied=True)
        if stat.S_ISLNK(child.facts.mode):
            followed += 1
            if followed > MAX_FOLLOWED:
                raise ConvertError(f"{what}: too many symbolic links on the way to {shown!r}")
            if child.facts.target.startswith(b"/"):
                del trail[1:]
            todo += [one for one in reversed(child.facts.target.split(b"/")) if one not in (b"", b".")]
        elif child.children is None:
            raise ConvertError(f"{what}: {shown!r} lies below a file")
        else:
            trail.append(child)
    return trail[-1]


def _parts(name: str, what: str) -> list[bytes]:
    parts = [part for part in name.encode("utf-8", "surrogateescape").split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise ConvertError(f"{what}: entry {name!r} leads out of the layer")
    return parts


def _facts(member: tarfile.TarInfo, kind: int) -> Facts:
    mtime = int(member.mtime // 1)
    xattrs = {
        key[len(_XATTR) :].encode("utf-8", "surrogateescape"): value.encode("utf-8", "surrogateescape")
        for key, value in member.pax_headers.items()
        if key.startswith(_XATTR)
    }
    return Facts(
        kind | stat.S_IMODE(member.mode),
        member.uid,
        member.gid,
        mtime=mtime if 0 <= mtime < _MAX_TIME else None,
        xattrs=kept_xattrs(xattrs),
    )


def _digest(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    found = hashlib.sha256()
    source = archive.extractfile(member)
    left = member.size
    while source is not None and left and (piece := source.read(min(_PIECE, left))):
        found.update(piece)
        left -= len(piece)
    return found.hexdigest()


def apply_layer(lower: Node, upper: Node) -> None:
    """Puts `upper` onto `lower`, in place, by the OCI rules: whiteouts remove only what lies below."""
    assert lower.children is not None and upper.children is not None
    if not upper.implied:
        lower.facts, lower.implied = upper.facts, False
    for name in upper.children:
        if name == _OPAQUE:
            lower.children.clear()
        elif name.startswith(_WHITEOUT) and not name.startswith(_RESERVED):
            lower.children.pop(name[len(_WHITEOUT) :], None)
    for name, node in upper.children.items():
        if name.startswith(_WHITEOUT):
            continue
        below = lower.children.get(name)
        if node.children is None:
            lower.children[name] = node
            continue
        if below is None or below.children is None:
            below = lower.children[name] = Node(Facts(stat.S_IFDIR | 0o755), implied=True)
            below.facts = node.facts
        apply_layer(below, node)
