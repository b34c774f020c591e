"""Layers that need not be converted again: a build cache image in a registry, and a folder on this machine.

Build cache image, as upstream writes it (seen on its output): an OCI manifest whose config is `{}` and whose layers are
Nydus layer blobs; each carries `containerd.io/snapshot/nydus-source-digest` = digest of the source layer. The version
annotation is written empty by upstream 2.4.4 whatever its --build-cache-version says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from nydusfs.convert.endpoints import Endpoint
from nydusfs.convert.images import Descriptor, parse_layers, parse_object
from nydusfs.convert.layers import ConvertedLayer, LayerSettings, read_tail
from nydusfs.convert.manifests import compact, digest_of, indented
from nydusfs.errors import ConvertError, NotFoundError, NydusError
from nydusfs.registry import mediatypes as mt
from nydusfs.registry.reference import SHA256_DIGEST

if TYPE_CHECKING:
    from bootstrap.base import Bootstrap

log = logging.getLogger(__name__)

_EMPTY_CONFIG = b"{}"
MAX_RECORDS = 200
_SAVE_EVERY = 2.0  # seconds between two versions of the cache image while layers come in
# our own annotation on a record: upstream has no way to tell a v5 layer from a v6 one before it has fetched it
ANNOTATION_SETTINGS = "containerd.io/snapshot/nydus-py-settings"


class BuildCache:
    """Records of a cache image: source layer digest -> Nydus layer, newest first."""

    def __init__(self, endpoint: Endpoint, version: str, max_records: int) -> None:
        self.endpoint = endpoint
        self._version = version
        self._max = max(1, min(max_records, MAX_RECORDS))
        self._records: dict[str, Descriptor] = {}
        self._loaded: list[str] = []
        self._lock = threading.Lock()
        self._written = 0.0

    def __len__(self) -> int:
        return len(self._records)

    def load(self) -> None:
        """Reads the cache image; one that is absent, unreadable or of another version is empty (a warning says so).
        Raises RegistryError when the registry itself fails."""
        try:
            found = self.endpoint.manifest()
        except NotFoundError:
            log.info("build cache %s does not exist yet", self.endpoint.name)
            return
        try:
            manifest = parse_object(found.body, f"build cache {self.endpoint.name}")
            layers = parse_layers(manifest, self.endpoint.name)
        except ConvertError as error:
            log.warning("build cache is ignored: %s", error)
            return
        annotations = manifest.get("annotations")
        version = annotations.get(mt.ANNOTATION_CACHE_VERSION) if isinstance(annotations, dict) else None
        if version not in ("", None, self._version):
            log.warning("build cache %s has version %s, not %s: ignored", self.endpoint.name, version, self._version)
            return
        for layer in layers:
            source = layer.annotations.get(mt.ANNOTATION_SOURCE_DIGEST, "")
            if layer.media_type == mt.NYDUS_BLOB and SHA256_DIGEST.fullmatch(source):
                self._records.setdefault(source, layer)
        self._loaded = list(self._records)

    def find(self, source: Descriptor, settings: LayerSettings, folder: Path) -> ConvertedLayer | None:
        """The converted layer, with its bootstrap fetched by ranges into `folder`; the blob stays where it is. A record
        that does not fit these settings or cannot be read is a miss."""
        record = self._records.get(source.digest)
        if record is None:
            return None
        plain = not settings.batch_size and not settings.dictionary  # what upstream's records, without our key, may be
        if record.annotations.get(ANNOTATION_SETTINGS, settings.key if plain else "") != settings.key:
            return None
        from bootstrap.errors import RafsError
        from bootstrap.reader import open_bootstrap

        blob = self.endpoint.open_blob_ranges(record.digest, record.size)
        try:
            bootstrap, meta, toc_digest = read_tail(cast(BinaryIO, blob), record.size, folder)
            with contextlib.closing(open_bootstrap(str(bootstrap))) as opened:
                fits = _fits(opened, settings)
        except (RafsError, NydusError, OSError) as error:
            log.warning("build cache record for layer %s is ignored: %s", source.digest, error)
            return None
        if not fits:
            log.debug("build cache record for layer %s was made with other settings", source.digest)
            return None
        return ConvertedLayer(
            source.digest, record.digest, record.size, bootstrap, meta, None, "build cache", toc_digest
        )

    def keep(self, layer: ConvertedLayer, settings: LayerSettings, origin: Endpoint | None) -> None:
        """Stores a layer that was built (its blob is in `origin` by now) and remembers it, so that a conversion which
        ends early need not be done again. Raises RegistryError, ConvertError. Thread-safe."""
        if layer.blob is None:
            return
        self.endpoint.push_file(layer.digest, layer.blob, origin=origin)
        with self._lock:
            self._add(layer, settings)
            if time.monotonic() - self._written >= _SAVE_EVERY:
                self._write()

    def finish(self, layers: Sequence[ConvertedLayer], settings: LayerSettings) -> None:
        """Writes the records, this conversion's first; nothing to do when every layer came from here."""
        with self._lock:
            for layer in reversed(layers):
                self._add(layer, settings)
            if list(self._records)[: self._max] != self._loaded or any(one.origin != "build cache" for one in layers):
                self._write()

    def _add(self, layer: ConvertedLayer, settings: LayerSettings) -> None:
        annotations = {
            mt.ANNOTATION_BLOB: "true",
            mt.ANNOTATION_SOURCE_DIGEST: layer.source_digest,
            mt.ANNOTATION_UNCOMPRESSED: layer.digest,
            ANNOTATION_SETTINGS: settings.key,
        }
        self._records.pop(layer.source_digest, None)
        record = Descriptor(mt.NYDUS_BLOB, layer.digest, layer.size, annotations)
        self._records = {layer.source_digest: record, **self._records}

    def _write(self) -> None:
        self._written = time.monotonic()
        kept = list(self._records.items())[: self._max]
        digest = digest_of(_EMPTY_CONFIG)
        self.endpoint.push_bytes(digest, _EMPTY_CONFIG)
        document = {
            "schemaVersion": 2,
            "mediaType": mt.OCI_MANIFEST,
            "config": Descriptor(mt.OCI_CONFIG, digest, len(_EMPTY_CONFIG)).to_json(),
            "layers": [record.to_json() for _, record in kept],
            "annotations": {mt.ANNOTATION_CACHE_VERSION: ""},
        }
        self.endpoint.push_image(mt.OCI_MANIFEST, indented(document))


