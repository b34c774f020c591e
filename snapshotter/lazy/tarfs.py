"""tarfs: a layer stays the tar that it is, on this node; the kernel reads it as a device of an EROFS mount.

Nothing is unpacked and no daemon serves anything. A layer is fetched and indexed behind the pull, by a few programs at
a time; the first container merges the indexes and mounts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, cast

from nydusfs.errors import NydusError
from nydusfs.registry.reference import SHA256_DIGEST, Reference
from nydusfs.trees import wait_for_disk
from snapshotter import crowd
from snapshotter.errors import SnapshotterError, Unavailable
from snapshotter.labels import LAYER_DIGEST, MANIFEST_DIGEST, TARFS_HINT
from snapshotter.lazy import content
from snapshotter.lazy.registries import Registries
from snapshotter.system import detach, mountpoints

log = logging.getLogger(__name__)

BOOT = "layer.boot"  # in the snapshot's directory, beside `fs`, as is layer-ID.tar
BUILD_SECONDS = 3600.0
_PIECE = 1 << 20
_BUILD = "import sys; from bootstrap.cli import main; sys.argv[0] = 'nydus-image'; main()"


class Tarfs:
    """`jobs`: layers indexed at the same time, 0 for one per processor."""

    def __init__(self, registries: Registries, jobs: int) -> None:
        self._registries = registries
        self._pool = ThreadPoolExecutor(jobs or os.cpu_count() or 1, thread_name_prefix="tarfs")
        self._lock = threading.Lock()
        self._running: dict[Path, Future[None]] = {}
        self._hints: dict[tuple[str, str], bool] = {}

    def hinted(self, image: Reference, labels: Mapping[str, str]) -> bool:
        """Whether the image's manifest asks for tarfs. Raises nothing."""
        digest = labels.get(MANIFEST_DIGEST, "")
        if not SHA256_DIGEST.fullmatch(digest):
            return False
        key = image.name, digest
        if key not in self._hints:
            try:
                with self._registries.open(image, labels) as client:
                    document = json.loads(client.manifest(image.repository, digest).body)
            except (NydusError, ValueError) as error:
                log.warning("image %s: whether it is for tarfs cannot be told: %s", image, error)
                return False
            annotations = document.get("annotations") if isinstance(document, dict) else None
            self._hints[key] = isinstance(annotations, dict) and TARFS_HINT in annotations
        return self._hints[key]

    def begin(self, image: Reference, labels: Mapping[str, str], folder: Path, *, below: str | None) -> Future[None]:
        """Has a layer fetched and indexed in the background. `below`: as for `content.check`."""
        with self._lock:
            if folder not in self._running:
                self._running[folder] = self._pool.submit(self._run, image, labels, folder, below)
            return self._running[folder]

    def _run(self, image: Reference, labels: Mapping[str, str], folder: Path, below: str | None) -> None:
        try:
            self._convert(image, labels, folder, below)
        finally:
            with self._lock:
                self._running.pop(folder, None)  # who comes from now on finds the layer, or tries again

    def finish(
        self, image: Reference, labels: Mapping[str, str], folder: Path, *, below: str | None
    ) -> tuple[Path, Path]:
        """(bootstrap, tar) of a layer, waited for. Raises Unavailable, SnapshotterError."""
        if (tar := tar_of(folder)) is None:
            if any_tar_of(folder) is not None:
                raise SnapshotterError(
                    f"image {image}: layer {labels.get(LAYER_DIGEST)} cannot be part of a tarfs image"
                )
            self.begin(image, labels, folder, below=below).result()
            tar = tar_of(folder)
            if tar is None:
                raise SnapshotterError(f"image {image}: layer {labels.get(LAYER_DIGEST)} is gone")
        return folder / BOOT, tar

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _convert(self, image: Reference, labels: Mapping[str, str], folder: Path, below: str | None) -> None:
        if tar_of(folder) is not None:
            return
        layer = labels[LAYER_DIGEST]
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tarfs-") as scratch:
            tar, boot = Path(scratch, "layer.tar"), Path(scratch, BOOT)
            identity = self._fetch(image, labels, tar)
            content.check(image, labels, below, f"sha256:{identity}")
            wait_for_disk(tar)
            # also where the index cannot be used: it need not be fetched again to be unpacked
            if below != "" and (name := _unnamed(tar)):
                os.rename(tar, folder / f"plain-{identity}.tar")
                raise SnapshotterError(
                    f"image {image}: layer {layer} does not name its directory {name}, which would get other rights"
                )
            crowd.apart()
            command = [sys.executable, "-P", "-c", _BUILD, "create", "--type", "tar-tarfs", "--log-level", "error"]
            command += ["--blob-dir", scratch, "--bootstrap", str(boot), str(tar)]
            try:
                done = subprocess.run(command, capture_output=True, timeout=BUILD_SECONDS, cwd="/", check=False)
            except subprocess.TimeoutExpired:
                raise SnapshotterError(f"image {image}: layer {layer}: no index after {BUILD_SECONDS:.0f} s") from None
            if done.returncode:
                reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
                os.rename(tar, folder / f"plain-{identity}.tar")
                raise SnapshotterError(f"image {image}: layer {layer} cannot be indexed: {reason}")
            wait_for_disk(boot)
            os.rename(boot, folder / BOOT)
            os.rename(tar, folder / f"layer-{identity}.tar")  # last: its name says that both are there

    def _fetch(self, image: Reference, labels: Mapping[str, str], out: Path) -> str:
        """SHA-256 of the tar. Raises Unavailable, SnapshotterError."""
        from bootstrap.decompress import open_layer
        from bootstrap.errors import RafsError

        layer = labels[LAYER_DIGEST]
        digest = hashlib.sha256()
        try:
            with (
                out.open("wb") as file,
                self._registries.open(image, labels) as client,
                client.open_blob(image.repository, layer) as stored,
                open_layer(cast(BinaryIO, stored)) as plain,
            ):
                while piece := plain.read(_PIECE):
                    digest.update(piece)
                    file.write(piece)
                while stored.read(_PIECE):  # to its end, where its digest is compared
                    pass
                file.write(bytes(-file.tell() % 512))  # some writers leave the last block short
        except (NydusError, RafsError) as error:
            raise Unavailable(f"image {image}: layer {layer} cannot be fetched: {error}") from None
        except OSError as error:
            raise SnapshotterError(f"image {image}: layer {layer}: {error.strerror}") from None
        return digest.hexdigest()


