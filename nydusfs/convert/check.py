"""`nydusify check`: rules of manifest and bootstrap, then the file system against the source's."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from nydusfs.convert import rules
from nydusfs.convert.compare import Comparison, MountView, ReaderView, View, compare
from nydusfs.convert.endpoints import Connections, Location
from nydusfs.convert.images import Descriptor, Image, load_images
from nydusfs.convert.nydusd import daemon_config, find_nydusd, mounted, require_root
from nydusfs.convert.nydusimage import fetch_bootstrap, pick_nydus, pick_plain
from nydusfs.convert.platforms import Platform
from nydusfs.convert.progress import Progress, size_text
from nydusfs.convert.sourcetree import Node, apply_layer, new_root, read_layer
from nydusfs.errors import ConvertError

if TYPE_CHECKING:
    from bootstrap.base import Bootstrap

log = logging.getLogger(__name__)

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """`source` None: only rules. `use_mount` False: read through our reader, without nydusd, FUSE and root."""

    target: Location
    source: Location | None = None
    platform: Platform | None = None
    multi_platform: bool = False
    work_dir: Path = Path("output")
    nydusd: str = "nydusd"
    use_mount: bool = True


@dataclass(slots=True)
class CheckResult:
    violations: list[str] = field(default_factory=list)
    comparison: Comparison | None = None

    @property
    def ok(self) -> bool:
        return not self.violations and (self.comparison is None or not self.comparison.count)


def check(options: CheckOptions, progress: Progress) -> CheckResult:
    """Raises NydusError for what prevents checking; what is wrong with the image is in the result."""
    if options.use_mount and options.source is not None:
        require_root(" (or check without a mount: --no-mount)")
    try:
        return _check(options, progress)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConvertError(f"working directory {options.work_dir}: {reason} (choose with --work-dir)") from error


def _check(options: CheckOptions, progress: Progress) -> CheckResult:
    with ExitStack() as stack:
        connections = stack.enter_context(Connections())
        endpoint = stack.enter_context(options.target.open(connections))
        platforms = [options.platform] if options.platform else None
        progress.say(f"parsing image {options.target}")
        found = load_images(endpoint, platforms)
        target, plain = pick_nydus(found)
        source = None
        if options.source is not None:
            progress.say(f"parsing image {options.source}")
            source_place = stack.enter_context(options.source.open(connections))
            source = pick_plain(load_images(source_place, platforms))
        result = CheckResult()
        folder = _fresh(options.work_dir)
        _dump(folder / "target", "nydus", target)
        if source is not None:
            _dump(folder / "source", "nydus" if source.is_nydus else "oci", source)

        progress.say(f"checking manifest {options.target}")
        result.violations += rules.check_manifest(target)
        if options.multi_platform and plain is None:
            result.violations.append("index: holds no plain image beside the Nydus one")
        if plain is not None:
            result.violations += rules.check_oci_half(plain, target)
        if source is not None:
            result.violations += rules.check_config(source, target)
        if not target.is_nydus:
            return result
        result.violations += _check_blobs(target)
        if result.violations:
            return result

        progress.say(f"checking bootstrap {options.target}")
        boot, violations = fetch_bootstrap(target, folder / "target" / "nydus_bootstrap")
        result.violations += violations
        result.violations += _check_bootstrap(boot, target)
        if source is None or result.violations:
            return result

        progress.say(f"reading source {source.name} ({size_text(source.size)})")
        tree = source_tree(source, progress)
        with _view(options, target, boot, folder / "target", progress) as view:
            progress.say("comparing filesystem")
            result.comparison = compare(tree, view)
        progress.say(f"compared {result.comparison.entries} entries, {size_text(result.comparison.content)} of content")
        return result


def source_tree(source: Image, progress: Progress) -> Node:
    """The merged tree of a plain image. Raises ConvertError, RegistryError."""
    from bootstrap.errors import RafsError
    from bootstrap.tar import open_layer

    root = new_root()
    for layer in source.layers:
        what = f"layer {layer.digest} of {source.name}"
        progress.start(layer.digest, f"layer {layer.hex[:12]}", layer.size)
        try:
            stored = source.endpoint.open_blob(layer.digest, layer.size)
            with stored, open_layer(cast(BinaryIO, stored)) as plain:
                upper = read_layer(plain, what)
                while plain.read(_PIECE):
                    pass
        except RafsError as error:
            raise ConvertError(f"{what}: {error}") from error
        apply_layer(root, upper)
        progress.finish(layer.digest)
    return root


def _check_blobs(target: Image) -> Iterator[str]:
    for layer in {layer.digest: layer for layer in target.layers}.values():
        if not target.endpoint.has_blob(layer.digest):
            yield f"manifest: layer {layer.digest} does not exist in {target.endpoint.name}"


def _check_bootstrap(path: Path, target: Image) -> list[str]:
    from bootstrap.errors import RafsError
    from bootstrap.reader import open_bootstrap

    found: list[str] = []
    try:
        with contextlib.closing(open_bootstrap(str(path))) as bootstrap:
            found += rules.check_bootstrap(bootstrap, target)
    except RafsError as error:
        found.append(f"bootstrap: {error}")
    return found


@contextmanager
def _view(options: CheckOptions, target: Image, boot: Path, folder: Path, progress: Progress) -> Iterator[View]:
    if options.use_mount:
        program = find_nydusd(options.nydusd)
        progress.say(f"mounting image {options.target}")
        cache = folder / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        config = daemon_config(target.endpoint, cache, prefetch=False)
        try:
            with mounted(program, boot, config, folder / "mnt", folder):
                yield MountView(folder / "mnt")
        finally:
            shutil.rmtree(cache, ignore_errors=True)
        return
    from bootstrap.reader import open_bootstrap

    blobs = folder / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.closing(open_bootstrap(str(boot))) as bootstrap:
            _download(target, bootstrap, blobs, progress)
            with contextlib.closing(ReaderView(bootstrap, blobs)) as view:
                yield view
    finally:
        shutil.rmtree(blobs, ignore_errors=True)


def _download(target: Image, bootstrap: Bootstrap, folder: Path, progress: Progress) -> None:
    layers: dict[str, Descriptor] = {layer.hex: layer for layer in target.layers}
    for blob in bootstrap.blobs:
        layer = layers.get(blob.id)
        if layer is None:
            raise ConvertError(f"blob {blob.id} is not a layer of {target.name}: check it through a mount")
        path = folder / blob.id
        with target.endpoint.open_blob(layer.digest, layer.size) as stored, path.open("wb") as out:
            shutil.copyfileobj(stored, out, _PIECE)


def _dump(folder: Path, kind: str, image: Image) -> None:
    """Manifest and config as upstream leaves them for whoever wants to look."""
    folder.mkdir(parents=True, exist_ok=True)
    documents: list[tuple[str, dict[str, Any]]] = [("manifest", image.manifest), ("config", image.config)]
    for name, document in documents:
        (folder / f"{kind}_{name}.json").write_text(json.dumps(document, indent=2), encoding="utf-8")


def _fresh(root: Path) -> Path:
    try:
        for name in ("source", "target"):
            (root / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConvertError(
            f"working directory {root} cannot be used: {error.strerror} (choose with --work-dir)"
        ) from error
    return root.resolve()