def _fits(layer: Bootstrap, settings: LayerSettings) -> bool:
    """Whether a layer's bootstrap is what these settings give, as far as it can be seen. RafsError if it is damaged."""
    from bootstrap.check import check_bootstrap
    from bootstrap.layout.common import BlobFeatures

    if layer.version == 5:
        check_bootstrap(layer)  # its blob has no table of contents with a digest of it
    if layer.version != settings.fs_version or (layer.blobs and layer.chunk_size != settings.chunk_size):
        return False
    if not settings.dictionary and len(layer.blobs) > 1:
        return False
    compressor = "gzip" if settings.oci_ref else settings.compressor
    return all(
        blob.compressor.name.lower() == compressor
        and bool(blob.features & BlobFeatures.BATCH) == bool(settings.batch_size)
        for blob in layer.blobs[-1:]
    )


class LocalCache:
    """`<root>/<source digest hex>.<settings>/{layer.json,image.boot,blob.meta,blob}`. Entries appear by rename, whole
    or not at all; a damaged entry is a miss. Nothing is ever removed: the folder is the user's."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def _entry(self, source_digest: str, settings: LayerSettings) -> Path:
        return self._root / f"{source_digest.removeprefix('sha256:')}.{settings.key}"

    def find(self, source: Descriptor, settings: LayerSettings) -> ConvertedLayer | None:
        entry = self._entry(source.digest, settings)
        try:
            record = json.loads((entry / "layer.json").read_bytes())
            digest, size = record["digest"], record["size"]
            blob, bootstrap, meta = entry / "blob", entry / "image.boot", entry / "blob.meta"
            if not SHA256_DIGEST.fullmatch(digest) or blob.stat().st_size != size or _sha256(blob) != digest:
                raise ValueError("its blob is damaged")
            sums = record["files"]
            for path in [bootstrap, *([meta] if record["meta"] else [])]:
                if _sha256(path) != sums[path.name]:
                    raise ValueError(f"its {path.name} is damaged")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("local cache entry %s is ignored: %s", entry, error)
            return None
        meta_file = meta if record["meta"] else None
        return ConvertedLayer(
            source.digest, digest, size, bootstrap, meta_file, blob, "local cache", str(record.get("toc") or "")
        )

    def add(self, layer: ConvertedLayer, settings: LayerSettings) -> None:
        """Keeps a layer that was built here; a full disk is a warning, not the end of a conversion."""
        if layer.blob is None or layer.origin != "built":
            return
        entry = self._entry(layer.source_digest, settings)
        fresh = entry.with_name(f"{entry.name}.{os.getpid()}.new")
        try:
            fresh.mkdir(parents=True)
            files = {"image.boot": layer.bootstrap, "blob": layer.blob}
            if layer.meta is not None:
                files["blob.meta"] = layer.meta
            for name, path in files.items():
                _link_or_copy(path, fresh / name)
            record = {
                "digest": layer.digest,
                "size": layer.size,
                "meta": layer.meta is not None,
                "toc": layer.toc_digest,
                "files": {name: _sha256(path) for name, path in files.items() if name != "blob"},
            }
            (fresh / "layer.json").write_bytes(compact(record))
            shutil.rmtree(entry, ignore_errors=True)
            fresh.rename(entry)
        except OSError as error:
            log.warning("layer %s cannot be kept in %s: %s", layer.source_digest, self._root, error)
            shutil.rmtree(fresh, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
