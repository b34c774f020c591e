"""An image's EROFS mount before it is at its place: all that takes time, so that it can be done before it is asked for.

Of an image of 500 MB, 2,000 devices: 0.06 s of processor time for the metadata image, 0.05 s for empty devices, 0.02 s
for the mount, and on a busy disk a second to the fsync. To attach what is ready takes one system call.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from bootstrap.errors import RafsError
from nydusfs.cache import CacheStore
from nydusfs.cache.devices import MOST_PLAIN, DeviceFiles, usable
from nydusfs.drivers import mountapi
from nydusfs.drivers.apart import apart
from nydusfs.drivers.erofs import fanotify, mount
from nydusfs.drivers.erofs.image import DeviceFile, is_scattered
from nydusfs.image_reader import ImageReader


class PreparedMount:
    """Of the metadata image at `path`, whose fingerprint is `mark`. `open_devices` as soon as they are known, `make`,
    then `attach` or `close`; all for a worker thread. `files`: the devices in the image's order."""

    def __init__(self, reader: ImageReader, devices: DeviceFiles, path: Path, mark: bytes) -> None:
        assert reader.store is not None
        self.reader = reader
        self.store: CacheStore = reader.store
        self.devices = devices
        self.files: list[DeviceFile] = []
        self.mark = mark
        self.blob_ids = frozenset(blob.id for blob in reader.bootstrap.blobs)
        self.plain = False  # some segments were opened by their plain path
        self.direct = False  # devices are read past their page cache
        self.seconds = (0.0, 0.0)  # that devices and the mount took
        self._path = path
        config = reader.config
        self._watched = config.iostats_files or config.access_pattern or config.latest_read_files
        self._plain: dict[tuple[int, str], Path] = {}  # segments that nobody empties any more, by blob and name
        self._names: list[str] = []  # what the kernel is to open for `files`
        self._mounted = -1

    def image_names(self) -> set[str]:
        """Of its metadata image in the cache."""
        return {self.mark.hex()}

    def open_devices(self, files: list[DeviceFile], tree: int, group: int) -> None:
        """See that all of them are there. What is opened by the clone is asked about: the clone's mark must be there
        before the mount is. Raises OSError."""
        if self._names and files == self.files:
            return
        began = time.monotonic()
        self.files = files
        if not self._asked_always():
            self._note_plain(files)
        self._names = [self._device_path(file, tree, group) for file in files]
        self.seconds = time.monotonic() - began, 0.0

    def make(self, tree: int, group: int) -> None:
        """Raises OSError."""
        for attempt in range(3):
            try:
                self.open_devices(self.files, tree, group)
                began = time.monotonic()
                apart = not any(name.startswith(mountapi.tree_path(tree)) for name in self._names)
                self.direct = apart and not is_scattered(self._path)
                self._mounted = mount.open_erofs(str(self._path), self._names, direct=self.direct)
            except OSError as error:
                # a segment file was renamed or deleted between our look and the kernel's
                if error.errno != errno.ENOENT or attempt == 2:
                    raise
                self._names = []
                continue
            self.seconds = self.seconds[0], time.monotonic() - began
            self._let_be()  # now that the mount holds the files, whose marks would go with them
            return

    def attach(self, target: str) -> None:
        """Raises OSError."""
        apart(lambda: mountapi.attach(self._mounted, target), keep=self._mounted)
        self.close()

    def close(self) -> None:
        if self._mounted >= 0:
            os.close(self._mounted)
            self._mounted = -1

    def blob_id(self, file: DeviceFile) -> str:
        return self.reader.bootstrap.blobs[file.blob_index].id

    def names(self) -> set[tuple[str, str]]:
        """Of its devices: blob and segment."""
        return {(self.blob_id(file), file.name) for file in self.files}

    def _note_plain(self, files: list[DeviceFile]) -> None:
        """What is complete and on the disk now is about to be opened by its plain path. Raises OSError."""
        found: dict[str, list[int]] = {}
        for file in files:
            cache = self.reader.cache(self.reader.bootstrap.blobs[file.blob_index])
            ready = cache.ready_path(file.name) if cache is not None else None
            number = int(file.name.partition("-")[0])
            if ready is not None and ready.name == file.name and number < MOST_PLAIN:
                found.setdefault(self.blob_id(file), []).append(number)
                self._plain[file.blob_index, file.name] = ready
        for blob_id, numbers in found.items():
            self.devices.note_plain(blob_id, numbers)

    def _device_path(self, file: DeviceFile, tree: int, group: int) -> str:
        """What the kernel is to open for a device."""
        blob = self.reader.bootstrap.blobs[file.blob_index]
        cache, devices = self.reader.cache(blob), self.devices
        plain = self._plain.get((file.blob_index, file.name))
        if plain is not None and usable(plain, file.size):
            self.plain = True
            return str(plain)
        ready = cache.ready_path(file.name) if cache is not None else None
        if ready is not None and usable(ready, file.size):
            devices.adopt(blob.id, file.name, ready)  # to be asked about until it is durable, or has to go
        if not devices.create(blob.id, file.name) and (fd := devices.open(blob.id, file.name)) >= 0:
            # Perhaps a mount from before the death of all processes has it, whose mark died with them. A mark on the
            # file lets that mount ask again, and our own writes as well, which `events` allows at once.
            try:
                if os.fstat(fd).st_size < file.size:
                    fanotify.mark_inode(group, fd)
                elif self._watched:
                    fanotify.heed(group, fd)  # another mount had no use for being asked
            finally:
                os.close(fd)
        return mountapi.tree_path(tree) + devices.device(blob.id, file.name)

    def _asked_always(self) -> bool:
        """Of complete segments too: they may have to go, or their reads are counted."""
        return self._watched or self.store.quota is not None

    def _let_be(self) -> None:
        """Nothing is asked about devices that were durable at the mount. Raises OSError."""
        if self.plain or self._watched or not self._asked_always():
            return
        for file in self.files:
            blob_id = self.blob_id(file)
            if self._is_durable(file) and (fd := self.devices.open(blob_id, file.name, os.O_RDONLY)) >= 0:
                try:
                    self.devices.leaving.quiet(self.devices.device(blob_id, file.name), fd, file.size)
                finally:
                    os.close(fd)

    def _is_durable(self, file: DeviceFile) -> bool:
        try:
            segment = self.reader.segment(file.blob_index, int(file.name.partition("-")[0]))
        except (KeyError, ValueError, RafsError):
            return False
        return segment.name == file.name and self.reader.is_durable(segment)
