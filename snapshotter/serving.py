"""Which nydusd serves which image: the daemons, their mounts, and what is found of both when this program starts."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from snapshotter import leftovers
from snapshotter.auth.chain import Chain
from snapshotter.daemons import Daemon, DaemonSettings, new_id
from snapshotter.errors import NotFound, SnapshotterError, Unavailable
from snapshotter.gates import Gates
from snapshotter.imageconfig import ImageConfigs
from snapshotter.labels import IdMapping
from snapshotter.mounting import Wanted, attached, mount, mount_all
from snapshotter.nydusd_api import ApiUnreachable
from snapshotter.nydusd_config import Template, write_private
from snapshotter.records import DaemonRecord, InstanceRecord, Records, instance_name, own_mountpoint
from snapshotter.signature import Signatures
from snapshotter.store import Store

log = logging.getLogger(__name__)

RECOVERY_SECONDS = 90.0
RECOVER_TOGETHER = 4  # daemons: a start costs 0.3 s of a CPU
UMOUNT_SECONDS = 10.0  # normal: milliseconds; an image left mounted is unmounted by the next start's `_settle`


@dataclass(frozen=True)
class ImageSettings:
    daemon: DaemonSettings
    shared: bool
    template: Template
    cache_dir: Path
    serve: bool = True  # False: daemon_mode none and fs_driver proxy, no nydusd is started
    signatures: Signatures = Signatures(Path(), required=False)  # noqa: RUF009 (immutable)


class Serving:
    """Keeps what is on record true over deaths of either program. Which image is to be served, `Images` says."""

    def __init__(self, settings: ImageSettings, store: Store, records: Records, chain: Chain) -> None:
        self._settings = settings
        self._root = settings.daemon.root
        self.configs = ImageConfigs(
            self._root / "config", settings.template, settings.cache_dir, chain, self._settings_shared
        )
        self._store = store
        self._records = records
        self._lock = threading.Lock()  # guards the dictionaries, never held over a call
        self._instances: dict[str, InstanceRecord] = {}  # by name, as is `_serving`
        self._serving: set[str] = set()
        self._unattached: set[str] = set()  # of those the ones that FUSE may still show for a moment
        self._daemons: dict[str, Daemon] = {}
        self._gates = Gates()
        self._prefetch: dict[str, list[str]] = {}  # image -> paths, for its next mount

    def mountpoint(self, record: InstanceRecord) -> Path:
        if self._settings_shared(record):
            return self._root / "mnt" / record.name
        return self._own_mountpoint(record.snapshot, record.mapping)

    def daemons(self) -> list[Daemon]:
        with self._lock:
            return list(self._daemons.values())

    def instances(self, daemon: str = "") -> list[InstanceRecord]:
        """Images on record, of one daemon or of all."""
        return [one for one in list(self._instances.values()) if daemon in ("", one.daemon)]

    def serves(self, record: InstanceRecord) -> bool:
        daemon = self._daemons.get(record.daemon)
        return record.name in self._serving and daemon is not None and daemon.alive

    # ---- start and end of this program

    def recover(self) -> None:
        """Finds the daemons of an earlier run, replaces dead ones, mounts what is missing. Once, in the background."""
        try:
            self._recover()
        except Exception:
            log.exception("recovery did not finish; images are mounted again when they are asked for")
        finally:
            self._gates.open_all()
        if self._settings.shared and self._settings.serve:
            try:
                # at start, not at the first image: the first container then does not wait for it
                self._shared_daemon().ensure()
            except (SnapshotterError, OSError) as error:
                log.warning("%s; plain OCI images work, Nydus images will try again", error)
        self._gates.started.set()

    def _recover(self) -> None:
        alive = self._store.ids()
        lost = []
        for instance in self._records.instances():
            if instance.snapshot in alive:
                self._instances[instance.name] = instance
            else:
                lost.append(instance)
        daemons = [self._add(record) for record in self._records.daemons()]
        self._gates.shut(daemon.id for daemon in daemons)
        self._gates.recovered.set()
        # side by side: one that hangs, or whose image is broken, keeps nobody else waiting
        with ThreadPoolExecutor(RECOVER_TOGETHER, "recovery") as pool:
            lived = [
                daemon for daemon, found in zip(daemons, pool.map(self._recover_daemon, daemons), strict=True) if found
            ]
        log.info("found %d nydusd running, %d were not", len(lived), len(daemons) - len(lived))
        for instance in lost:
            self._records.forget_instance(instance)
        leftovers.sweep(self._root, self._settings.daemon.log_dir, self._on_record)
        if self._settings.daemon.restart:
            for daemon in lived:  # last: nobody waits for this
                daemon.upgrade_if_older()

    def _on_record(self) -> dict[str, set[str]]:
        """Names of the images of each daemon. Others may come and go meanwhile."""
        served: dict[str, set[str]] = {daemon.id: set() for daemon in self.daemons()}
        for instance in list(self._instances.values()):
            served.setdefault(instance.daemon, set()).add(instance.name)
        return served

    def _recover_daemon(self, daemon: Daemon) -> bool:
        """True: it lived. What fails is tried again by whoever asks for its images."""
        lived = False
        try:
            kept = daemon.shared and self._settings.shared and self._settings.serve
            if not kept and not any(one.daemon == daemon.id for one in list(self._instances.values())):
                daemon.stop()
                self._daemons.pop(daemon.id, None)
                return False
            try:
                lived = daemon.adopt()
            except OSError:  # it died between two looks at it
                pass
            if lived:
                self._settle(daemon)
            else:
                daemon.ensure()
        except (SnapshotterError, OSError) as error:
            log.warning("%s; its images are mounted when they are asked for", error)
        except Exception:
            log.exception("nydusd %s: its images are mounted when they are asked for", daemon.id)
        finally:
            self._gates.open(daemon.id)
        return lived

    def _wait_recovered(self, snapshot: int, mapping: IdMapping | None) -> None:
        """Until what serves, or will serve, this image was found or started again. Raises Unavailable."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        known = self._gates.recovered.wait(RECOVERY_SECONDS)
        record = self._instances.get(instance_name(snapshot, mapping))
        if record is not None and self.serves(record):
            return  # others of the same daemon may not be mounted again yet
        for daemon in list(self._daemons.values()) if known else ():
            its_own = not daemon.shared and daemon.mountpoint == self._own_mountpoint(snapshot, mapping)
            if daemon.id == record.daemon if record else its_own or (daemon.shared and self._settings.shared):
                known = self._gates.wait(daemon.id, lambda: record is not None and self.serves(record), deadline)
        if not known:
            raise Unavailable("still recovering after the start: try again")

    def _served_again(self, record: InstanceRecord) -> None:
        self._serving.add(record.name)
        self._gates.look_again()

    def _settle(self, daemon: Daemon) -> None:
        """A living daemon serves exactly the images on record."""
        if not daemon.shared:
            self._serving |= {one.name for one in list(self._instances.values()) if one.daemon == daemon.id}
            return
        mounted = daemon.api.mounted()
        wanted = {f"/{one.name}": one for one in list(self._instances.values()) if one.daemon == daemon.id}
        for path in (mounted or set()) - set(wanted) - {"/"}:
            try:
                daemon.api.umount(path)
                log.info("unmounted %s, which no snapshot needs any more", path)
            except SnapshotterError as error:
                log.warning("%s", error)
        there = {path for path in wanted if mounted is not None and path in mounted}
        self._serving |= {wanted[path].name for path in there}
        lost = [record for path, record in wanted.items() if path not in there]
        if lost:
            with daemon.held():
                self._mount_again(daemon, lost, {})
                daemon.save_state()

    def close(self, *, umount: bool = False) -> None:
        """Daemons and mounts stay, unless `umount` (cleanup_on_close)."""
        for daemon in list(self._daemons.values()):
            if umount:
                daemon.stop()
            else:
                daemon.unwatch()

    # ---- mounting

    def _mount(
        self, record: InstanceRecord, labels: Mapping[str, str], *, known: bool = False, later: bool = False
    ) -> None:
        """`later`: `_attached` follows, before a container runs."""
        self._settings.signatures.check(record.bootstrap, labels, record.image)
        daemon = self._daemons[record.daemon]
        if not daemon.shared:
            daemon.ensure()
            self._serving.add(record.name)
            return
        # before the lock: a credential helper may take its time
        config = self.configs.write(record, labels, known=known)
        prefetch = self._prefetch.pop(record.image, ())
        for attempt in (1, 2):
            with daemon.held():
                daemon.ensure()
                if record.name in self._serving:
                    return
                later = later and self._settings.template.fs_driver != "fuse"
                try:
                    mount(daemon.api, Wanted(record, config, prefetch), later=later)
                except ApiUnreachable as error:
                    # its watcher, who would say so, waits for the lock that is held here
                    if attempt == 2 or not (daemon.died() if error.hung else daemon.back()):
                        raise
                    continue
                self._serving.add(record.name)
                if later:
                    self._unattached.add(record.name)
                daemon.save_state()
                return

    def _attached(self, record: InstanceRecord) -> None:
        """Returns when an image that was mounted `later` is shown by the driver that it will have. Raises
        SnapshotterError, and has forgotten it then."""
        if record.name not in self._unattached:
            return
        try:
            attached(self._daemons[record.daemon].api, record)
        except ApiUnreachable:
            pass  # the next nydusd makes the kernel's mount before it serves
        except SnapshotterError:
            self._forget(record)
            raise
        self._unattached.discard(record.name)

    def _mount_again(self, daemon: Daemon, records: Sequence[InstanceRecord], configs: dict[str, str]) -> None:
        """What `daemon` of all images served before. A failing one does not take the others down. `configs`: by name,
        those that are made already."""
        wanted = []
        for record in records:
            labels = self._labels(record)
            try:
                self._settings.signatures.check(record.bootstrap, labels, record.image)
                config = configs.pop(record.name, "") or self.configs.write(record, labels, known=True)
            except (SnapshotterError, OSError) as error:
                log.warning("image %s is not mounted again: %s", record.image, error)
                continue
            wanted.append(Wanted(record, config, self._prefetch.pop(record.image, ())))
        try:
            mount_all(daemon.api, wanted, self._served_again)
        except SnapshotterError as error:
            log.warning("nydusd %s: its other images are mounted when asked for: %s", daemon.id, error)

    def _forget(self, record: InstanceRecord) -> None:
        daemon = self._daemons[record.daemon]
        self._serving.discard(record.name)
        self._unattached.discard(record.name)
        self._instances.pop(record.name, None)
        if not daemon.shared:
            daemon.stop()
            self._daemons.pop(daemon.id, None)
            self._remove_daemon_files(daemon.id)
        elif daemon.alive:
            try:
                daemon.api.umount(f"/{record.name}", timeout=UMOUNT_SECONDS)
                daemon.save_state()
            except SnapshotterError as error:
                log.debug("%s", error)
        self._records.forget_instance(record)
        shutil.rmtree(self.configs.folder(daemon.id) / record.name, ignore_errors=True)

    def _labels(self, record: InstanceRecord) -> Mapping[str, str]:
        snapshot = self._store.by_id(record.snapshot)
        return snapshot.labels if snapshot else {}

    # ---- daemons

    def _shared_daemon(self) -> Daemon:
        with self._lock:
            for daemon in self._daemons.values():
                if daemon.shared:
                    return daemon
            return self._new_daemon(0, None, shared=True)

    def _new_daemon(self, snapshot: int, mapping: IdMapping | None, *, shared: bool = False) -> Daemon:
        identity = new_id()
        socket = self._root / "socket" / identity / "api.sock"
        mountpoint = self._root / "mnt" if shared else self._own_mountpoint(snapshot, mapping)
        return self._add(DaemonRecord(identity, shared, 0, 0, socket, mountpoint))

    def _add(self, record: DaemonRecord) -> Daemon:
        prepared: dict[str, str] = {}  # name -> configuration, for `on_start`

        def arguments() -> Sequence[str]:
            if record.shared:
                return []
            instance = self._only_instance(record.id)
            self.configs.write(instance, self._labels(instance), known=True)
            words = ["--config", str(self.configs.path(instance)), "--bootstrap", str(instance.bootstrap)]
            if paths := self._prefetch.pop(instance.image, ()):
                listed = self.configs.folder(record.id) / "prefetch"
                write_private(listed, "".join(f"{path}\n" for path in paths))
                words += ["--prefetch-files", str(listed)]
            return words

        def on_start() -> None:
            served = [one for one in list(self._instances.values()) if one.daemon == record.id]
            if not record.shared:
                self._serving |= {one.name for one in served}
                return
            # mounted before this start and lost with the old process; images never mounted are ensure's business
            self._serving -= {one.name for one in served}
            self._mount_again(daemon, served, prepared)

        def on_take_over() -> None:
            self._settle(daemon)

        def meanwhile() -> None:
            prepared.clear()
            for one in list(self._instances.values()) if record.shared else ():
                if one.daemon == record.id:
                    # what fails here fails again, and is said, when the image is mounted
                    with suppress(SnapshotterError, OSError):
                        prepared[one.name] = self.configs.write(one, self._labels(one), known=True)

        daemon = Daemon(self._settings.daemon, self._records, record, arguments, on_start, on_take_over, meanwhile)
        self._daemons[record.id] = daemon
        return daemon

    def _only_instance(self, daemon: str) -> InstanceRecord:
        for instance in list(self._instances.values()):
            if instance.daemon == daemon:
                return instance
        raise NotFound(f"nydusd {daemon} has no image")

    def _settings_shared(self, record: InstanceRecord) -> bool:
        daemon = self._daemons.get(record.daemon)
        return daemon.shared if daemon else self._settings.shared

    def _own_mountpoint(self, snapshot: int, mapping: IdMapping | None) -> Path:
        return own_mountpoint(self._store.directory, snapshot, mapping)

    def _remove_daemon_files(self, daemon: str) -> None:
        logs = self._settings.daemon.log_dir
        for path in (self.configs.folder(daemon), self._root / "socket" / daemon, logs / daemon):
            shutil.rmtree(path, ignore_errors=True)
