"""What of a plain image need not be unpacked, and what such an image needs when a container comes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from nydusfs.errors import ConvertError, NydusError
from nydusfs.registry.reference import SHA256_DIGEST, Reference
from nydusfs.trees import disk_usage, wait_for_disk
from snapshotter.auth.chain import parse
from snapshotter.errors import InvalidArgument, SnapshotterError, Unavailable
from snapshotter.labels import (
    IMAGE_BLOCK,
    INDEX_ALTERNATIVE,
    LAYER_BLOCK,
    LAYER_DIGEST,
    MANIFEST_DIGEST,
    SIGNATURE,
    SNAPSHOT_REF,
    STARGZ,
    STARGZ_TOC,
    TARFS,
    TWIN,
    TWIN_LAYER,
    image_label,
    image_ref,
    is_left_packed,
)
from snapshotter.lazy import blockdisk, estargz, plain, tarfs
from snapshotter.lazy.registries import Registries
from snapshotter.lazy.settings import LazySettings
from snapshotter.lazy.twins import Twin, TwinFinder, bootstrap_layer
from snapshotter.store import Snapshot, Store
from snapshotter.system import mountpoints
from snapshotter.volumes import raw_block

log = logging.getLogger(__name__)

MAX_BOOTSTRAP_LAYER = 4 << 30


@dataclass(frozen=True, slots=True)
class Claim:
    """Labels for a layer that is not unpacked, and what to do with its directory. `settle` raises nothing."""

    labels: Mapping[str, str]
    settle: Callable[[Snapshot], None]


class LazyFinder:
    """Thread-safe."""

    def __init__(self, settings: LazySettings, registries: Registries, store: Store) -> None:
        self._settings, self._registries, self._store = settings, registries, store
        self._twins = TwinFinder(registries, index=settings.index, referrers=settings.referrers)
        self._estargz = estargz.Estargz(registries)
        self._tarfs = tarfs.Tarfs(registries, settings.tarfs_jobs)
        self._no_tarfs = tarfs.why_not(store.directory) if settings.tarfs else ""
        if self._no_tarfs:
            log.warning("enable_tarfs: %s. Layers are unpacked as usual", self._no_tarfs)
        self._lock = threading.Lock()
        self._busy: dict[int, threading.Lock] = {}

    # ---- at the pull

    @property
    def looks(self) -> bool:
        """Whether plain images may run lazily here."""
        settings = self._settings
        return settings.index or settings.referrers or settings.estargz or (settings.tarfs and not self._no_tarfs)

    def claim(self, parent: str, labels: Mapping[str, str]) -> Claim | None:
        """For a layer of a plain image that is about to be unpacked; None: unpack it. Asks the registry."""
        settings = self._settings
        if not image_label(labels) or not self.looks:
            return None
        try:
            image = parse(image_label(labels))
        except InvalidArgument as error:
            log.warning("%s", error)
            return None
        twin = self._twins.find(image, labels.get(MANIFEST_DIGEST, ""), labels)
        if twin is not None:
            return self._twin(image, twin, parent, labels)
        if not SHA256_DIGEST.fullmatch(labels.get(LAYER_DIGEST, "")):
            return None
        # only from the bottom up: their files are merged, and what lies below must be among them
        below = self._store.stat(parent).labels if parent else {STARGZ: "", TARFS: ""}
        if settings.estargz and not settings.signed and STARGZ in below:
            claim = self._estargz_layer(image, parent, labels)
            if claim is not None:
                return claim
        if settings.tarfs and not self._no_tarfs and TARFS in below:
            return self._tarfs_layer(image, parent, labels)
        return None

    def _twin(self, image: Reference, twin: Twin, parent: str, labels: Mapping[str, str]) -> Claim:
        marks = {INDEX_ALTERNATIVE: "true"} if twin.by_index else {}
        depth = len(self._store.chain(parent)) if parent else 0
        if depth + 1 != len(twin.layers) or labels.get(LAYER_DIGEST) != twin.layers[-1]:
            return Claim({**marks, TWIN: TWIN_LAYER}, lambda made: None)
        marks |= {TWIN: twin.manifest} | ({SIGNATURE: twin.signature} if twin.signature else {})

        def settle(made: Snapshot) -> None:
            # now, while the credentials of the pull are good; should it fail, the first container tries again
            try:
                self._fetch_bootstrap(image, made, twin.bootstrap)
            except (SnapshotterError, OSError) as error:
                log.warning("%s", error)

        return Claim(marks, settle)

    def _estargz_layer(self, image: Reference, parent: str, labels: Mapping[str, str]) -> Claim | None:
        table = self._estargz.claim(image, labels, lowest=not parent)
        if table is None:
            return None

        def settle(made: Snapshot) -> None:
            try:
                table.save(self._store.path(made.id) / estargz.TABLE)
            except OSError as error:
                log.warning("%s; it is fetched again for the first container", error)

        # upstream's value is `true`; only presence counts
        return Claim({STARGZ: "true", STARGZ_TOC: table.digest}, settle)

    def _tarfs_layer(self, image: Reference, parent: str, labels: Mapping[str, str]) -> Claim | None:
        if self._settings.tarfs_hint and not self._tarfs.hinted(image, labels):
            return None

        def settle(made: Snapshot) -> None:
            self._tarfs.begin(image, made.labels, self._store.path(made.id), below=self._chain_id(parent))

        return Claim({TARFS: labels[LAYER_DIGEST].removeprefix("sha256:")}, settle)

    # ---- when a container comes

    def complete(self, chain: Sequence[Snapshot]) -> bool:
        """Makes sure that `chain[0]`, a layer that `runs_lazily`, has its bootstrap. False: it must be unpacked.

        Raises SnapshotterError.
        """
        layer = chain[0]
        if not is_left_packed(layer.labels):
            return True
        with self._one(layer.id):
            if (self._store.path(layer.id) / plain.DONE).exists():
                return False
            boot = self._boot(layer)
            if TARFS in layer.labels:
                return self._mount_tarfs(chain, boot)
            if boot.exists():
                return True
            if STARGZ in layer.labels:
                return self._merge(chain, boot)
            image = parse(image_ref(layer.labels, str(layer.id)))
            self._fetch_bootstrap(image, layer, None)
            return True

    def local(self, layer: Snapshot) -> Path | None:
        """Where a completed layer is mounted that needs no nydusd."""
        return self._store.path(layer.id) / "mnt" if TARFS in layer.labels else None

    def volumes(self, chain: Sequence[Snapshot]) -> list[str]:
        """Mount options that give the image of `chain[0]`, a completed layer, to a virtual machine as block devices.

        Empty where there are none.
        """
        mode = self._settings.export
        if mode is None or not mode.disk or TARFS not in chain[0].labels:
            return []
        kind, name = ("image", blockdisk.IMAGE) if mode.whole else ("layer", blockdisk.LAYER)
        disks = [self._store.path(layer.id) / name for layer in (chain[:1] if mode.whole else chain)]
        if not all(disk.exists() for disk in disks):
            return []
        return [raw_block(kind, disk, blockdisk.verity_of(disk) if mode.verity else None) for disk in disks]

    def release(self, snapshot: int) -> None:
        """Its directory is about to go. Raises OSError."""
        mountpoint = self._store.path(snapshot) / "mnt"
        if os.path.lexists(mountpoint):  # the mount table is long
            tarfs.umount(mountpoint)

    def usage(self, layer: Snapshot) -> tuple[int, int]:
        """(bytes, inodes) that came into the directory of a layer that was left packed at its pull."""
        if not is_left_packed(layer.labels):
            return 0, 0
        folder = self._store.path(layer.id)
        try:
            size, inodes = map(int, (folder / plain.DONE).read_text().split())
        except (OSError, ValueError):  # not unpacked since: a bootstrap, or nothing
            size, inodes = disk_usage(self._store.upper(layer.id))
        try:
            tar = tarfs.any_tar_of(folder) if TARFS in layer.labels else None
            beside = [tar, folder / blockdisk.IMAGE, folder / blockdisk.LAYER] if tar else []
            size += sum(path.stat().st_blocks * 512 for path in beside if path.exists())
            return size, inodes
        except FileNotFoundError:
            return size, inodes

    def close(self, *, umount: bool) -> None:
        self._tarfs.close()
        if umount:
            for path in mountpoints():
                if Path(path).name == "mnt" and Path(path).parent.parent == self._store.directory:
                    tarfs.umount(Path(path))

    def unpack(self, layer: Snapshot, below: Callable[[], Sequence[str]]) -> None:
        """A layer that was not unpacked is now. `below`: directories under it, asked for if needed."""
        folder = self._store.path(layer.id)
        with self._one(layer.id):
            if (folder / plain.DONE).exists():
                return
            image = parse(image_ref(layer.labels, str(layer.id)))
            log.info("image %s: layer %s is unpacked for an image built on it", image, layer.labels.get(LAYER_DIGEST))
            tar = tarfs.any_tar_of(folder)
            chain = self._chain_id(layer.parent)
            plain.unpack(self._registries, image, layer.labels, folder, below(), tar, chain=chain)
            if tar is not None:
                tar.unlink()

    def _merge(self, chain: Sequence[Snapshot], boot: Path) -> bool:
        tables = []
        for layer in reversed(chain):
            image = parse(image_ref(layer.labels, str(layer.id)))
            blob = layer.labels.get(LAYER_DIGEST, "").removeprefix("sha256:")
            digest = layer.labels.get(STARGZ_TOC, "")
            path = self._store.path(layer.id) / estargz.TABLE
            try:
                table = estargz.Table.load(path, blob, digest)
            except (OSError, ValueError):
                table = self._estargz.fetch(image, layer.labels, digest)
                table.save(path)
            tables.append(table)
        try:
            estargz.merge(tables, boot)
        except SnapshotterError as error:
            log.warning("image %s: %s: its layers are unpacked instead", image_label(chain[0].labels), error)
            return False
        return True

    def _mount_tarfs(self, chain: Sequence[Snapshot], boot: Path) -> bool:
        if self._no_tarfs or not self._settings.tarfs:  # of a time when it was wanted
            self._no_tarfs = self._no_tarfs or tarfs.why_not(self._store.directory)
            if self._no_tarfs:
                log.warning("tarfs layers are unpacked: %s", self._no_tarfs)
                return False
        try:
            layers = []
            for layer in reversed(chain):
                image = parse(image_ref(layer.labels, str(layer.id)))
                folder = self._store.path(layer.id)
                below = self._chain_id(layer.parent)
                layers.append(self._tarfs.finish(image, layer.labels, folder, below=below))
            if not boot.exists():
                tarfs.merge(layers, boot)
            tarfs.mount(boot, [tar for _, tar in layers], self._store.path(chain[0].id) / "mnt")
            self._export(chain, boot, layers)
        except Unavailable:
            raise
        except SnapshotterError as error:
            log.warning("image %s: %s: unpacked instead", image_label(chain[0].labels), error)
            return False
        return True

    def _chain_id(self, key: str) -> str | None:
        """Of the layers up to this one; "" for none, None where the client did not say."""
        return self._store.stat(key).labels.get(SNAPSHOT_REF) if key else ""

    def _export(self, chain: Sequence[Snapshot], boot: Path, layers: Sequence[tuple[Path, Path]]) -> None:
        """`layers`: bootstrap and tar, lowest first. What fails is a warning: the image is mounted here anyhow."""
        mode = self._settings.export
        if mode is None:
            return
        tars = [(tarfs.identity_of(tar), tar) for _, tar in layers]
        parts = [(chain[0], boot, tars, blockdisk.IMAGE, IMAGE_BLOCK)]
        if not mode.whole:
            each = zip(reversed(chain), layers, tars, strict=True)
            parts = [(layer, one[0], [tar], blockdisk.LAYER, LAYER_BLOCK) for layer, one, tar in each]
        for layer, path, needed, name, label in parts:
            try:
                told = blockdisk.export(path, needed, self._store.path(layer.id) / name, mode)
                if told and layer.labels.get(label) != told:
                    self._store.mark(layer.key, {label: told})
            except (SnapshotterError, OSError) as error:
                log.warning("image %s: %s", image_label(chain[0].labels), error)

    def _boot(self, layer: Snapshot) -> Path:
        return self._store.upper(layer.id) / "image" / "image.boot"

    def _fetch_bootstrap(self, image: Reference, layer: Snapshot, known: tuple[str, int] | None) -> None:
        """Raises Unavailable, SnapshotterError."""
        from bootstrap.decompress import open_layer
        from bootstrap.errors import RafsError
        from nydusfs.convert.bootstrap_layer import unpack_bootstrap_layer

        manifest = layer.labels[TWIN]
        upper = self._store.upper(layer.id)
        try:
            with self._registries.open(image, layer.labels) as client:
                if known is None:
                    last = bootstrap_layer(json.loads(client.manifest(image.repository, manifest).body))
                    if last is None:
                        raise SnapshotterError(f"image {image}: its Nydus image {manifest} has no bootstrap")
                    known = last["digest"], last["size"]
                with tempfile.TemporaryDirectory(dir=upper.parent, prefix=".new-") as folder:
                    with (
                        client.open_blob(image.repository, *known) as stored,
                        open_layer(cast(BinaryIO, stored)) as tar,
                    ):
                        what = f"Nydus image {manifest} of {image}"
                        unpack_bootstrap_layer(tar, Path(folder), what, MAX_BOOTSTRAP_LAYER)
                        while tar.read(1 << 20):  # to its end, where the digest is compared
                            pass
                        while stored.read(1 << 20):
                            pass
                    wait_for_disk(Path(folder, "image"))
                    shutil.rmtree(upper / "image", ignore_errors=True)
                    os.rename(Path(folder, "image"), upper / "image")
        except ConvertError as error:
            raise SnapshotterError(str(error)) from None
        except (NydusError, RafsError) as error:
            raise Unavailable(f"image {image}: bootstrap of its Nydus image {manifest}: {error}") from None

    @contextmanager
    def _one(self, snapshot: int) -> Iterator[None]:
        with self._lock:
            lock = self._busy.setdefault(snapshot, threading.Lock())
        with lock:
            yield
