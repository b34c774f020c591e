"""What OCI layering means, plainly: flat maps from paths to inodes, nothing of nodes, chunks or bootstraps.

`stacks` gives random layer stacks as plans; `Layer` is a plan as a tar and as what that tar unpacks to; `overlay` is
what a container sees of several. `check_image` compares an opened bootstrap with it.
"""

from __future__ import annotations

import io
import stat
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from bootstrap.reader import Bootstrap

CHUNK = 0x1000
NAMES = [b"a", b"b", b"c.d", b"!", b"\xff\xfe", "é".encode(), b"n" * 255, b"...", b"A", b".wh", b"-"]

Path = tuple[bytes, ...]


@dataclass(eq=False)
class Inode:
    """`implied`: a directory no entry describes. The same object at several paths: a hard link."""

    kind: int
    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    content: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    implied: bool = False

    @property
    def is_dir(self) -> bool:
        return self.kind == stat.S_IFDIR


Tree = dict[Path, Inode]


@dataclass
class Step:
    """One entry of a layer tar."""

    parent: Path
    name: bytes
    kind: str
    inode: Inode
    link: int = 0


contents = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda seed, size: (bytes([seed]) * CHUNK + bytes([seed + 1]) * CHUNK * 2)[:size],
        st.integers(0, 3),
        st.sampled_from([1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK]),
    ),
)
xattrs = st.dictionaries(
    st.sampled_from([b"user.a", b"user.long" + b"x" * 100, b"security.capability", b"system.posix_acl_access"]),
    st.one_of(st.binary(max_size=30), st.just(b"line\nbreak=\0" * 200)),
    max_size=3,
)
inodes = st.builds(
    Inode,
    kind=st.just(0),
    mode=st.sampled_from([0, 0o644, 0o755, 0o4711, 0o1777]),
    uid=st.sampled_from([0, 1000, 70000, 0xFFFFFFFE]),
    gid=st.sampled_from([0, 5]),
    mtime=st.sampled_from([0, 1, 1_600_000_000, (1 << 33) - 1]),
    content=contents,
    rdev=st.tuples(st.integers(0, 4095), st.integers(0, (1 << 20) - 1)),
    xattrs=st.one_of(st.just({}), xattrs),
)
kinds = st.sampled_from(
    ["dir", "dir", "dir", "file", "file", "file", "symlink", "hardlink", "char", "block", "fifo", "whiteout", "opaque"]
)
parents = st.lists(st.sampled_from(NAMES[:4]), max_size=3).map(tuple)
steps = st.builds(
    Step, parent=parents, name=st.sampled_from(NAMES), kind=kinds, inode=inodes, link=st.integers(0, 1 << 16)
)
stacks = st.lists(st.lists(steps, max_size=25), min_size=1, max_size=4)

_TYPES = {
    "dir": (stat.S_IFDIR, tarfile.DIRTYPE),
    "file": (stat.S_IFREG, tarfile.REGTYPE),
    "symlink": (stat.S_IFLNK, tarfile.SYMTYPE),
    "char": (stat.S_IFCHR, tarfile.CHRTYPE),
    "block": (stat.S_IFBLK, tarfile.BLKTYPE),
    "fifo": (stat.S_IFIFO, tarfile.FIFOTYPE),
}


