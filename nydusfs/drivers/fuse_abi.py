"""The FUSE protocol as `include/uapi/linux/fuse.h` of Linux 6.18 (protocol 7.45) defines it: what a read-only file
system needs of it, under the header's names without their FUSE_ prefix.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct

KERNEL_VERSION = 7
KERNEL_MINOR_VERSION = 45
MINOR_FLOOR = 31  # Linux 5.4: before it no MAX_PAGES worth the name
MIN_READ_BUFFER = 8192
ROOT_ID = 1


class Opcode(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    GETXATTR = 22
    LISTXATTR = 23
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44


# Requests that would write: the mount is read-only, so the kernel refuses most of them itself.
WRITES = frozenset({4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51})


class InitFlag(IntFlag):
    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    INIT_EXT = 1 << 30
    # the second word, `flags2`
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40


class Notify(IntEnum):
    """`fuse_notify_code`: the error field of a message with unique 0."""

    INVAL_INODE = 2
    INVAL_ENTRY = 3
    RESEND = 7


UNIQUE_RESEND = 1 << 63  # set in the number of a request that is delivered again

IN_HEADER = Struct("<IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding"""
IN_START = Struct("<4xIQQ8xI")
"""opcode, unique, nodeid, pid: what every request is routed by"""
OUT_HEADER = Struct("<IiQ")
"""len, error (0 or a negative errno), unique"""
INIT_IN = Struct("<IIIII44x")
"""major, minor, max_readahead, flags, flags2. Kernels before 7.36 send the first 16 bytes."""
INIT_OUT = Struct("<IIIIHHIIHHIIH22x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
map_alignment, flags2, max_stack_depth, request_timeout"""
ATTR = "QQQQQQIIIIIIIIII"
"""ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags"""
ENTRY_OUT = Struct("<QQQQII" + ATTR)
"""nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec, attr"""
ATTR_OUT = Struct("<QII" + ATTR)
"""attr_valid, attr_valid_nsec, dummy, attr"""
READ_IN = Struct("<QQIIQII")
"""fh, offset, size, read_flags, lock_owner, flags, padding; READDIR and READDIRPLUS too"""
READ_RANGE = Struct("<8xQI")
"""offset, size of a READ_IN"""
GETXATTR_IN = Struct("<II")
GETXATTR_OUT = Struct("<II")
"""size, padding; LISTXATTR too"""
DIRENT = Struct("<QQII")
"""ino, off, namelen, type; then the name, padded to 8 bytes. DIRENTPLUS is an ENTRY_OUT before it."""
STATFS_OUT = Struct("<QQQQQIIII24x")
"""blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding"""
INTERRUPT_IN = Struct("<Q")
NOTIFY_INVAL_INODE_OUT = Struct("<Qqq")
"""ino, off (negative: attributes only), len"""
NOTIFY_INVAL_ENTRY_OUT = Struct("<QII")
"""parent, namelen, flags; then the name and a NUL"""

BODY = IN_HEADER.size
