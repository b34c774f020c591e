"""Random layer stacks through tar -> build -> merge -> reader, against a model of what OCI layering means.

The model works on flat maps of paths and knows nothing of nodes, chunks or inodes.
"""

from __future__ import annotations

import io
import stat
import tarfile
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bootstrap.build import BuildOptions, build_layer
from bootstrap.chunkmap import ChunkMap
from bootstrap.decode import decode_chunk
from bootstrap.layout.common import Compressor, Digester
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.reader import Bootstrap, open_bootstrap

NAMES = [b"a", b"b", b"c.d", b"!", b"\xff\xfe", "é".encode(), b"n" * 255, b"...", b"A"]
CHUNK = 0x1000


@dataclass(eq=False)
class Inode:
    kind: int
    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    content: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    implied: bool = False


@dataclass
class Step:
    """One entry of a layer tar."""

    parent: tuple[bytes, ...]
    name: bytes
    kind: str
    inode: Inode
    link: int = 0


Tree = dict[tuple[bytes, ...], Inode]

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
layers = st.lists(st.lists(steps, max_size=25), min_size=1, max_size=4)

_TYPES = {
    "dir": (stat.S_IFDIR, tarfile.DIRTYPE),
    "file": (stat.S_IFREG, tarfile.REGTYPE),
    "symlink": (stat.S_IFLNK, tarfile.SYMTYPE),
    "char": (stat.S_IFCHR, tarfile.CHRTYPE),
    "block": (stat.S_IFBLK, tarfile.BLKTYPE),
    "fifo": (stat.S_IFIFO, tarfile.FIFOTYPE),
}


class Layer:
    """A tar and what it unpacks to: entries that would not unpack are left out on the way."""

    def __init__(self, plan: list[Step]) -> None:
        self.tree: Tree = {(): Inode(stat.S_IFDIR, 0o755, implied=True)}
        self.removed: set[tuple[bytes, ...]] = set()
        self.opaque: set[tuple[bytes, ...]] = set()
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
            if above is not None and above.kind != stat.S_IFDIR:
                return
        if step.kind == "whiteout":
            if len(step.name) > 251:  # no layer bootstrap can hold such a whiteout: names have 255 bytes
                return
            self.removed.add(path)
            self._add((*step.parent, b".wh." + step.name), tarfile.REGTYPE, Inode(0, 0))
            return
        if step.kind == "opaque":
            self.opaque.add(step.parent)
            self._add((*step.parent, b".wh..wh..opq"), tarfile.REGTYPE, Inode(0, 0))
            return
        if step.kind == "hardlink":
            files = sorted(p for p, i in self.tree.items() if i.kind != stat.S_IFDIR and p != path)
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
            self._add(path, tar_type, inode)
        old = self.tree.get(path)
        if old is None or old.kind != stat.S_IFDIR or inode.kind != stat.S_IFDIR:
            for below in [p for p in self.tree if p[: len(path)] == path]:
                del self.tree[below]
        self.tree[path] = inode

    def _add(self, path: tuple[bytes, ...], kind: bytes, inode: Inode, link: bytes = b"") -> None:
        for depth in range(len(path)):
            self.tree.setdefault(path[:depth], Inode(stat.S_IFDIR, 0o755, implied=True))
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


def overlay(stack: list[Layer]) -> Tree:
    """What a container sees."""
    seen: Tree = {}
    for layer in stack:
        for path in list(seen):
            gone = any(path[: len(p)] == p for p in layer.removed)
            hidden = any(path[: len(p)] == p and len(path) > len(p) for p in layer.opaque)
            replaced = any(
                path[:depth] in layer.tree and layer.tree[path[:depth]].kind != stat.S_IFDIR
                for depth in range(1, len(path))
            )
            if gone or hidden or replaced:
                del seen[path]
        for path, inode in layer.tree.items():
            old = seen.get(path)
            if old is not None and old.kind == stat.S_IFDIR and inode.kind != stat.S_IFDIR:
                for below in [p for p in seen if p[: len(path)] == path]:
                    del seen[below]
            if old is None or old.kind != stat.S_IFDIR or not inode.implied:
                seen[path] = inode
    return seen


