"""What tests of EROFS mounts need: whether they can be made here, and a process that reads and can be left behind."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

from nydusfs.drivers import kernel
from nydusfs.drivers.erofs import selftest
from tests.lab.daemon import can_mount_fuse
from tests.lab.process import matching, wait_until


@cache
def cannot_mount_erofs() -> str:
    """ "" when a test may, else the reason why not."""
    if reason := can_mount_fuse():
        return reason
    try:
        selftest.run(Path(tempfile.gettempdir()))
    except selftest.UnsupportedError as error:
        return f"erofs: {error}"
    return ""


def is_erofs(path: Path) -> bool:
    return any(entry.mountpoint == str(path) and entry.fstype == "erofs" for entry in kernel.mounts())


def marked_devices(cache: Path) -> list[Path]:
    return [path for path in matching(cache, ".erofs/files.*/*/*/*") if path.is_file()]


def settle(cache: Path) -> None:
    """Wait until all that a cache holds is durable: from then on mounts ask nobody about it."""
    wait_until(lambda: not any(path.suffix for path in matching(cache, "*/*-*")), 60, "durable segments")


READ_ALL = """
import errno, hashlib, json, os, stat, sys
found = {}
for folder, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(folder, name)
        # an overlay lists a whiteout of its lower layer and finds nothing there
        if not os.path.lexists(path) or not stat.S_ISREG(os.lstat(path).st_mode): continue
        key = os.path.relpath(path, sys.argv[1])
        try:
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            data = b""
            while piece := os.read(fd, 1 << 17): data += piece
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
            found[key] = hashlib.sha256(data).hexdigest()
        except OSError as error:
            found[key] = errno.errorcode[error.errno]
print(json.dumps(found))
"""
"""Argument: a directory. Prints a JSON object: by file the SHA-256 of its content, read anew, or the error's name."""


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
