"""What a container changed, as a layer: an overlayfs upper directory, or a folder mounted into it, becomes a tar.

The directories belong to a container, which may be hostile: they are walked by descriptors that never follow a link.
Kernel's overlayfs documentation is the source of what upper directories hold: whiteouts (character device 0:0), opaque
directories, redirected directories and files that are only metadata. The last two refer to lower layers by name, so
they are read through a mount that puts all together (`merged`), made when the first one turns up.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from bootstrap import tarwrite
from bootstrap.tarwrite import Member, pack_member, padding
from nydusfs.convert.facts import shown
from nydusfs.errors import ConvertError
from nydusfs.owners import UserNamespace, renumbered

log = logging.getLogger(__name__)

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
TRUSTED, USER = b"trusted.overlay.", b"user.overlay."  # overlayfs' attributes; the second with the option userxattr
MACHINE = UserNamespace()
_PIECE = 1 << 20
_KINDS = {stat.S_IFCHR: tarwrite.CHAR, stat.S_IFBLK: tarwrite.BLOCK_DEVICE, stat.S_IFIFO: tarwrite.FIFO}


class ChangedError(ConvertError):
    """A file changed while it was read: worth another try."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Paths without a leading slash. `left_out`: neither they nor what is below them is taken. `replaced`: the layer
    removes what lower layers have there, since another layer brings it anew."""

    left_out: Sequence[bytes] = field(default_factory=tuple)
    replaced: Sequence[bytes] = field(default_factory=tuple)

    def takes(self, path: bytes) -> bool:
        return not any(path == one or path.startswith(one + b"/") for one in (*self.left_out, *self.replaced))


def upper_layer(
    upper: int,
    choice: Choice,
    merged: Callable[[], int],
    marks: bytes = TRUSTED,
    namespace: UserNamespace = MACHINE,
) -> Iterator[bytes]:
    """Pieces of the layer tar for an upper directory. `upper` is a descriptor; `merged` gives that of the directory
    where upper and lower layers are seen as one; `marks` begin the names of overlayfs' attributes; owners are named as
    in `namespace`, the container's. Raises ConvertError that names the path."""
    with _changes_noticed():
        yield from _upper(upper, choice, merged, marks, namespace)
    yield tarwrite.END_OF_ARCHIVE


def _upper(
    upper: int, choice: Choice, merged: Callable[[], int], marks: bytes, namespace: UserNamespace
) -> Iterator[bytes]:
    writer = _Writer(marks, namespace)
    stack = [b""]
    while stack:
        path = stack.pop()
        with opened_directory(upper, path) as directory:
            if path and _mark(directory, b"", marks + b"opaque") == b"y":
                yield writer.whiteout(path, _OPAQUE.removeprefix(_WHITEOUT))
            for name in sorted(os.listdir(directory)):
                raw = os.fsencode(name)
                below = path + b"/" + raw if path else raw
                if not choice.takes(below):
                    continue
                found = os.lstat(raw, dir_fd=directory)
                if stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
                    yield writer.whiteout(path, raw)
                    continue
                if stat.S_ISDIR(found.st_mode) and _mark(directory, raw, marks + b"redirect") is not None:
                    # its old name has a whiteout of its own; here all of it is new
                    yield from _tree(merged(), below, writer, choice, opaque=True)
                    continue
                if stat.S_ISREG(found.st_mode) and _mark(directory, raw, marks + b"metacopy") is not None:
                    with opened_directory(merged(), path) as whole:
                        yield from writer.entry(whole, raw, below, os.lstat(raw, dir_fd=whole))
                    continue
                yield from writer.entry(directory, raw, below, found)
                if stat.S_ISDIR(found.st_mode):
                    stack.append(below)
    for path in choice.replaced:
        head, _, last = path.rpartition(b"/")
        yield writer.whiteout(head, last)


def folder_layer(top: int, path: bytes, choice: Choice, namespace: UserNamespace = MACHINE) -> Iterator[bytes]:
    """Pieces of the layer tar for all there is below `path` of the directory `top`, or for the one file it names.
    Mounts below are taken with it; owners are named as in `namespace`. Raises ConvertError that names the path."""
    with _changes_noticed():
        yield from _tree(top, path, _Writer(namespace=namespace), choice)
    yield tarwrite.END_OF_ARCHIVE


def _tree(top: int, path: bytes, writer: _Writer, choice: Choice, *, opaque: bool = False) -> Iterator[bytes]:
    head, _, name = path.rpartition(b"/")
    with opened_directory(top, head) as parent:
        try:
            found = os.lstat(name, dir_fd=parent)
        except FileNotFoundError:
            raise ConvertError(f"the container has no /{shown(path)}") from None
        yield from writer.entry(parent, name, path, found)
    if not stat.S_ISDIR(found.st_mode):
        return
    if opaque:
        yield writer.whiteout(path, _OPAQUE.removeprefix(_WHITEOUT))
    stack = [path]
    while stack:
        at = stack.pop()
        with opened_directory(top, at) as directory:
            for text in sorted(os.listdir(directory)):
                raw = os.fsencode(text)
                below = at + b"/" + raw
                if not choice.takes(below):
                    continue
                found = os.lstat(raw, dir_fd=directory)
                yield from writer.entry(directory, raw, below, found)
                if stat.S_ISDIR(found.st_mode):
                    stack.append(below)


