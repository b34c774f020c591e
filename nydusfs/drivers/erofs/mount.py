"""EROFS mounts by the mount API of descriptors: thousands of devices need it, mount(2) takes one page of options."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

from nydusfs.drivers.mountapi import (
    AT_FDCWD,
    FSCONFIG_CMD_CREATE,
    FSCONFIG_CMD_RECONFIGURE,
    FSCONFIG_SET_FLAG,
    FSCONFIG_SET_STRING,
    call,
    fsconfig,
    fsmount,
    fsopen,
    said,
)

SYS_fspick = 433
FSPICK_CLOEXEC = 0x1

READ_AHEAD_KIB = 512
"""Of the mount; the kernel's 128 reads a cached image at a third of the speed, 1024 was slower again in some runs."""


def open_erofs(image: str, devices: Iterable[str], *, direct: bool = False) -> int:
    """Mount an image with its devices in the order of its table, attached nowhere yet; the descriptor.

    `direct`: the kernel reads devices past their own page cache. For devices that nobody writes any more: what is not
    on the disk yet would be written out before each read. Of ext4's speed from disk, 3 rounds beside other work: random
    4 KiB 1.2 (else 0.15), in sequence 2.9 (0.8), small files 1.0 (3: whole neighbourhoods are read), so it is not for
    images of small files. Faults all over a library of 100 MB with cold pages: 0.5 s, else 1.4, by FUSE 1.0. Data is in
    memory once, not twice.

    nosuid and nodev for the reasons `connection.mount` gives. Raises OSError, with what the kernel says about it.
    """
    context = fsopen("erofs")
    try:
        try:
            fsconfig(context, FSCONFIG_SET_FLAG, "ro")  # before block devices are opened
            fsconfig(context, FSCONFIG_SET_STRING, "source", image)
            if direct:
                fsconfig(context, FSCONFIG_SET_FLAG, "directio")
            for device in devices:
                fsconfig(context, FSCONFIG_SET_STRING, "device", device)
            known = _bdis()
            fsconfig(context, FSCONFIG_CMD_CREATE)
            _set_read_ahead(_bdis() - known)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}{said(context)}") from None
        return fsmount(context)
    finally:
        os.close(context)


def set_direct(target: str, direct: bool) -> None:
    """From now on a mount's devices are read past their page cache, or through it: see `open_erofs`. Raises OSError."""
    cwd, flags = ctypes.c_int(AT_FDCWD), ctypes.c_uint(FSPICK_CLOEXEC)
    context = call("fspick", SYS_fspick, cwd, os.fsencode(target), flags)
    try:
        if direct:
            fsconfig(context, FSCONFIG_SET_FLAG, "directio")
        fsconfig(context, FSCONFIG_CMD_RECONFIGURE)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}{said(context)}") from None
    finally:
        os.close(context)


def _bdis() -> set[str]:
    """The kernel's names of the EROFS mounts there are, for `_set_read_ahead`."""
    try:
        return {name for name in os.listdir("/sys/class/bdi") if name.startswith("erofs-")}
    except OSError:
        return set()


def _set_read_ahead(names: set[str]) -> None:
    """Best effort: nothing tells which name is which mount's, so it is called with those that are new."""
    for name in names:
        try:
            Path(f"/sys/class/bdi/{name}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))
        except OSError:
            pass
