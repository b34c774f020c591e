"""A Nydus image that was made of the plain image being pulled: beside it in its index, or naming it as its subject."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nydusfs.errors import NydusError
from nydusfs.registry import mediatypes as mt
from nydusfs.registry.reference import SHA256_DIGEST, Reference
from snapshotter.labels import SIGNATURE
from snapshotter.lazy.registries import Registries

if TYPE_CHECKING:
    from nydusfs.registry.client import RegistryClient

log = logging.getLogger(__name__)

MEMORY = 500
MISS_SECONDS = 60.0  # an image may be converted later, and a registry that failed come back
MAX_REFERRERS = 8  # looked at, of those that may be Nydus images


@dataclass(frozen=True, slots=True)
class Twin:
    """`layers`: digests of the plain image, lowest first. `bootstrap`: digest and size of the layer that holds it."""

    manifest: str
    layers: tuple[str, ...]
    bootstrap: tuple[str, int]
    signature: str
    by_index: bool


class TwinFinder:
    """Thread-safe; layers of one image that are prepared at once cause one look."""

    def __init__(self, registries: Registries, *, index: bool, referrers: bool) -> None:
        self._registries, self._index, self._referrers = registries, index, referrers
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], tuple[float, Twin | None]] = OrderedDict()
        self._busy: dict[tuple[str, str], threading.Lock] = {}

    def find(self, image: Reference, manifest: str, labels: Mapping[str, str]) -> Twin | None:
        """The twin of the plain image with this manifest digest. Whatever goes wrong means that there is none."""
        if not (self._index or self._referrers) or not SHA256_DIGEST.fullmatch(manifest):
            return None
        key = str(image), manifest
        with self._lock:
            busy = self._busy.setdefault(key, threading.Lock())
        with busy:
            with self._lock:
                known = self._known.get(key)
                if known is not None and (known[1] is not None or time.monotonic() - known[0] < MISS_SECONDS):
                    self._known.move_to_end(key)
                    return known[1]
            found: Twin | None = None
            try:
                with self._registries.open(image, labels) as client:
                    found = self._look(client, image, manifest)
            except (NydusError, ValueError, TypeError, AttributeError, RecursionError) as error:
                # also of documents that are of another form than manifests
                log.warning("image %s: no look for a Nydus image of it: %s", image, error)
            if found is not None:
                way = "in its index" if found.by_index else "among its referrers"
                log.info("image %s: there is a Nydus image of it %s: %s", image, way, found.manifest)
            with self._lock:
                self._known[key] = time.monotonic(), found
                self._busy.pop(key, None)
                while len(self._known) > MEMORY:
                    self._known.popitem(last=False)
            return found

    def _look(self, client: RegistryClient, image: Reference, manifest: str) -> Twin | None:
        candidates: list[tuple[str, bool]] = []
        if self._index:
            candidates += [(digest, True) for digest in _in_index(client, image, manifest)]
        if self._referrers:
            entries = client.referrers(image.repository, manifest)
            candidates += [(digest, False) for digest in _may_be_nydus(entries)]
        layers: tuple[str, ...] | None = None
        for digest, by_index in candidates:
            document = _manifest(client, image, digest)
            if document is None or not (by_index or (document.get("subject") or {}).get("digest") == manifest):
                continue
            last = bootstrap_layer(document)
            if last is None:
                log.debug("image %s: %s is no Nydus image", image, digest)
                continue
            if layers is None:
                plain = _manifest(client, image, manifest)
                if plain is None:
                    return None
                layers = tuple(str(layer.get("digest")) for layer in _layers(plain))
            signature = (last.get("annotations") or {}).get(SIGNATURE)
            return Twin(
                digest,
                layers,
                (last["digest"], last["size"]),
                signature if isinstance(signature, str) else "",
                by_index,
            )
        return None


def bootstrap_layer(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Descriptor of the last layer of a Nydus manifest; None if the manifest is of something else."""
    layers = _layers(document)
    if not layers:
        return None
    last = layers[-1]
    annotations = last.get("annotations")
    fits = (
        isinstance(annotations, dict)
        and mt.ANNOTATION_BOOTSTRAP in annotations
        and isinstance(last.get("digest"), str)
        and SHA256_DIGEST.fullmatch(last["digest"])
        and isinstance(last.get("size"), int)
    )
    return last if fits else None


def _in_index(client: RegistryClient, image: Reference, manifest: str) -> Iterator[str]:
    """Entries for the platform of the pulled manifest that say to be Nydus images."""
    if image.digest and image.digest == manifest:
        return  # named without an index
    index = json.loads(client.manifest(image.repository, image.selector).body)
    entries = [one for one in index.get("manifests") or [] if isinstance(one, dict)]
    own = next((one for one in entries if one.get("digest") == manifest), None)
    if own is None:
        return
    for entry in entries:
        digest = entry.get("digest")
        if entry is own or not isinstance(digest, str) or not SHA256_DIGEST.fullmatch(digest):
            continue
        if _platform(entry) == _platform(own) and says_nydus(entry):
            yield digest


def says_nydus(entry: Mapping[str, Any]) -> bool:
    """Whether an index entry says to be a Nydus image: by artifact type, or as before nydus 2.3.5 by os.features."""
    platform = entry.get("platform")
    features = platform.get("os.features") if isinstance(platform, dict) else None
    return entry.get("artifactType") == mt.NYDUS_MANIFEST_ARTIFACT or (
        isinstance(features, list) and mt.OS_FEATURE_NYDUS in features
    )


def _platform(entry: Mapping[str, Any]) -> tuple[object, ...]:
    platform = entry.get("platform")
    found = platform if isinstance(platform, dict) else {}
    architecture, variant = found.get("architecture"), found.get("variant") or ""
    if (architecture, variant) == ("arm64", "v8"):  # the same by definition
        variant = ""
    return found.get("os"), architecture, variant


def _may_be_nydus(entries: list[dict[str, Any]]) -> list[str]:
    """Digests, surest first. Upstream's nydusify says nothing in the descriptor, signatures and SBOMs do."""
    sure, maybe = [], []
    for entry in entries:
        digest, kind = entry.get("digest"), entry.get("artifactType") or ""
        if not isinstance(digest, str) or not SHA256_DIGEST.fullmatch(digest):
            continue
        if kind in (mt.NYDUS_MANIFEST_ARTIFACT, mt.NYDUS_CONFIG):
            sure.append(digest)
        elif kind in ("", mt.OCI_CONFIG, mt.DOCKER_CONFIG):
            maybe.append(digest)
    return [*sure, *maybe][:MAX_REFERRERS]


def _manifest(client: RegistryClient, image: Reference, digest: str) -> dict[str, Any] | None:
    found = client.manifest(image.repository, digest)
    document = json.loads(found.body)
    return document if isinstance(document, dict) and found.media_type in mt.MANIFESTS else None


def _layers(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    layers = document.get("layers")
    return [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []
