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
from pathlib import Path
from typing import BinaryIO, cast

from nydusfs.convert.endpoints import Endpoint
from nydusfs.convert.images import Descriptor, parse_layers, parse_object
from nydusfs.convert.layers import ConvertedLayer, LayerSettings, write_tail
from nydusfs.convert.manifests import compact, indented
from nydusfs.errors import ConvertError, NotFoundError, NydusError
from nydusfs.registry import mediatypes as mt
from nydusfs.registry.reference import SHA256_DIGEST

log = logging.getLogger(__name__)

_EMPTY_CONFIG = b"{}"
MAX_RECORDS = 200
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
        if record is None or record.annotations.get(ANNOTATION_SETTINGS, settings.key) != settings.key:
            return None
        from bootstrap.errors import RafsError
        from bootstrap.reader import open_bootstrap

        blob = self.endpoint.open_blob_ranges(record.digest, record.size)
        try:
            bootstrap, meta = write_tail(cast(BinaryIO, blob), record.size, folder)
            with contextlib.closing(open_bootstrap(str(bootstrap))) as opened:
                compressors = {entry.compressor.name.lower() for entry in opened.blobs}
                fits = (
                    opened.version == settings.fs_version
                    and (not opened.blobs or opened.chunk_size == settings.chunk_size)
                    and compressors <= {settings.compressor}
                )
        except (RafsError, NydusError, OSError) as error:
            log.warning("build cache record for layer %s is ignored: %s", source.digest, error)
            return None
        if not fits:
            log.debug("build cache record for layer %s was made with other settings", source.digest)
            return None
        return ConvertedLayer(source.digest, record.digest, record.size, bootstrap, meta, None, "build cache")

    def add(self, layer: ConvertedLayer, settings: LayerSettings) -> None:
        annotations = {
            mt.ANNOTATION_BLOB: "true",
            mt.ANNOTATION_SOURCE_DIGEST: layer.source_digest,
            mt.ANNOTATION_UNCOMPRESSED: layer.digest,
            ANNOTATION_SETTINGS: settings.key,
        }
        self._records.pop(layer.source_digest, None)
        record = Descriptor(mt.NYDUS_BLOB, layer.digest, layer.size, annotations)
        self._records = {layer.source_digest: record, **self._records}

    def push(self, layers: list[ConvertedLayer], target: Endpoint) -> None:
        """Stores blobs that are not there and the new manifest; nothing to do when every layer came from here."""
        kept = dict(list(self._records.items())[: self._max])
        if list(kept) == self._loaded and all(layer.origin == "build cache" for layer in layers):
            return
        for layer in layers:
            if layer.source_digest in kept and layer.blob is not None:
                self.endpoint.push_file(layer.digest, layer.blob, origin=target)
        digest = f"sha256:{hashlib.sha256(_EMPTY_CONFIG).hexdigest()}"
        self.endpoint.push_bytes(digest, _EMPTY_CONFIG)
        document = {
            "schemaVersion": 2,
            "mediaType": mt.OCI_MANIFEST,
            "config": Descriptor(mt.OCI_CONFIG, digest, len(_EMPTY_CONFIG)).to_json(),
            "layers": [record.to_json() for record in kept.values()],
            "annotations": {mt.ANNOTATION_CACHE_VERSION: ""},
        }
        self.endpoint.push_image(mt.OCI_MANIFEST, indented(document))


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
        return ConvertedLayer(
            source.digest, digest, size, bootstrap, meta if record["meta"] else None, blob, "local cache"
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
