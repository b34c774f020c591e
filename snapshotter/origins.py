"""Which image a layer is of where its labels do not say: containerd knows, from its content and image stores.

CRI with snapshot annotations disabled and the transfer service without its export send `containerd.io/snapshot.ref`
(the chain id) and the layer's own annotations, but no image; `ctr images pull` of containerd 1.x sends nothing but a
key that ends in the chain id. The manifest whose config has a layer of this chain id is found among those that
containerd keeps; where it was pulled from is said by its labels `containerd.io/distribution.source.HOST` and by the
image store.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nydusfs.containerd.chain import chain_ids
from nydusfs.errors import NydusError
from nydusfs.registry.reference import Reference
from snapshotter.containerdfile import SOCKETS
from snapshotter.labels import DATA_LAYER, IMAGE_REF, LAYER_DIGEST, MANIFEST_DIGEST, PREFIX, PULL_SECRET, PULL_USER

if TYPE_CHECKING:
    from nydusfs.containerd.client import Containerd

log = logging.getLogger(__name__)

SECONDS = 5.0  # for one call: what a container's start waits for it at most is a few of them
MAX_DOCUMENT = 16 << 20
_CONFIG = "containerd.io/gc.ref.content.config"
_ENTRY = "containerd.io/gc.ref.content.m."
_SOURCE = "containerd.io/distribution.source."
_MAX_ENTRIES = 64  # of an index that are looked at for the name of its image
_REMEMBERED = 4096  # manifests


@dataclass(frozen=True, slots=True)
class Origin:
    """`labels`: those that the client would have sent with this layer, but for `containerd.io/snapshot.ref`. `sure`:
    containerd has the image under this name. Else the port of its registry is a guess, good for this moment alone: a
    pull that is under way gives the name a moment later."""

    image: str
    namespace: str
    labels: Mapping[str, str]
    sure: bool = True


@dataclass(frozen=True, slots=True)
class _Layer:
    digest: str
    annotations: Mapping[str, str]


class Origins:
    """Thread-safe. `address` is this snapshotter's socket, `named` the containerd that the configuration names."""

    def __init__(self, address: Path, named: Path) -> None:
        self._address, self._named = address, named
        self._lock = threading.Lock()
        self._layers: dict[str, dict[str, _Layer]] = {}  # manifest -> chain id -> layer

    def find(self, chain_id: str, namespace: str = "") -> tuple[Origin | None, str]:
        """The image that a layer is of, or None and why it is not known. `namespace`: where to look first."""
        reasons = []
        for address in self._addresses():
            try:
                origin = self._ask(address, chain_id, namespace)
            except NydusError as error:
                reasons.append(str(error))
                continue
            if origin is not None:
                return origin, ""
            reasons.append(f"containerd at {address} has no image with this layer")
        return None, "; ".join(reasons) or "no containerd was found: remote.auth.image_service_address names its socket"

    def _addresses(self) -> list[str]:
        from snapshotter.node import containerds  # the processes of this machine: /proc is read

        ours = [one.address for one in containerds() if one.snapshotter_name(self._address)]
        # the usual ones where none names our socket in its configuration: processes of the node may not be visible
        return [one for one in dict.fromkeys(ours or [str(self._named), *SOCKETS]) if Path(one).is_socket()]

    def _ask(self, address: str, chain_id: str, namespace: str) -> Origin | None:
        # here: most pulls say what they are of, and the start need not wait for this
        from nydusfs.containerd.client import Containerd

        with Containerd(address, namespace or "default", "nydus-snapshotter") as client:
            for space in client.namespaces():
                client.namespace = space
                for info in _contents(client, [f'labels."{_CONFIG}"']):
                    layer = self._chain(client, info).get(chain_id)
                    image, sure = _image(client, info) if layer else ("", False)
                    if layer and image:
                        return Origin(image, client.namespace, _labels(image, info.digest, layer), sure)
        return None

    def _chain(self, client: Containerd, info: Any) -> Mapping[str, _Layer]:
        """Layers of a manifest by chain id; empty if it is none of an image that can be read."""
        from nydusfs.containerd.connection import ContainerdError

        with self._lock:
            known = self._layers.get(info.digest)
        if known is not None:
            return known
        try:
            layers = json.loads(client.read_content(info.digest, MAX_DOCUMENT))["layers"]
            config = json.loads(client.read_content(info.labels[_CONFIG], MAX_DOCUMENT))
            chain = chain_ids(config["rootfs"]["diff_ids"])
            found = {}
            for one, layer, diff_id in zip(chain, layers, config["rootfs"]["diff_ids"], strict=True):
                described = _Layer(layer["digest"], layer.get("annotations") or {})
                if DATA_LAYER in described.annotations and layer["digest"] != diff_id:
                    break  # it claims the chain ids of another image, as nobody unpacks and compares
                found[one] = described
        except ContainerdError as error:  # its config is on the way: asked again next time
            log.debug("manifest %s: %s", info.digest, error)
            return {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.debug("manifest %s is no image: %r", info.digest, error)
            found = {}
        with self._lock:
            if len(self._layers) >= _REMEMBERED:
                self._layers.clear()
            self._layers[info.digest] = found
        return found


def _contents(client: Containerd, filters: list[str]) -> Iterator[Any]:
    """Newest first: it is a pull of this moment, more often than not."""
    from protos.containerd.services.content.v1 import content_pb2, content_pb2_grpc

    found: list[Any] = []
    request = content_pb2.ListContentRequest(filters=filters)
    for reply in client.stream("listing content", client.stub(content_pb2_grpc.ContentStub).List, request, SECONDS):
        found += reply.info
    yield from sorted(found, key=lambda info: (info.updated_at.seconds, info.updated_at.nanos), reverse=True)


def _image(client: Containerd, manifest: Any) -> tuple[str, bool]:
    """The name a manifest was pulled by, else the repository it came from with its digest; "" if nothing says. And
    whether that is sure.

    During the pull there is no name yet. The port of the registry is then taken to be that of the only registry on this
    host which other images came from, or the usual one.
    """
    sources = [
        (key.removeprefix(_SOURCE), repository)
        for key, value in manifest.labels.items()
        if key.startswith(_SOURCE)
        for repository in value.split(",")
    ]
    targets = [manifest.digest]
    entries = [f'labels."{_ENTRY}{number}"=="{manifest.digest}"' for number in range(_MAX_ENTRIES)]
    targets += [info.digest for info in _contents(client, entries)]
    names = _references(name for digest in targets for name in client.image_names(digest))
    # an image that was only tagged here is not in the registry of its new name; the labels know hosts without ports
    pulled = [one for one in names if (one.hostname, one.repository) in sources] or ([] if sources else names)
    pulled.sort(key=lambda one: (not one.tag, str(one)))
    if pulled:
        return str(pulled[0]), True
    for hostname, repository in sources:
        hosts = {one.host for one in _references(client.image_names()) if one.hostname == hostname}
        host = hosts.pop() if len(hosts) == 1 else hostname
        for found in _references([f"{host}/{repository}@{manifest.digest}"]):
            return str(found), False
    return "", False


def _references(names: Iterable[str]) -> list[Reference]:
    """Those that are references; CRI keeps one more record, named by the image's id."""
    found = []
    for name in names:
        try:
            found += [] if name.startswith("sha256:") else [Reference.parse(name)]
        except NydusError:
            continue
    return found


def _labels(image: str, manifest: str, layer: _Layer) -> dict[str, str]:
    own = {str(key): str(value) for key, value in layer.annotations.items() if str(key).startswith(PREFIX)}
    own = {key: value for key, value in own.items() if key not in (PULL_USER, PULL_SECRET)}
    return {**own, IMAGE_REF: image, LAYER_DIGEST: layer.digest, MANIFEST_DIGEST: manifest}
