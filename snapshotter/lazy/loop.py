"""Loop devices, for kernels that mount EROFS images from block devices only (before 6.12)."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from struct import Struct

LOOP_CTL_GET_FREE = 0x4C82
LOOP_CONFIGURE = 0x4C0A
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR = 1, 4
_TRIES = 50

# struct loop_config: fd, block_size, struct loop_info64 (232 bytes, of which flags are at 52), 8 reserved words
_CONFIG = Struct("<II52xI176x64x")


def attach(path: Path) -> tuple[str, int]:
    """A read-only device for a file, and a descriptor that keeps it: it goes when that and its mounts are closed.

    Raises OSError.
    """
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    backing = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            name = f"/dev/loop{number}"
            device = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, _CONFIG.pack(backing, 0, LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR))
                return name, device
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # another program was faster
                    raise
        raise OSError(errno.EBUSY, "no free loop device", str(path))
    finally:
        os.close(backing)
        os.close(control)
