"""The mount API of descriptors: system calls for any file system; `erofs/mount.py` has those of one.

Names are those of `linux/mount.h`; numbers of the calls are the same on all architectures but alpha.
"""

from __future__ import annotations

import ctypes
import os
import struct

SYS_open_tree = 428
SYS_move_mount = 429
SYS_mount_setattr = 442

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOATIME = 0x1, 0x2, 0x4, 0x10
MOUNT_ATTR_IDMAP = 0x00100000
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MS_PRIVATE = 1 << 18
CLONE_NEWUSER = 0x10000000

_MOUNT_ATTR = struct.Struct("=QQQQ")  # struct mount_attr: attr_set, attr_clr, propagation, userns_fd

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def call(name: str, number: int, *arguments: object) -> int:
    """Raises OSError, which says the call's name."""
    found: int = _syscall(ctypes.c_long(number), *arguments)
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return found


def clone_tree(path: str | os.PathLike[str]) -> int:
    """A descriptor of a private bind mount of a directory that is attached nowhere. Raises OSError."""
    flags = ctypes.c_uint(OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
    return call("open_tree", SYS_open_tree, ctypes.c_int(AT_FDCWD), os.fsencode(path), flags)


def tree_path(tree: int) -> str:
    """What paths into a tree of `clone_tree` begin with, in this process."""
    return f"/proc/self/fd/{tree}/"


def map_owners(tree: int, user_namespace: int) -> None:
    """Ids inside of a user namespace, on the disk, are shown as those outside by a tree of `clone_tree`, which can be
    written to no more. Linux 5.12; EINVAL where the file system has no such mounts. Raises OSError."""
    attributes = MOUNT_ATTR_IDMAP | MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    wanted = _MOUNT_ATTR.pack(attributes, 0, MS_PRIVATE, user_namespace)
    arguments = ctypes.c_int(tree), b"", ctypes.c_uint(AT_EMPTY_PATH), wanted, ctypes.c_size_t(len(wanted))
    call("mount_setattr", SYS_mount_setattr, *arguments)


def attach(mounted: int, target: str) -> None:
    """Put a mount at a path. Raises OSError."""
    cwd, flags = ctypes.c_int(AT_FDCWD), ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH)
    call("move_mount", SYS_move_mount, ctypes.c_int(mounted), b"", cwd, os.fsencode(target), flags)