class Image:
    """Reads a merged image through the public reader."""

    def __init__(self, boot: Bootstrap, blobs: dict[str, bytes]) -> None:
        self.boot = boot
        self.blobs = blobs
        self.chunks = ChunkMap.open(boot, None)

    def content(self, ino: int) -> bytes:
        out = bytearray()
        for extent in self.boot.extents(ino, 0, self.boot.attr(ino).size):
            chunk = self.chunks.chunk(self.chunks.find(extent.blob_index, extent.blob_offset))
            blob = self.boot.blobs[extent.blob_index]
            stored = self.blobs[blob.id][chunk.compressed_offset : chunk.compressed_offset + chunk.compressed_size]
            plain = decode_chunk(chunk, blob, memoryview(stored))
            start = extent.blob_offset - chunk.uncompressed_offset
            out += plain[start : start + extent.size]
        return bytes(out)


def check(image: Image, expected: Tree, version: int) -> None:
    boot = image.boot
    found = {(): boot.root}
    for path, entry in boot.walk():
        found[tuple(path.split(b"/"))] = entry.ino
    assert found.keys() == expected.keys()
    groups: dict[int, list[tuple[bytes, ...]]] = {}
    for path, inode in expected.items():
        groups.setdefault(id(inode), []).append(path)
    for path, inode in expected.items():
        attr = boot.attr(found[path])
        assert attr.mode == inode.kind | inode.mode, path
        assert (attr.uid, attr.gid, attr.mtime) == (inode.uid, inode.gid, inode.mtime)
        assert boot.xattrs(found[path]) == inode.xattrs
        if inode.kind == stat.S_IFDIR:
            below = [i for p, i in expected.items() if len(p) == len(path) + 1 and p[:-1] == path]
            assert attr.nlink == 2 + sum(i.kind == stat.S_IFDIR for i in below)
            continue
        names = groups[id(inode)]
        assert attr.nlink == len(names)
        if inode.kind == stat.S_IFREG:
            assert len({found[name] for name in names}) == 1
            assert image.content(found[path]) == inode.content
        elif inode.kind == stat.S_IFLNK:
            assert boot.readlink(found[path]) == inode.content
        elif inode.kind in (stat.S_IFCHR, stat.S_IFBLK):
            major, minor = inode.rdev
            assert attr.rdev == (major & 0xFFF) << 8 | (minor & 0xFF) | (minor & 0xFFF00) << 12


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    plans=layers,
    version=st.sampled_from([5, 6]),
    compressor=st.sampled_from([Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD]),
    digester=st.sampled_from(list(Digester)),
    toc=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_layers_become_the_image_a_container_sees(
    plans: list[list[Step]], version: int, compressor: Compressor, digester: Digester, toc: bool, threads: int
) -> None:
    stack = [Layer(plan) for plan in plans]
    options = BuildOptions(
        fs_version=version,
        compressor=compressor,
        digester=digester,
        chunk_size=CHUNK,
        inline_meta=True,
        blob_toc=toc and version == 6,
        threads=threads,
    )
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        sources, blobs = [], {}
        for number, layer in enumerate(stack):
            out = io.BytesIO()
            result = build_layer(io.BytesIO(layer.data), out, options)
            blobs[result.blob_sha256] = out.getvalue()
            path = work / f"layer{number}"
            path.write_bytes(out.getvalue())
            sources.append(MergeSource(path, blob_digest=result.blob_sha256))
        merge_layers(sources, work / "image.boot")
        with open_bootstrap(work / "image.boot") as boot:
            image = Image(boot, blobs)
            check(image, overlay(stack), version)
            files = [entry.ino for _, entry in boot.walk() if entry.dtype == 8]
            used = {extent.blob_index for ino in files for extent in boot.extents(ino, 0, 1 << 40)}
            assert used == set(range(len(boot.blobs)))
