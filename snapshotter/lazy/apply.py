"""Unpacks one OCI layer, as a program of its own: `python -m snapshotter.lazy.apply SCRATCH [LOWER]... <layer.tar`.

SCRATCH has the empty directories `fs`, `work` and `merged`; `fs` is the result. LOWER: directories of the layers below,
nearest first. With them the layer is unpacked into an overlay mount, so what the kernel makes of its whiteouts and of
directories it does not name is the layer in overlay's form. The mount is seen by this process alone and ends with it;
the process is confined to it (chroot), so that no link in the layer leads out.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
import tarfile
from io import BufferedReader
from typing import cast

from nydusfs.trees import remove_tree

WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
_PIECE = 1 << 20
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18
_XATTR = "SCHILY.xattr."


def apply(stream: BufferedReader) -> None:
    """Below the current root. Raises OSError, tarfile.TarError."""
    if not stream.peek(1):
        return  # containerd takes it for an empty layer, `tarfile` for none
    made: set[str] = set()
    times: dict[str, int] = {}
    with tarfile.open(fileobj=stream, mode="r|", errorlevel=2) as archive:
        for member in archive:
            path = os.path.normpath("/" + member.name)
            folder, name = os.path.split(path)
            _make_parents(folder)
            if name == OPAQUE:
                _empty(folder, made)
            elif name.startswith(WHITEOUT):
                if not name.startswith(WHITEOUT + WHITEOUT):  # aufs keeps notes of its own under such names
                    _remove(os.path.join(folder, name.removeprefix(WHITEOUT)))
            else:
                _extract(archive, member, path)
                made.add(path)
                times[path] = round(float(member.pax_headers.get("mtime", member.mtime)) * 10**9)
    # Directories last: what was put into them changed theirs.
    for path, when in sorted(times.items(), reverse=True):
        if os.path.lexists(path):
            os.utime(path, ns=(when, when), follow_symlinks=False)


def _make_parents(folder: str) -> None:
    if not os.path.isdir(folder):
        os.makedirs(folder, 0o755, exist_ok=True)


def _empty(folder: str, made: set[str]) -> None:
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if not any(one == path or one.startswith(path + "/") for one in made):
            _remove(path)


def _remove(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    remove_tree(path) if stat.S_ISDIR(mode) else os.unlink(path)


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    there = os.lstat(path).st_mode if os.path.lexists(path) else 0
    if there and not (member.isdir() and stat.S_ISDIR(there)):
        _remove(path)
        there = 0
    if member.isdir():
        if not there:
            os.mkdir(path)
    elif member.isreg():
        source = archive.extractfile(member)
        with open(path, "xb") as out:
            while source is not None and (piece := source.read(_PIECE)):
                out.write(piece)
    elif member.issym():
        os.symlink(member.linkname, path)
    elif member.islnk():
        os.link(os.path.normpath("/" + member.linkname), path, follow_symlinks=False)
    elif member.isfifo():
        os.mkfifo(path)
    elif member.ischr() or member.isblk():
        kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
        os.mknod(path, kind | 0o600, os.makedev(member.devmajor, member.devminor))
    else:
        raise tarfile.TarError(f"{member.name}: entry of type {member.type!r}")
    os.lchown(path, member.uid, member.gid)
    for key, value in member.pax_headers.items():
        if key.startswith(_XATTR):
            # tarfile decodes PAX values; what was no UTF-8 comes back by the same rule
            data = value.encode("utf-8", "surrogateescape")
            os.setxattr(path, key.removeprefix(_XATTR).encode("utf-8", "surrogateescape"), data, follow_symlinks=False)
    if not stat.S_ISLNK(os.lstat(path).st_mode):  # a hard link's header counts too, as in containerd
        os.chmod(path, member.mode & 0o7777)


def _enter(scratch: str, below: list[str]) -> None:
    """Raises OSError."""
    root = f"{scratch}/fs"
    if below:
        libc = ctypes.CDLL(None, use_errno=True)

        def must(result: int, what: str) -> None:
            if result != 0:
                raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")

        must(libc.unshare(CLONE_NEWNS), "unshare")
        must(libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None), "making / private")
        # Relative, as the options of 500 layers would not fit the one page that the kernel takes.
        common = os.path.commonpath([scratch, *below])
        os.chdir(common)
        upper, work, *lower = (os.path.relpath(one, common) for one in (root, f"{scratch}/work", *below))
        options = f"upperdir={upper},workdir={work},lowerdir={':'.join(lower)}".encode()
        root = f"{scratch}/merged"
        must(libc.mount(b"overlay", os.fsencode(root), b"overlay", ctypes.c_ulong(0), options), "overlay mount")
    os.chroot(root)
    os.chdir("/")


def main() -> None:
    os.umask(0)
    try:
        _enter(sys.argv[1], sys.argv[2:])
        apply(cast(BufferedReader, sys.stdin.buffer))
        while sys.stdin.buffer.read(_PIECE):
            pass
    except (OSError, tarfile.TarError, ValueError) as error:
        print(str(error) or type(error).__name__, file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
