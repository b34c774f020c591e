"""Mounted Nydus images ("RAFS instances"): one per meta layer snapshot, served by the shared daemon or by its own."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nydusfs.errors import NydusError
from snapshotter.auth.chain import Chain
from snapshotter.auth.renewal import Renewal
from snapshotter.bootstrapfile import find_bootstrap
from snapshotter.errors import NotFound, SnapshotterError, Unavailable
from snapshotter.labels import IdMapping
from snapshotter.naming import find_name
from snapshotter.origins import Origins
from snapshotter.records import InstanceRecord, Records, instance_name
from snapshotter.serving import RECOVERY_SECONDS, ImageSettings, Serving
from snapshotter.store import Snapshot, Store
from snapshotter.tally import tally

log = logging.getLogger(__name__)

# A pull that names no image gives it its name right after its last layer, some milliseconds on an idle machine.
NAMED_SOON = (0.05, 0.1, 0.2, 0.4, 0.8)
IMAGE_SECONDS = 120.0  # wait for another call's mount of the same image; that one is bounded itself


class Images(Serving):
    """What is called from outside, `ensure` most of all."""

    def __init__(
        self,
        settings: ImageSettings,
        store: Store,
        records: Records,
        chain: Chain,
        origins: Origins | None = None,
    ) -> None:
        super().__init__(settings, store, records, chain)
        self._origins = origins
        self._image_locks: dict[str, threading.Lock] = {}  # by name

    # ---- what the flow needs

    def ensure(self, meta: Snapshot, mapping: IdMapping | None = None, *, later: bool = False) -> Path:
        """Where this image is mounted; mounts it if it is not. Blocks until reads are answered; unless `later`, by the
        driver that the image will have: the kernel's mount may take tenths of a second the first time.

        `mapping`: of the user namespace that the container will have: such an image is a mount of its own. Raises
        NotFound (no image reference, no bootstrap), Unavailable (nydusd) and whatever nydusd answers.
        """
        name, asked = instance_name(meta.id, mapping), time.monotonic()
        self._wait_recovered(meta.id, mapping)
        with self._one(name):
            record = self._instances.get(name)
            if record is not None and name in self._serving and self._daemons[record.daemon].lives():
                if not later:
                    self._attached(record)
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
                    self._mount(record, labels, later=later)
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

    @contextmanager
    def _one(self, name: str) -> Iterator[None]:
        """One caller per image: the others find it mounted."""
        deadline = time.monotonic() + IMAGE_SECONDS
        while True:
            with self._lock:
                lock = self._image_locks.setdefault(name, threading.Lock())
            if not lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                raise Unavailable(f"image of snapshot {name} is being mounted for more than {IMAGE_SECONDS:.0f} s")
            try:
                with self._lock:
                    in_force = self._image_locks.get(name) is lock
                if in_force:  # else it was released meanwhile, and who comes now takes another lock
                    yield
                    return
            finally:
                lock.release()

    # ---- what operators ask

    def upgrade(self) -> None:
        """Every daemon goes over to the code that is installed now, one after the other, under its mounts. One that
        does not run will begin with it. Raises SnapshotterError."""
        if not self._gates.started.wait(RECOVERY_SECONDS):
            raise Unavailable("still recovering after the start: try again")
        for daemon in self.daemons():
            if daemon.upgrade():
                log.info("nydusd %s serves with the code that is installed now", daemon.id)

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
