"""Start and end of the program: claim the root, sweep it, serve at once, recover behind, stop without disturbing."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from pathlib import Path
from typing import Any

import grpc

from snapshotter import controller
from snapshotter.auth.explain import ExplainService
from snapshotter.auth.renewal import Renewer
from snapshotter.auth.setup import Auth
from snapshotter.cachegc import Collector
from snapshotter.cacheusage import CacheUsage
from snapshotter.cgroup import MemoryGroup
from snapshotter.daemons import DaemonSettings
from snapshotter.database import NAME, Database
from snapshotter.errors import SnapshotterError, StartError
from snapshotter.flow import Snapshotter
from snapshotter.idmapped import IdMappedLayers
from snapshotter.images import Images
from snapshotter.lazy.finder import LazyFinder
from snapshotter.lazy.registries import Registries
from snapshotter.lean import Libraries
from snapshotter.logs import NYDUSD_LEVELS
from snapshotter.metrics import Metrics
from snapshotter.mounts import Layout
from snapshotter.nydusd_config import Template, template_of
from snapshotter.origins import Origins
from snapshotter.records import Records
from snapshotter.service import GRACE_SECONDS, Service, claim_address, serve
from snapshotter.serving import ImageSettings
from snapshotter.settings import Settings
from snapshotter.signature import Signatures
from snapshotter.store import Store
from snapshotter.system import in_user_namespace, overlay_works

log = logging.getLogger(__name__)


class Program:
    """A running snapshotter. The constructor returns with the socket being served; recovery goes on behind.

    `libraries`: whose pages are given back when the start is over. Raises StartError or SettingsError, with nothing
    left behind.
    """

    def __init__(self, settings: Settings, libraries: Libraries | None = None) -> None:
        if os.geteuid() != 0:
            raise StartError("must run as root: it mounts images and owns container files")
        template = template_of(settings)
        root = _make_root(settings.root)
        self._lock = _lock_root(root)
        claim_address(settings.address)
        userxattr = in_user_namespace()
        overlay_options = "userxattr" if userxattr else ""
        if not _overlay_works(root, overlay_options):
            raise StartError(
                "this kernel cannot mount overlayfs (or not on the file system of "
                f"{root}): containers need it. Try modprobe overlay, or another --root"
            )
        self._libraries = libraries
        self._settings = settings
        self._template = template
        self._database = Database(root / NAME)
        store = self._store = Store(root, self._database)
        self._database.reserve()
        for identity in store.missing:
            log.error("snapshot %d has no directory any more: remove its image in containerd, pull it again", identity)
        if (root / "metadata.db").exists():
            log.warning(
                "%s holds the database of another implementation (metadata.db), which is not read: "
                "images unpacked by it must be removed and pulled again",
                root,
            )
        daemon = DaemonSettings(
            program=settings.nydusd,
            root=root,
            log_dir=settings.log_dir,
            log_level=NYDUSD_LEVELS.get(settings.log_level, settings.log_level),
            log_rotation_size=settings.nydusd_log_rotation,
            threads=settings.threads,
            restart=settings.restart_nydusd,
            failover=settings.failover,
            failover_policy=settings.failover_policy,
            cpu_seconds=settings.system.cpu_seconds,
            log_format=settings.log_format,
            fs_driver=template.named_driver,
            group=MemoryGroup(settings.memory_limit) if settings.cgroup else None,
        )
        cache = settings.cache_dir
        if template.work_dir and template.work_dir != cache:
            log.info("work_dir %s of %s is not used: see --cache-dir", template.work_dir, template.path)
        images = ImageSettings(
            daemon,
            settings.shared,
            template,
            cache,
            settings.serve,
            Signatures(settings.public_key, required=settings.validate_signature),
        )
        records = Records(self._database)
        self._auth = Auth(settings.auth, template, root / "auth")
        origins = Origins(settings.address, settings.auth.image_service)
        self._images = Images(images, store, records, self._auth.chain, origins)
        self._renewer = Renewer(self._images.mounted, self._images.renew, settings.auth.renewal_seconds)
        self._images.configs.on_credentials = self._renewer.learned
        self._idmapped = IdMappedLayers(root, store, overlay_options)
        self._lazy = LazyFinder(settings.lazy, Registries(template, self._auth.chain), store)
        self._collector = Collector(
            cache,
            store.directory,
            lambda: [daemon.api for daemon in self._images.daemons() if daemon.alive],
            lambda: {one.bootstrap for one in self._images.instances()},
            enabled=settings.collect_cache,
            period=settings.collect_period,
        )
        layout = Layout(
            store.directory, volatile=settings.volatile, helper=settings.volumes.mount_type, userxattr=userxattr
        )
        self.snapshotter = Snapshotter(
            store,
            layout,
            self._images,
            self._idmapped,
            self._auth.vault,
            self._lazy,
            CacheUsage(cache, store),
            self._collector,
            origins,
            sync_remove=settings.sync_remove,
            volumes=settings.volumes,
            proxy=settings.proxy,
        )
        handlers: list[grpc.GenericRpcHandler[Any, Any]] = [ExplainService(self._auth.chain, store)]
        if self._auth.cri is not None:
            handlers.append(self._auth.cri)
        self._metrics = Metrics(settings.metrics, self._images, store, root, cache)
        control = controller.Controller(settings, self._images, records)
        self._operators = controller.serve(settings, root, control, self._metrics.answer)
        self._server: grpc.Server = serve(
            Service(self.snapshotter), settings.address, settings.uid, settings.gid, handlers
        )
        self._inode = settings.address.lstat().st_ino
        log.info("serving %s, root %s, blob cache %s", settings.address, root, cache)
        if settings.metrics.address:
            self._metrics.start()
        threading.Thread(target=self._recover, name="recovery", daemon=True).start()

    def _recover(self) -> None:
        self._auth.start(self._renewer.kick)
        self._images.recover()
        _say_driver(self._template, self._settings.cache_dir)
        self._collector.start()
        try:
            if written := self._store.write_records():
                log.info("%d snapshot directories of an older version have their records now", written)
        except (SnapshotterError, OSError) as error:
            log.warning("records of snapshots: %s", error)
        self._renewer.start()
        self._renewer.kick()  # images mounted again have the credentials of before
        if self._libraries is not None:
            self._libraries.give_back()

    def stop(self) -> None:
        """Ends serving; nydusd and its mounts stay for the containers that use them."""
        self._server.stop(GRACE_SECONDS).wait(GRACE_SECONDS + 1)
        self._metrics.close()
        for server in self._operators:
            server.close()
        self._renewer.close()
        self._auth.close()
        self._collector.close()
        self._images.close(umount=self._settings.cleanup_on_close)
        self._lazy.close(umount=self._settings.cleanup_on_close)
        if self._settings.cleanup_on_close:
            self._idmapped.close()
        self._database.close()
        try:
            # another instance may have put its own socket there by now
            if self._settings.address.lstat().st_ino == self._inode:
                self._settings.address.unlink()
        except FileNotFoundError:
            pass
        os.close(self._lock)


def repair(settings: Settings) -> list[str]:
    """A new database for a root that no snapshotter runs on; what was done, line by line. Raises StartError."""
    from snapshotter.repair import repair as rebuild

    if not settings.root.is_dir():
        raise StartError(f"root {settings.root}: there is no such directory: nothing to repair")
    root = settings.root.resolve()
    lock = _lock_root(root)
    try:
        return rebuild(root).lines()
    finally:
        os.close(lock)


def _say_driver(template: Template, cache: Path) -> None:
    """One line: by which driver images are served, and why."""
    from nydusfs.drivers.erofs import selftest

    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        driver, reason = selftest.choose(template.fs_driver, cache)
    except OSError as error:
        log.warning("fs_driver %s: cache directory %s: %s", template.fs_driver, cache, error.strerror)
        return
    level = logging.WARNING if template.fs_driver == "erofs" != driver else logging.INFO
    log.log(level, "fs_driver %s: images are served by %s: %s", template.fs_driver, driver, reason)


def _overlay_works(root: Path, options: str) -> bool:
    """True where the disk is too full to try it: who removes images then makes room."""
    try:
        return overlay_works(root, options)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        log.warning("the disk of %s is full: remove images or free some space", root)
        return True


def _make_root(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(path, 0o700)
        root = path.resolve(strict=True)
        # trash: a full disk has no room for a directory, and none is freed without it
        for name in ("mnt", "socket", "config", "trash"):
            # mnt may be a mount whose server is dead: it must not be touched
            try:
                (root / name).mkdir(mode=0o700 if name != "mnt" else 0o750)
            except FileExistsError:
                pass
    except OSError as error:
        raise StartError(f"root {path}: {error.strerror}") from None
    return root


def _lock_root(root: Path) -> int:
    """Held until this process ends, however it ends; nydusd does not inherit it."""
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StartError(f"root {root} is in use by a living process: stop it, or choose another --root") from None
    return descriptor