def tar_of(folder: Path) -> Path | None:
    """The tar of a layer that is indexed."""
    return next(folder.glob("layer-*.tar"), None)


def any_tar_of(folder: Path) -> Path | None:
    return tar_of(folder) or next(folder.glob("plain-*.tar"), None)


def merge(layers: Sequence[tuple[Path, Path]], out: Path) -> None:
    """`layers`: bootstrap and tar, lowest first. `out` is complete or not there. Raises SnapshotterError."""
    from bootstrap.errors import RafsError
    from bootstrap.merge import MergeSource, merge_layers

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".new-") as folder:
        merged = Path(folder, "image.boot")
        try:
            merge_layers([MergeSource(boot, original_blob_id=identity_of(tar)) for boot, tar in layers], merged)
        except RafsError as error:
            raise SnapshotterError(f"the layers' indexes do not make an image: {error}") from None
        wait_for_disk(merged)
        os.replace(merged, out)


def mount(boot: Path, tars: Sequence[Path], target: Path) -> None:
    """Does nothing where it is mounted. Raises SnapshotterError."""
    from bootstrap.reader import open_bootstrap

    if str(target) in mountpoints():
        return
    target.mkdir(mode=0o755, exist_ok=True)
    by_id = {identity_of(tar): tar for tar in tars}
    try:
        with open_bootstrap(str(boot)) as image:
            devices = [by_id[blob.id] for blob in image.blobs]
        mount_erofs(boot, devices, target)
    except KeyError as error:
        raise SnapshotterError(f"{boot} names the tar {error}, which is not there") from None
    except OSError as error:
        raise SnapshotterError(f"{boot} cannot be mounted: {error.strerror}") from None


def mount_erofs(image: Path, devices: Sequence[Path], target: Path) -> None:
    """From files where the kernel can, else through loop devices. Raises OSError."""
    from nydusfs.drivers.erofs.mount import open_erofs
    from nydusfs.drivers.mountapi import attach
    from snapshotter.lazy import loop

    try:
        mounted = open_erofs(str(image), map(str, devices))
    except OSError as error:
        if error.errno != errno.ENOTBLK:
            raise
        held: list[int] = []
        try:
            names = []
            for path in (image, *devices):
                name, descriptor = loop.attach(path)
                held.append(descriptor)
                names.append(name)
            mounted = open_erofs(names[0], names[1:])
        finally:
            for descriptor in held:
                os.close(descriptor)
    try:
        attach(mounted, str(target))
    finally:
        os.close(mounted)


def umount(target: Path) -> None:
    """Raises OSError."""
    detach(str(target))


def why_not(folder: Path) -> str:
    """What this kernel lacks, found out by a mount; "" if it can. `folder` is on the file system of the layers."""
    from nydusfs.drivers.erofs.selftest import tiny_image

    with tempfile.TemporaryDirectory(dir=folder, prefix=".selftest-") as scratch:
        image, device, target = (Path(scratch, name) for name in ("image", "device", "mnt"))
        image.write_bytes(tiny_image())
        device.write_bytes(bytes(8192))
        target.mkdir()
        try:
            mount_erofs(image, [device], target)
            umount(target)
        except OSError as error:
            need = "CONFIG_EROFS_FS, with CONFIG_EROFS_FS_BACKED_BY_FILE (Linux 6.12) or loop devices"
            return f"{error.strerror or error}: it needs {need}"
    return ""


def identity_of(tar: Path) -> str:
    return tar.stem.partition("-")[2]


def _unnamed(path: Path) -> str:
    """A directory that has entries but none of its own: see `estargz`. Raises nothing: what cannot be read is found out
    by who indexes it."""
    import tarfile

    named, wanted = {"."}, set[str]()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = os.path.normpath(member.name.lstrip("/"))
                named.add(name)
                wanted.add(os.path.dirname(name) or ".")
    except (tarfile.TarError, OSError, ValueError):
        return ""
    return min(wanted - named, default="")
