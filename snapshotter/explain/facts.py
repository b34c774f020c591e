"""What is known of one image or container: from containerd, from the snapshotter's database, from its API, from nydusd.

Each source of facts may be missing (a daemon that does not answer, a snapshotter started a moment ago); then its part
is empty and everything else is still said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nydusfs.containerd.chain import chain_ids
from nydusfs.containerd.connection import Connection, ContainerdError, Missing
from nydusfs.containerd.containers import Container, Containers
from nydusfs.drivers import kernel
from nydusfs.errors import NydusError
from nydusfs.registry.reference import Reference
from nydusfs.trees import disk_usage
from snapshotter.client.plan import (
    Descriptor,
    Platform,
    choose_manifest,
    is_index,
    parse_diff_ids,
    parse_document,
    parse_manifest,
)
from snapshotter.controller import SOCKET
from snapshotter.errors import NotFound, SnapshotterError
from snapshotter.labels import (
    DATA_LAYER,
    META_LAYER,
    PREFIX,
    STARGZ,
    TARFS,
    TWIN,
    chain_of,
    id_mapping,
    is_left_packed,
    namespace_of,
    runs_lazily,
)
from snapshotter.lazy.plain import DONE
from snapshotter.node import Node
from snapshotter.nydusd_api import NydusdApi
from snapshotter.records import InstanceRecord
from snapshotter.store import Kind

PROGRAM = "nydusctl"
MAX_DOCUMENT = 8 << 20
ORIGINAL = PREFIX + "nydus-ref"  # a layer whose data is the ordinary layer beside it
# state of a layer of a plain image that was not unpacked, and why
PACKED = {
    TWIN: ("lazy", "of a plain image: the Nydus image found for it is read in its place"),
    STARGZ: ("lazy", "eStargz, read by ranges"),
    TARFS: ("tar", "the whole layer is on this node"),
}


@dataclass
class Layer:
    """`state`: lazy, bootstrap, unpacked, tar, absent. `cached`: bytes of it in the blob cache, decoded."""

    digest: str
    size: int
    state: str
    why: str
    cached: int = 0


@dataclass
class Phase:
    """`at` is wall clock; `seconds` None where only the moment is known."""

    name: str
    at: float | None
    seconds: float | None
    note: str = ""


@dataclass
class Explanation:
    name: str
    kind: str  # container, image
    image: str = ""
    namespace: str = ""
    snapshotter: str = ""
    lazy: bool = False
    why: list[str] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    mountpoint: str = ""
    driver: str = ""
    daemon: str = ""
    api_socket: str = ""
    reads: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)
    backend: dict[str, Any] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    slowest: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    others: int = 0  # further mounts of the same image, each for another user namespace

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Row:
    id: int
    key: str
    parent: int | None
    kind: int
    created: int
    updated: int
    labels: Mapping[str, str]


def explain(node: Node, name: str) -> Explanation:
    """Raises NotFound for a name that is neither a container nor an image here, ContainerdError."""
    found, client, container = _find(node, name)
    with client:
        rows = _rows(node)
        found.namespace = client.namespace
        if container is not None:
            found.image, found.snapshotter = container.image, container.snapshotter
        else:
            found.snapshotter = _our_name(node)
        layers, diff_ids = _manifest(client, found.image, found)
        chain = chain_ids(diff_ids)
        ours = found.snapshotter == _our_name(node)
        top = _container_row(rows, client.namespace, container) if container is not None and ours else None
        named = _rows_by_chain(rows, client.namespace)
        unpacked = _judge_layers(client, node, found, layers, chain, named if ours else {})
    above = top or (named.get(chain[-1]) if chain else None)
    base = _lazy_layer(node, rows, above) if above is not None else None
    _verdict(found, ours, base, unpacked)
    if base is not None and TARFS not in base.labels:
        _image(node, found, rows, base, top)
    return found


# ---- containerd


def _our_name(node: Node) -> str:
    return node.containerd.snapshotter_name(node.need().address) or "nydus"


def _find(node: Node, name: str) -> tuple[Explanation, Containers, Container | None]:
    address = node.containerd.address
    references = [name]
    try:
        references.append(str(Reference.parse(name)))
    except NydusError:
        pass
    for namespace in _namespaces(address, node.choices.namespace):
        client = Containers(address, namespace, PROGRAM)
        try:
            container = client.find(name)
            return Explanation(container.id, "container"), client, container
        except Missing:
            pass
        for reference in references:
            try:
                client.image_target(reference)
                return Explanation(reference, "image", reference), client, None
            except Missing:
                continue
        client.__exit__()
    raise NotFound(f"containerd at {address} has no container and no image {name} in any namespace")


def _namespaces(address: str, first: str) -> list[str]:
    with Connection(address, first, PROGRAM) as connection:
        return connection.namespaces()


def _manifest(client: Containers, image: str, found: Explanation) -> tuple[list[Descriptor], list[str]]:
    """Layers and diff ids of the manifest that was pulled; empty when containerd does not have it any more."""
    platform = Platform.parse("")
    try:
        target = client.image_target(image)
        digest, media_type = str(target.digest), str(target.media_type)
        body = client.read_content(digest, MAX_DOCUMENT)
        if is_index(media_type):
            digest = choose_manifest(parse_document(body, image), platform, image)[0].digest
            body = client.read_content(digest, MAX_DOCUMENT)
        config, layers = parse_manifest(body, image)
        return layers, parse_diff_ids(client.read_content(config.digest, MAX_DOCUMENT), layers, platform, image)
    except NydusError as failure:
        found.why.append(f"containerd does not have the image's description any more: {failure}")
        return [], []


def _judge_layers(
    client: Containers, node: Node, found: Explanation, layers: list[Descriptor], chain: list[str],
    named: Mapping[str, _Row],
) -> bool:  # fmt: skip
    """Fills `found.layers`; whether the image is unpacked for the snapshotter at all. `named`: ours by chain id."""
    cache = node.need().cache_dir
    unpacked = False
    for layer, name in zip(layers, chain, strict=True):
        try:
            there = client.has_snapshot(found.snapshotter, name)
        except ContainerdError:
            there = False
        unpacked = unpacked or there
        data, meta = DATA_LAYER in layer.annotations, META_LAYER in layer.annotations
        blob = cache / layer.digest.rpartition(":")[2]
        cached = disk_usage(blob)[0] if blob.is_dir() else 0
        row = named.get(name)
        if not there:
            state, why = "absent", f"not unpacked for snapshotter {found.snapshotter}"
        elif row is not None and _is_packed(node, row):
            state, why = next(said for label, said in PACKED.items() if label in row.labels)
        elif meta:
            state, why = "bootstrap", "the image's metadata, always here"
        elif data and client.has_content(layer.digest):
            state, why = "lazy", "also in containerd's store: the client that pulled it fetched all layers"
        elif data:
            state, why = "lazy", "original layer, read by ranges" if ORIGINAL in layer.annotations else ""
        else:
            state, why = "unpacked", "an ordinary layer"
        found.layers.append(Layer(layer.digest, layer.size, state, why, cached))
    return unpacked


def _verdict(found: Explanation, ours: bool, base: _Row | None, unpacked: bool) -> None:
    states = [layer.state for layer in found.layers]
    if not ours:
        found.why.append(f"it uses snapshotter {found.snapshotter}: run it with the one of Nydus (--snapshotter)")
    elif base is not None and TARFS in base.labels:
        found.why.append("tarfs: its layers are fetched whole and mounted by the kernel as the tars they are")
    elif base is not None:
        found.lazy = True
        if "unpacked" in states:
            found.why.append(f"{states.count('unpacked')} ordinary layers above it were unpacked")
    elif found.layers and not unpacked:
        found.why.append(f"it was not pulled for snapshotter {found.snapshotter}: pull it again with that one")
    elif "lazy" in states:
        found.why.append("its layer of metadata is missing: pull it again")
    elif found.layers:
        found.why.append("a plain OCI image, no layer has a mark of Nydus: nydusify convert makes one that has")


# ---- the snapshotter's database


def _rows(node: Node) -> dict[int, _Row]:
    statement = "SELECT id, key, parent, kind, created, updated, labels FROM snapshots"
    return {
        row[0]: _Row(row[0], row[1], row[2], row[3], row[4], row[5], json.loads(row[6]))
        for row in node.query(statement)
    }


def _container_row(rows: Mapping[int, _Row], namespace: str, container: Container) -> _Row | None:
    pattern = re.compile(rf"{re.escape(namespace)}/\d+/{re.escape(container.snapshot_key)}")
    return next((row for row in rows.values() if pattern.fullmatch(row.key)), None)


def _rows_by_chain(rows: Mapping[int, _Row], namespace: str) -> dict[str, _Row]:
    """Layers that were not unpacked are nobody's: the snapshotter itself committed them."""
    committed = (row for row in rows.values() if row.kind == Kind.COMMITTED)
    return {chain_of(row.key, row.labels): row for row in committed if namespace_of(row.key) in ("", namespace)}


