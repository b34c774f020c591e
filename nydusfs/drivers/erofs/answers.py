"""What the kernel is told when it asks about a device: whether it is complete, or to make it so (`events.Server`)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import trio

from nydusfs.cache.durability import resident
from nydusfs.drivers.erofs.events import Question
from nydusfs.drivers.erofs.filling import ErofsImage
from nydusfs.drivers.erofs.settling import Settling

log = logging.getLogger("nydusfs.erofs")


class Answers:
    """`users`: the images that have a device."""

    def __init__(self, users: Callable[[str], tuple[ErofsImage, ...]], settling: Settling) -> None:
        self._users = users
        self._settling = settling
        self._nursery: trio.Nursery
        self._at_work = False
        self.knows_all = False
        self._known = trio.Event()  # one more image of an earlier worker, or all

    def begin(self, nursery: trio.Nursery) -> None:
        self._nursery, self._at_work = nursery, True

    def end(self) -> None:
        self._at_work = False

    def one_more(self) -> None:
        """Of the images of an earlier worker, whose readers may have asked already."""
        self._known.set()
        self._known = trio.Event()

    def all_known(self) -> None:
        """Who asks about another image than those is not waited with."""
        self.knows_all = True
        self._known.set()

    def ready(self, question: Question) -> bool:
        name, fd = question.name, question.fd
        for image in self._users(name):
            began = time.perf_counter_ns()
            if not image.asked_before:
                # Of an earlier worker's mount: not in the way of those who waited for this one. Many are never asked.
                image.asked_before = True
                image.soon(self._know_files, image)
            kept = image.devices.leaving.keep(name)
            size = os.fstat(fd).st_size if kept else 0
            complete = image.asked(question, size)
            if complete is not None:
                if complete and image.is_durable(name):
                    curious = any(one.curious(name) for one in self._users(name))
                    complete = curious or image.devices.leaving.quiet(name, fd, size)
                else:
                    complete = complete and resident(fd, size)
                if complete:
                    image.answered(question, began, missed=False)
                return complete
        return False

    def simple(self, question: Question) -> bool:
        return any(image.at_hand(question) for image in self._users(question.name))

    def fill_now(self, question: Question) -> bool:
        for image in self._users(question.name):
            if image.asked_before and image.at_hand(question):
                if image.direct is not False:
                    image.soon(self._disturb, image)
                if image.fill_now(question):
                    return True
        return False

    def _disturb(self, image: ErofsImage) -> None:
        if self._at_work:
            self._settling.disturb(image, self._nursery)

    async def _begin_next(self, image: ErofsImage, question: Question) -> None:
        """Beside what a reader waits for: what comes behind."""
        try:
            if not image.asked_before:  # of an earlier worker's mount
                image.asked_before = True
                await trio.to_thread.run_sync(image.know_files)
                self._settling.changed()
            else:
                await trio.lowlevel.checkpoint()  # what he waits for is begun now
            image.begin_next(question)
        except Exception:  # a bug must cost the head start, not the daemon
            log.exception("image %s: its files are not known", image.where)

    def _know_files(self, image: ErofsImage) -> None:
        if self._at_work:
            self._nursery.start_soon(self._learn_files, image)
            self._settling.changed()

    async def _learn_files(self, image: ErofsImage) -> None:
        try:
            await trio.to_thread.run_sync(image.know_files)
        except Exception:  # it may be unmounted meanwhile, and its bootstrap closed: no reason to end the daemon
            log.debug("image %s: its files are not known", image.where, exc_info=True)

    async def fill(self, question: Question) -> bool:
        name = question.name
        users: tuple[ErofsImage, ...] = ()
        while True:
            late, known = not self.knows_all, self._known
            tried, users = users, self._users(name)
            for image in users:
                self._settling.disturb(image, self._nursery)
                if image not in tried:
                    self._nursery.start_soon(self._begin_next, image, question)
                    if await image.fill(question):
                        return True
            if not late:
                break
            await known.wait()
        if not users:
            log.warning("device %s is read by a mount that this daemon knows no more: EIO", name)
        elif all(image.segment(name) is None for image in users):
            log.error("device %s: the tables of its blob are others than at the mount: mount the image again", name)
        return False
