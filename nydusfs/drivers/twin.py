"""A second FUSE connection that shows the same tree, but the kernel asks it for no extended attributes.

overlayfs asks each file that it meets for attributes of its own: two of five requests of a container's start, each of
which a program waits for. ENOSYS ends that, for a whole connection. So images without any attributes have this one. It
is mounted nowhere: its directory of an image is cloned and put above the one of the main connection. Node numbers are
the same, so images, their tree and what is answered are shared.

Before Linux 6.15 mounts that are nowhere cannot be cloned; the main connection shows all images then.
"""

from __future__ import annotations

import os

from nydusfs.drivers import connection, kernel, mountapi
from nydusfs.drivers.apart import apart
from nydusfs.drivers.connection import Connection
from nydusfs.drivers.operations import ImageOperations, RequestLoop


class Twin:
    """`open` or `adopt`, `loop.run`, then `bind` and `unbind`; `close`."""

    def __init__(self, operations: ImageOperations, threads: int) -> None:
        self.connection = Connection(-1)
        self.loop = RequestLoop(self.connection, ImageOperations(twin_of=operations), threads)
        self.tree = -1
        """Descriptor of the whole mount; -1: an earlier process lost it, and `bind` fails."""

    def open(self) -> None:
        """Raises `kernel.MountError`, `connection.DisconnectedError`, OSError."""
        self.connection.fd, self.tree = connection.mount_nowhere()
        self.connection.handshake()
        kernel.set_read_ahead(*mountapi.device_number(self.tree), connection.READ_AHEAD >> 10)

    def adopt(self, fd: int, tree: int) -> None:
        os.set_blocking(fd, True)
        self.connection.fd, self.tree = fd, tree

    def bind(self, place: str, target: str) -> None:
        """Show `place` of the tree at a path. Both connections must be served. Raises OSError."""

        def put() -> None:
            clone = mountapi.clone_tree(place.lstrip("/"), self.tree)
            try:
                mountapi.attach(clone, target)
            finally:
                os.close(clone)

        apart(put, keep=self.tree)

    @staticmethod
    def unbind(target: str) -> None:
        """Raises OSError."""
        apart(lambda: kernel.umount_detach(target), keep=-1)

    def close(self) -> None:
        self.connection.close()
        if self.tree >= 0:
            os.close(self.tree)
            self.tree = -1
