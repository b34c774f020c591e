"""`nydusify convert --reverse`: a Nydus image becomes a plain OCI image again. RAFS format 6.7.

Each data layer becomes the tar it was made of, from the bootstrap inside it. Two kinds of images go another way:
OCI-ref images get back their source's layers, which are still there; images whose layers cannot be told apart (blobs in
a storage backend, no bootstrap inside a layer, a history that does not fit) become one layer of the merged tree.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nydusfs.convert import manifests
from nydusfs.convert.backends import BackendChoice
from nydusfs.convert.convert import ConvertResult
from nydusfs.convert.endpoints import Connections, Location
from nydusfs.convert.images import Descriptor, Image, ImageSet, load_images
from nydusfs.convert.nydusimage import NydusImage, unpack_image
from nydusfs.convert.platforms import Platform
from nydusfs.convert.pool import cpu_count, run_jobs
from nydusfs.convert.progress import Progress, elapsed_text, size_text
from nydusfs.convert.pushing import RETRIES, RETRY_DELAY, Pusher
from nydusfs.convert.unpacking import PlainLayer, UnpackJob, has_bootstrap
from nydusfs.convert.workdir import work_folder
from nydusfs.errors import ConvertError
from nydusfs.registry import mediatypes as mt

log = logging.getLogger(__name__)

_CREATOR = "Nydus Converter"


@dataclass(frozen=True, slots=True)
class ReverseOptions:
    """`platforms` None: all. `backend` holds the blobs of an image that has none in its manifest."""

    source: Location
    target: Location
    platforms: tuple[Platform, ...] | None = None
    oci: bool = False
    backend: BackendChoice | None = None
    work_dir: Path = Path("tmp")
    push_retry_count: int = RETRIES
    push_retry_delay: float = RETRY_DELAY
    workers: int = 0


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one image's plain layers come about. `flat`: one layer, from the merged tree."""

    nydus: NydusImage
    jobs: list[UnpackJob]
    flat: bool


def reverse(options: ReverseOptions, progress: Progress) -> ConvertResult:
    """Raises NydusError with the reason; the tag is written last."""
    with ExitStack() as stack:
        folder = stack.enter_context(work_folder(options.work_dir))
        connections = stack.enter_context(Connections())
        options = replace(options, source=options.source.prepare(folder / "source"))
        source = stack.enter_context(options.source.open(connections))
        target = stack.enter_context(options.target.open(connections, create=True))
        result, begun = ConvertResult(), time.monotonic()
        progress.say(f"pulling image {options.source}")
        found = load_images(source, options.platforms)
        images = _nydus_images(found)
        target.require_writable()
        result.source_size = sum(image.size for image in images)
        plans = _plans(images, options, folder)
        result.pull_elapsed = time.monotonic() - begun

        begun = time.monotonic()
        progress.say(f"converting image {options.source} ({size_text(result.source_size)}) back to a plain one")
        pusher = stack.enter_context(Pusher(target, progress, options.push_retry_count, options.push_retry_delay))
        layers = _unpack(plans, options, pusher, progress)
        result.layers = len(layers)
        done = []
        for plan in plans:
            mine = [layers[job.number] for job in plan.jobs]
            config, media_type, body = plain_manifest(plan.nydus.image, mine, oci=options.oci, flat=plan.flat)
            pusher.data(config)
            result.target_size += len(config) + sum(layer.size for layer in mine)
            done.append((plan.nydus.image, media_type, body))
        result.convert_elapsed = time.monotonic() - begun

        begun = time.monotonic()
        progress.say(f"pushing image {options.target}")
        pusher.wait()
        result.digest = _push(found, done, pusher, oci=options.oci)
        result.push_elapsed = time.monotonic() - begun
        progress.say(
            f"pushed image {options.target}@{result.digest} ({size_text(result.target_size)}), "
            f"elapsed {elapsed_text(result.push_elapsed)}"
        )
        return result


def _nydus_images(found: ImageSet) -> list[Image]:
    images = [image for image in found.images if image.is_nydus]
    if not images:
        raise ConvertError(f"{found.name} is not a Nydus image (no layer has {mt.ANNOTATION_BOOTSTRAP})")
    return images


def _plans(images: Iterable[Image], options: ReverseOptions, folder: Path) -> list[_Plan]:
    plans: list[_Plan] = []
    for number, image in enumerate(images):
        nydus = unpack_image(image, folder / f"bootstrap-{number}")
        jobs = _jobs(nydus, options, folder, sum(len(plan.jobs) for plan in plans))
        plans.append(_Plan(nydus, jobs, flat=jobs[0].bootstrap is not None))
    return plans


