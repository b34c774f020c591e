"""What a comparison of two file systems looks at, and the difference between two such records."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

# The RAFS formats hold these namespaces and no others.
_XATTR_PREFIXES = (b"user.", b"trusted.", b"security.", b"system.posix_acl_")


@dataclass(slots=True)
class Facts:
    """`mode` with type bits; `size` of files only; `mtime` in seconds, None where the source has no usable time;
    `sha256` of the content of files, "" while not known."""

    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    rdev: int = 0
    mtime: int | None = None
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    sha256: str = ""

    @property
    def kind(self) -> str:
        return _KINDS.get(stat.S_IFMT(self.mode), "unknown")


_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def kept_xattrs(found: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {name: value for name, value in found.items() if name.startswith(_XATTR_PREFIXES)}


def differences(source: Facts, target: Facts) -> Iterator[str]:
    """Each as `what: source value, target value`; contents are compared elsewhere."""
    if source.kind != target.kind:
        yield f"type: source {source.kind}, target {target.kind}"
        return
    # every symlink is 0777 on Linux, whatever an archive says
    if source.kind != "symlink" and source.mode != target.mode:
        yield f"mode: source {stat.S_IMODE(source.mode):04o}, target {stat.S_IMODE(target.mode):04o}"
    for field_name in ("uid", "gid"):
        if (left := getattr(source, field_name)) != (right := getattr(target, field_name)):
            yield f"{field_name}: source {left}, target {right}"
    if source.kind == "file" and source.size != target.size:
        yield f"size: source {source.size}, target {target.size}"
    if source.rdev != target.rdev:
        yield f"device: source {source.rdev:#x}, target {target.rdev:#x}"
    if source.target != target.target:
        yield f"link target: source {shown(source.target)}, target {shown(target.target)}"
    if source.mtime is not None and source.mtime != target.mtime:
        yield f"mtime: source {source.mtime}, target {target.mtime}"
    for name in sorted({*source.xattrs, *target.xattrs}):
        mine, theirs = source.xattrs.get(name), target.xattrs.get(name)
        if mine != theirs:
            yield f"xattr {shown(name)}: source {_value(mine)}, target {_value(theirs)}"


def shown(text: bytes) -> str:
    return text.decode("utf-8", "backslashreplace")


def _value(value: bytes | None) -> str:
    if value is None:
        return "none"
    return shown(value) if len(value) <= 64 else f"{len(value)} bytes"
