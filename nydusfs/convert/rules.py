"""What must hold of a Nydus image's manifest, config and bootstrap. Each function yields violations, fit for a user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bootstrap.base import Bootstrap
from bootstrap.check import check_bootstrap as check_all
from bootstrap.errors import RafsError
from nydusfs.convert.images import Image
from nydusfs.convert.manifests import EMPTY_LAYER_DIFF_ID, EMPTY_LAYER_DIGEST
from nydusfs.registry import mediatypes as mt


def check_manifest(target: Image) -> Iterator[str]:
    """Layers, annotations and diff ids of the image itself."""
    if not target.layers:
        yield "manifest: has no layers"
        return
    last = target.layers[-1]
    if last.annotations.get(mt.ANNOTATION_BOOTSTRAP) != "true":
        yield f"manifest: the last layer {last.digest} is not annotated as bootstrap: not a Nydus image"
        return
    if last.annotations.get(mt.ANNOTATION_FS_VERSION) not in ("5", "6", None):
        yield f"manifest: bootstrap layer says file system version {last.annotations[mt.ANNOTATION_FS_VERSION]!r}"
    for number, layer in enumerate(target.layers[:-1]):
        where = f"manifest: layer {number} {layer.digest}"
        if layer.media_type != mt.NYDUS_BLOB:
            yield f"{where} has media type {layer.media_type!r}, not {mt.NYDUS_BLOB!r}"
        if layer.annotations.get(mt.ANNOTATION_BLOB) != "true":
            yield f"{where} lacks the annotation {mt.ANNOTATION_BLOB}=true"
    diff_ids = target.diff_ids
    if len(diff_ids) != len(target.layers):
        yield f"config: {len(diff_ids)} diff ids for {len(target.layers)} layers"
        return
    for layer, diff_id in zip(target.layers[:-1], diff_ids, strict=False):
        if diff_id != layer.digest:
            yield f"config: diff id {diff_id} of the data layer {layer.digest} differs from its digest"


def check_plain(target: Image) -> Iterator[str]:
    """A plain image made back from a Nydus one."""
    if len(target.diff_ids) != len(target.layers):
        yield f"config: {len(target.diff_ids)} diff ids for {len(target.layers)} layers"
    for number, layer in enumerate(target.layers):
        if layer.media_type == mt.NYDUS_BLOB or mt.ANNOTATION_BLOB in layer.annotations:
            yield f"manifest: layer {number} {layer.digest} is one of Nydus, in an image without bootstrap"


def check_config(source: Image, target: Image) -> Iterator[str]:
    """What a container is started with must be the source's."""
    for name in ("architecture", "os", "variant"):
        if source.config.get(name) != target.config.get(name):
            yield f"config: {name} is {target.config.get(name)!r}, in the source {source.config.get(name)!r}"
    mine, theirs = _without_args_escaped(source), _without_args_escaped(target)
    for name in sorted({*mine, *theirs}):
        if mine.get(name) != theirs.get(name):
            yield f"config: config.{name} is {theirs.get(name)!r}, in the source {mine.get(name)!r}"


def check_oci_half(plain: Image, nydus: Image) -> Iterator[str]:
    """The plain image beside the Nydus one in a merged index."""
    if len(plain.diff_ids) != len(plain.layers):
        yield f"index: the plain image has {len(plain.diff_ids)} diff ids for {len(plain.layers)} layers"
    first = plain.layers[0] if plain.layers else None
    if (
        first is not None
        and first.annotations.get(mt.ANNOTATION_EMPTY_LAYER) == "true"
        and (first.digest != EMPTY_LAYER_DIGEST or plain.diff_ids[:1] != [EMPTY_LAYER_DIFF_ID])
    ):
        yield f"index: the plain image's empty layer is {first.digest}"
    yield from check_config(plain, nydus)


def check_bootstrap(bootstrap: Bootstrap, target: Image) -> Iterator[str]:
    """Version and blobs against the manifest, then every promise of the format."""
    said = target.layers[-1].annotations.get(mt.ANNOTATION_FS_VERSION)
    if said is not None and said != str(bootstrap.version):
        yield f"bootstrap: is RAFS v{bootstrap.version}, its layer's annotation says {said}"
    layers = {layer.hex for layer in target.layers[:-1]}
    references = {layer.annotations.get(mt.ANNOTATION_REF, "").removeprefix("sha256:") for layer in target.layers}
    if layers:  # with a storage backend the manifest names no blobs
        for blob in bootstrap.blobs:
            if blob.id not in layers and blob.id not in references:
                yield f"bootstrap: blob {blob.id} is not a layer of the manifest"
    try:
        check_all(bootstrap)
    except RafsError as error:
        yield f"bootstrap: {error}"


def _without_args_escaped(image: Image) -> dict[str, Any]:
    config = image.config.get("config")
    # empty and absent mean the same, and converters drop empty fields
    return {k: v for k, v in config.items() if k != "ArgsEscaped" and v} if isinstance(config, dict) else {}
