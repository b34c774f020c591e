"""`nydusify build`: a directory becomes an image of bootstrap and data blob, without registry and layers.

NAME.meta (or NAME, if that has a suffix) and NAME.blob in the output directory; with a parent, or to be pushed, the
blob is named by its id, as a backend wants it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nydusfs.convert.backends import BackendChoice, BlobStore
from nydusfs.convert.blobreader import StoreReader
from nydusfs.convert.progress import Progress, elapsed_text, size_text
from nydusfs.errors import ConfigError, ConvertError, os_reason

if TYPE_CHECKING:
    from bootstrap.compact import CompactOptions

log = logging.getLogger(__name__)

DEFAULT_OUTPUT = Path(".nydus-build-output")
# the defaults that upstream documents, by the names it documents and those its program reads
_COMPACT = {"min_used_ratio": 5, "compact_blob_size": 10485760, "max_compact_size": 104857600, "layers_to_compact": 32}


@dataclass(frozen=True, slots=True)
class PackOptions:
    """`compact` None: leave the parent as it is; it needs `parent` and `backend`. `push`: put all into `backend`."""

    source: Path
    name: str
    output: Path = DEFAULT_OUTPUT
    fs_version: int = 6
    compressor: str = "zstd"
    chunk_size: int = 0x100000
    chunk_dict: Path | None = None
    parent: Path | None = None
    compact: CompactOptions | None = None
    backend: BackendChoice | None = None
    push: bool = False


@dataclass(slots=True)
class PackResult:
    """Where the two parts are: files, or addresses in the backend. `blob` is "" for an image without new data."""

    meta: str = ""
    blob: str = ""
    blobs: list[str] = field(default_factory=list)


def compact_options(path: Path | None) -> CompactOptions:
    """Defaults, changed by a JSON file. Raises ConfigError."""
    from bootstrap.compact import CompactOptions
    from bootstrap.errors import BuildError

    values = dict(_COMPACT)
    where = str(path)
    if path is not None:
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError("", os_reason(error)) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError("", f"is not valid JSON: {error}", where) from None
        if not isinstance(given, dict):
            raise ConfigError("", "is not a JSON object", where)
        for key, value in given.items():
            values[_compact_key(key, where)] = _number(key, value, where)
    try:
        return CompactOptions(**values)
    except BuildError as error:
        raise ConfigError("", str(error), where) from None


def _compact_key(key: str, where: str) -> str:
    """Upstream documents min_used_ratio, and reads MinUsedRatio."""
    for name in _COMPACT:
        if key.lower().replace("_", "") == name.replace("_", ""):
            return name
    raise ConfigError(key, f"is unknown: {', '.join(_COMPACT)}", where)


def _number(key: str, value: Any, where: str) -> int:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ConfigError(key, f"{value!r} is not a number", where)


def pack(options: PackOptions, progress: Progress) -> PackResult:
    """Raises NydusError."""
    from bootstrap.errors import RafsError

    try:
        with ExitStack() as stack:
            options.output.mkdir(parents=True, exist_ok=True)
            return _Packing(options, progress, stack).run()
    except RafsError as error:
        raise ConvertError(f"building {options.name}: {error}") from error
    except OSError as error:
        raise ConvertError(f"building {options.name}: {os_reason(error)}") from error


class _Packing:
    def __init__(self, options: PackOptions, progress: Progress, stack: ExitStack) -> None:
        self._options = options
        self._progress = progress
        self._stack = stack
        self._output = options.output
        suffix = Path(options.name).suffix
        self._meta = self._output / (options.name if suffix else f"{options.name}.meta")
        self._blob = self._output / f"{options.name.removesuffix(suffix)}.blob"

    def run(self) -> PackResult:
        options = self._options
        blobs = self._store("blob_prefix") if options.backend and (options.push or options.compact) else None
        parent = options.parent
        if parent is not None and options.compact is not None:
            assert blobs is not None
            parent = self._compacted(parent, blobs, options.compact)
        below = _blob_ids(parent)
        known = {*below, *_blob_ids(options.chunk_dict)}
        result = self._build(parent)
        fresh = [blob for blob in result.blobs if blob not in known]
        if fresh and (parent is not None or options.push):
            target = self._output / fresh[0]
            self._blob.replace(target)
            self._blob = target
        if not fresh:
            self._blob.unlink(missing_ok=True)
            self._progress.say("no data that is not there already: no blob")
        result.blob = str(self._blob) if fresh else ""
        if options.push:
            assert blobs is not None
            self._push(blobs, below, fresh, result)
        self._progress.say(f"successfully built Nydus image (bootstrap: {result.meta!r}, blob: {result.blob!r})")
        return result

    def _store(self, prefix: str) -> BlobStore:
        """Pushes tell blobs and bootstraps apart by prefix, as upstream's configuration does."""
        backend = self._options.backend
        assert backend is not None
        table = {key: value for key, value in backend.table.items() if key not in ("blob_prefix", "meta_prefix")}
        if prefix in backend.table:
            table["object_prefix"] = backend.table[prefix]
        return self._stack.enter_context(BackendChoice(backend.kind, table, backend.where).open())

    def _compacted(self, parent: Path, store: BlobStore, settings: CompactOptions) -> Path:
        """The parent with fewer and fuller blobs; itself when there is nothing to do."""
        from bootstrap.blobsource import Folder, open_blobs
        from bootstrap.compact import compact
        from bootstrap.merge import write_file
        from bootstrap.reader import open_bootstrap

        began = time.monotonic()
        self._progress.say(f"compacting parent {parent}")
        with open_bootstrap(str(parent)) as image:
            source = _FolderFirst(Folder(self._output), StoreReader(store))
            with open_blobs(image, source) as blobs:
                done = compact(blobs, self._output, settings, dictionary=_blob_ids(self._options.chunk_dict))
        if done.bootstrap is None:
            self._progress.say("nothing to compact")
            return parent
        out = parent.with_name(f"{parent.name}.compact")
        write_file(out, done.bootstrap)
        self._progress.say(
            f"compacted parent: {len(done.new)} new blob(s), {len(done.dropped)} unused, new parent {out}, "
            f"elapsed {elapsed_text(time.monotonic() - began)}"
        )
        return out

    def _build(self, parent: Path | None) -> PackResult:
        from bootstrap.build import build_directory
        from bootstrap.cli.building import report
        from bootstrap.cli.output import output_file
        from bootstrap.layout.common import Compressor
        from bootstrap.merge import write_file
        from bootstrap.options import BuildOptions

        options = self._options
        settings = BuildOptions(
            fs_version=options.fs_version,
            compressor=Compressor[options.compressor.upper()],
            chunk_size=options.chunk_size,
            chunk_dict=options.chunk_dict,
            threads=max(1, min(4, len(os.sched_getaffinity(0)))),
        )
        began = time.monotonic()
        self._progress.say(f"building image from {options.source}")
        with output_file(self._blob) as out:
            built = build_directory(
                os.fsencode(options.source), out, settings, parent=str(parent) if parent is not None else None
            )
        write_file(self._meta, built.bootstrap)
        report(
            bootstrap=str(self._meta),
            blobs=built.blobs,
            times=built.timings,
            events={},
            fs_version=options.fs_version,
            compressor=options.compressor,
            output_json=str(self._output / "output.json"),
            blob_size=built.blob_size,
        )
        self._progress.say(
            f"built image: {built.inode_count} entries, {size_text(built.blob_size)} of new data, "
            f"elapsed {elapsed_text(time.monotonic() - began)}"
        )
        return PackResult(str(self._meta), "", built.blobs)

    def _push(self, store: BlobStore, below: list[str], fresh: list[str], result: PackResult) -> None:
        """Blobs first: what is in the backend can be mounted. The parent's are there, or were made by compacting."""
        for blob_id in [*below, *fresh]:
            path = self._output / blob_id
            if not path.exists():
                if store.size(blob_id) is None:
                    raise ConvertError(f"blob {blob_id} of the parent is neither in {store.name} nor in {self._output}")
                continue
            self._sent(store, blob_id, path, force=False)
        metas = self._store("meta_prefix")
        self._sent(metas, self._meta.name, self._meta, force=True)
        result.meta = metas.url(self._meta.name)
        result.blob = store.url(fresh[0]) if fresh else ""

    def _sent(self, store: BlobStore, name: str, path: Path, *, force: bool) -> None:
        size = path.stat().st_size
        self._progress.start(name, f"push  {name[:12]}", size)
        sent = store.put_file(name, path, force=force, progress=lambda count: self._progress.advance(name, count))
        self._progress.finish(name)
        self._progress.say(f"{'pushed' if sent else 'kept'} {store.url(name)} ({size_text(size)})")


class _FolderFirst:
    """Blobs that an earlier run left here, else those of the backend."""

    def __init__(self, folder: Any, backend: StoreReader) -> None:
        self._folder = folder
        self._backend = backend

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        local = os.path.exists(self._folder.path(blob_id))
        data: bytes = (self._folder if local else self._backend).read(blob_id, offset, size)
        return data

    def close(self) -> None:
        self._folder.close()


def _blob_ids(bootstrap: Path | None) -> list[str]:
    from bootstrap.reader import open_bootstrap

    if bootstrap is None:
        return []
    with open_bootstrap(str(bootstrap)) as image:
        return [blob.id for blob in image.blobs]


def chunk_dictionary(text: str) -> Path:
    """`bootstrap=PATH`, or the path alone. Raises ConvertError."""
    kind, separator, path = text.partition("=")
    if not separator:
        kind, path = "bootstrap", text
    if kind != "bootstrap" or not path:
        raise ConvertError(f"chunk dictionary {text!r} is not bootstrap=PATH")
    return Path(path)
