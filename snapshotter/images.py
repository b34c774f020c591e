"""Mounted Nydus images ("RAFS instances"): one per meta layer snapshot, served by the shared daemon or by its own."""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nydusfs.registry.credentials import Credentials
from snapshotter import cachegc, leftovers
from snapshotter.auth.chain import Chain, parse
from snapshotter.auth.renewal import Renewal, Result
from snapshotter.bootstrapfile import find_bootstrap
from snapshotter.daemons import Daemon, DaemonSettings, new_id
from snapshotter.directories import disk_usage, make_private
from snapshotter.errors import NotFound, SnapshotterError, Unavailable
from snapshotter.labels import SNAPSHOT_REF, image_label, image_ref, namespace_of
from snapshotter.nydusd_api import ApiError, ApiUnreachable
from snapshotter.nydusd_config import Template, credentials_of, derive, write_private
from snapshotter.origins import Origins
from snapshotter.records import DaemonRecord, InstanceRecord, Records
from snapshotter.signature import Signatures
from snapshotter.store import Snapshot, Store
from snapshotter.tally import tally

log = logging.getLogger(__name__)

RECOVERY_SECONDS = 90.0
RECOVER_TOGETHER = 4  # daemons: a start costs 0.3 s of a CPU
UMOUNT_SECONDS = 10.0  # normal: milliseconds; an image left mounted is unmounted by the next start's `_settle`
IMAGE_SECONDS = 120.0  # wait for another call's mount of the same image; that one is bounded itself
_BLOB_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ImageSettings:
    daemon: DaemonSettings
    shared: bool
    template: Template
    cache_dir: Path
    collect: bool = True  # blobs of removed images leave the cache
    collect_period: float = 0.0  # seconds, 0: only when images are removed
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
        self._chain = chain
        self.on_credentials: Callable[[int, float | None], None] = lambda snapshot, expires: None
        self._root = settings.daemon.root
        self._store = store
        self._records = records
        self._lock = threading.Lock()  # guards the dictionaries, never held over a call
        self._image_locks: dict[int, threading.Lock] = {}
        self._instances: dict[int, InstanceRecord] = {}
        self._serving: set[int] = set()
        self._daemons: dict[str, Daemon] = {}
        self._recovered = threading.Event()  # what is on record is known here
        self._gates: dict[str, threading.Event] = {}  # of each daemon on record: it was found or started again
        self._collecting = threading.Lock()
        self._patient = threading.Lock()  # held by the one collection that waits for blobs to be old enough
        self._closing = threading.Event()
        self._prefetch: dict[str, list[str]] = {}  # image -> paths, for its next mount

    # ---- what the flow needs

    def ensure(self, meta: Snapshot, labels: Mapping[str, str] | None = None) -> Path:
        """Where this image is mounted; mounts it if it is not. Blocks until reads are answered.

        Raises NotFound (no image reference, no bootstrap), Unavailable (nydusd) and whatever nydusd answers.
        """
        labels = labels or meta.labels
        asked = time.monotonic()
        self._wait_recovered(meta.id)
        with self._one(meta.id):
            record = self._instances.get(meta.id)
            if record is not None and meta.id in self._serving and self._daemons[record.daemon].alive:
                return self.mountpoint(record)
            began = time.monotonic()
            labels, why = self._with_image(meta, labels)
            image = image_ref(labels, str(meta.id), why)
            bootstrap = find_bootstrap(self._store.upper(meta.id), image)
            if record is None:
                daemon = self._shared_daemon() if self._settings.shared else self._new_daemon(meta.id, shared=False)
                record = InstanceRecord(meta.id, daemon.id, image, bootstrap)
                try:
                    # written first: should this program die now, the next one knows what to look for
                    self._records.add_instance(daemon.record, record)
                    self._instances[meta.id] = record
                    self._mount(record, labels)
                except BaseException:
                    self._forget(record)
                    raise
            else:
                self._mount(record, labels)
            tally.remember(f"image {meta.id}", waited=began - asked, mount=time.monotonic() - began)
            log.info("image %s mounted at %s", record.image, self.mountpoint(record))
            return self.mountpoint(record)

    def _with_image(self, meta: Snapshot, labels: Mapping[str, str]) -> tuple[Mapping[str, str], str]:
        """The labels with the image that the client did not name; else why it is not known."""
        if image_label(labels) or self._origins is None or not labels.get(SNAPSHOT_REF):
            return labels, ""
        origin, why = self._origins.find(labels[SNAPSHOT_REF], namespace_of(meta.key))
        if origin is None:
            return labels, why
        log.info("snapshot %d is of image %s, as containerd says: the pull did not name it", meta.id, origin.image)
        more = {key: value for key, value in origin.labels.items() if key not in labels}
        self._store.update(meta.key, more, [f"labels.{key}" for key in more])
        return {**labels, **more}, ""

    def mounted(self) -> list[int]:
        """Meta layers of the images that are served."""
        return sorted(self._serving)

    def renew(self, snapshot: int) -> Renewal | None:
        """Looks the credentials of a mounted image up again; what is new goes to its nydusd and its file.

        None: not mounted any more. Raises nothing.
        """
        record = self._instances.get(snapshot)
        if record is None or snapshot not in self._serving:
            return None
        try:
            found = self._chain.find(parse(record.image), self._labels(record))
            old = credentials_of(self._config_path(record).read_text())
            if found.credentials == old or (found.credentials is None and found.failed):
                return Renewal(record.image, Result.FAILED if found.failed else Result.SAME, found.expires)
            write_private(self._config_path(record), self._derive(record, found.credentials))
            if found.credentials is None or not found.credentials.registry_token:
                auth = found.credentials.basic if found.credentials else ""
                self._daemons[record.daemon].api.set_registry_auth(f"/{record.snapshot}", auth)
        except (SnapshotterError, OSError, ValueError, KeyError) as error:
            log.warning("credentials of image %s cannot be renewed: %s", record.image, error)
            return Renewal(record.image, Result.FAILED, None)
        log.info("credentials of image %s renewed from %s", record.image, found.source or "nowhere")
        return Renewal(record.image, Result.RENEWED, found.expires)

    def release(self, snapshot: int) -> bool:
        """Unmounts an image whose meta layer was removed; a daemon of its own ends. False: none was mounted.

        Raises Unavailable while the start is not over.
        """
        self._wait_recovered(snapshot)
        with self._one(snapshot):
            record = self._instances.get(snapshot)
            if record is not None:
                self._forget(record)
                log.info("image %s unmounted from %s", record.image, self.mountpoint(record))
        with self._lock:
            self._image_locks.pop(snapshot, None)
        return record is not None

    def collect(self) -> None:
        """In the background: what the blob cache holds of removed images goes."""
        if not self._settings.collect:
            return
        threading.Thread(target=self._collect_all, name="cache-gc", daemon=True).start()

    def _collect_all(self) -> None:
        """Now, and again when the rest is old enough, so that an image's blobs do not outlive it by a day."""
        again = self._collect()
        if again and self._patient.acquire(blocking=False):
            try:
                while again and not self._closing.wait(again + 1):
                    again = self._collect()
            finally:
                self._patient.release()

    def _collect_forever(self) -> None:
        while not self._closing.wait(self._settings.collect_period):
            self._collect()

    def _collect(self) -> float:
        """Blobs of the cache that no image here names any more go; see `cachegc`. In how many seconds more will."""
        with self._collecting:
            mounted = {one.bootstrap for one in self.instances()}
            blobs, again = cachegc.look(self._settings.cache_dir, self._store.directory, mounted)
            log.debug("blob cache: %d blobs are of no image any more", len(blobs))
            for blob in blobs:
                with self._lock:
                    daemons = [daemon for daemon in self._daemons.values() if daemon.alive]
                try:
                    for daemon in daemons:
                        daemon.api.drop_blob(blob)
                    # what no daemon, or one that knows nothing of this, left
                    cachegc.remove(self._settings.cache_dir, blob)
                    tally.count("snapshotter_cache_blobs_deleted_total")
                except SnapshotterError as error:
                    tally.count("snapshotter_cache_blob_deletion_errors_total")
                    log.warning("blob %s stays in the cache: %s", blob, error)
        return again

    def mountpoint(self, record: InstanceRecord) -> Path:
        if self._settings_shared(record):
            return self._root / "mnt" / str(record.snapshot)
        return self._own_mountpoint(record.snapshot)

    def cache_usage(self, blob: str) -> int:
        """Bytes on disk that the blob cache holds for a blob id: our directory of segments, or upstream's files."""
        if not _BLOB_ID.fullmatch(blob):
            return 0
        size = 0
        for name in (blob, *(blob + ending for ending in (".blob.data", ".blob.data.chunk_map", ".blob.meta"))):
            path = self._settings.cache_dir / name
            if path.is_dir():
                size += disk_usage(path)[0]
            elif path.is_file():
                size += path.stat().st_blocks * 512
        return size

    # ---- what operators ask

    def daemons(self) -> list[Daemon]:
        with self._lock:
            return list(self._daemons.values())

    def instances(self, daemon: str = "") -> list[InstanceRecord]:
        """Images on record, of one daemon or of all."""
        return [one for one in list(self._instances.values()) if daemon in ("", one.daemon)]

    def serves(self, record: InstanceRecord) -> bool:
        daemon = self._daemons.get(record.daemon)
        return record.snapshot in self._serving and daemon is not None and daemon.alive

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
            path = self._config_path(self._only_instance(daemon))
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
            self._recovered.set()
            for gate in self._gates.values():
                gate.set()
        if self._settings.collect and self._settings.collect_period:
            threading.Thread(target=self._collect_forever, name="cache-gc-timer", daemon=True).start()
        if self._settings.shared:
            try:
                # at start, not at the first image: the first container then does not wait for it
                self._shared_daemon().ensure()
            except (SnapshotterError, OSError) as error:
                log.warning("%s; plain OCI images work, Nydus images will try again", error)

    def _recover(self) -> None:
        alive = self._store.ids()
        lost = []
        for instance in self._records.instances():
            if instance.snapshot in alive:
                self._instances[instance.snapshot] = instance
            else:
                lost.append(instance.snapshot)
        daemons = [self._add(record) for record in self._records.daemons()]
        self._gates = {daemon.id: threading.Event() for daemon in daemons}
        self._recovered.set()
        # side by side: one that hangs, or whose image is broken, keeps nobody else waiting
        with ThreadPoolExecutor(RECOVER_TOGETHER, "recovery") as pool:
            found = sum(pool.map(self._recover_daemon, daemons))
        log.info("found %d nydusd running, %d were not", found, len(daemons) - found)
        for snapshot in lost:
            self._records.forget_instance(snapshot)
        with self._lock:
            served: dict[str, set[int]] = {daemon: set() for daemon in self._daemons}
            for instance in self._instances.values():
                served[instance.daemon].add(instance.snapshot)
        leftovers.sweep(self._root, self._settings.daemon.log_dir, served)

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
            self._gates[daemon.id].set()
        return lived

    def _wait_recovered(self, snapshot: int) -> None:
        """Until what serves, or will serve, this image was found or started again. Raises Unavailable."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        known = self._recovered.wait(RECOVERY_SECONDS)
        record = self._instances.get(snapshot)
        if record is not None and self.serves(record):
            return  # others of the same daemon may not be mounted again yet
        for daemon in list(self._daemons.values()) if known else ():
            its_own = not daemon.shared and daemon.mountpoint == self._own_mountpoint(snapshot)
            if daemon.id == record.daemon if record else its_own or (daemon.shared and self._settings.shared):
                gate = self._gates.get(daemon.id)
                known = gate is None or gate.wait(max(0.0, deadline - time.monotonic()))
        if not known:
            raise Unavailable("still recovering after the start: try again")

    def _settle(self, daemon: Daemon) -> None:
        """A living daemon serves exactly the images on record."""
        if not daemon.shared:
            self._serving |= {one.snapshot for one in self._instances.values() if one.daemon == daemon.id}
            return
        mounted = daemon.api.mounted()
        wanted = {f"/{one.snapshot}": one for one in self._instances.values() if one.daemon == daemon.id}
        for path in (mounted or set()) - set(wanted) - {"/"}:
            try:
                daemon.api.umount(path)
                log.info("unmounted %s, which no snapshot needs any more", path)
            except SnapshotterError as error:
                log.warning("%s", error)
        for path, record in wanted.items():
            if mounted is not None and path in mounted:
                self._serving.add(record.snapshot)
            elif not self._remount(record):
                return

    def close(self, *, umount: bool = False) -> None:
        """Daemons and mounts stay, unless `umount` (cleanup_on_close)."""
        self._closing.set()
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
            self._serving.add(record.snapshot)
            return
        # before the lock: a credential helper may take its time
        config = self._config(record, labels, known=known)
        prefetch = self._prefetch.pop(record.image, ())
        for attempt in (1, 2):
            with daemon.held():
                daemon.ensure()
                if record.snapshot in self._serving:
                    return
                try:
                    daemon.api.mount(f"/{record.snapshot}", record.bootstrap, config, prefetch)
                except ApiUnreachable:
                    if attempt == 2 or daemon.alive:
                        raise
                    continue
                except ApiError as error:
                    # ids are never given out twice: what is mounted there is this very image
                    if "already exists" not in error.message:
                        hint = ""
                        if f"bootstrap {record.bootstrap}: " in error.reason:
                            hint = " (damaged? remove the image in containerd and pull it again)"
                        raise SnapshotterError(
                            f"image {record.image} cannot be mounted: {error.reason}{hint}"
                        ) from None
                self._serving.add(record.snapshot)
                return

    def _remount(self, record: InstanceRecord) -> bool:
        """A failing image does not take the others down. False: nydusd does not answer, more of them are no use."""
        try:
            self._mount(record, self._labels(record), known=True)
        except (SnapshotterError, OSError) as error:
            log.warning("image %s is not mounted again: %s", record.image, error)
            return not isinstance(error, ApiUnreachable)
        return True

    def _forget(self, record: InstanceRecord) -> None:
        daemon = self._daemons[record.daemon]
        self._serving.discard(record.snapshot)
        self._instances.pop(record.snapshot, None)
        if not daemon.shared:
            daemon.stop()
            self._daemons.pop(daemon.id, None)
            self._remove_daemon_files(daemon.id)
        elif daemon.alive:
            try:
                daemon.api.umount(f"/{record.snapshot}", timeout=UMOUNT_SECONDS)
            except SnapshotterError as error:
                log.debug("%s", error)
        self._records.forget_instance(record.snapshot)
        shutil.rmtree(self._config_dir(daemon.id) / str(record.snapshot), ignore_errors=True)

    def _config(self, record: InstanceRecord, labels: Mapping[str, str], *, known: bool = False) -> str:
        """Also written to the image's file. `known`: with the credentials of that file, if there is one: at a restart
        nobody is asked, as registries, clusters and helpers may come up later than containers; renewal follows."""
        credentials = None
        try:
            if not known:
                raise FileNotFoundError
            credentials = credentials_of(self._config_path(record).read_text())
        except (OSError, ValueError):
            found = self._chain.find(parse(record.image), labels)
            credentials = found.credentials
            self.on_credentials(record.snapshot, found.expires)
        text = self._derive(record, credentials)
        make_private(self._settings.cache_dir)
        write_private(self._config_path(record), text)
        return text

    def _derive(self, record: InstanceRecord, credentials: Credentials | None) -> str:
        return derive(
            self._settings.template,
            image=record.image,
            instance=str(record.snapshot),
            cache_dir=self._settings.cache_dir,
            credentials=credentials,
        )

    def _labels(self, record: InstanceRecord) -> Mapping[str, str]:
        snapshot = self._store.by_id(record.snapshot)
        return snapshot.labels if snapshot else {}

    # ---- daemons

    def _shared_daemon(self) -> Daemon:
        with self._lock:
            for daemon in self._daemons.values():
                if daemon.shared:
                    return daemon
            return self._new_daemon(0, shared=True)

    def _new_daemon(self, snapshot: int, *, shared: bool) -> Daemon:
        identity = new_id()
        socket = self._root / "socket" / identity / "api.sock"
        mountpoint = self._root / "mnt" if shared else self._own_mountpoint(snapshot)
        return self._add(DaemonRecord(identity, shared, 0, 0, socket, mountpoint))

    def _add(self, record: DaemonRecord) -> Daemon:
        def arguments() -> Sequence[str]:
            if record.shared:
                return []
            instance = self._only_instance(record.id)
            self._config(instance, self._labels(instance), known=True)
            words = ["--config", str(self._config_path(instance)), "--bootstrap", str(instance.bootstrap)]
            if paths := self._prefetch.pop(instance.image, ()):
                listed = self._config_dir(record.id) / "prefetch"
                write_private(listed, "".join(f"{path}\n" for path in paths))
                words += ["--prefetch-files", str(listed)]
            return words

        def on_start() -> None:
            served = [one for one in list(self._instances.values()) if one.daemon == record.id]
            if not record.shared:
                self._serving |= {one.snapshot for one in served}
                return
            # mounted before this start and lost with the old process; images never mounted are ensure's business
            self._serving -= {one.snapshot for one in served}
            for instance in served:
                if not self._remount(instance):
                    log.warning("nydusd %s does not answer: its other images are mounted when asked for", record.id)
                    return

        daemon = Daemon(self._settings.daemon, self._records, record, arguments, on_start)
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

    def _own_mountpoint(self, snapshot: int) -> Path:
        return self._store.directory / str(snapshot) / "mnt"

    def _config_dir(self, daemon: str) -> Path:
        return self._root / "config" / daemon

    def _config_path(self, record: InstanceRecord) -> Path:
        if self._settings_shared(record):
            return self._config_dir(record.daemon) / str(record.snapshot) / "config.json"
        return self._config_dir(record.daemon) / "config.json"

    def _remove_daemon_files(self, daemon: str) -> None:
        for path in (self._config_dir(daemon), self._root / "socket" / daemon, self._settings.daemon.log_dir / daemon):
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _one(self, snapshot: int) -> Iterator[None]:
        """One caller per image: the others find it mounted."""
        with self._lock:
            lock = self._image_locks.setdefault(snapshot, threading.Lock())
        if not lock.acquire(timeout=IMAGE_SECONDS):
            raise Unavailable(f"image of snapshot {snapshot} is being mounted for more than {IMAGE_SECONDS:.0f} s")
        try:
            yield
        finally:
            lock.release()
