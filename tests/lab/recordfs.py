"""A file system in memory that writes down every change, for tests of what a power cut or a failing disk leaves.

A program works on it (or on a real file system in a loop device over its file `disk`), and afterwards `RecordFs.log`
has what happened in order: data, directory entries and what was synced when. `fail` makes reads or writes give EIO.

It serves /dev/fuse in a process of its own: whoever works on it may hold locks that a thread here would wait for.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import select
import socket
import stat
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

from nydusfs.drivers.fuse_abi import ATTR_OUT, BODY, DIRENT, ENTRY_OUT, IN_HEADER, INIT_OUT, OUT_HEADER, STATFS_OUT
from tests.lab.process import Child, LabError, run, wait_until

DISK = "disk"
# Of ext4, in blocks of 4 KiB: so even a small disk has a second superblock (in group 1), as every ordinary one has. The
# first is two sectors: a power cut can leave one of them new and one old, and fsck then needs the other copy.
GROUP_BLOCKS = 2048
MAX_WRITE = 1 << 20
_SETATTR_IN = struct.Struct("<I4xQQQQQQIIIIIIII")
_FATTR_MODE, _FATTR_SIZE, _FATTR_MTIME = 1, 8, 32
_FOPEN_DIRECT_IO = 1
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22


class Write(NamedTuple):
    node: int
    offset: int
    data: bytes


class Resize(NamedTuple):
    node: int
    size: int


class Sync(NamedTuple):
    """fsync or fdatasync of a file, or of a directory."""

    node: int


class Entry(NamedTuple):
    """A name changed: it is `node` now, 0 for none. `rename` makes two, the old name's first."""

    folder: int
    name: str
    node: int
    is_folder: bool = False


Step: TypeAlias = Write | Resize | Sync | Entry


@dataclass(slots=True)
class _Node:
    mode: int
    data: bytearray = field(default_factory=bytearray)
    names: dict[str, int] = field(default_factory=dict)
    links: int = 1
    mtime: int = 0
    lookups: int = 0


