"""A pull whose labels let a remote snapshotter take over layers: only what it does not take is downloaded."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from nydusfs.containerd.chain import chain_ids
from nydusfs.containerd.client import Containerd, read_pieces
from nydusfs.containerd.connection import AlreadyExists, ContainerdError
from nydusfs.registry.client import Manifest, RegistryClient
from nydusfs.registry.mediatypes import NYDUS_BLOB
from nydusfs.registry.reference import Reference
from snapshotter.client.plan import (
    LABEL_REF,
    LABEL_UNCOMPRESSED,
    Descriptor,
    Platform,
    choose_manifest,
    index_gc_labels,
    is_index,
    manifest_gc_labels,
    parse_diff_ids,
    parse_document,
    parse_manifest,
    snapshot_labels,
)

MAX_CONFIG = 16 << 20
PARALLEL_DOWNLOADS = 3  # containerd's own default for CRI
_TRIES = 3


class Progress(Protocol):
    """Told about each layer; calls may come from several threads."""

    def layer(self, number: int, layer: Descriptor, state: str) -> None: ...

    def received(self, number: int, count: int) -> None: ...


class Silence:
    def layer(self, number: int, layer: Descriptor, state: str) -> None:
        pass

    def received(self, number: int, count: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Pulled:
    """`lazy` layers were left to the snapshotter, `present` ones had been unpacked before; bytes are of downloads."""

    name: str
    digest: str
    layers: int
    lazy: int
    present: int
    downloaded: int
    bytes: int


class Puller:
    def __init__(
        self,
        containerd: Containerd,
        registry: RegistryClient,
        snapshotter: str,
        platform: Platform,
        progress: Progress | None = None,
    ) -> None:
        self._containerd, self._registry = containerd, registry
        self._snapshotter, self._platform = snapshotter, platform
        self._progress = progress or Silence()

    def pull(self, reference: Reference) -> Pulled:
        """Raises NydusError (RegistryError, ImageError, ContainerdError); nothing half-made stays visible."""
        with self._containerd.lease():
            return self._pull(reference)

    def _pull(self, reference: Reference) -> Pulled:
        name, repository = str(reference), reference.repository
        found = self._registry.manifest(repository, reference.selector)
        target = Descriptor(found.media_type, found.digest, len(found.body))
        where = f"image {name}"
        if is_index(found.media_type):
            index = parse_document(found.body, where)
            chosen, usual = choose_manifest(index, self._platform, where)
            found_index, found = found, self._registry.manifest(repository, chosen.digest)
            if usual:
                self._store(found_index, index_gc_labels(index, where), reference)
            else:
                target = Descriptor(found.media_type, found.digest, len(found.body))
        config, layers = parse_manifest(found.body, where)
        config_body = self._registry.blob(repository, config.digest, MAX_CONFIG)
        diff_ids = parse_diff_ids(config_body, layers, self._platform, where)
        chain = chain_ids(diff_ids)
        self._store(found, manifest_gc_labels(config, layers), reference)
        labels = {f"containerd.io/gc.ref.snapshot.{self._snapshotter}": chain[-1]} if chain else {}
        labels |= _source(reference)
        self._containerd.write_content(f"config of {name}", config, iter((config_body,)), labels)
        with _Downloads(self._containerd, self._registry, reference, layers, self._progress) as downloads:
            lazy, present = self._unpack(name, found.digest, layers, diff_ids, chain, downloads)
        self._containerd.record_image(name, target)
        return Pulled(name, found.digest, len(layers), lazy, present, downloads.count, downloads.bytes)

    def _store(self, found: Manifest, labels: dict[str, str], reference: Reference) -> None:
        described = Descriptor(found.media_type, found.digest, len(found.body))
        self._containerd.write_content(
            f"manifest {found.digest}", described, iter((found.body,)), labels | _source(reference)
        )

    def _unpack(
        self,
        name: str,
        manifest: str,
        layers: list[Descriptor],
        diff_ids: list[str],
        chain: list[str],
        downloads: _Downloads,
    ) -> tuple[int, int]:
        lazy = present = 0
        for number, layer in enumerate(layers):
            labels = snapshot_labels(name, manifest, layers, number, chain[number])
            if self._containerd.has_snapshot(self._snapshotter, chain[number]):
                self._progress.layer(number, layer, "present")
                present += 1
            elif self._unpack_layer(
                number, layer, diff_ids[number], chain[number - 1] if number else "", labels, downloads
            ):
                self._progress.layer(number, layer, "lazy")
                lazy += 1
            else:
                self._progress.layer(number, layer, "done")
        return lazy, present

    def _unpack_layer(
        self, number: int, layer: Descriptor, diff_id: str, parent: str, labels: dict[str, str], downloads: _Downloads
    ) -> bool:
        """True if the snapshotter took the layer over; False if it was downloaded and unpacked here."""
        chain_id, snapshotter = labels[LABEL_REF], self._snapshotter
        for _ in range(_TRIES):
            key = f"extract-{time.time_ns() % 10**9}-{secrets.token_urlsafe(3)} {chain_id}"
            try:
                mounts = self._containerd.prepare(snapshotter, key, parent, labels)
                break
            except AlreadyExists:
                if self._containerd.has_snapshot(snapshotter, chain_id):
                    return True
                # the key itself was taken, or the layer was just removed by others
        else:
            raise ContainerdError(
                f"snapshotter {snapshotter} says layer {layer.digest} is there, but has no {chain_id}"
            )
        try:
            if layer.media_type == NYDUS_BLOB:
                raise ContainerdError(
                    f"snapshotter {snapshotter} did not take over Nydus layer {layer.digest}, which cannot be "
                    "unpacked: use --snapshotter nydus with containerd-nydus-grpc running, or the plain image"
                )
            downloads.wait(number)
            self._progress.layer(number, layer, "unpacking")
            applied = self._containerd.apply(layer, mounts)
            if applied != diff_id:
                raise ContainerdError(f"layer {layer.digest} unpacks to {applied}, the image's config says {diff_id}")
            try:
                self._containerd.commit(snapshotter, key, chain_id, labels)
            except AlreadyExists:
                self._drop(key)  # another client unpacked the same layer meanwhile
        except BaseException:
            self._drop(key)
            raise
        self._containerd.label_content(layer.digest, {LABEL_UNCOMPRESSED: diff_id})
        return False

    def _drop(self, key: str) -> None:
        try:
            self._containerd.remove_snapshot(self._snapshotter, key)
        except ContainerdError:
            pass


class _Downloads:
    """Layers into the content store, a few at a time, started with the first one that is needed.

    Everything above a needed layer is fetched beside it, as containerd does: an ordinary image's layers are all needed,
    a Nydus image's only needed layer is its last.
    """

    def __init__(
        self,
        containerd: Containerd,
        registry: RegistryClient,
        reference: Reference,
        layers: list[Descriptor],
        progress: Progress,
    ) -> None:
        self._containerd, self._registry, self._reference = containerd, registry, reference
        self._layers, self._progress = layers, progress
        self._pool = ThreadPoolExecutor(PARALLEL_DOWNLOADS, thread_name_prefix="download")
        self._started: dict[int, Future[int]] = {}
        self._stopped = False
        self.count = self.bytes = 0

    def __enter__(self) -> _Downloads:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def wait(self, number: int) -> None:
        """Returns when layer `number` is in the content store; raises what its download raised."""
        if number not in self._started:
            for one in range(number, len(self._layers)):
                if self._layers[one].media_type != NYDUS_BLOB and one not in self._started:
                    self._started[one] = self._pool.submit(self._fetch, one)
        received = self._started[number].result()
        if received:
            self.count += 1
            self.bytes += received

    def _fetch(self, number: int) -> int:
        layer = self._layers[number]
        if self._containerd.has_content(layer.digest):
            self._containerd.label_content(layer.digest, _source(self._reference))
            return 0
        self._progress.layer(number, layer, "downloading")

        def received(count: int) -> None:
            if self._stopped:
                raise ContainerdError("the pull was ended")
            self._progress.received(number, count)

        stream = self._registry.open_blob(self._reference.repository, layer.digest, layer.size)
        pieces: Iterable[bytes] = read_pieces(stream, received)
        self._containerd.write_content(f"layer {layer.digest}", layer, iter(pieces), _source(self._reference))
        return layer.size


def _source(reference: Reference) -> dict[str, str]:
    """Where a blob came from: containerd mounts blobs across repositories by this label when it pushes."""
    return {f"containerd.io/distribution.source.{reference.hostname}": reference.repository}
