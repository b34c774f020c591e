"""`nydusify chunkdict generate`: the chunks that several Nydus images share, as an image for `--chunk-dict`.

Its manifest has the blobs these chunks lie in and a bootstrap that lists the chunks; nothing of data is read. What the
images are made of stays in the working directory, as upstream leaves it.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nydusfs.convert import manifests
from nydusfs.convert.backends import BackendChoice, BlobStore
from nydusfs.convert.bootstrap_layer import write_bootstrap_layer
from nydusfs.convert.endpoints import Connections, Location
from nydusfs.convert.images import Descriptor, Image, load_images
from nydusfs.convert.nydusimage import unpack_image
from nydusfs.convert.platforms import Platform
from nydusfs.convert.progress import Progress, elapsed_text, size_text
from nydusfs.convert.pushing import Pusher, verified_stream
from nydusfs.errors import ConvertError, os_reason
from nydusfs.registry import mediatypes as mt

if TYPE_CHECKING:
    from bootstrap.chunkdb import ChunkDatabase, Dictionary, Form

log = logging.getLogger(__name__)

_CREATED_BY = "nydusify chunkdict generate"


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """`target` None: the dictionary is only left in the working directory. `platforms` None: all. `backend` holds blobs
    that the manifests do not name."""

    sources: tuple[Location, ...]
    target: Location | None = None
    platforms: tuple[Platform, ...] | None = None
    backend: BackendChoice | None = None
    work_dir: Path = Path("output")


@dataclass(slots=True)
class GenerateResult:
    """`digest` "" without a target; `blobs` of the dictionary, `size` bytes of its chunks when they are unpacked."""

    digest: str = ""
    blobs: list[str] = field(default_factory=list)
    chunks: int = 0
    size: int = 0


def generate(options: GenerateOptions, progress: Progress) -> GenerateResult:
    """Raises NydusError."""
    from bootstrap.errors import RafsError

    try:
        with ExitStack() as stack:
            options.work_dir.mkdir(parents=True, exist_ok=True)
            return _Generation(options, progress, stack).run()
    except RafsError as error:
        raise ConvertError(f"chunk dictionary: {error}") from error
    except OSError as error:
        raise ConvertError(f"chunk dictionary: {os_reason(error)} (choose the folder with --work-dir)") from error


class _Generation:
    def __init__(self, options: GenerateOptions, progress: Progress, stack: ExitStack) -> None:
        self._options = options
        self._progress = progress
        self._stack = stack
        self._connections = stack.enter_context(Connections())
        self._images: list[Image] = []

    def run(self) -> GenerateResult:
        options, progress = self._options, self._progress
        began = time.monotonic()
        made, form = self._dictionary()
        for blob in made.small_blobs:
            log.info("blob %s has too few shared bytes to be part of the dictionary", blob)
        for name in made.lonely_images:
            log.warning("%s shares no chunk with another image", " ".join(name.split()))
        progress.say(
            f"dictionary of {len(self._images)} image(s): {made.chunk_count} chunks in {len(made.blobs)} blob(s), "
            f"{size_text(made.uncompressed_size)}, elapsed {elapsed_text(time.monotonic() - began)}"
        )
        result = GenerateResult("", made.blobs, made.chunk_count, made.uncompressed_size)
        boot = options.work_dir / "chunkdict_bootstrap"
        boot.write_bytes(made.bootstrap)
        report = {"blobs": made.blobs, "fs_version": str(form.version), "compressor": form.compressor.label}
        (options.work_dir / "nydus_bootstrap_output.json").write_text(json.dumps(report, indent=2))
        if options.target is None:
            return result
        if not made.blobs:
            raise ConvertError("no two of the images share a chunk: there is no dictionary to push")
        target = self._stack.enter_context(options.target.open(self._connections, create=True))
        pusher = self._stack.enter_context(Pusher(target, progress))
        progress.say(f"pushing image {options.target}")
        media_type, body = self._assemble(boot, made, form, pusher)
        pusher.wait()
        result.digest = pusher.image(media_type, body)
        progress.say(f"pushed chunk dictionary {options.target}@{result.digest}")
        return result

    def _dictionary(self) -> tuple[Dictionary, Form]:
        from bootstrap.chunkdb import ChunkDatabase
        from bootstrap.chunkdb import generate as make

        path = self._options.work_dir / "database.db"
        with suppress(FileNotFoundError):
            path.unlink()  # it would also know images of earlier runs, whose blobs nobody named now
        form: Form | None = None
        with ChunkDatabase(str(path)) as database:
            for source in self._options.sources:
                form = self._add(database, source, form)
            assert form is not None
            return make(database, form), form

    def _add(self, database: ChunkDatabase, source: Location, form: Form | None) -> Form:
        """Every Nydus image of a source; the form they all have."""
        from bootstrap.chunkdb import form_of
        from bootstrap.reader import open_bootstrap

        self._progress.say(f"pulling bootstrap of {source}")
        folder = self._options.work_dir / source.image.replace("/", ":")
        endpoint = self._stack.enter_context(source.prepare(folder / "image").open(self._connections))
        found = load_images(endpoint, list(self._options.platforms) if self._options.platforms else None)
        nydus = [image for image in found.images if image.is_nydus]
        if not nydus:
            raise ConvertError(f"{source} is not a Nydus image")
        for number, image in enumerate(nydus):
            place = folder if number == 0 else folder / str(image.platform).replace("/", "-")
            unpacked = unpack_image(image, place)
            named = [("index", found.index), ("manifest", image.manifest), ("config", image.config)]
            for name, document in named:
                if document is not None:
                    (place / f"nydus_{name}.json").write_text(json.dumps(document, indent=2))
            with open_bootstrap(str(unpacked.bootstrap)) as bootstrap:
                own = form_of(bootstrap)
                if form is not None and own != form:
                    raise ConvertError(f"{image.name} does not fit the other images: {_difference(form, own)}")
                database.add(bootstrap, image.name, image.digest)
            form = own
            self._images.append(image)
        assert form is not None
        return form

    def _assemble(self, boot: Path, made: Dictionary, form: Form, pusher: Pusher) -> tuple[str, bytes]:
        """Media type and body of the manifest; what it names is being pushed."""
        first = self._images[0]
        store = self._stack.enter_context(self._options.backend.open()) if self._options.backend else None
        layers = [self._push_blob(blob_id, store, pusher) for blob_id in made.blobs]
        packed = write_bootstrap_layer(boot, [], self._options.work_dir / "chunkdict_bootstrap.tar.gz")
        pusher.file(packed.digest, packed.path)
        layers.append(manifests.bootstrap_descriptor(first, packed.digest, packed.size, form.version, False))
        config: dict[str, Any] = copy.deepcopy(first.config)
        config["rootfs"]["diff_ids"] = [*(layer.digest for layer in layers[:-1]), packed.diff_id]
        config["history"] = [{"created_by": _CREATED_BY} for _ in layers]
        body = manifests.compact(config)
        document = {
            "schemaVersion": 2,
            "mediaType": first.media_type,
            "config": Descriptor(_config_type(first), pusher.data(body), len(body)).to_json(),
            "layers": [layer.to_json() for layer in layers],
        }
        return first.media_type, manifests.indented(document)

    def _push_blob(self, blob_id: str, store: BlobStore | None, pusher: Pusher) -> Descriptor:
        for image in self._images:
            for layer in image.layers[:-1]:
                if layer.hex == blob_id:
                    pusher.copy(image.endpoint, layer)
                    return manifests.blob_descriptor(layer.digest, layer.size)
        size = store.size(blob_id) if store is not None else None
        if store is None or size is None:
            where = f"nor in {store.name}" if store is not None else "(is it in a storage backend? See --backend-type)"
            raise ConvertError(f"blob {blob_id} of the dictionary is a layer of none of the images {where}")
        pusher.stream(f"sha256:{blob_id}", size, partial(verified_stream, store, blob_id))
        return manifests.blob_descriptor(f"sha256:{blob_id}", size)


def _config_type(image: Image) -> str:
    kind = image.config_descriptor.media_type
    if kind != mt.NYDUS_CONFIG:
        return kind
    return mt.DOCKER_CONFIG if image.is_docker else mt.OCI_CONFIG


def _difference(first: Form, second: Form) -> str:
    words: Sequence[tuple[str, str]] = (
        ("version", "RAFS version"), ("chunk_size", "chunk size"), ("compressor", "compressor"),
        ("digester", "digest"), ("explicit_owners", "ownership flag"),
    )  # fmt: skip
    for key, text in words:
        mine, theirs = getattr(first, key), getattr(second, key)
        if mine != theirs:
            return f"{text} {getattr(theirs, 'label', theirs)} instead of {getattr(mine, 'label', mine)}"
    return "its form is another"
