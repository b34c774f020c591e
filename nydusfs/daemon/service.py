"""The daemon: start order, what ends it, and the order in which it ends."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from nydusfs.config import CacheConfig, Config, LocalFsBackend, load_config
from nydusfs.daemon import http, process
from nydusfs.daemon.api import Api
from nydusfs.daemon.errors import MountFailedError
from nydusfs.daemon.images import ImageOpener
from nydusfs.daemon.logs import ErrorRing
from nydusfs.daemon.mounts import MountRequest, MountTable
from nydusfs.daemon.state import Event, State, StateMachine
from nydusfs.daemon.version import version_line
from nydusfs.drivers import kernel
from nydusfs.drivers.fuse import FuseDriver, InFlightInfo
from nydusfs.errors import NydusError
from nydusfs.services import Services, open_services

log = logging.getLogger("nydusfs.daemon")

# A stop must end the process even if a thread hangs in a call that cannot be cancelled (a name lookup, a dead NFS).
STOP_DEADLINE = 7.0  # and a second for a log that takes nothing: 8 in all
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Options:
    mountpoint: str
    apisock: str | None = None
    bootstrap: str | None = None
    config: str | None = None
    localfs_dir: str | None = None
    prefetch_files: str | None = None
    virtual_mountpoint: str = "/"
    daemon_id: str | None = None
    threads: int = 4
    rlimit_nofile: int = 1_000_000


def first_mount(options: Options) -> MountRequest | None:
    """The image given on the command line, None for an empty daemon. Raises `NydusError`."""
    config: Config | None = None
    if options.config is not None:
        try:
            text = Path(options.config).read_text(encoding="utf-8")
        except OSError as error:
            raise NydusError(f"configuration {options.config} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise NydusError(f"configuration {options.config} is not UTF-8 text") from None
        # Without a bootstrap the file is a template for nobody: each mount brings its own configuration.
        config = load_config(text, options.config, template=options.bootstrap is None)
    if options.bootstrap is None:
        return None
    if config is None:
        if options.localfs_dir is None:
            raise NydusError("both --config and --localfs-dir are missing: one must say where the image's blobs are")
        if not os.path.isdir(options.localfs_dir):
            raise NydusError(f"--localfs-dir {options.localfs_dir} is not a directory: give the one with the blobs")
        config = Config(id="", backend=LocalFsBackend(dir=options.localfs_dir), cache=_local_cache(options.localfs_dir))
    return MountRequest(options.virtual_mountpoint, options.bootstrap, config, _prefetch_list(options.prefetch_files))


def _local_cache(directory: str) -> CacheConfig:
    """Beside the blobs, as upstream keeps it, but in a folder: the cache of a blob has the blob's own name."""
    path = os.path.join(directory, ".nydusd-cache")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as error:
        log.warning(
            "no cache directory can be made at %s (%s): data is decoded again when needed", path, error.strerror
        )
        return CacheConfig()
    return CacheConfig(type="blobcache", work_dir=path)


