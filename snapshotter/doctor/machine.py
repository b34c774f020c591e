"""The kernel, FUSE, and by which driver images are served."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from nydusfs.drivers import kernel
from nydusfs.drivers.erofs import selftest
from nydusfs.errors import NydusError
from snapshotter.doctor.finding import Finding, error, note, ok, warning
from snapshotter.errors import SnapshotterError
from snapshotter.node import Node

RESEND = (6, 9)  # the first Linux that delivers a dead worker's requests again
OLDEST = (5, 4)


def kernel_release(node: Node) -> Iterator[Finding]:
    release = os.uname().release
    found = re.match(r"(\d+)\.(\d+)", release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < OLDEST:
        yield error("machine.kernel", f"Linux {release} is older than {OLDEST[0]}.{OLDEST[1]}", "a newer kernel")
    elif version < RESEND:
        yield note(
            "machine.kernel",
            f"Linux {release}: a reader that waits while a nydusd worker dies gets an error, as the kernel does not "
            "deliver its request again",
            "Linux 6.9 or newer, where this matters",
        )
    else:
        yield ok("machine.kernel", f"Linux {release}")
    if "\toverlay\n" not in Path("/proc/filesystems").read_text():
        yield error("machine.overlay", "the kernel has no overlayfs: containers cannot be mounted", "modprobe overlay")


def fuse(node: Node) -> Iterator[Finding]:
    try:
        kernel.check_fuse_device()
        device = os.stat(kernel.DEV_FUSE).st_rdev
        if (os.major(device), os.minor(device)) != (10, 229):
            yield error("machine.fuse", f"{kernel.DEV_FUSE} is another device", f"mknod {kernel.DEV_FUSE} c 10 229")
            return
        os.close(os.open(kernel.DEV_FUSE, os.O_RDWR | os.O_CLOEXEC))
    except NydusError as failure:
        yield error("machine.fuse", str(failure), "modprobe fuse, or pass /dev/fuse into the container")
    except OSError as failure:
        yield error(
            "machine.fuse", f"/dev/fuse: {failure.strerror}", "run as root, with the device allowed in the cgroup"
        )
    else:
        yield ok("machine.fuse", "/dev/fuse can be opened")


def driver(node: Node) -> Iterator[Finding]:
    """Which way images take to the kernel, and why."""
    settings = node.need()
    try:
        chosen = node.template.fs_driver
    except SnapshotterError:
        return  # said by another check
    shared = {one.id: one.shared for one in node.daemons()}
    images = [str(node.mountpoint(one, shared.get(one.daemon, True))) for one in node.instances()]
    erofs = {one.mountpoint for one in kernel.mounts() if one.fstype == "erofs"}.intersection(images)
    told = f"{len(images)} images mounted, {len(erofs)} of them as EROFS mounts; fs_driver is {chosen}"
    folder = settings.cache_dir if settings.cache_dir.is_dir() else None
    if folder is None:
        yield ok("machine.driver", told)
        return
    possible, reason = selftest.choose("auto", folder)
    if chosen == "fuse":
        able = (
            f"EROFS is not possible here: {reason}" if possible == "fuse" else "EROFS would be possible: fs_driver auto"
        )
        yield ok("machine.driver", f"{told} ({able})")
    elif possible == "erofs":
        first = "; FUSE shows a new image until its first start is over" if chosen == "auto" else ""
        yield ok("machine.driver", f"{told}; EROFS, as {reason}{first}")
    elif chosen == "auto":
        yield ok("machine.driver", f"{told}; by FUSE, as EROFS is not possible here: {reason}")
    else:
        yield error(
            "machine.driver",
            f"{told}, and this machine cannot: {reason}",
            "fs_driver auto or fuse in the nydusd template",
        )


def limits(node: Node) -> Iterator[Finding]:
    """Of the machine that many images meet."""
    try:
        used, _, most = (int(word) for word in Path("/proc/sys/fs/file-nr").read_text().split())
    except (OSError, ValueError):
        return
    if used > most * 0.9:
        yield warning("machine.files", f"{used} of {most} open files are in use", "raise fs.file-max")


CHECKS = (kernel_release, fuse, driver, limits)