def _is_packed(node: Node, row: _Row) -> bool:
    """Whether it is a layer of a plain image that was not unpacked, at the pull or since."""
    return is_left_packed(row.labels) and not (node.root / "snapshots" / str(row.id) / DONE).exists()


def _above(rows: Mapping[int, _Row], row: _Row) -> Iterator[_Row]:
    """The row and its ancestors."""
    current: _Row | None = row
    while current is not None:
        yield current
        current = rows.get(current.parent) if current.parent else None


def _lazy_layer(node: Node, rows: Mapping[int, _Row], top: _Row) -> _Row | None:
    """The highest one that is an image with all below it, as the snapshotter finds it."""
    lazy = (row for row in _above(rows, top) if runs_lazily(row.labels))
    return next((row for row in lazy if not is_left_packed(row.labels) or _is_packed(node, row)), None)


# ---- the image at work


def _image(node: Node, found: Explanation, rows: Mapping[int, _Row], meta: _Row, top: _Row | None) -> None:
    chain = list(_above(rows, meta))
    first = min(row.created for row in chain) / 1e9
    found.phases.append(
        Phase("pull", first, meta.created / 1e9 - first, "from the first layer to the image's metadata unpacked")
    )
    mounted = [one for one in node.instances() if one.snapshot == meta.id]  # one for each user namespace
    mapping = id_mapping(top.labels) if top is not None else None
    instance = next((one for one in mounted if one.mapping == mapping), mounted[0] if mounted and top is None else None)
    if instance is None:
        guest = "it is not mounted on this machine: daemon_mode none leaves that to who starts the container"
        found.why.append("no container used it yet: it is not mounted" if node.need().serve else guest)
        return
    found.others = len(mounted) - 1
    daemon = next((one for one in node.daemons() if one.id == instance.daemon), None)
    if daemon is None:
        return
    where = node.mountpoint(instance, daemon.shared)
    _times(found, NydusdApi(node.root / SOCKET), instance, where.name, top)
    found.mountpoint, found.daemon, found.api_socket = str(where), daemon.id, str(daemon.socket)
    kinds = {entry.fstype for entry in kernel.mounts() if entry.mountpoint == str(where)}
    found.driver = "EROFS, by the kernel" if "erofs" in kinds else "FUSE"
    api, name = NydusdApi(daemon.socket), f"/{instance.name}"
    _numbers(found, api, name if daemon.shared else "/", name)


