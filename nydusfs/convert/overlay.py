"""A plain image mounted as containerd's overlayfs snapshotter would: one directory per layer, overlayfs over them.

Unpacked with the standard library's tar reader on purpose, as `sourcetree` is: a check that shared our builder's reader
would share its mistakes. Layers may be hostile: directories are entered by descriptors that never follow a link.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from nydusfs.convert.facts import kept_xattrs
from nydusfs.convert.images import Image
from nydusfs.convert.progress import Progress, size_text
from nydusfs.convert.sourcetree import MAX_FOLLOWED
from nydusfs.errors import ConvertError, os_reason
from nydusfs.trees import remove_tree

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_RESERVED = b".wh..wh."
_MARK = b"trusted.overlay.opaque"
_XATTR = "SCHILY.xattr."
_PIECE = 1 << 20
_ENTER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# of directories that no layer describes: `MountView` takes times before 1970 for unknown
_NO_TIME = -1
_MAX_LOWER_TEXT = 3500  # of one mount(2) page of options

_KINDS = {tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO}


@contextmanager
def overlay_mounted(image: Image, folder: Path, progress: Progress) -> Iterator[Path]:
    """Where the image is mounted, below `folder`; the layers go again, the empty mountpoint stays. Raises ConvertError
    that names the layer."""
    from bootstrap.errors import RafsError
    from bootstrap.tar import open_layer

    layers, mountpoint = folder / "layers", folder / "mnt"
    remove_tree(layers, ignore_errors=True)
    for made in (layers, mountpoint):
        made.mkdir(parents=True, exist_ok=True)
    done: list[Path] = []
    try:
        for number, layer in enumerate(image.layers):
            what = f"layer {layer.digest} of {image.name}"
            progress.start(layer.digest, f"layer {layer.hex[:12]}", layer.size)
            try:
                with (
                    image.endpoint.open_blob(layer.digest, layer.size) as stored,
                    open_layer(cast(BinaryIO, stored)) as plain,
                ):
                    unpack_layer(plain, layers / str(number), done, what)
                    while plain.read(_PIECE):
                        pass
            except RafsError as error:
                raise ConvertError(f"{what}: {error}") from error
            done.append(layers / str(number))
            progress.finish(layer.digest)
            progress.note(f"unpacked layer {layer.hex[:12]} ({size_text(layer.size)})")
        _mount(done, layers, mountpoint, image.name)
        try:
            yield mountpoint
        finally:
            subprocess.run(["umount", str(mountpoint)], capture_output=True, timeout=60, check=False)
    finally:
        remove_tree(layers, ignore_errors=True)


def _mount(lower: Sequence[Path], layers: Path, mountpoint: Path, name: str) -> None:
    """Names relative to the layers' directory keep the options of 500 layers in the one page that mount(2) takes."""
    (layers / "empty").mkdir()
    names = ":".join([*(one.name for one in reversed(lower)), "empty"])
    if len(names) > _MAX_LOWER_TEXT:
        raise ConvertError(f"{name} has too many layers for overlayfs: check without a mount (--no-mount)")
    command = ["mount", "-t", "overlay", "overlay", "-o", f"ro,lowerdir={names}", str(mountpoint.resolve())]
    done = subprocess.run(command, cwd=layers, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise ConvertError(f"{name} cannot be mounted: {done.stderr.strip()} (or check without a mount: --no-mount)")


def unpack_layer(stream: BinaryIO, folder: Path, below: Sequence[Path], what: str) -> None:
    """Unpacks one uncompressed layer into the new directory `folder`, with overlayfs' whiteouts. `below`: directories
    of the layers below, lowest first; directories that this layer only implies look as they do there. Raises
    ConvertError that names `what`."""
    folder.mkdir()
    try:
        with (
            _Unpacker(folder, below, what) as unpacker,
            tarfile.open(
                fileobj=stream, mode="r|", encoding="utf-8", errors="surrogateescape", ignore_zeros=True
            ) as archive,
        ):
            while (member := archive.next()) is not None:
                unpacker.add(archive, member)
                cast(Any, archive).members.clear()  # it remembers every entry: 2 kB each
    except (tarfile.TarError, EOFError, UnicodeError, ValueError) as error:
        raise ConvertError(f"{what} is not a readable tar: {error}") from error
    except OSError as error:
        raise ConvertError(f"{what} cannot be unpacked: {os_reason(error)}") from error


def _link_target(parent: int, name: bytes) -> bytes | None:
    try:
        return os.readlink(name, dir_fd=parent)
    except OSError:
        return None


class _Unpacker:
    def __init__(self, folder: Path, below: Sequence[Path], what: str) -> None:
        self._top = os.open(folder, _ENTER)
        self._below = below
        self._what = what
        self._times: dict[bytes, int] = {}  # of directories, set when nothing more comes into them
        os.utime(self._top, (_NO_TIME, _NO_TIME))

    def __enter__(self) -> _Unpacker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for path, mtime in self._times.items():
                    with suppress(ConvertError), self._entered(path.split(b"/")) as (descriptor, real):
                        if b"/".join(real) == path:  # else something else has its name by now
                            os.utime(descriptor, ns=(mtime, mtime))
        finally:
            os.close(self._top)

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = self._parts(member.name)
        if not parts:
            if member.isdir():
                self._attributes(b"/proc/self/fd/%d/." % self._top, member)
            return
        name = parts[-1]
        with self._entered(parts[:-1]) as (parent, above):
            if name.startswith(_WHITEOUT):
                self._whiteout(parent, name)
                return
            self._make(archive, member, parent, name)
            self._attributes(b"/proc/self/fd/%d/%s" % (parent, name), member)  # a link's are those of its file, too
            if member.isdir():
                self._times[b"/".join([*above, name])] = int(member.mtime * 10**9)

    def _parts(self, name: str) -> list[bytes]:
        parts = [part for part in name.encode("utf-8", "surrogateescape").split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise ConvertError(f"{self._what}: entry {name!r} leads out of the layer")
        return parts

    @contextmanager
    def _entered(self, parts: Sequence[bytes]) -> Iterator[tuple[int, list[bytes]]]:
        """A descriptor of a directory of the layer, made where it is missing, and its path. Links of the layer on the
        way are followed within the layer, as containerd does."""
        trail, names = [os.dup(self._top)], list[bytes]()
        todo, followed = list(reversed(parts)), 0

        def back_to(depth: int) -> None:
            while len(names) > depth:
                names.pop()
                os.close(trail.pop())

        try:
            while todo:
                part = todo.pop()
                if part == b"..":  # only from a link
                    back_to(max(0, len(names) - 1))
                    continue
                target = _link_target(trail[-1], part)
                if target is not None:
                    followed += 1
                    if followed > MAX_FOLLOWED:
                        raise ConvertError(f"{self._what}: too many symbolic links on the way to {parts[-1]!r}")
                    if target.startswith(b"/"):
                        back_to(0)
                    todo += [one for one in reversed(target.split(b"/")) if one not in (b"", b".")]
                    continue
                try:
                    below = os.open(part, _ENTER, dir_fd=trail[-1])
                except FileNotFoundError:
                    self._imply(trail[-1], [*names, part])
                    below = os.open(part, _ENTER, dir_fd=trail[-1])
                except NotADirectoryError:
                    if not self._clear(trail[-1], part):
                        raise ConvertError(
                            f"{self._what}: an entry lies below {part!r}, which is no directory"
                        ) from None
                    self._imply(trail[-1], [*names, part], opaque=True)
                    below = os.open(part, _ENTER, dir_fd=trail[-1])
                trail.append(below)
                names.append(part)
            yield trail[-1], names
        finally:
            for descriptor in trail:
                os.close(descriptor)

    def _imply(self, parent: int, parts: list[bytes], *, opaque: bool = False) -> None:
        """The layer has no entry for this directory. `opaque`: it removes what lies below."""
        name, path = parts[-1], b"/".join(parts)
        os.mkdir(name, 0o755, dir_fd=parent)
        here = b"/proc/self/fd/%d/%s" % (parent, name)
        self._times[path] = _NO_TIME * 10**9
        if opaque:
            os.setxattr(here, _MARK, b"y")
            return
        for lower in reversed(self._below):
            there = os.path.join(os.fsencode(lower), path)
            try:
                found = os.lstat(there)
            except OSError:
                continue
            if stat.S_ISDIR(found.st_mode):
                os.chown(here, found.st_uid, found.st_gid)
                os.chmod(here, stat.S_IMODE(found.st_mode))
                for key in os.listxattr(there):
                    if not key.startswith("trusted.overlay."):
                        os.setxattr(here, key, os.getxattr(there, key))
                self._times[path] = found.st_mtime_ns
            return

    def _clear(self, parent: int, name: bytes) -> bool:
        """Removes an entry of this layer that another replaces; whether it was a whiteout."""
        try:
            found = os.lstat(name, dir_fd=parent)
        except FileNotFoundError:
            return False
        if stat.S_ISDIR(found.st_mode):
            remove_tree(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)
        return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0

    def _whiteout(self, parent: int, name: bytes) -> None:
        """It removes what lower layers have, never what this layer has."""
        if name == _OPAQUE:
            os.setxattr(b"/proc/self/fd/%d/." % parent, _MARK, b"y")
        elif not name.startswith(_RESERVED):
            victim = name[len(_WHITEOUT) :]
            try:
                found = os.lstat(victim, dir_fd=parent)
            except FileNotFoundError:
                os.mknod(victim, stat.S_IFCHR, 0, dir_fd=parent)
                return
            if stat.S_ISDIR(found.st_mode):
                os.setxattr(b"/proc/self/fd/%d/%s" % (parent, victim), _MARK, b"y")

    def _make(self, archive: tarfile.TarFile, member: tarfile.TarInfo, parent: int, name: bytes) -> None:
        if member.isdir():
            try:
                if stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                    return
            except FileNotFoundError:
                pass
        was_removed = self._clear(parent, name)
        if member.isdir():
            os.mkdir(name, 0o755, dir_fd=parent)
            if was_removed:
                os.setxattr(b"/proc/self/fd/%d/%s" % (parent, name), _MARK, b"y")
        elif member.islnk():
            target = self._parts(member.linkname)
            with self._entered(target[:-1]) as (folder, _):
                try:
                    os.link(target[-1], name, src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False)
                except (FileNotFoundError, IndexError):
                    said = f"{self._what}: hard link {member.name!r} to {member.linkname!r}"
                    raise ConvertError(f"{said}, which this layer does not have") from None
        elif member.issym():
            os.symlink(member.linkname.encode("utf-8", "surrogateescape"), name, dir_fd=parent)
        elif member.type in _KINDS:
            device = 0 if member.isfifo() else os.makedev(member.devmajor, member.devminor)
            os.mknod(name, _KINDS[member.type] | 0o600, device, dir_fd=parent)
        elif member.isreg():
            self._write(archive, member, os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=parent))
        else:
            raise ConvertError(f"{self._what}: entry {member.name!r} has the unknown type {member.type!r}")

    def _write(self, archive: tarfile.TarFile, member: tarfile.TarInfo, descriptor: int) -> None:
        with os.fdopen(descriptor, "wb") as out:
            source = archive.extractfile(member)
            assert source is not None
            shutil.copyfileobj(source, out, _PIECE)

    def _attributes(self, place: bytes, member: tarfile.TarInfo) -> None:
        os.chown(place, member.uid, member.gid, follow_symlinks=False)
        if not stat.S_ISLNK(os.lstat(place).st_mode):
            os.chmod(place, stat.S_IMODE(member.mode))  # after chown, which takes the set-id bits away
        xattrs = {
            key[len(_XATTR) :].encode("utf-8", "surrogateescape"): value.encode("utf-8", "surrogateescape")
            for key, value in member.pax_headers.items()
            if key.startswith(_XATTR)
        }
        for key, value in kept_xattrs(xattrs).items():
            os.setxattr(place, key, value, follow_symlinks=False)
        mtime = int(member.mtime * 10**9)
        os.utime(place, ns=(mtime, mtime), follow_symlinks=False)
