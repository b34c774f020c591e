"""EROFS mounts by the mount API of descriptors: thousands of devices need it, mount(2) takes one page of options."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

from nydusfs.drivers.mountapi import (
    AT_FDCWD,
    MOUNT_ATTR_NOATIME,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    call,
)

SYS_fsopen = 430
SYS_fsconfig = 431
SYS_fsmount = 432
SYS_fspick = 433

FSOPEN_CLOEXEC = 1
FSPICK_CLOEXEC = 0x1
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE, FSCONFIG_CMD_RECONFIGURE = 0, 1, 6, 7
FSMOUNT_CLOEXEC = 1

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
    context = call("fsopen", SYS_fsopen, b"erofs", ctypes.c_uint(FSOPEN_CLOEXEC))
    try:
        try:
            _config(context, FSCONFIG_SET_FLAG, b"ro", None)  # before block devices are opened
            _config(context, FSCONFIG_SET_STRING, b"source", os.fsencode(image))
            if direct:
                _config(context, FSCONFIG_SET_FLAG, b"directio", None)
            for device in devices:
                _config(context, FSCONFIG_SET_STRING, b"device", os.fsencode(device))
            known = _bdis()
            _config(context, FSCONFIG_CMD_CREATE, None, None)
            _set_read_ahead(_bdis() - known)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}{_said(context)}") from None
        flags = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOATIME
        arguments = ctypes.c_int(context), ctypes.c_uint(FSMOUNT_CLOEXEC), ctypes.c_uint(flags)
        return call("fsmount", SYS_fsmount, *arguments)
    finally:
        os.close(context)


def set_direct(target: str, direct: bool) -> None:
    """From now on a mount's devices are read past their page cache, or through it: see `open_erofs`. Raises OSError."""
    cwd, flags = ctypes.c_int(AT_FDCWD), ctypes.c_uint(FSPICK_CLOEXEC)
    context = call("fspick", SYS_fspick, cwd, os.fsencode(target), flags)
    try:
        if direct:
            _config(context, FSCONFIG_SET_FLAG, b"directio", None)
        _config(context, FSCONFIG_CMD_RECONFIGURE, None, None)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}{_said(context)}") from None
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


def _config(context: int, command: int, key: bytes | None, value: bytes | None) -> None:
    call("fsconfig", SYS_fsconfig, ctypes.c_int(context), ctypes.c_uint(command), key, value, ctypes.c_int(0))


def _said(context: int) -> str:
    """What the kernel has to say about the last failure, one message per read."""
    lines = []
    try:
        while line := os.read(context, 1024):
            lines.append(line[2:].decode("utf-8", "replace").strip())
    except OSError:
        pass
    return f" ({'; '.join(lines)})" if lines else ""