class _Server:
    def __init__(self, mountpoint: str, control: socket.socket, disk: int) -> None:
        self.nodes = {1: _Node(stat.S_IFDIR | 0o755, links=2)}
        self.next = 2
        self.log: list[Step] = []
        self.failing = ""
        self.control = control
        if disk:
            self._make(1, DISK, stat.S_IFREG | 0o600).data = bytearray(disk)
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        libc = ctypes.CDLL(None, use_errno=True)
        options = f"fd={self.fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={1 << 20}"
        if libc.mount(b"recordfs", os.fsencode(mountpoint), b"fuse", ctypes.c_ulong(6), options.encode()) != 0:
            raise OSError(ctypes.get_errno(), f"mount {mountpoint}")
        self.handlers = {
            1: self.lookup, 3: self.getattr, 4: self.setattr, 9: self.mkdir, 10: self.unlink, 11: self.unlink,
            12: self.rename, 13: self.link, 14: self.open, 15: self.read, 16: self.write, 17: self.statfs,
            18: self.nothing, 20: self.fsync, 25: self.nothing, 26: self.init, 27: self.open, 28: self.readdir,
            29: self.nothing, 30: self.fsync, 35: self.create, 38: self.nothing, 45: self.rename,
        }  # fmt: skip

    def serve(self) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self.fd:
                    try:
                        request = os.read(self.fd, MAX_WRITE + 8192)
                    except OSError as error:
                        if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                            continue
                        return  # unmounted
                    self.answer(memoryview(request))
                elif not self.command(self.control.recv(100).decode()):
                    return

    def command(self, text: str) -> bool:
        if not text:
            return False
        word, _, rest = text.partition(" ")
        data = b""
        if word == "fail":
            self.failing = rest
        elif word == "log":
            data = pickle.dumps(self.log)
        elif word == "forget":
            self.log.clear()
        self.control.sendall(struct.pack("<Q", len(data)) + data)
        return True

    def answer(self, request: memoryview) -> None:
        _, opcode, unique, node = IN_HEADER.unpack_from(request)[:4]
        if opcode in (2, 36, 42):  # forget, interrupt
            return
        handler = self.handlers.get(opcode)
        code, body = 0, b""
        try:
            if handler is None:
                raise OSError(errno.ENOSYS, "")
            body = handler(node, request[BODY:])
        except OSError as error:
            code = error.errno or errno.EIO
        try:
            os.writev(self.fd, [OUT_HEADER.pack(OUT_HEADER.size + len(body), -code, unique), body])
        except OSError as error:
            if error.errno != errno.ENOENT:  # its process was killed
                raise

    # -- requests

    def _attr(self, number: int) -> tuple[int, ...]:
        node = self.nodes[number]
        seconds, nanoseconds = divmod(node.mtime, 10**9)
        size = len(node.data)
        return (number, size, -(-size // 512), seconds, seconds, seconds, nanoseconds, nanoseconds, nanoseconds,
                node.mode, node.links, 0, 0, 0, 4096, 0)  # fmt: skip

    def _entry(self, number: int) -> bytes:
        return ENTRY_OUT.pack(number, 0, 0, 0, 0, 0, *self._attr(number))

    def _make(self, parent: int, name: str, mode: int) -> _Node:
        node = self.nodes[self.next] = _Node(mode)
        self._set(parent, name, self.next)
        self.next += 1
        return node

    def _set(self, parent: int, name: str, number: int) -> None:
        names = self.nodes[parent].names
        old = names.pop(name, 0)
        if old:
            self.nodes[old].links -= 1
        if number:
            names[name] = number
        self.log.append(Entry(parent, name, number, bool(number) and stat.S_ISDIR(self.nodes[number].mode)))

    def _child(self, parent: int, name: str) -> int:
        number = self.nodes[parent].names.get(name, 0)
        if not number:
            raise FileNotFoundError(errno.ENOENT, name)
        return number

    def init(self, _: int, body: memoryview) -> bytes:
        flags = struct.unpack_from("<IIII", body)[3] & (_BIG_WRITES | _MAX_PAGES)
        return INIT_OUT.pack(7, 31, 1 << 20, flags, 64, 48, MAX_WRITE, 1, MAX_WRITE // 4096, 0, 0, 0, 0)

    def lookup(self, parent: int, body: memoryview) -> bytes:
        return self._entry(self._child(parent, _name(body)))

    def getattr(self, number: int, _: memoryview) -> bytes:
        return ATTR_OUT.pack(0, 0, 0, *self._attr(number))

    def setattr(self, number: int, body: memoryview) -> bytes:
        valid, _, size, _, _, mtime, _, _, nanoseconds, _, mode, *_ = _SETATTR_IN.unpack_from(body)
        node = self.nodes[number]
        if valid & _FATTR_SIZE:
            if self.failing == "write":
                raise OSError(errno.EIO, "")
            del node.data[size:]
            node.data.extend(bytes(size - len(node.data)))
            self.log.append(Resize(number, size))
        if valid & _FATTR_MODE:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        if valid & _FATTR_MTIME:
            node.mtime = mtime * 10**9 + nanoseconds
        return self.getattr(number, body)

    def mkdir(self, parent: int, body: memoryview) -> bytes:
        mode, name = struct.unpack_from("<I", body)[0], _name(body[8:])
        self._make(parent, name, stat.S_IFDIR | stat.S_IMODE(mode)).links = 2
        return self._entry(self.next - 1)

    def create(self, parent: int, body: memoryview) -> bytes:
        mode, name = struct.unpack_from("<II", body)[1], _name(body[16:])
        self._make(parent, name, stat.S_IFREG | stat.S_IMODE(mode))
        return self._entry(self.next - 1) + struct.pack("<QII", 0, 0, 0)

    def unlink(self, parent: int, body: memoryview) -> bytes:
        name = _name(body)
        if self.nodes[self._child(parent, name)].names:
            raise OSError(errno.ENOTEMPTY, name)
        self._set(parent, name, 0)
        return b""

    def rename(self, parent: int, body: memoryview) -> bytes:
        (target,) = struct.unpack_from("<Q", body)
        old, new = bytes(body).rstrip(b"\0").split(b"\0")[-2:]
        # the old name directly follows 8 or 16 bytes of numbers
        old = bytes(body[16 if len(body) - 16 == len(old) + len(new) + 2 else 8 :]).split(b"\0")[0]
        number = self._child(parent, old.decode())
        if self.nodes[target].names.get(new.decode()) == number:
            return b""  # two names of one file: rename(2) does nothing
        self.nodes[number].links += 1
        self._set(parent, old.decode(), 0)
        self._set(target, new.decode(), number)
        return b""

    def link(self, parent: int, body: memoryview) -> bytes:
        (number,) = struct.unpack_from("<Q", body)
        self.nodes[number].links += 1
        self._set(parent, _name(body[8:]), number)
        return self._entry(number)

    def open(self, number: int, _: memoryview) -> bytes:
        direct = self.nodes[1].names.get(DISK) == number
        return struct.pack("<QII", 0, _FOPEN_DIRECT_IO if direct else 0, 0)

    def read(self, number: int, body: memoryview) -> bytes:
        if self.failing == "read":
            raise OSError(errno.EIO, "")
        _, offset, size = struct.unpack_from("<QQI", body)
        return bytes(memoryview(self.nodes[number].data)[offset : offset + size])

    def write(self, number: int, body: memoryview) -> bytes:
        if self.failing == "write":
            raise OSError(errno.EIO, "")
        _, offset, size = struct.unpack_from("<QQI", body)
        data, node = bytes(body[40 : 40 + size]), self.nodes[number]
        if offset > len(node.data):
            node.data.extend(bytes(offset - len(node.data)))
        node.data[offset : offset + size] = data
        self.log.append(Write(number, offset, data))
        return struct.pack("<II", size, 0)

    def fsync(self, number: int, _: memoryview) -> bytes:
        if self.failing == "write":
            raise OSError(errno.EIO, "")
        self.log.append(Sync(number))
        return b""

    def readdir(self, number: int, body: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        out = b""
        for at, (name, child) in enumerate(list(self.nodes[number].names.items())[offset:], offset + 1):
            text = name.encode()
            entry = DIRENT.pack(child, at, len(text), stat.S_IFMT(self.nodes[child].mode) >> 12) + text
            entry = entry.ljust(-(-len(entry) // 8) * 8, b"\0")
            if len(out) + len(entry) > size:
                break
            out += entry
        return out

    def statfs(self, *_: object) -> bytes:
        return STATFS_OUT.pack(1 << 20, 1 << 19, 1 << 19, 1 << 20, 1 << 19, 4096, 255, 4096, 0)

    def nothing(self, *_: object) -> bytes:
        return b""


def _name(body: memoryview) -> str:
    return bytes(body).split(b"\0")[0].decode()


class RecordFs:
    """Mounted at `mountpoint` until `close`; `disk`: bytes of its file for a loop device, 0 for none."""

    def __init__(self, mountpoint: Path, disk: int = 0) -> None:
        self.mountpoint = mountpoint
        mountpoint.mkdir(exist_ok=True)
        path = mountpoint.with_name(f"{mountpoint.name}.ctl")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(20)
            argv = [sys.executable, "-m", "tests.lab.recordfs", mountpoint, path, str(disk)]
            self._child = Child("recordfs", argv, mountpoint.with_name(f"{mountpoint.name}.log"))
            self._control, _ = listener.accept()
        path.unlink()
        self._control.settimeout(60)
        self._answers = self._control.makefile("rb")
        wait_until(lambda: os.path.ismount(mountpoint), 30, f"recordfs at {mountpoint}", self._child.alive)

    def _ask(self, text: str) -> bytes:
        self._control.sendall(text.encode())
        (size,) = struct.unpack("<Q", self._answers.read(8))
        return self._answers.read(size)

    def fail(self, what: str) -> None:
        """Give EIO from now on, to "read", to "write" (and syncs) or to nothing, ""."""
        self._ask(f"fail {what}")

    def forget(self) -> None:
        """Begin the log anew: what is there now is on the disk for good."""
        self._ask("forget")

    def log(self) -> list[Step]:
        return pickle.loads(self._ask("log"))  # type: ignore[no-any-return]

    def content(self, name: str = DISK) -> bytes:
        return (self.mountpoint / name).read_bytes()

    def close(self) -> None:
        self._answers.close()
        self._control.close()
        run(["umount", "-l", self.mountpoint], check=False)
        self._child.stop(5)


class LoopDisk:
    """ext4 (or another file system) in a loop device on a RecordFs, mounted at `mountpoint`."""

    def __init__(self, folder: Path, size: int, kind: str = "ext4", options: str = "") -> None:
        self.fs = RecordFs(folder / "record", size)
        self.mountpoint = folder / "disk"
        self.mountpoint.mkdir(exist_ok=True)
        try:
            ext4 = ["-F", "-b", "4096", "-g", str(GROUP_BLOCKS)]
            run([f"mkfs.{kind}", "-q", *(ext4 if kind == "ext4" else []), self.fs.mountpoint / DISK])
            self.mount(options)
        except BaseException:
            self.fs.close()
            raise

    def mount(self, options: str = "") -> None:
        words = ",".join(filter(None, ["loop", options]))
        run(["mount", "-o", words, self.fs.mountpoint / DISK, self.mountpoint])

    def write_out(self) -> None:
        """Begin to write what the file system changed of itself in place, as the kernel does every half a minute."""
        number = os.stat(self.mountpoint).st_dev
        name = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
        fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def close(self) -> None:
        self.fs.fail("")
        run(["umount", "-l", self.mountpoint], check=False)
        self.fs.close()


def main() -> None:
    mountpoint, path, disk = sys.argv[1:]
    control = socket.socket(socket.AF_UNIX)
    control.connect(path)
    _Server(mountpoint, control, int(disk)).serve()


__all__ = ["DISK", "GROUP_BLOCKS", "Entry", "LabError", "LoopDisk", "RecordFs", "Resize", "Step", "Sync", "Write"]

if __name__ == "__main__":
    from tests.lab import recordfs  # what it sends is of that module then, and can be read by any program

    recordfs.main()
