"""What becomes of mounts once nothing is written any more: nothing is asked about devices that are complete, and they
are read past their page cache. Nobody wakes up for it while nothing changes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import trio

from nydusfs.cache.devices import DeviceFiles
from nydusfs.drivers.apart import apart
from nydusfs.drivers.erofs import mount
from nydusfs.drivers.erofs.filling import ErofsImage

log = logging.getLogger("nydusfs.erofs")

SETTLE = 5.0  # seconds between looks at what changed


class Settling:
    """`images` by their path in the tree; `users`: those that have a device; `target`: where a path is mounted."""

    def __init__(
        self,
        images: Mapping[str, ErofsImage],
        users: Callable[[str], Sequence[ErofsImage]],
        target: Callable[[str], str],
    ) -> None:
        self._images = images
        self._users = users
        self._target = target
        self._later: dict[str, DeviceFiles] = {}  # one that is evicted and comes again is there once
        self._changed = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def changed(self) -> None:
        """Something is to be settled."""
        self._changed.set()

    def durable(self, device: str, fd: int) -> None:
        """Nothing needs to be asked about it, unless reads are of interest. From any thread."""
        images = self._users(device)
        if any(image.curious(device) for image in images):
            self._later[device] = images[0].devices
        else:
            self._let_be(device, fd)
        if not self._changed.is_set():
            try:
                self._token.run_sync_soon(self.changed)
            except trio.RunFinishedError:
                pass

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            await trio.sleep(SETTLE)
            await self._settle()  # apart from what sleeps: an image that goes meanwhile goes at once

    async def _settle(self) -> None:
        await trio.to_thread.run_sync(self._ignore, list(self._later.items()))
        for image in list(self._images.values()):
            # those of an earlier worker only once they are asked about: many never are
            if image.files and (wanted := image.direct_now()) != image.direct:
                await trio.to_thread.run_sync(self._turn, image, wanted)
        if self._later or any(image.files and not image.direct for image in self._images.values()):
            self.changed()

    def disturb(self, image: ErofsImage, nursery: trio.Nursery) -> None:
        """A device of it is about to be written."""
        if image.direct is not False:
            image.direct = False
            self.changed()
            nursery.start_soon(trio.to_thread.run_sync, partial(self._turn, image, False))

    def _turn(self, image: ErofsImage, direct: bool) -> None:
        """Have its devices read past their page cache or through it."""
        try:
            if not (direct and image.scattered()):
                apart(lambda: mount.set_direct(self._target(image.where), direct), keep=-1)
            image.direct = direct
        except OSError as error:
            log.debug("image %s: %s", image.where, error)

    def _ignore(self, batch: Sequence[tuple[str, DeviceFiles]]) -> None:
        """Drop the marks of devices that were complete before anybody read them, once that is of no interest."""
        for device, devices in batch:
            users = self._users(device)
            if any(image.reader.recorder is not None or image.volume.stats.watched for image in users):
                continue
            self._later.pop(device, None)  # before it is opened: who says so again meanwhile is heard
            _, blob_id, name = device.split("/")
            fd = devices.open(blob_id, name, os.O_RDONLY)
            if fd >= 0:
                self._let_be(device, fd)
                os.close(fd)

    def _let_be(self, device: str, fd: int) -> None:
        for image in self._users(device):
            segment = image.segment(device)
            if segment is not None:
                image.devices.leaving.quiet(device, fd, segment.padded)
                return
