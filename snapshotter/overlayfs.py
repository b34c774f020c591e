"""`nydus-overlayfs`: the mount helper behind mounts of type `fuse.nydus-overlayfs` (snapshotter.md 5.4).

containerd runs `mount.fuse overlay TARGET -o OPTIONS -t nydus-overlayfs`, which runs this. What is there for virtual
machine runtimes is taken out, and an ordinary overlay is mounted. Exit code 1 and one line for anything wrong; the
options may hold a registry password and are never printed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

FOR_RUNTIMES = ("extraoption=", "io.katacontainers.volume=")
PAGE = 4096  # mount(2) takes no more text
ROOM = 512  # as containerd: from here on directories are shortened

# option -> (flag of mount(2), whether it sets or clears it)
FLAGS: dict[str, tuple[int, bool]] = {
    "ro": (1, True), "rw": (1, False), "nosuid": (2, True), "suid": (2, False), "nodev": (4, True), "dev": (4, False),
    "noexec": (8, True), "exec": (8, False), "sync": (16, True), "async": (16, False), "remount": (32, True),
    "mand": (64, True), "nomand": (64, False), "dirsync": (128, True), "noatime": (1024, True),
    "atime": (1024, False), "nodiratime": (2048, True), "diratime": (2048, False), "bind": (4096, True),
    "rbind": (4096 | 16384, True), "relatime": (1 << 21, True), "norelatime": (1 << 21, False),
    "strictatime": (1 << 24, True), "nostrictatime": (1 << 24, False), "defaults": (0, False),
}  # fmt: skip


class UsageError(Exception):
    """A command line of another form."""


def split(options: str) -> tuple[int, list[str]]:
    """(flags, what goes to overlayfs), without what only runtimes of virtual machines understand."""
    flags, data = 0, []
    for option in options.split(","):
        if option in FLAGS:
            flag, sets = FLAGS[option]
            flags = flags | flag if sets else flags & ~flag
        elif option and not option.startswith(FOR_RUNTIMES):
            data.append(option)
    return flags, data


def shorten(data: Sequence[str]) -> tuple[str, list[str]]:
    """(directory to mount from, options) with paths relative to it; ("", options) if that saves nothing."""
    lower = [path for option in data if option.startswith("lowerdir=") for path in option[9:].split(":")]
    if not lower or not all(map(os.path.isabs, lower)):
        return "", list(data)
    common = os.path.commonpath(lower)
    if common in ("/", *lower):
        return "", list(data)

    def relative(path: str) -> str:
        return os.path.relpath(path, common) if path.startswith(f"{common}/") else path

    short = []
    for option in data:
        name, _, value = option.partition("=")
        if name in ("lowerdir", "upperdir", "workdir"):
            option = f"{name}={':'.join(map(relative, value.split(':')))}"
        short.append(option)
    return common, short


def run(arguments: Sequence[str]) -> None:
    """Mounts. Raises UsageError, OSError."""
    if len(arguments) != 4 or arguments[2] != "-o":
        raise UsageError("usage: nydus-overlayfs overlay TARGET -o OPTIONS")
    if arguments[0] != "overlay":
        raise UsageError(f"the source is {arguments[0]!r}, expected overlay: this mounts overlayfs only")
    target = os.path.abspath(arguments[1])
    flags, data = split(arguments[3])
    text = ",".join(data)
    if len(os.fsencode(text)) >= PAGE - ROOM:
        folder, data = shorten(data)
        text = ",".join(data)
        if len(os.fsencode(text)) >= PAGE:
            raise UsageError(f"the options for overlayfs take {len(os.fsencode(text))} bytes, the kernel takes {PAGE}")
        if folder:
            os.chdir(folder)
    from snapshotter.system import mount

    mount("overlay", "overlay", target, flags, text)


def main() -> None:
    """Console script."""
    try:
        run(sys.argv[1:])
    except UsageError as error:
        said = str(error)
    except OSError as error:
        said = f"{error.filename or sys.argv[2]}: overlay cannot be mounted: {error.strerror}"
    else:
        return
    sys.stderr.write(f"nydus-overlayfs: {said}\n")
    raise SystemExit(1)


if __name__ == "__main__":
    main()