def _jobs(nydus: NydusImage, options: ReverseOptions, folder: Path, first: int) -> list[UnpackJob]:
    image, data = nydus.image, nydus.data_layers

    def job(number: int, **more: Any) -> UnpackJob:
        number += first
        return UnpackJob(number, options.source, image.name, data, folder / f"layer-{number}", **more)

    own = own_layers(image)
    references = [layer.annotations.get(mt.ANNOTATION_REF, "") for layer in data]
    if data and all(references):
        sizes = [image.endpoint.blob_size(digest) for digest in references]
        originals = [Descriptor("", digest, size) for digest, size in zip(references, sizes, strict=True)]
        return [job(number, original=one) for number, one in enumerate(originals)]
    if own and all(has_bootstrap(image.endpoint, layer) for layer in data[:own]):
        return [job(number, layer=layer) for number, layer in enumerate(data[:own])]
    if not data and options.backend is None and nydus.has_data:
        raise ConvertError(
            f"{image.name}: its data is in a storage backend: name it with --source-backend-type and "
            "--source-backend-config"
        )
    log.warning("%s: its layers cannot be told apart, the plain image gets one layer", image.name)
    return [job(0, bootstrap=nydus.bootstrap, backend=options.backend if not data else None)]


def own_layers(image: Image) -> int:
    """How many of its data layers an image was made of: behind them lie blobs of a chunk dictionary, which only the
    history tells from them. 0 if it does not."""
    history = image.config.get("history")
    if not isinstance(history, list) or not all(isinstance(item, dict) for item in history):
        return 0
    layers = [item for item in history if not item.get("empty_layer")]
    if not layers or layers[-1].get("created_by") != _CREATOR:
        return 0
    count = len(layers) - 1
    return count if count <= len(image.layers) - 1 else 0


def _unpack(
    plans: Iterable[_Plan], options: ReverseOptions, pusher: Pusher, progress: Progress
) -> dict[int, PlainLayer]:
    """Plain layers by job number; pushes are under way."""
    jobs = [job for plan in plans for job in plan.jobs]
    endpoints = {job.number: plan.nydus.image.endpoint for plan in plans for job in plan.jobs}
    for job in jobs:
        progress.start(str(job.number), f"layer {job.name}", job.size)
    found: dict[int, PlainLayer] = {}
    work = run_jobs(jobs, options.workers or cpu_count(), lambda job, count: progress.advance(str(job.number), count))
    with closing(work):
        for job, layer in work:
            progress.finish(str(job.number))
            progress.note(f"layer {job.name}: {size_text(layer.size)}, {len(found) + 1}/{len(jobs)}")
            found[job.number] = layer
            if layer.path is None:
                pusher.copy(endpoints[job.number], Descriptor("", layer.digest, layer.size))
            else:
                pusher.file(layer.digest, layer.path)
            pusher.check()
    return found


def plain_manifest(image: Image, layers: list[PlainLayer], *, oci: bool, flat: bool) -> tuple[bytes, str, bytes]:
    """Config, manifest media type and manifest of the plain image, in upstream's form."""
    config = copy.deepcopy(image.config)
    config["rootfs"]["diff_ids"] = [layer.diff_id for layer in layers]
    history = config.get("history")
    if flat:
        config["history"] = [{"created_by": _CREATOR, "comment": "all layers of a Nydus image"}]
    elif isinstance(history, list) and history and history[-1].get("created_by") == _CREATOR:
        config["history"] = history[:-1]
    body = manifests.compact(config)
    docker = image.is_docker and not oci
    document = {
        "schemaVersion": 2,
        "mediaType": mt.DOCKER_MANIFEST if docker else mt.OCI_MANIFEST,
        "config": Descriptor(
            mt.DOCKER_CONFIG if docker else mt.OCI_CONFIG, manifests.digest_of(body), len(body)
        ).to_json(),
        "layers": [
            Descriptor(
                mt.DOCKER_LAYER_GZIP if docker else mt.OCI_LAYER_GZIP,
                layer.digest,
                layer.size,
                {mt.ANNOTATION_UNCOMPRESSED: layer.diff_id},
            ).to_json()
            for layer in layers
        ],
    }
    annotations = image.manifest.get("annotations")
    gone = (mt.ANNOTATION_BUILDER_VERSION, mt.ANNOTATION_FS_VERSION)  # they told of the Nydus image
    kept = {key: text for key, text in annotations.items() if key not in gone} if isinstance(annotations, dict) else {}
    if kept:
        document["annotations"] = kept
    return body, str(document["mediaType"]), manifests.compact(document)


def _push(found: ImageSet, done: list[tuple[Image, str, bytes]], pusher: Pusher, *, oci: bool) -> str:
    if len(done) == 1:
        return pusher.image(*done[0][1:])
    entries = []
    for image, media_type, body in done:
        pusher.manifest(media_type, body)
        entries.append(manifests.index_entry(media_type, body, image.platform_json or {}))
    media_type = manifests.oci_type(found.index_media_type) if oci else found.index_media_type
    return pusher.image(media_type, manifests.converted_index(entries, media_type, found.index))