class Layer:
    """A tar and what it unpacks to: entries that would not unpack are left out on the way.

    `upstream`: only what upstream's merge does as it should and leaves nothing to chance: every directory has an entry,
    links are to files, link targets short (tarfs), an inode has one attribute at most, whiteouts have names in UTF-8.
    `whiteouts` False: there are none.
    """

    def __init__(self, plan: Sequence[Step], *, upstream: bool = False, whiteouts: bool = True) -> None:
        self.tree: Tree = {(): Inode(stat.S_IFDIR, 0o755, implied=True)}
        self.removed: set[Path] = set()
        self.opaque: set[Path] = set()
        self._upstream = upstream
        self._whiteouts = whiteouts
        self._out = io.BytesIO()
        self._tar = tarfile.open(  # noqa: SIM115  closed below
            fileobj=self._out, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
        )
        for step in plan:
            self._step(step)
        self._tar.close()
        self.data = self._out.getvalue()

    def _step(self, step: Step) -> None:
        path = (*step.parent, step.name)
        for depth in range(len(step.parent) + 1):
            above = self.tree.get(path[:depth])
            if above is not None and not above.is_dir:
                return
        if step.kind in ("whiteout", "opaque"):
            self._whiteout(step, path)
            return
        if step.kind == "hardlink":
            wanted = (stat.S_IFREG,) if self._upstream else (*(kind for kind, _ in _TYPES.values()),)
            files = sorted(p for p, i in self.tree.items() if i.kind in wanted and not i.is_dir and p != path)
            if not files:
                return
            target = files[step.link % len(files)]
            inode = self.tree[target]
            self._add(path, tarfile.LNKTYPE, inode, link=b"/".join(target))
        else:
            kind, tar_type = _TYPES[step.kind]
            inode = replace(step.inode, kind=kind)
            if step.kind == "symlink":
                inode.content = inode.content.replace(b"\0", b"0").replace(b"/", b"_")[:4000] or b"t"
            elif step.kind != "file":
                inode.content = b""
            if step.kind not in ("char", "block"):
                inode.rdev = (0, 0)
            if self._upstream:
                inode.content = inode.content[:400] if step.kind == "symlink" else inode.content
                inode.xattrs = dict(sorted(inode.xattrs.items())[:1])
            self._add(path, tar_type, inode)
        old = self.tree.get(path)
        if old is None or not old.is_dir or not inode.is_dir:
            for below in [p for p in self.tree if p[: len(path)] == path]:
                del self.tree[below]
        self.tree[path] = inode

    def _whiteout(self, step: Step, path: Path) -> None:
        if not self._whiteouts or len(step.name) > 251:  # no layer can hold such a whiteout: names have 255 bytes
            return
        if step.kind == "opaque":
            self.opaque.add(step.parent)
            self._add((*step.parent, b".wh..wh..opq"), tarfile.REGTYPE, Inode(0, 0))
        elif not self._upstream or _is_utf8(step.name):
            self.removed.add(path)
            self._add((*step.parent, b".wh." + step.name), tarfile.REGTYPE, Inode(0, 0))

    def _add(self, path: Path, kind: bytes, inode: Inode, link: bytes = b"") -> None:
        for depth in range(len(path)):
            if path[:depth] not in self.tree:
                self.tree[path[:depth]] = directory = Inode(stat.S_IFDIR, 0o755, implied=not self._upstream)
                if self._upstream:
                    self._write(path[:depth], tarfile.DIRTYPE, directory)
        self._write(path, kind, inode, link)

    def _write(self, path: Path, kind: bytes, inode: Inode, link: bytes = b"") -> None:
        member = tarfile.TarInfo(b"/".join(path).decode("utf-8", "surrogateescape"))
        member.type = kind
        member.mode, member.uid, member.gid, member.mtime = inode.mode, inode.uid, inode.gid, inode.mtime
        member.linkname = link.decode("utf-8", "surrogateescape")
        if kind == tarfile.SYMTYPE:
            member.linkname = inode.content.decode("utf-8", "surrogateescape")
        member.devmajor, member.devminor = inode.rdev
        member.pax_headers = {
            "SCHILY.xattr." + name.decode(): value.decode("utf-8", "surrogateescape")
            for name, value in inode.xattrs.items()
        }
        data = inode.content if kind == tarfile.REGTYPE else b""
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


def _is_utf8(name: bytes) -> bool:
    try:
        return bool(name.decode())
    except UnicodeDecodeError:
        return False


def overlay(stack: Sequence[Layer]) -> Tree:
    """What a container sees."""
    seen: Tree = {}
    for layer in stack:
        for path in list(seen):
            gone = any(path[: len(p)] == p for p in layer.removed)
            hidden = any(path[: len(p)] == p and len(path) > len(p) for p in layer.opaque)
            replaced = any(
                path[:depth] in layer.tree and not layer.tree[path[:depth]].is_dir for depth in range(1, len(path))
            )
            if gone or hidden or replaced:
                del seen[path]
        for path, inode in layer.tree.items():
            old = seen.get(path)
            if old is not None and old.is_dir and not inode.is_dir:
                for below in [p for p in seen if p[: len(path)] == path]:
                    del seen[below]
            if old is None or not old.is_dir or not inode.implied:
                seen[path] = inode
    return seen


def check_image(boot: Bootstrap, read_file: Callable[[int, int], bytes], expected: Tree) -> None:
    """Every path, attribute, link and byte of an image. `read_file(ino, size)`: the content of a file."""
    found = {(): boot.root}
    for path, entry in boot.walk():
        found[tuple(path.split(b"/"))] = entry.ino
    assert found.keys() == expected.keys()
    groups: dict[int, list[Path]] = {}
    for names, inode in expected.items():
        groups.setdefault(id(inode), []).append(names)
    for at, inode in expected.items():
        attr = boot.attr(found[at])
        assert attr.mode == inode.kind | inode.mode, at
        assert (attr.uid, attr.gid, attr.mtime, attr.mtime_nsec) == (inode.uid, inode.gid, inode.mtime, 0)
        assert boot.xattrs(found[at]) == inode.xattrs
        if inode.is_dir:
            below = [i for p, i in expected.items() if len(p) == len(at) + 1 and p[:-1] == at]
            assert attr.nlink == 2 + sum(i.is_dir for i in below)
            continue
        group = groups[id(inode)]
        if inode.kind == stat.S_IFREG or boot.version == 6:
            assert attr.nlink == len(group)
        else:  # v5 cannot link other files from a directory that comes later
            assert 1 <= attr.nlink <= len(group)
        if inode.kind == stat.S_IFREG:
            assert len({found[name] for name in group}) == 1
            assert read_file(found[at], attr.size) == inode.content
        elif inode.kind == stat.S_IFLNK:
            assert boot.readlink(found[at]) == inode.content
        elif inode.kind in (stat.S_IFCHR, stat.S_IFBLK):
            major, minor = inode.rdev
            assert attr.rdev == (major & 0xFFF) << 8 | (minor & 0xFF) | (minor & 0xFFF00) << 12
