"""Mounted Nydus images ("RAFS instances"): one per meta layer snapshot, served by the shared daemon or by its own."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nydusfs.errors import NydusError
from snapshotter import leftovers
from snapshotter.auth.chain import Chain
from snapshotter.auth.renewal import Renewal
from snapshotter.bootstrapfile import find_bootstrap
from snapshotter.daemons import Daemon, DaemonSettings, new_id
from snapshotter.errors import NotFound, SnapshotterError, Unavailable
from snapshotter.gates import Gates
from snapshotter.imageconfig import ImageConfigs
from snapshotter.labels import IdMapping
from snapshotter.mounting import Wanted, mount, mount_all
from snapshotter.naming import find_name
from snapshotter.nydusd_api import ApiUnreachable
from snapshotter.nydusd_config import Template, write_private
from snapshotter.origins import Origins
from snapshotter.records import DaemonRecord, InstanceRecord, Records, instance_name, own_mountpoint
from snapshotter.signature import Signatures
from snapshotter.store import Snapshot, Store
from snapshotter.tally import tally

log = logging.getLogger(__name__)

RECOVERY_SECONDS = 90.0
RECOVER_TOGETHER = 4  # daemons: a start costs 0.3 s of a CPU
UMOUNT_SECONDS = 10.0  # normal: milliseconds; an image left mounted is unmounted by the next start's `_settle`
# A pull that names no image gives it its name right after its last layer, some milliseconds on an idle machine.
NAMED_SOON = (0.05, 0.1, 0.2, 0.4, 0.8)
IMAGE_SECONDS = 120.0  # wait for another call's mount of the same image; that one is bounded itself


@dataclass(frozen=True)
class ImageSettings:
    daemon: DaemonSettings
    shared: bool
    template: Template
    cache_dir: Path
    serve: bool = True  # False: daemon_mode none and fs_driver proxy, no nydusd is started
    signatures: Signatures = Signatures(Path(), required=False)  # noqa: RUF009 (immutable)


class Images:
    """`ensure` is what the flow calls; everything else keeps it true over deaths of either program."""

    def __init__(
        self,
        settings: ImageSettings,
        store: Store,
        records: Records,
        chain: Chain,
        origins: Origins | None = None,
    ) -> None:
        self._settings = settings
        self._origins = origins
        self._root = settings.daemon.root
        self.configs = ImageConfigs(
            self._root / "config", settings.template, settings.cache_dir, chain, self._settings_shared
        )
        self._store = store
        self._records = records
        self._lock = threading.Lock()  # guards the dictionaries, never held over a call
        self._image_locks: dict[str, threading.Lock] = {}
        self._instances: dict[str, InstanceRecord] = {}  # by name, as are locks and `_serving`
        self._serving: set[str] = set()
        self._daemons: dict[str, Daemon] = {}
        self._gates = Gates()
        self._prefetch: dict[str, list[str]] = {}  # image -> paths, for its next mount

    # ---- what the flow needs

    def ensure(self, meta: Snapshot, mapping: IdMapping | None = None) -> Path:
        """Where this image is mounted; mounts it if it is not. Blocks until reads are answered.

        `mapping`: of the user namespace that the container will have: such an image is a mount of its own. Raises
        NotFound (no image reference, no bootstrap), Unavailable (nydusd) and whatever nydusd answers.
        """
        name, asked = instance_name(meta.id, mapping), time.monotonic()
        self._wait_recovered(meta.id, mapping)
        with self._one(name):
            record = self._instances.get(name)
            if record is not None and name in self._serving and self._daemons[record.daemon].lives():
                return self.mountpoint(record)
            began = time.monotonic()
            named = find_name(meta, self._store, self._origins)
            labels, image = named.labels, named.image(meta.id)
            if not named.sure:
                log.warning("snapshot %d is taken to be of %s: containerd has no name for it", meta.id, image)
            bootstrap = find_bootstrap(self._store.upper(meta.id), image)
            if record is None and not self._settings.serve:
                self._settings.signatures.check(bootstrap, labels, image)
                empty = self._own_mountpoint(meta.id, None)
                empty.mkdir(mode=0o755, exist_ok=True)
                return empty
            if record is None:
                daemon = self._shared_daemon() if self._settings.shared else self._new_daemon(meta.id, mapping)
                record = InstanceRecord(meta.id, daemon.id, image, bootstrap, mapping)
                try:
                    # written first: should this program die now, the next one knows what to look for
                    self._records.add_instance(daemon.record, record)
                    self._instances[name] = record
                    self._mount(record, labels)
                except BaseException:
                    self._forget(record)
                    raise
            else:
                self._mount(record, labels)
            tally.remember(f"image {name}", waited=began - asked, mount=time.monotonic() - began)
            log.info("image %s mounted at %s", record.image, self.mountpoint(record))
            return self.mountpoint(record)

    def expect(self, meta: Snapshot) -> None:
        """This image was unpacked: the nydusd of all opens it and begins to fetch what its start will read, before a
        container asks for it. Returns at once; whatever fails is left to `ensure` to tell."""
        if self._settings.serve and self._settings.shared:
            threading.Thread(target=self._expect, args=(meta,), name="expect", daemon=True).start()

    def _expect(self, meta: Snapshot) -> None:
        name = instance_name(meta.id, None)
        try:
            self._wait_recovered(meta.id, None)
            daemon = self._shared_daemon()
            for pause in (*NAMED_SOON, None):
                if name in self._instances or not daemon.alive:
                    return
                named = find_name(meta, self._store, self._origins)
                if named.sure or named.why:
                    break
                if pause is None:
                    return
                time.sleep(pause)
            labels, image = named.labels, named.image(meta.id)
            bootstrap = find_bootstrap(self._store.upper(meta.id), image)
            self._settings.signatures.check(bootstrap, labels, image)
            record = InstanceRecord(meta.id, daemon.id, image, bootstrap, None)
            daemon.api.expect(f"/{name}", bootstrap, self.configs.found(record, labels)[0])
        except (SnapshotterError, NydusError, OSError) as error:
            log.debug("snapshot %d is not opened ahead: %s", meta.id, error)

    def describe(self, meta: Snapshot) -> tuple[Path, str]:
        """Bootstrap and nydusd configuration of an image for which `ensure` returned; the text may hold a password.

        Raises NotFound, OSError, and what finding credentials raises.
        """
        record = self._instances.get(instance_name(meta.id, None))
        if record is not None:
            return record.bootstrap, self.configs.path(record).read_text()
        named = find_name(meta, self._store, self._origins)
        image = named.image(meta.id)
        record = InstanceRecord(meta.id, "", image, find_bootstrap(self._store.upper(meta.id), image))
        return record.bootstrap, self.configs.found(record, named.labels)[0]

    def mounted(self) -> list[str]:
        """Names of the images that are served."""
        return sorted(self._serving)

    def renew(self, instance: str) -> Renewal | None:
        """Looks the credentials of a mounted image up again; what is new goes to its nydusd and its file.

        None: not mounted any more. Raises nothing.
        """
        record = self._instances.get(instance)
        daemon = self._daemons.get(record.daemon) if record else None
        if record is None or daemon is None or instance not in self._serving:
            return None
        return self.configs.renew(record, lambda: self._labels(record), daemon.api)

    def release(self, snapshot: int) -> bool:
        """Unmounts an image whose meta layer was removed; a daemon of its own ends. False: none was mounted.

        Raises Unavailable while the start is not over.
        """
        self._wait_recovered(snapshot, None)
        names = {one.name for one in list(self._instances.values()) if one.snapshot == snapshot}
        released = [self._release(name, lambda: False) for name in names | {instance_name(snapshot, None)}]
        return any(released)

    def release_mapped(self, used: Callable[[], set[str]]) -> None:
        """Unmounts images for user namespaces without a container; `used` tells the names that containers need.

        Raises Unavailable while the start is not over.
        """
        mapped = [one for one in list(self._instances.values()) if one.mapping is not None]
        needed = used() if mapped else set()
        for one in mapped:
            if one.name not in needed:
                self._wait_recovered(one.snapshot, one.mapping)
                # asked again under the lock: the row of a container is there before its image is asked for
                self._release(one.name, lambda name=one.name: name in used())  # type: ignore[misc]

    def _release(self, name: str, needed: Callable[[], bool]) -> bool:
        with self._one(name):
            record = self._instances.get(name)
            if record is not None and needed():
                return False
            if record is not None:
                self._forget(record)
                log.info("image %s unmounted from %s", record.image, self.mountpoint(record))
        with self._lock:
            self._image_locks.pop(name, None)
        return record is not None

    def mountpoint(self, record: InstanceRecord) -> Path:
        if self._settings_shared(record):
            return self._root / "mnt" / record.name
        return self._own_mountpoint(record.snapshot, record.mapping)

    # ---- what operators ask

    def daemons(self) -> list[Daemon]:
        with self._lock:
            return list(self._daemons.values())

    def upgrade(self) -> None:
        """Every daemon goes over to the code that is installed now, one after the other, under its mounts. One that
        does not run will begin with it. Raises SnapshotterError."""
        if not self._gates.started.wait(RECOVERY_SECONDS):
            raise Unavailable("still recovering after the start: try again")
        for daemon in self.daemons():
            if daemon.upgrade():
                log.info("nydusd %s serves with the code that is installed now", daemon.id)

    def instances(self, daemon: str = "") -> list[InstanceRecord]:
        """Images on record, of one daemon or of all."""
        return [one for one in list(self._instances.values()) if daemon in ("", one.daemon)]

    def serves(self, record: InstanceRecord) -> bool:
        daemon = self._daemons.get(record.daemon)
        return record.name in self._serving and daemon is not None and daemon.alive

    @property
    def fetches_ahead(self) -> bool:
        """Whether nydusd fetches anything at a mount: `fs_prefetch.enable` of the template."""
        return bool((self._settings.template.document.get("fs_prefetch") or {}).get("enable"))

    def prefetch(self, image: str, paths: Sequence[str]) -> None:
        """Absolute paths that nydusd fetches first at the next mount of an image; an empty list takes them back."""
        if paths:
            self._prefetch[image] = list(paths)
        else:
            self._prefetch.pop(image, None)

    def backend(self, daemon: str) -> dict[str, Any]:
        """Type and configuration of a daemon's storage backend, secrets included. Raises NotFound."""
        found = next((one for one in self.daemons() if one.id == daemon), None)
        if found is None:
            raise NotFound(f"no nydusd {daemon}")
        document = self._settings.template.document
        if not found.shared:
            path = self.configs.path(self._only_instance(daemon))
            document = json.loads(path.read_text())
        return {key: document["device"]["backend"].get(key) for key in ("type", "config")}

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
        with self._lock:
            served: dict[str, set[str]] = {daemon: set() for daemon in self._daemons}
            for instance in self._instances.values():
                served[instance.daemon].add(instance.name)
        leftovers.sweep(self._root, self._settings.daemon.log_dir, served)
        if self._settings.daemon.restart:
            for daemon in lived:  # last: nobody waits for this
                daemon.upgrade_if_older()

    def _recover_daemon(self, daemon: Daemon) -> bool:
        """True: it lived. What fails is tried again by whoever asks for its images."""
        lived = False
        try:
            if not daemon.shared and not any(one.daemon == daemon.id for one in list(self._instances.values())):
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
            self._serving |= {one.name for one in self._instances.values() if one.daemon == daemon.id}
            return
        mounted = daemon.api.mounted()
        wanted = {f"/{one.name}": one for one in self._instances.values() if one.daemon == daemon.id}
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

    def _mount(self, record: InstanceRecord, labels: Mapping[str, str], *, known: bool = False) -> None:
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
                try:
                    mount(daemon.api, Wanted(record, config, prefetch))
                except ApiUnreachable:
                    if attempt == 2 or daemon.alive:
                        raise
                    continue
                self._serving.add(record.name)
                daemon.save_state()
                return

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

    @contextmanager
    def _one(self, name: str) -> Iterator[None]:
        """One caller per image: the others find it mounted."""
        with self._lock:
            lock = self._image_locks.setdefault(name, threading.Lock())
        if not lock.acquire(timeout=IMAGE_SECONDS):
            raise Unavailable(f"image of snapshot {name} is being mounted for more than {IMAGE_SECONDS:.0f} s")
        try:
            yield
        finally:
            lock.release()
