"""Unpacked layers on top of a lazy image, for containers in user namespaces: bind mounts that map their owners.

nydusd maps the owners of the image below, so the overlay as a whole must not be mapped by containerd (`uidmap=`), and
each of these layers is mapped by a mount of its own: `<root>/idmapped/12-userns-65536`, of the directory of layer 12.
Which there are is what the mount table says, nothing else records it. An overlay keeps what it was mounted with: of
containers that run nobody needs these mounts any more.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nydusfs.drivers.mountapi import CLONE_NEWUSER, attach, clone_tree, map_owners
from snapshotter import crowd
from snapshotter.errors import InvalidArgument
from snapshotter.labels import IdMapping
from snapshotter.records import instance_name, instance_of
from snapshotter.store import Store
from snapshotter.system import detach, overlay_works

log = logging.getLogger(__name__)

FOLDER = "idmapped"
_UNABLE = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
_CHILD_SECONDS = 10.0  # normal: 14 ms
_CHILD = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
failed = libc.unshare({CLONE_NEWUSER})
os.write(1, bytes([ctypes.get_errno() if failed else 0]))
os.read(0, 1)
"""


class IdMappedLayers:
    """Thread-safe."""

    def __init__(self, root: Path, store: Store, overlay_options: str = "") -> None:
        """`overlay_options`: that overlays must have on this machine."""
        self._root = root
        self._folder = root / FOLDER
        self._store = store
        self._overlay_options = overlay_options
        self._overlay_takes = False  # seen once since the start
        self._lock = threading.Lock()

    def ensure(self, layers: Sequence[int], mapping: IdMapping) -> list[str]:
        """Where these layers are mounted for a user namespace; mounts those that are not.

        Their containers have their rows already: `release` leaves alone what those need. Raises InvalidArgument where
        this machine cannot, OSError.
        """
        places = [(self._store.upper(layer), str(self._folder / instance_name(layer, mapping))) for layer in layers]
        with self._lock:
            there = all(_is_there(*place) for place in places)
        if not there:
            with user_namespace(mapping) as namespace, self._lock:
                self._folder.mkdir(mode=0o700, exist_ok=True)
                for directory, path in places:
                    if not _is_there(directory, path):
                        self._mount(directory, path, namespace)
        return [path for _, path in places]

    def release(self, used: Callable[[], set[str]]) -> None:
        """Unmounts what no container needs; `used` tells the names that containers do. What fails is left for the
        next time."""
        names = self._names()
        needed = used() if names else set()
        for name in names:
            if name not in needed:
                with self._lock:
                    # again under the lock: the row of a container is there before `ensure` is called for it
                    if name not in used():
                        self._umount([name])

    def close(self) -> None:
        """Unmounts all."""
        with self._lock:
            self._umount(self._names())

    def _names(self) -> list[str]:
        try:
            return [name for name in os.listdir(self._folder) if instance_of(name) is not None]
        except FileNotFoundError:
            return []

    def _mount(self, directory: Path, path: str, namespace: int) -> None:
        try:
            tree = clone_tree(directory)
            try:
                map_owners(tree, namespace)
                try:
                    os.mkdir(path, 0o700)
                except FileExistsError:
                    detach(path)  # of a directory whose place another one took, or nothing after a reboot
                attach(tree, path)
            finally:
                os.close(tree)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            need = "Linux 5.12 and a file system that has idmapped mounts (as ext4, xfs and btrfs do)"
            raise InvalidArgument(f"{error.strerror}: it needs {need}") from None
        log.info("layer %s is mounted at %s", directory, path)
        self._overlay_takes = self._overlay_takes or overlay_works(self._root, self._overlay_options, path)
        if not self._overlay_takes:
            self._umount([os.path.basename(path)])
            raise InvalidArgument("overlayfs refuses idmapped layers: it needs Linux 5.19")

    def _umount(self, names: Iterable[str]) -> None:
        for name in names:
            path = str(self._folder / name)
            try:
                detach(path)
                os.rmdir(path)
            except OSError as error:
                log.warning("%s is left for the next clean-up: %s", path, error.strerror)
            else:
                log.info("%s is unmounted: no container needs it any more", path)


def _is_there(directory: Path, path: str) -> bool:
    """Whether it is this directory that is mounted: a mount of another one would keep its inode from being reused."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    wanted = os.stat(directory)
    return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)


@contextmanager
def user_namespace(mapping: IdMapping) -> Iterator[int]:
    """A descriptor of a new one, in which nobody is. Raises InvalidArgument where there can be none.

    A process makes it and ends: a program with threads cannot enter one itself, nor safely fork.
    """
    crowd.apart()
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, bufsize=0, cwd="/", **pipes) as child:  # type: ignore[call-overload]
        try:
            poll = select.poll()
            poll.register(child.stdout, select.POLLIN)
            said = child.stdout.read(1) if poll.poll(_CHILD_SECONDS * 1000) else b""
            if said != b"\0":
                code = said[0] if said else errno.ETIMEDOUT
                raise OSError(code, os.strerror(code))
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{child.pid}/{name}").write_text(f"{mapping.inside} {mapping.host} {mapping.length}")
            namespace = os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            why = f"user namespace {mapping}: {error.strerror}: it needs CONFIG_USER_NS and user.max_user_namespaces"
            raise InvalidArgument(why) from None
        finally:
            child.kill()
    try:
        yield namespace
    finally:
        os.close(namespace)