def _prefetch_list(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        raise NydusError(f"the prefetch-files arg is not a file path: {path}") from None
    files = tuple(line.strip() for line in lines if line.strip())
    for name in files:
        if not name.startswith("/"):
            raise NydusError(f"invalid prefetch file list: {path}: {name!r} is not an absolute path")
    return files


class Daemon:
    """`DaemonControl` for the API."""

    mounts: MountTable

    def __init__(self, options: Options, events: ErrorRing) -> None:
        self.options = options
        self.id = options.daemon_id
        self.supervisor: str | None = None
        self.events = events
        self._machine = StateMachine()
        self._driver: FuseDriver
        self._services: Services
        self._stopping = trio.Event()
        self._unmount = True
        self._failed = False
        self._listening = False
        self._deadline_armed = False
        self._runtime: dict[str, dict[str, str]] = {}

    # -- what the API asks

    @property
    def state(self) -> State:
        return self._machine.state

    def start(self) -> None:
        self._machine.step(Event.START)

    async def exit(self) -> Callable[[], None]:
        self._machine.exit()
        log.info("exit daemon by http request")
        self._unmount = False
        # Reads now in flight are answered before the caller is; those blocked for longer end with EIO at the stop.
        with trio.move_on_after(2):
            await self._driver.loop.wait_idle()
        return self._stopping.set

    def inflight(self) -> list[InFlightInfo]:
        return self._driver.inflight()

    def set_runtime_config(self, config_id: str, values: dict[str, str]) -> None:
        self._runtime.setdefault(config_id, {}).update(values)
        if (auth := values.get("registry_auth")) is not None:
            self._services.set_registry_auth(config_id, auth)
            log.info("new registry credentials for %s", f"configuration {config_id}" if config_id else "all images")

    def runtime_config(self, config_id: str) -> dict[str, str]:
        return self._runtime.get(config_id, {})

    # -- life

    def prepare(self) -> MountRequest | None:
        """All checks that need no event loop. Raises `NydusError`; nothing was changed then, except a dead mount."""
        process.tame_allocator()
        process.stacks_on_signal()
        log.info(version_line())
        process.raise_nofile_limit(self.options.rlimit_nofile)
        process.check_privileges()
        kernel.check_fuse_device()
        request = first_mount(self.options)
        if self.options.apisock is not None:
            http.check_socket_path(self.options.apisock)
        self._driver = FuseDriver(process.check_mountpoint(self.options.mountpoint), self.options.threads)
        return request

    async def run(self, request: MountRequest | None) -> int:
        """Serve until stopped; the exit status. Raises `NydusError` when the start fails."""
        refused: NydusError | None = None
        try:
            with trio.open_signal_receiver(*_SIGNALS) as signals:
                async with open_services() as services, trio.open_nursery() as nursery:
                    self._services = services
                    self.mounts = MountTable(self._driver, ImageOpener(services, self._driver.mountpoint), nursery)
                    nursery.start_soon(self._watch_signals, signals)
                    try:
                        await self._serve(nursery, request)
                    except NydusError as error:
                        refused = error  # raised below, outside the nursery's exception group
                    finally:
                        # Also after an unexpected error: no mount may stay behind a daemon that is about to end.
                        self._arm_deadline()
                        if self._unmount:
                            self._driver.detach()
                        nursery.cancel_scope.cancel()
        finally:
            # Only now no task can answer a request any more: libfuse's session may go.
            self._driver.close()
            self._remove_socket()
        if refused is not None:
            raise refused
        log.info("nydusd quits")
        return 1 if self._failed else 0

    async def _serve(self, nursery: trio.Nursery, request: MountRequest | None) -> None:
        if request is not None:
            try:
                await self.mounts.mount(request)
            except MountFailedError as error:
                raise NydusError(error.message) from None
        # Bound before the mount, so that a bad path fails the start; clients wait until the API serves.
        listener = http.bind_socket(self.options.apisock) if self.options.apisock is not None else None
        self._listening = listener is not None
        self._driver.open()
        self._machine.step(Event.MOUNT)
        served = trio.Event()
        await nursery.start(self._serve_fuse, served)
        self._machine.step(Event.START)
        log.info("start fuse servers with %d worker threads", self.options.threads)
        log.info("Fuse daemon started!")
        api = trio.CancelScope()
        if listener is not None:
            log.info("HTTP API server running at %s", self.options.apisock)

            async def serve_api() -> None:
                with api:
                    await http.serve(listener, Api(self).handle)

            nursery.start_soon(serve_api)
            log.info("http server started")
        await self._stopping.wait()
        self._arm_deadline()
        api.cancel()
        self._remove_socket()
        if self._machine.state is not State.STOPPED:
            self._machine.stop()
        await self._driver.stop(unmount=self._unmount)
        await served.wait()
        await self.mounts.close_all()

    def _remove_socket(self) -> None:
        if self._listening and self.options.apisock is not None:
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
        finally:
            served.set()
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
            if self._unmount:
                kernel.call_with_deadline(self._driver.detach, 1.0)
            os._exit(1)

        timer = threading.Timer(STOP_DEADLINE, give_up)
        timer.daemon = True
        timer.start()