def _times(
    found: Explanation, controller: NydusdApi, instance: InstanceRecord, mountpoint: str, top: _Row | None
) -> None:
    """`mountpoint`: its name, which tells the image's mounts apart."""
    try:
        images = controller.get("images") or []
        prepared = controller.get(f"times?key={quote(top.key, safe='')}") if top is not None else {}
    except SnapshotterError:
        images, prepared = [], {}
    ours = [one for one in images if one.get("snapshot") == instance.snapshot]
    times = next((one.get("times") or {} for one in ours if Path(one.get("mountpoint", "")).name == mountpoint), {})
    if times:
        waited = f", {times['waited']:.3f} s of waiting for others" if times.get("waited", 0) > 0.001 else ""
        found.phases.append(Phase("mount", times["at"], times.get("mount"), f"nydusd opens the image{waited}"))
    if top is not None and top.kind != Kind.COMMITTED:
        note = (
            "the snapshotter's answer to containerd"
            if prepared
            else "before the snapshotter's last start: time not known"
        )
        found.phases.append(Phase("prepare", top.created / 1e9, (prepared or {}).get("prepare"), note))


def _numbers(found: Explanation, api: NydusdApi, where: str, config: str) -> None:
    try:
        stats = api.metrics("", where) or {}
        found.cache = api.metrics("blobcache", config) or {}
        found.backend = api.metrics("backend", where) or {}
        slow = api.metrics("slow", where) or {}
    except SnapshotterError as failure:
        found.why.append(f"its nydusd does not say what it did: {failure}")
        return
    found.sources = found.backend.pop("sources", [])
    found.slowest, found.failed = slow.get("files", []), slow.get("failed", [])
    found.reads = {
        "count": stats["fop_hits"][4],
        "errors": stats["fop_errors"][4],
        "bytes": stats["data_read"],
        "latency": stats["read_latency_dist"],
        "lookups": stats["fop_hits"][9],
    }
    for phase in found.phases:
        if phase.name == "mount" and phase.at is not None and not phase.seconds:
            phase.at = slow.get("mounted_at", phase.at)
    if slow.get("first_read_at"):
        note = "the first file a container read"
        if mounted := slow.get("mounted_at"):
            note = f"{slow['first_read_at'] - mounted:.3f} s after the mount; counted since this nydusd began"
        found.phases.append(Phase("first read", slow["first_read_at"], slow["first_read_micros"] / 1e6, note))
    if found.cache.get("prefetch_requests_count"):
        begin = found.cache["prefetch_begin_time_secs"] + found.cache["prefetch_begin_time_millis"] / 1000
        end = found.cache["prefetch_end_time_secs"] + found.cache["prefetch_end_time_millis"] / 1000
        found.phases.append(
            Phase(
                "prefetch",
                begin,
                max(0.0, end - begin) if end else None,
                f"{found.cache['prefetch_data_amount'] / 1e6:.1f} MB",
            )
        )
    found.phases.sort(key=lambda phase: phase.at or 0.0)
