"""The daemon: start order, what ends it, and the order in which it ends.

A worker ends in one of three ways. It *stops* (signal, API, umount from outside): the mount goes or is left dead, and
no other worker follows. It *retires*: a successor has the connection and answers what is unanswered. It *dies*: nothing
is done, the keeper starts the next one, which goes on with what was saved last.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import trio

from nydusfs import stacks
from nydusfs.cache.devices import device_key
from nydusfs.config import load_config
from nydusfs.daemon import handover, http, process
from nydusfs.daemon.api import Api
from nydusfs.daemon.caches import Caches
from nydusfs.daemon.errors import ApiError, MountFailedError, UnsupportedError
from nydusfs.daemon.handover import KeptMount, KeptState
from nydusfs.daemon.images import ImageOpener
from nydusfs.daemon.logs import ErrorRing, set_level
from nydusfs.daemon.mounted import MountRequest
from nydusfs.daemon.mounts import MountTable, canonical
from nydusfs.daemon.options import Options, first_mount, pull_auth
from nydusfs.daemon.state import Event, State, StateMachine
from nydusfs.daemon.version import version_line
from nydusfs.drivers import kernel
from nydusfs.drivers.erofs.driver import ErofsDriver
from nydusfs.drivers.fuse import FuseDriver, InFlightInfo
from nydusfs.errors import NydusError
from nydusfs.keeper.haste import take_time
from nydusfs.keeper.jobs import Jobs
from nydusfs.keeper.link import KeeperLink
from nydusfs.keeper.protocol import API, FUSE, read_memory_file
from nydusfs.services import Services, open_services

log = logging.getLogger("nydusfs.daemon")

# A stop must end the process even if a thread hangs in a call that cannot be cancelled (a name lookup, a dead NFS).
STOP_DEADLINE = 7.0  # and a second for a log that takes nothing: 8 in all
UPGRADE_SECONDS = 30.0
RESTORED_AT_ONCE = 8  # images, while readers of others are served already
OTHERS_WAIT = 0.1  # seconds at most that images nobody asks for wait for reads of those that are open
HASTE_SECONDS = 1.0
HURRIED, HURRIED_SECONDS = 8, 1.0  # reads that waited for this worker are given to two sources at once
SOURCES = "sources"  # name of a held descriptor: what was learned of them
CACHE = "cache-"  # what names of held descriptors begin with: claims on cache directories
MAX_CLAIMS = 8  # that are handed on; a node has one cache directory
_LOG = "\0log"  # no configuration's id: what the next worker takes over of the log
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_Kept: TypeAlias = tuple[MountRequest, KeptMount]


class Daemon:
    """`DaemonControl` for the API. `link`: to the keeper, None for a daemon that nobody succeeds."""

    mounts: MountTable

    def __init__(
        self, options: Options, events: ErrorRing, link: KeeperLink | None = None, jobs: Jobs | None = None
    ) -> None:
        self.options = options
        self.id = options.daemon_id
        self.supervisor = options.supervisor
        self.events = events
        self._link = link
        self._jobs = jobs or Jobs()
        self._machine = StateMachine()
        self._driver: FuseDriver
        self._services: Services
        self._erofs: ErofsDriver
        self._kept: KeptState | None = None
        self._stopping = trio.Event()
        self._started = trio.Event()  # RUNNING: requests are answered
        self._ready = trio.Event()  # and readers' too
        self._refused = ""
        self._retired: trio.Event | None = None  # set by the keeper's answer to `upgrade`; None: it was not asked
        self._unmount = True
        self._retiring = False
        self._successor = False  # somebody else has the connection and answers what this one leaves unanswered
        self._failed = False
        self._listening = False
        self._deadline_armed = False
        self._runtime: dict[str, dict[str, str]] = {}
        self._mounted_ids: set[str] = set()

    # -- what the API asks

    @property
    def state(self) -> State:
        return self._machine.state

    @property
    def keeper_pid(self) -> int | None:
        return self._link.keeper_pid if self._link is not None else None

    def start(self) -> None:
        self._machine.step(Event.START)
        self._started.set()

    async def exit(self) -> Callable[[], None]:
        self._machine.exit()
        log.info("exit daemon by http request")
        self._unmount = False
        self._successor = self.supervisor is not None
        # Reads now in flight are answered before the caller is; those blocked for longer are the successor's, or end
        # with EIO at the stop.
        with trio.move_on_after(2):
            await self._driver.loop.wait_idle()
        return self._stopping.set

    async def send_fd(self) -> None:
        """Give state and connection to the supervisor."""
        if self.supervisor is None:
            raise UnsupportedError()
        if self._driver.connection.fd < 0:
            raise ApiError("DaemonAbnormal(NotReady)", 503)
        fds = {FUSE: self._driver.connection.fd, **self._erofs.descriptors(), **self._claims()}
        try:
            await trio.to_thread.run_sync(handover.send_to_supervisor, self.supervisor, self._state(), fds)
        except NydusError as error:
            log.error("%s", error)
            raise ApiError("DaemonAbnormal(SendFd)") from None

    async def take_over(self) -> None:
        """Go on with what the supervisor was given by another daemon."""
        if self.supervisor is None:
            raise UnsupportedError()
        self._machine.expect(Event.TAKEOVER)
        try:
            kept, fds = await trio.to_thread.run_sync(handover.receive_from_supervisor, self.supervisor)
            self._erofs.adopt(kept.mountpoint, fds)
            self._services.claims = _claims_of(fds)
            await self._restore(kept, fds[FUSE])
        except NydusError as error:
            log.error("takeover failed: %s", error)
            raise ApiError("DaemonAbnormal(RecvFd)") from None

    async def upgrade(self) -> Callable[[], None]:
        """Have a worker of the installed code follow. The returned call makes room for it."""
        if self._link is None or self._link.keeper_pid == 0:
            raise UnsupportedError()
        if self._machine.state is not State.RUNNING:
            raise ApiError("DaemonAbnormal(NotReady)", 503)
        if self._retired is None:  # who asks meanwhile is told the same
            self._refused, self._retired = "no answer of the keeper in time", trio.Event()
            self._link.upgrade()
        asked = self._retired
        with trio.move_on_after(UPGRADE_SECONDS):
            await asked.wait()
        if self._retired is asked:
            self._retired = None
        if self._refused:
            log.error("upgrade refused: %s", self._refused)
            raise ApiError("DaemonAbnormal(Upgrade)")
        return self._retire

    def inflight(self) -> list[InFlightInfo]:
        return [*self._driver.inflight(), *self._erofs.inflight()]

    @property
    def caches(self) -> Caches:
        return Caches(self._services, self.mounts, self._driver)

    def sources(self) -> list[dict[str, Any]]:
        return self._services.hub.report()

    async def drop_blob(self, blob_id: str) -> bool:
        dropped = await self._services.drop_blob(blob_id)
        if not dropped:
            log.info("blob %s is kept: an image has it that is mounted, or about to be", blob_id)
        return dropped

    def set_log_level(self, level: str) -> None:
        self.set_runtime_config(_LOG, {"log_level": level})

    def set_runtime_config(self, config_id: str, values: dict[str, str]) -> None:
        self._apply(config_id, values)
        self._save()

    def _apply(self, config_id: str, values: dict[str, str]) -> None:
        self._runtime.setdefault(config_id, {}).update(values)
        if config_id == _LOG:
            set_level(values["log_level"])
        if (auth := values.get("registry_auth")) is not None:
            self._services.set_registry_auth(config_id, auth)
            log.info("new registry credentials for %s", f"configuration {config_id}" if config_id else "all images")

    def runtime_config(self, config_id: str) -> dict[str, str]:
        return self._runtime.get(config_id, {})

    def _mounts_changed(self) -> None:
        """Settings of images that are gone go too: containers come and go for months, and so do their passwords."""
        before, self._mounted_ids = self._mounted_ids, {one.request.config.id for one in self.mounts.images.values()}
        for config_id in before - self._mounted_ids - {""}:
            self._runtime.pop(config_id, None)
            self._services.forget_registry_auth(config_id)
        self._save()

    # -- what is kept for the next worker

    def _share(self, services: Services) -> None:
        link, hub = self._link, services.hub
        if link is not None:
            services.claims = _claims_of(link.held)
            services.claimed = self._hold_claim
            if SOURCES in link.held:
                hub.take_over(read_memory_file(link.held[SOURCES]))
            hub.learned = lambda: link.keep(SOURCES, hub.leave())

    def _hold_claim(self, key: str, fd: int) -> None:
        assert self._link is not None
        if sum(name.startswith(CACHE) for name in self._link.held) < MAX_CLAIMS:
            self._link.hold(CACHE + key, fd)

    def _claims(self) -> dict[str, int]:
        return {CACHE + device_key(store.path): store.claim for store in self._services.stores()[:MAX_CLAIMS]}

    def _state(self) -> KeptState:
        tree, next_node = self._driver.operations.tree.numbers()
        driver = self._driver
        return KeptState(driver.mountpoint, self.mounts.kept(), driver.numbering, tree, next_node, self._runtime)

    def _save(self) -> None:
        if self._link is not None and FUSE in self._link.held:
            self._link.save(handover.encode(self._state()))

    async def _restore(self, kept: KeptState, fd: int, nursery: trio.Nursery | None = None) -> None:
        """`nursery`: in which EROFS reads may be served before all images are known."""
        driver = self._driver
        driver.mountpoint = kept.mountpoint
        driver.adopt(fd)
        driver.numbering = kept.numbering
        driver.operations.tree.restore_numbers(kept.tree, kept.next_node)
        self._services.hub.extras.hurry(HURRIED, trio.current_time() + HURRIED_SECONDS)
        for config_id, values in kept.runtime.items():
            self._apply(config_id, values)  # not saved before the mounts are there: the next worker would have none
        found = []
        for mount in kept.mounts:
            try:
                config = load_config(mount.config, f"configuration of {mount.mountpoint}")
            except NydusError as error:
                log.error("image at %s is lost: %s", mount.mountpoint, error)
                continue
            if self.options.bootstrap and mount.mountpoint == canonical(self.options.virtual_mountpoint):
                config = pull_auth(config)
            request = MountRequest(mount.mountpoint, mount.source, config, mount.prefetch_files, mount.config)
            found.append((request, mount))
        if nursery is not None and self._erofs.descriptors():
            await self._erofs.start(nursery)
            found = await self._restore_asked(found)
        await self.mounts.restore(found)
        self._hold()
        self._machine.step(Event.TAKEOVER)

    async def _restore_asked(self, images: list[_Kept]) -> list[_Kept]:
        """Those first whose readers wait already, or come meanwhile; the rest when these are answered, or soon. What
        only FUSE shows is left: its readers wait until all is there."""
        keyed = [(_device_key(pair[0]), pair) for pair in images]
        left = [pair for pair in keyed if self._erofs.had(pair[1][0].mountpoint)]
        others = [pair for _, pair in keyed if not self._erofs.had(pair[0].mountpoint)]
        until = trio.current_time() + OTHERS_WAIT
        while left:
            await self._erofs.asked(until if not others else 0)
            keys = self._erofs.unknown()
            batch = ([pair for pair in left if pair[0] in keys] or left)[:RESTORED_AT_ONCE]
            left = [pair for pair in left if not any(pair is one for one in batch)]
            await self.mounts.restore([pair for _, pair in batch])
        return others

    def _hold(self) -> None:
        if self._link is not None:
            self._link.hold(FUSE, self._driver.connection.fd)
            self._save()

    # -- life

    def prepare(self, state: int = -1) -> MountRequest | None:
        """All checks that need no event loop. `state`: a memory file of the last worker. Raises `NydusError`; nothing
        was changed then, except a dead mount."""
        process.tame_allocator()
        stacks.on_signal()
        log.info(version_line())
        process.raise_nofile_limit(self.options.rlimit_nofile)
        process.check_privileges()
        if self._link is not None and FUSE in self._link.held:
            kept = handover.decode(read_memory_file(state)) if state >= 0 else KeptState(self.options.mountpoint)
            self._kept = kept
            self._driver = FuseDriver(kept.mountpoint, self.options.threads)
            return None
        kernel.check_fuse_device()
        take_time()  # nobody waits yet
        request = None if self.options.upgrade else first_mount(self.options)
        if self.options.apisock is not None:
            http.check_socket_path(self.options.apisock)
        mountpoint = self.options.mountpoint
        mountpoint = os.path.abspath(mountpoint) if self.options.upgrade else process.check_mountpoint(mountpoint)
        self._driver = FuseDriver(mountpoint, self.options.threads)
        return request

    async def run(self, request: MountRequest | None) -> int:
        """Serve until stopped; the exit status. Raises `NydusError` when the start fails."""
        refused: NydusError | None = None
        stacks.watch_tasks()
        try:
            with trio.open_signal_receiver(*_SIGNALS) as signals:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # blocked since `keeper.zygote` forked this worker
                async with open_services() as services, trio.open_nursery() as nursery:
                    self._services = services
                    self._share(services)
                    self._erofs = ErofsDriver(
                        self._driver.mountpoint, self._link, self.options.fs_driver, self._jobs
                    )
                    opener = ImageOpener(services, self._driver.mountpoint, nursery, self._erofs)
                    self.mounts = MountTable(self._driver, opener, nursery, self._mounts_changed, self._erofs)
                    nursery.start_soon(self._watch_signals, signals)
                    nursery.start_soon(self._end_haste)
                    nursery.start_soon(process.give_back_when_idle, services)
                    if self._link is not None:
                        nursery.start_soon(self._link.watch, self._agree, self._refuse_upgrade)
                    try:
                        await self._serve(nursery, request)
                    except NydusError as error:
                        refused = error  # raised below, outside the nursery's exception group
                    finally:
                        # Also after an unexpected error: no mount may stay behind a daemon that is about to end,
                        # unless another one follows.
                        self._arm_deadline()
                        if self._unmount and not self._followed():
                            self._driver.detach()
                        nursery.cancel_scope.cancel()
        finally:
            # Only now no task can answer a request any more.
            self._driver.close()
            self._remove_socket()
        if refused is not None:
            raise refused
        log.info("nydusd quits")
        return 1 if self._failed else 0

    def _followed(self) -> bool:
        """Whether the keeper starts another worker after this one: this one retires, or it ends unexpectedly."""
        kept = self._link is not None and FUSE in self._link.held
        return self._retiring or (kept and not self._stopping.is_set())

    async def _serve(self, nursery: trio.Nursery, request: MountRequest | None) -> None:
        if request is not None:
            try:
                await self.mounts.mount(request)
            except MountFailedError as error:
                raise NydusError(error.message) from None
        # Bound before the mount, so that a bad path fails the start; clients wait until the API serves.
        listener = self._listener()
        api = trio.CancelScope()

        async def serve_api() -> None:
            with api:
                assert listener is not None
                await http.serve(listener, Api(self).handle)

        def start_api() -> None:
            if listener is not None:
                nursery.start_soon(serve_api)
                log.info("HTTP API server running at %s", self.options.apisock)
                log.info("http server started")

        served = trio.Event()
        if self.options.upgrade and self._kept is None:
            start_api()
            await self._until_started()
        else:
            await self._open(nursery)
            self.start()
        if not self._stopping.is_set():
            await self._erofs.start(nursery)
            await nursery.start(self._serve_fuse, served)
            await self._erofs.begin()
            await self.mounts.begin()
            if self._kept is not None:  # and not beside another daemon, which may be at work still
                self._services.reopen_claimed()
            log.info("start fuse servers with %d worker threads", self.options.threads)
            log.info("Fuse daemon started!")
            if self._link is not None:
                self._link.ready()
            self._ready.set()
            if not self.options.upgrade or self._kept is not None:
                start_api()
        else:
            served.set()
        await self._stopping.wait()
        self._arm_deadline()
        if self._link is not None and not self._retiring:
            self._link.stopping()
        api.cancel()
        self._remove_socket()
        if self._machine.state is not State.STOPPED:
            self._machine.stop()
        await self._erofs.stop(successor=self._successor)
        await self._driver.stop(unmount=self._unmount, successor=self._successor)
        await served.wait()
        await self.mounts.close_all()

    async def _open(self, nursery: trio.Nursery) -> None:
        """To READY: a new mount, or the last worker's."""
        if self._kept is not None:
            assert self._link is not None
            await self._restore(self._kept, os.dup(self._link.held[FUSE]), nursery)
            return
        self._driver.open()
        self._hold()
        self._machine.step(Event.MOUNT)

    async def _end_haste(self) -> None:
        """Readers who waited for this worker are answered, or it would be too long."""
        with trio.move_on_after(HASTE_SECONDS):
            await self._ready.wait()
            await self._erofs.caught_up()
        take_time()

    async def _until_started(self) -> None:
        async with trio.open_nursery() as nursery:

            async def watch(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch, self._started)
            nursery.start_soon(watch, self._stopping)

    def _listener(self) -> socket.socket | None:
        if self.options.apisock is None:
            return None
        if self._link is not None and API in self._link.held:
            listener = socket.socket(fileno=os.dup(self._link.held[API]))
            listener.setblocking(False)
        else:
            listener = http.bind_socket(self.options.apisock)
            if self._link is not None:
                self._link.hold(API, listener.fileno())
        self._listening = True
        return listener

    def _remove_socket(self) -> None:
        if self._listening and self.options.apisock is not None and not self._followed():
            self._listening = False
            http.remove_socket(self.options.apisock)

    async def _serve_fuse(self, served: trio.Event, task_status: trio.TaskStatus[None]) -> None:
        try:
            await self._driver.serve(task_status)
            if not self._stopping.is_set():
                log.info("the mount at %s was unmounted from outside", self.options.mountpoint)
        except OSError as error:
            log.error("FUSE session failed: %s", error)
            self._failed = True
            if self._link is not None:
                self._retire()
        finally:
            served.set()
        self._stopping.set()  # not where it was cancelled, for a bug in any task: another worker follows then

    def _agree(self) -> None:
        self._answered("")

    def _refuse_upgrade(self, why: str) -> None:
        self._answered(why or "refused")

    def _answered(self, refused: str) -> None:
        self._refused = refused
        if self._retired is not None:
            self._retired.set()

    def _retire(self) -> None:
        log.info("making room for another worker")
        self._unmount = False
        self._retiring = self._successor = True
        self._stopping.set()

    async def _watch_signals(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            # Before anything that may wait: a first mount under way, or a log that takes no more.
            self._arm_deadline()
            log.info("signal %s: stopping", signal.Signals(number).name)
            if self._stopping.is_set():
                continue
            self._unmount = True
            self._stopping.set()

    def _arm_deadline(self) -> None:
        if self._deadline_armed:
            return
        self._deadline_armed = True

        def say() -> None:
            log.error("stop did not finish within %.0f s: leaving at once", STOP_DEADLINE)

        def give_up() -> None:
            # A log that takes no more (a full pipe nobody reads) may be what keeps the stop waiting.
            kernel.call_with_deadline(say, 1.0)
            if self._unmount and not self._followed():
                kernel.call_with_deadline(self._driver.detach, 1.0)
            os._exit(1)

        timer = threading.Timer(STOP_DEADLINE, give_up)
        timer.daemon = True
        timer.start()


def _claims_of(held: Mapping[str, int]) -> dict[str, int]:
    return {name.removeprefix(CACHE): fd for name, fd in held.items() if name.startswith(CACHE)}


def _device_key(request: MountRequest) -> str:
    cache = request.config.cache
    return device_key(Path(cache.work_dir)) if cache.persistent else ""
