"""Which layer is lazy, and what every call of the snapshots service does about it (snapshotter.md 2.2 to 2.8)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from nydusfs.containerd.chain import chain_ids
from nydusfs.errors import NydusError
from nydusfs.registry.reference import Reference
from nydusfs.trees import disk_usage
from snapshotter.auth.local import label_credentials
from snapshotter.auth.vault import LABELS, Vault
from snapshotter.cachegc import Collector
from snapshotter.cacheusage import CacheUsage
from snapshotter.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, SnapshotterError
from snapshotter.filters import Adaptor, parse
from snapshotter.idmapped import IdMappedLayers
from snapshotter.images import Images
from snapshotter.labels import (
    DATA_LAYER,
    IMAGE_REF,
    LAYER_DIGEST,
    OWN,
    PROXY,
    PULL_SECRET,
    PULL_USER,
    RECOVERED,
    SNAPSHOT_REF,
    IdMapping,
    id_mapping,
    image_label,
    is_data,
    is_left_packed,
    is_meta,
    namespace_of,
    runs_lazily,
    unpacked_chain,
)
from snapshotter.lazy.finder import LazyFinder
from snapshotter.mounts import Layout, Mount
from snapshotter.origins import Origins
from snapshotter.records import instance_name
from snapshotter.store import Kind, Snapshot, Store, need
from snapshotter.tally import tally
from snapshotter.trash import Trash
from snapshotter.volumes import VolumeSettings, extra_option, guest_pull

log = logging.getLogger(__name__)

_NOT_LAZY = (
    "{image} is a Nydus image: its layers cannot be unpacked, and this client (ctr images pull of containerd 1.x or "
    "with --local, or whoever runs an image that was loaded or pulled for another snapshotter) does not send the "
    "labels of a lazy pull. Remove it (ctr -n {space} images rm {image}), then pull it with ctr-remote -n {space} "
    "images rpull, nerdctl --snapshotter nydus, or, from containerd 2.1 on, ctr images pull --snapshotter nydus, which "
    "needs an unpack_config for nydus in io.containerd.transfer.v1.local"
)
CLEANUP_PATIENCE = 2.0  # seconds: the images of 100 snapshots, or 20,000 files or so, are gone by then


class Snapshotter:
    """The ten calls, in terms of this room; `service.py` puts them on the wire."""

    def __init__(
        self,
        store: Store,
        layout: Layout,
        images: Images,
        idmapped: IdMappedLayers,
        vault: Vault,
        lazy: LazyFinder,
        cache: CacheUsage,
        collector: Collector,
        origins: Origins | None = None,
        *,
        sync_remove: bool = False,
        volumes: VolumeSettings = VolumeSettings(),  # noqa: B008 (immutable)
        proxy: bool = False,
    ) -> None:
        """`proxy`: no image's layers come to this machine, a virtual machine pulls them itself."""
        self._store = store
        self._cache_usage = cache
        self._collector = collector
        self._volumes = volumes
        self._proxy = proxy
        self._lazy = lazy
        self._origins = origins
        self._vault = vault
        self._layout = layout
        self._images = images
        self._idmapped = idmapped
        self._sync_remove = sync_remove
        self._trash = Trash(store.trash, self._gather)
        self._trash.empty(0)  # what an earlier life had no time for

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A writable snapshot; or AlreadyExists `target snapshot ...` for a layer whose data never needs unpacking."""
        need(key, "key")
        self._stand_in(parent)
        labels = self._taken(self._described(key, parent, labels))
        ref = labels.get(SNAPSHOT_REF, "")
        if ref and self._proxy:
            if LAYER_DIGEST not in labels:
                raise InvalidArgument(
                    f"missing CRI reference annotation for snapshot {key}: with fs_driver proxy, layers need the label "
                    f"{LAYER_DIGEST} (disable_snapshot_annotations = false for containerd's CRI plugin)"
                )
            self._skip(key, parent, ref, {**labels, PROXY: "true"})
        # A layer that carries both marks is the meta layer: without its bootstrap there is no image.
        if ref and is_data(labels) and not is_meta(labels):
            self._check_chain(key, parent, ref, labels)
            self._skip(key, parent, ref, labels)
        if ref and not is_meta(labels) and (claim := self._lazy.claim(parent, labels)) is not None:
            self._skip(key, parent, ref, {**labels, **claim.labels}, claim.settle)
        return self._create(Kind.ACTIVE, key, parent, labels)

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Read-only, on any layer or on none. Data layers of a Nydus image show as the empty directories they are."""
        self._stand_in(parent)
        return self._create(Kind.VIEW, key, parent, self._taken(labels))

    def mounts(self, key: str) -> list[Mount]:
        """The same as Prepare or View answered; an image that is not mounted (any more) is mounted again."""
        chain = self._store.chain(key)
        if chain[0].kind is Kind.COMMITTED:
            raise FailedPrecondition(f"snapshot {key} is committed: it has no mounts")
        return self._mounts(chain, later=False)

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str) -> None:
        labels = self._taken(labels)
        unpacked = bool(unpacked_chain(key))

        def complete(active: Mapping[str, str]) -> Mapping[str, str]:
            """A client that sends no labels: ours say that it is one."""
            return {**active, **labels} if is_meta(active) else labels

        made = self._store.commit(name, key, labels, parent, complete if unpacked and not is_meta(labels) else None)
        if unpacked and not self._proxy and is_meta(made.labels):
            self._images.expect(made)

    def remove(self, key: str) -> None:
        """Constant time: directories and mounts go in Cleanup, as containerd holds its lock during this call."""
        self._store.remove(key)
        if self._sync_remove:
            self.cleanup()

    def stat(self, key: str) -> Snapshot:
        return self._store.stat(key)

    def update(self, key: str, labels: Mapping[str, str], mask: Sequence[str]) -> Snapshot:
        return self._store.update(key, self._taken(labels), mask)

    def find(self, filters: Sequence[str]) -> list[Snapshot]:
        """Raises InvalidArgument for a filter outside the grammar."""
        matches = parse(filters)
        if not any(filters):
            return self._store.all()
        return [found for found in self._store.candidates(matches.alternatives) if matches(_adaptor(found))]

    def usage(self, key: str) -> tuple[int, int]:
        """(bytes, inodes); for a lazy layer the blob cache's share is counted too."""
        snapshot = self._store.stat(key)
        if snapshot.kind is Kind.ACTIVE:
            return disk_usage(self._store.upper(snapshot.id))
        size, inodes = self._lazy.usage(snapshot)
        return snapshot.size + size + self._cache_usage.of(snapshot), snapshot.inodes + inodes

    def cleanup(self) -> None:
        """Unmounts the images of removed snapshots and deletes their directories; what takes long goes on behind."""
        self._trash.empty(CLEANUP_PATIENCE)

    def _gather(self) -> None:
        """One failure stops nothing."""
        images, done = False, []
        for identity in self._store.gone():
            path = self._store.path(identity)
            try:
                images |= self._images.release(identity)
                self._lazy.release(identity)
                self._trash.put(path)
            except FileNotFoundError:
                pass  # an earlier life came so far
            except (SnapshotterError, OSError) as error:
                log.warning("%s is left for the next clean-up: %s", path, error)
                continue
            done.append(identity)
        self._store.forget(done)
        try:
            self._idmapped.release(self._needed_names)
            self._images.release_mapped(self._needed_names)
        except SnapshotterError as error:
            log.warning("%s", error)
        if images:
            self._collector.collect()
            self._vault.sweep(lambda: {image_label(snapshot.labels) for snapshot in self._store.all()} - {""})

    # ----

    def _check_chain(self, key: str, parent: str, ref: str, labels: Mapping[str, str]) -> None:
        """Raises InvalidArgument for a data layer under a chain id that is not its own.

        containerd takes the chain id from the image's config and compares diff ids when it unpacks, which it does not
        do here. An image could so have any other image's layer taken for there, and empty. The diff id of a data layer
        is its digest (RAFS format 6.3), so the chain id can be told.
        """
        digest = labels.get(LAYER_DIGEST, "")
        below = self._store.stat(parent).labels.get(SNAPSHOT_REF, "") if parent else ""
        if not digest or (parent and not below):
            return  # a client that does not say
        wanted = chain_ids([below, digest] if below else [digest])[-1]
        if ref != wanted:
            raise InvalidArgument(
                f"snapshot {key}: layer {digest} is labelled {DATA_LAYER} and its image's config claims chain id {ref} "
                f"for it, where {wanted} is right: diff ids of data layers must be their digests, convert it again"
            )

    def _described(self, key: str, parent: str, labels: Mapping[str, str]) -> Mapping[str, str]:
        """What the client did not say of an image layer, where it is needed and containerd knows it.

        Raises NotFound for a data layer that a client without labels wants to unpack: that client would try
        again for ever if it were told that the layer is there, and the blob is no archive.
        """
        chain = labels.get(SNAPSHOT_REF, "") or unpacked_chain(key)
        if self._origins is None or not chain or image_label(labels) or is_meta(labels) or is_data(labels):
            return labels
        if SNAPSHOT_REF in labels:
            if not self._lazy.looks:
                return labels
        elif parent and not is_data(self._store.stat(parent).labels):
            return labels  # the lowest layer of a Nydus image is one of data, or all there is
        origin, why = self._origins.find(chain, namespace_of(key))
        if origin is None:
            log.debug("layer %s: %s", chain, why)
            return labels
        if SNAPSHOT_REF not in labels and is_data(origin.labels) and not is_meta(origin.labels):
            log.warning("%s: a client without the labels of a lazy pull wants to unpack it", origin.image)
            # not FailedPrecondition: nerdctl, told that something is missing, pulls again by itself, with labels
            raise NotFound(_NOT_LAZY.format(image=origin.image, space=origin.namespace))
        if SNAPSHOT_REF not in labels and not is_meta(origin.labels):
            return labels
        known = dict(origin.labels)
        if is_meta(known) and not origin.sure:
            del known[IMAGE_REF]  # it would stay; the name is asked for when the image is to be mounted
        return {**known, **labels}

    def _skip(
        self,
        key: str,
        parent: str,
        ref: str,
        labels: Mapping[str, str],
        settle: Callable[[Snapshot], None] = lambda made: None,
    ) -> NoReturn:
        """Raises AlreadyExists: the layer needs no unpacking."""
        made = self._store.commit_skipped(key, parent, ref, labels)
        log.debug("layer %s is lazy: %s", ref, f"snapshot {made.id}" if made else "there already")
        if made is not None:
            settle(made)
        raise AlreadyExists(f'target snapshot "{ref}": already exists')

    def _taken(self, labels: Mapping[str, str]) -> Mapping[str, str]:
        """Labels to store: without the password that some agents send in them, which is kept apart, and without what
        only this program may say of a layer."""
        credentials = label_credentials(labels)
        image = image_label(labels)
        if credentials is not None and image:
            try:
                self._vault.remember(LABELS, Reference.parse(image), credentials)
            except NydusError as error:
                log.warning("credentials in the labels of a snapshot are of no use: %s", error)
        return {key: value for key, value in labels.items() if key not in (PULL_USER, PULL_SECRET, *OWN)}

    def _create(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        mapping = id_mapping(labels)
        began = time.monotonic()
        snapshot = self._store.create(kind, key, parent, labels, mapping.host if mapping else None)
        try:
            # Clients look into a view at once and run no container in it; for a container they ask for Mounts, later.
            mounts = self._mounts([snapshot, *(self._store.chain(parent) if parent else ())], later=True)
            tally.remember(f"snapshot {key}", prepare=time.monotonic() - began)
            return mounts
        except BaseException:
            # else a retry with this key meets AlreadyExists, and containerd's collector has to find the rest
            self._undo(snapshot)
            raise

    def _stand_in(self, name: str) -> None:
        """With the proxy driver, an empty layer for one that is not here: another snapshotter unpacked it, as the pause
        image's. The guest has its own."""
        if not self._proxy or not name:
            return
        with suppress(NotFound):
            self._store.stat(name)
            return
        key = f"recovered {name}"
        labels = {RECOVERED: "true", f"{RECOVERED}.at": str(int(time.time()))}
        log.info("layer %s is not here, an empty one takes its place: the guest pulls the image", name)
        with suppress(AlreadyExists):  # another call does the same, or was killed between the two
            self._store.create(Kind.ACTIVE, key, "", {})
        with suppress(AlreadyExists, NotFound):
            self._store.commit(name, key, labels)

    def _undo(self, snapshot: Snapshot) -> None:
        try:
            # by its number: who gave up on this call may have removed it and used the key again
            self._store.remove(snapshot.key, snapshot.id)
            self._trash.empty(0)
        except SnapshotterError as error:
            log.warning("snapshot %s cannot be taken back: %s", snapshot.key, error)

    def _mounts(self, chain: Sequence[Snapshot], *, later: bool) -> list[Mount]:
        """Lazy if a meta layer lies below, whatever lies between: layers built on a Nydus image need its files too.

        The nearest one counts. The snapshot itself does not: a meta layer being unpacked is an ordinary directory.
        """
        if self._in_guest(chain):
            return self._layout.in_guest(chain, guest_pull(chain[1].labels if len(chain) > 1 else {}))
        mapping = id_mapping(chain[0].labels)
        for depth, layer in enumerate(chain[1:], 1):
            if runs_lazily(layer.labels) and self._lazy.complete(chain[depth:]):
                by_kernel = self._lazy.local(layer) is not None
                between = self._between(chain[1:depth], layer, None if by_kernel else mapping)
                image = self._mounted(layer, mapping, later=later)
                volumes = self._volumes_of(chain[0], chain[depth:])
                return self._layout.lazy(chain[0], between, image, volumes, mapped=not by_kernel)
            self._unpack(chain, depth)
        return self._layout.ordinary(chain)

    def _between(self, layers: Sequence[Snapshot], below: Snapshot, mapping: IdMapping | None) -> list[str]:
        """Directories of unpacked layers above the lazy one `below`."""
        if mapping is None:
            return [str(self._store.upper(layer.id)) for layer in layers]
        try:
            return self._idmapped.ensure([layer.id for layer in layers], mapping)
        except InvalidArgument as error:
            raise InvalidArgument(
                f"image {image_label(below.labels)}: it has layers on top of a Nydus image, whose owners cannot be "
                f"mapped to a user namespace here: {error}. Or convert the whole image to Nydus"
            ) from None

    def _in_guest(self, chain: Sequence[Snapshot]) -> bool:
        if len(chain) > 1 and PROXY in chain[1].labels and not self._proxy:
            raise FailedPrecondition(
                f"image {image_label(chain[1].labels)} was pulled with fs_driver proxy, its layers are not here: "
                "remove it and pull it again"
            )
        if not self._proxy:
            return False
        return len(chain) == 1 or PROXY in chain[1].labels or not image_label(chain[1].labels)

    def _volumes_of(self, own: Snapshot, image: Sequence[Snapshot]) -> list[str]:
        if self._lazy.local(image[0]) is not None:
            return self._lazy.volumes(image) if self._volumes.kata else []
        if not self._volumes.extra:
            return []
        return [extra_option(*self._images.describe(image[0]), self._store.path(own.id))]

    def _needed_names(self) -> set[str]:
        """Of images and of layers above them as containers in user namespaces need them."""
        names = set()
        for chain in self._store.mapped():
            try:
                mapping = id_mapping(chain[0].labels)
            except InvalidArgument:
                continue  # an update made them so; the clean-up of all others goes on
            if mapping is not None:
                names |= {instance_name(layer.id, mapping) for layer in chain[1:]}
        return names

    def _unpack(self, chain: Sequence[Snapshot], depth: int) -> None:
        """A layer whose directory is empty as the image it came with runs lazily, while this one does not."""
        if is_left_packed(chain[depth].labels):
            self._lazy.unpack(chain[depth], lambda: self._below(chain[depth:]))

    def _mounted(self, layer: Snapshot, mapping: IdMapping | None = None, *, later: bool = False) -> Path:
        """`later`: see `Images.ensure`."""
        return self._lazy.local(layer) or self._images.ensure(layer, mapping, later=later)

    def _below(self, chain: Sequence[Snapshot]) -> list[str]:
        """Directories under `chain[0]`, nearest first."""
        found: list[str] = []
        for depth, layer in enumerate(chain[1:], 1):
            if runs_lazily(layer.labels) and self._lazy.complete(chain[depth:]):
                return [*found, str(self._mounted(layer))]
            self._unpack(chain, depth)
            found.append(str(self._store.upper(layer.id)))
        return found


def _adaptor(snapshot: Snapshot) -> Adaptor:
    def field(path: Sequence[str]) -> tuple[str, bool]:
        if path[0] == "labels" and len(path) > 1:
            name = ".".join(path[1:])
            return snapshot.labels.get(name, ""), name in snapshot.labels
        if len(path) == 1:
            if path[0] == "name":
                return snapshot.key, True
            if path[0] == "parent":
                return snapshot.parent, True
            if path[0] == "kind":
                return snapshot.kind.name.lower(), True
        return "", False

    return field
