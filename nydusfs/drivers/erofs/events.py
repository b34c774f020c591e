"""The kernel asks before it reads a device: take the question, have it answered, forget nothing when we die.

Plain threads read the group, one at a time. What is complete they answer at once; what a thread can complete by itself
it does, while another one takes events; the rest goes to the event loop, which fetches in any order. Who writes a
device answers those who wait for it in the same moment (`filled`): the links, names and bookkeeping of a segment are
not in their way. A worker that follows another one first settles what that one left
(`journal`): a number may be answered only while no new event can have the same one, since the kernel matches answers by
number alone. So the numbers of pending entries are occupied by descriptors of ours until they are answered.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import select
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import NamedTuple, Protocol

import trio

from nydusfs.drivers import kernel
from nydusfs.drivers.erofs import fanotify
from nydusfs.drivers.erofs.journal import SWEEP, Journal, Pending
from nydusfs.lane import SLOTS

log = logging.getLogger("nydusfs.erofs")

THREADS = 1 + SLOTS
QUIET = 60.0  # seconds between two lines about events that cannot be read
_DELETED = " (deleted)"
_IN_CLONE = re.compile(r"/[0-9a-f]{8}/[^/]+/[^/]+")  # cache's key, blob, segment: see `cache.devices`


class Question(NamedTuple):
    """`name` of a device as in `cache.devices`. `offset`, `size`: what is to be read of it, in bytes; 0, 0: not known,
    as of what an earlier worker left. `fd`: the device, open for writing without events; -1: not at hand. `began`: of
    time.time()."""

    name: str
    offset: int
    size: int
    pid: int
    fd: int
    began: float


class Waiting(NamedTuple):
    """`number`: what the kernel calls the event; a descriptor of ours until it is closed."""

    question: Question
    number: int
    slot: int


class Server(Protocol):
    def ready(self, question: Question) -> bool:
        """From the reading threads: whether the device is complete. Must not wait."""

    def simple(self, question: Question) -> bool:
        """From the reading threads: whether `fill_now` may do something. Must not wait."""

    def fill_now(self, question: Question) -> bool:
        """From the reading threads: make the device complete; False: ask `fill`."""

    async def fill(self, question: Question) -> bool:
        """Make it complete; False when that failed for good."""


class Events:
    """One process reads one group at a time."""

    def __init__(self, group: int, journal: Journal, server: Server) -> None:
        # Its own, so that no thread of this one writes to what somebody else closed: the number may be another file's.
        self._group = os.dup(group)
        self._journal = journal
        self._server = server
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._stop = trio.Event()
        self._successor = False
        self._quiet_until = 0.0
        self._pid = os.getpid()
        self._numbers = count(1, 2)  # those of FUSE are even
        self.waiting: dict[int, Waiting] = {}  # readers who wait for data, by numbers of ours
        self._answering = threading.Lock()  # over who takes one of them out
        self._turn = threading.Lock()  # of a thread to read events
        self._nursery: trio.Nursery
        self._token: trio.lowlevel.TrioToken

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer until `stop`. What then waits for data gets EIO, or is left to the successor."""
        self._token = trio.lowlevel.current_trio_token()
        threads = [threading.Thread(target=self._read, args=(number,), daemon=True) for number in range(THREADS)]
        try:
            async with trio.open_nursery() as self._nursery:
                self._settle()
                for thread in threads:
                    thread.start()
                task_status.started()
                await self._stop.wait()
                self._nursery.cancel_scope.cancel()
        finally:
            os.eventfd_write(self._wake, len(threads))
            with trio.CancelScope(shield=True):
                for thread in threads:
                    await trio.to_thread.run_sync(thread.join, 1.0)
            # One that hangs in a call ends later: it is refused then.
            for fd in (self._group, self._wake):
                kernel.bury(fd)

    def stop(self, *, successor: bool) -> None:
        self._successor = successor
        self._stop.set()

    # -- what another worker left

    def _settle(self) -> None:
        left = self._journal.left()
        for entry in left:
            if _occupy(entry.number, self._journal.fd):
                self._nursery.start_soon(self._serve_left, entry)
            else:
                # An event of ours could get the number as soon as it is free. Once denied, the kernel asks again.
                fanotify.answer(self._group, entry.number, fanotify.FAN_DENY)
                self._journal.clear(entry.slot)
        if self._journal.take_gap():
            known = {entry.number for entry in left}
            lost = [
                number
                for number in range(SWEEP)
                if number not in known and fanotify.answer(self._group, number, fanotify.FAN_DENY)
            ]
            log.info("the last worker died while it took an event: %d asked again", len(lost))
        if left:
            log.info("%d reads that the last worker did not answer", len(left))

    async def _serve_left(self, entry: Pending) -> None:
        question = Question(entry.name, entry.offset, entry.size, 0, -1, time.time())
        await self._serve(Waiting(question, entry.number, entry.slot))

    # -- threads

    def _read(self, number: int) -> None:
        poller = select.poll()
        poller.register(self._group, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        try:
            while True:
                with self._turn:
                    asked = self._take(number, poller)
                if asked is None:
                    return
                self._fill_now(asked)
        except trio.RunFinishedError:
            return  # the process ends; nobody may answer for it

    def _fill_now(self, asked: Waiting) -> None:
        """Complete a device in this thread, or have the event loop do so."""
        done, mine = False, next(self._numbers)
        self.waiting[mine] = asked
        try:
            done = self._server.fill_now(asked.question)
        except Exception:  # a bug must cost one read its speed
            log.exception("event for %s", asked.question.name)
        with self._answering:  # by `filled`, mostly
            waits = self.waiting.pop(mine, None) is not None
        if waits and not done:
            self._token.run_sync_soon(self._begin, asked)
            return
        if waits:
            self._answer(asked.number, asked.slot, fanotify.FAN_ALLOW)
        os.close(asked.number)

    def _take(self, number: int, poller: select.poll) -> Waiting | None:
        """The next event that this thread may be able to complete by itself; None: it is over."""
        while True:
            if any(fd == self._wake for fd, _ in poller.poll()):
                return None
            self._journal.reading(number, True)
            try:
                event = fanotify.read_event(self._group)
            except OSError as error:
                self._journal.reading(number, False)
                if time.monotonic() >= self._quiet_until:  # a broken disk makes thousands
                    self._quiet_until = time.monotonic() + QUIET
                    log.error("an event of the kernel cannot be read, its reader gets EIO: %s", error.strerror or error)
                continue
            if event is None:
                self._journal.reading(number, False)
                continue
            # What this process does to a file with a mark of its own would not outlive its death. Who opened such a
            # file by its plain path is a mount that had it complete, or reads the cache (`nydusctl cache`).
            if event.pid == self._pid or not (name := _device(event.fd)):
                self._tell(event.fd, fanotify.FAN_ALLOW)
                os.close(event.fd)
                self._journal.reading(number, False)
                continue
            slot = self._journal.write(event.fd, name, event.offset, event.size)
            self._journal.reading(number, False)
            try:
                question = Question(name, event.offset, event.size, event.pid, event.fd, time.time())
                if self._server.ready(question):
                    self._answer(event.fd, slot, fanotify.FAN_ALLOW)
                    os.close(event.fd)
                    continue
                asked = Waiting(question, event.fd, slot)
                if self._server.simple(question):
                    return asked
                self._token.run_sync_soon(self._begin, asked)
            except trio.RunFinishedError:
                raise
            except Exception:
                log.exception("event for %s", name)
                self._answer(event.fd, slot, fanotify.FAN_DENY)
                os.close(event.fd)

    def filled(self, device: str, complete: Callable[[Question], bool]) -> None:
        """A device has its bytes: let those go on who wait for it and for whom it is `complete`. From any thread."""
        for mine, asked in list(self.waiting.items()):
            if asked.question.name == device and complete(asked.question):
                with self._answering:
                    if self.waiting.pop(mine, None) is not None:
                        self._answer(asked.number, asked.slot, fanotify.FAN_ALLOW)

    # -- the event loop

    def _begin(self, asked: Waiting) -> None:
        if not self._stop.is_set():
            self._nursery.start_soon(self._serve, asked)
        elif not self._successor:  # a reader who was told EIO and whom the kernel has try once more
            self._answer(asked.number, asked.slot, fanotify.FAN_DENY)
            os.close(asked.number)

    async def _serve(self, asked: Waiting) -> None:
        response = fanotify.FAN_DENY
        mine = next(self._numbers)
        self.waiting[mine] = asked
        try:
            if await self._server.fill(asked.question):
                response = fanotify.FAN_ALLOW
        except Exception:  # a bug must cost one read
            log.exception("event for %s", asked.question.name)
        finally:
            with self._answering:  # by `filled`: its number is free once that is done
                waits = self.waiting.pop(mine, None) is not None
            if waits and response == fanotify.FAN_DENY and self._stop.is_set() and not self._successor:
                log.warning("device %s: EIO, this daemon stops", asked.question.name)
            if waits and (response == fanotify.FAN_ALLOW or not self._successor):
                self._answer(asked.number, asked.slot, response)
                waits = False
            if not waits:
                os.close(asked.number)

    def _answer(self, number: int, slot: int, response: int) -> None:
        """The descriptor is closed later: until then no other event gets its number."""
        if self._tell(number, response):
            self._journal.clear(slot)

    def _tell(self, number: int, response: int) -> bool:
        """False: this worker's time is over, and who waits is its successor's."""
        try:
            fanotify.answer(self._group, number, response)
            return True
        except OSError as error:
            log.error("the kernel does not take the answer to event %d: %s", number, error.strerror)
            return False


def _device(fd: int) -> str:
    """The name of a device that was opened through a private clone, be it of a daemon that is gone: paths begin there.
    "" for other files."""
    path = os.readlink(f"/proc/self/fd/{fd}").removesuffix(_DELETED)
    return path[1:] if _IN_CLONE.fullmatch(path) else ""


def _occupy(number: int, fd: int) -> bool:
    """Have a copy of a descriptor under this number; False when it is another one's, or more than this process may
    have. In one step: other threads open files meanwhile."""
    try:
        got = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, number)
    except OSError:
        return False
    if got != number:
        os.close(got)
    return got == number
