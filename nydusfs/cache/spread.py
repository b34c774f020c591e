"""Directories whose folders lie apart on the disk.

ext4 does not give away an inode that was deleted in the last minutes (one to six), and each new file looks at all of
them in its folder's group. With the 2,117 segments of a removed image there, the empty devices of the next one took 1.5
to 2.4 s of processor time, each segment that is fetched a millisecond; in another group all devices take 0.05 s. ext4
gives each folder in a directory with the flag set here, like each in its root, a group of its own. Which one follows
from the name that the folder is made by: under its own an image that comes again lands where its deleted files are
(2,400 files made and removed eight times over: 0.06 to 0.35 s each, 0.05 to 0.07 and once 0.14 with a random one).
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from struct import Struct

_LONG = Struct("l")
_FLAGS = Struct("i")  # what the calls read and write, whatever their numbers say
FS_IOC_GETFLAGS = 2 << 30 | _LONG.size << 16 | ord("f") << 8 | 1
FS_IOC_SETFLAGS = 1 << 30 | _LONG.size << 16 | ord("f") << 8 | 2
FS_TOPDIR_FL = 0x0002_0000
_NEW = ".new-"  # and a random word: a folder that has no name yet


def make_folder(path: Path) -> None:
    """One of the folders that lie apart, for its owner alone, if it is not there yet. Raises OSError."""
    if path.is_dir():
        return
    new = path.with_name(_NEW + os.urandom(8).hex())
    new.mkdir(mode=0o700)
    try:
        new.rename(path)  # over another one only if that is empty
    except OSError as error:
        new.rmdir()
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def spread(folder: Path) -> None:
    """Have folders that are made in this one lie apart, where the file system knows how; what a death left of making
    them goes. Raises nothing."""
    try:
        for name in os.listdir(folder):
            if name.startswith(_NEW):
                os.rmdir(folder / name)
    except OSError:
        pass
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        [flags] = _FLAGS.unpack_from(fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(_LONG.size)))
        if not flags & FS_TOPDIR_FL:
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, _FLAGS.pack(flags | FS_TOPDIR_FL).ljust(_LONG.size, b"\0"))
    except OSError:
        pass  # another file system, which has groups of its own or none
    finally:
        os.close(fd)