class _Writer:
    """Entries of one layer; remembers the first name of each file with several. `marks`: attributes to leave out."""

    def __init__(self, marks: bytes = TRUSTED, namespace: UserNamespace = MACHINE) -> None:
        self._marks = marks
        self._namespace = namespace
        self._links: dict[tuple[int, int], bytes] = {}

    def whiteout(self, directory: bytes, name: bytes) -> bytes:
        path = b"/".join(part for part in (directory, _WHITEOUT + name) if part)
        return pack_member(Member(path, tarwrite.FILE, 0o600))

    def entry(self, directory: int, name: bytes, path: bytes, found: os.stat_result) -> Iterator[bytes]:
        if name.startswith(_WHITEOUT):
            raise ConvertError(
                f"/{shown(path)}: layers reserve names that begin with .wh. for deletions; "
                f"leave it out with --with-path '!/{shown(path)}'"
            )
        kind = stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFSOCK:
            log.info("/%s is a socket: layers have no place for it, it is left out", shown(path))
            return
        owner = self._namespace.user(found.st_uid), self._namespace.group(found.st_gid)
        member = Member(path, b"", stat.S_IMODE(found.st_mode), *owner)
        member.mtime = found.st_mtime_ns // 10**9
        if kind != stat.S_IFDIR and found.st_nlink > 1:
            first = self._links.setdefault((found.st_dev, found.st_ino), path)
            if first != path:
                member.kind, member.link = tarwrite.HARD_LINK, first
                yield pack_member(member)
                return
        member.xattrs = self._xattrs(directory, name, path)
        if kind == stat.S_IFREG:
            member.kind, member.size = tarwrite.FILE, found.st_size
            yield pack_member(member)
            yield from _content(directory, name, path, found)
            return
        if kind == stat.S_IFDIR:
            member.kind, member.name = tarwrite.DIRECTORY, path + b"/"
        elif kind == stat.S_IFLNK:
            member.kind, member.link = tarwrite.SYMLINK, os.readlink(name, dir_fd=directory)
        else:
            member.kind = _KINDS[kind]
            member.major, member.minor = os.major(found.st_rdev), os.minor(found.st_rdev)
        yield pack_member(member)

    def _xattrs(self, directory: int, name: bytes, path: bytes) -> dict[bytes, bytes]:
        place = b"/proc/self/fd/%d/%s" % (directory, name)
        found: dict[bytes, bytes] = {}
        try:
            for text in os.listxattr(place, follow_symlinks=False):
                key = os.fsencode(text)
                if not key.startswith(self._marks):
                    found[key] = os.getxattr(place, key, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise ConvertError(f"/{shown(path)}: its attributes cannot be read: {error.strerror}") from error
        return renumbered(found, self._namespace.user, self._namespace.group)


@contextmanager
def _changes_noticed() -> Iterator[None]:
    """What is gone, or of another kind, when it is looked at again."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL):
            raise
        name = shown(os.fsencode(error.filename)) if isinstance(error.filename, (str, bytes)) else "a file"
        raise ChangedError(f"{name} of the container changed while it was read") from None


@contextmanager
def opened_directory(top: int, path: bytes) -> Iterator[int]:
    """A descriptor of the directory `path` below `top`; no component may be a link. Raises ConvertError."""
    descriptor = descend(top, path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def descend(top: int, path: bytes) -> int:
    """A new descriptor of the directory `path` below the directory `top`. Raises ConvertError."""
    at = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=top)
    done: list[bytes] = []
    try:
        for part in path.split(b"/") if path else ():
            done.append(part)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
    except OSError as error:
        os.close(at)
        where = shown(b"/" + b"/".join(done))
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise ConvertError(f"{where} of the container is no directory (links are not followed)") from None
        raise ConvertError(f"{where} of the container: {error.strerror}") from error
    return at


def _content(directory: int, name: bytes, path: bytes, found: os.stat_result) -> Iterator[bytes]:
    descriptor = _opened_file(directory, name, path, found)
    size = found.st_size
    try:
        left = size
        while left:
            piece = os.read(descriptor, min(_PIECE, left))
            if not piece:
                break
            left -= len(piece)
            yield piece
        if left or os.read(descriptor, 1):
            raise ChangedError(f"/{shown(path)} of the container changed while it was read")
    except OSError as error:
        raise ConvertError(f"/{shown(path)} of the container cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)
    yield padding(size)


def _opened_file(directory: int, name: bytes, path: bytes, found: os.stat_result) -> int:
    """The file that was `found`. Opening what took its place meanwhile could wait (a pipe) or act (a device, which the
    container may make though not open), so it is first looked at without."""
    try:
        look = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            there = os.fstat(look)
            if (there.st_dev, there.st_ino, stat.S_IFMT(there.st_mode)) != (found.st_dev, found.st_ino, stat.S_IFREG):
                raise ChangedError(f"/{shown(path)} of the container was replaced while it was read")
            return os.open(b"/proc/self/fd/%d" % look, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(look)
    except FileNotFoundError:
        raise ChangedError(f"/{shown(path)} of the container was removed while it was read") from None
    except OSError as error:
        raise ConvertError(f"/{shown(path)} of the container cannot be read: {error.strerror}") from error


def _mark(directory: int, name: bytes, attribute: bytes) -> bytes | None:
    """One of overlayfs' marks on an entry (with name "" on the directory itself); None without it."""
    place = b"/proc/self/fd/%d/%s" % (directory, name or b".")
    try:
        return os.getxattr(place, attribute, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.ENOTSUP):
            raise
        return None
