"""`nydusify check`: rules of manifest and bootstrap, then the file system against the source's.

Both sides are read the same way: mounted (Nydus by nydusd, plain by overlayfs), or without any mount (Nydus by our
reader, plain by a model of its layers).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from nydusfs.convert import rules
from nydusfs.convert.backends import BackendChoice
from nydusfs.convert.compare import Comparison, compare
from nydusfs.convert.endpoints import Connections, Location
from nydusfs.convert.images import Image, ImageSet, load_images
from nydusfs.convert.nydusd import daemon_config, find_nydusd, mounted, require_root
from nydusfs.convert.nydusimage import NydusImage, fetch_bootstrap, pick_nydus
from nydusfs.convert.overlay import overlay_mounted
from nydusfs.convert.platforms import Platform
from nydusfs.convert.progress import Progress, size_text
from nydusfs.convert.readerview import reader_view
from nydusfs.convert.sourcetree import Node, apply_layer, new_root, read_layer
from nydusfs.convert.views import MountView, TreeView, View
from nydusfs.errors import ConvertError, os_reason
from nydusfs.registry import mediatypes as mt

_PIECE = 1 << 20
# what a check leaves in its folders, and what it makes anew
_LEFT = ("oci_index.json", "oci_manifest.json", "oci_config.json", "nydus_index.json", "nydus_manifest.json",
         "nydus_config.json", "nydus_output.json", "nydusd.log")  # fmt: skip
_LEFT_FOLDERS = ("nydus_bootstrap", "nydusd", "layers", "image")


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """`source` None: only rules. `use_mount`: None where it is possible; a check without needs neither root nor FUSE.
    The backends hold blobs that a manifest does not name."""

    target: Location
    source: Location | None = None
    platform: Platform | None = None
    multi_platform: bool = False
    work_dir: Path = Path("output")
    nydusd: str = "nydusd"
    use_mount: bool | None = None
    target_backend: BackendChoice | None = None
    source_backend: BackendChoice | None = None


@dataclass(slots=True)
class CheckResult:
    violations: list[str] = field(default_factory=list)
    comparison: Comparison | None = None
    mounted: bool = False

    @property
    def ok(self) -> bool:
        return not self.violations and (self.comparison is None or not self.comparison.count)


@dataclass(slots=True)
class _Side:
    """Source or target. `image` is what is compared; `beside`: the plain image of a merged index whose Nydus image that
    is. `nydus` comes with the bootstrap."""

    found: ImageSet
    image: Image
    beside: Image | None
    folder: Path
    backend: BackendChoice | None
    nydus: NydusImage | None = None


def can_mount() -> bool:
    return os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)


def check(options: CheckOptions, progress: Progress) -> CheckResult:
    """Raises NydusError for what prevents checking; what is wrong with the image is in the result."""
    if options.use_mount and options.source is not None:
        require_root(" (or check without a mount: --no-mount)")
    try:
        with ExitStack() as stack:
            return _Check(options, progress, stack).run()
    except OSError as error:
        name = error.filename
        if isinstance(name, str | bytes) and not os.fsdecode(name).startswith(str(options.work_dir.absolute())):
            raise ConvertError(os_reason(error)) from error
        reason = error.strerror or str(error)
        raise ConvertError(f"working directory {options.work_dir}: {reason} (choose with --work-dir)") from error


class _Check:
    def __init__(self, options: CheckOptions, progress: Progress, stack: ExitStack) -> None:
        self._options = options
        self._progress = progress
        self._stack = stack
        self._connections = stack.enter_context(Connections())
        self._mount = can_mount() if options.use_mount is None else options.use_mount
        self._root = options.work_dir.absolute()

    def run(self) -> CheckResult:
        options, progress, result = self._options, self._progress, CheckResult()
        target = self._parsed(options.target, "target", options.target_backend)
        source = self._parsed(options.source, "source", options.source_backend) if options.source else None
        for side in filter(None, (target, source)):
            _dump(side)

        progress.say(f"checking manifest {options.target}")
        result.violations += self._manifest_rules(target, source)
        if result.violations:
            return result
        for side in filter(None, (target, source)):
            if side.image.is_nydus:
                progress.say(f"checking bootstrap {side.image.name}")
                result.violations += _bootstrap_rules(side)
        if source is None or result.violations:
            return result

        result.mounted = self._mount
        with self._view(source) as expected, self._view(target) as found:
            progress.say("comparing filesystem")
            result.comparison = compare(expected, found)
        progress.say(f"compared {result.comparison.entries} entries, {size_text(result.comparison.content)} of content")
        return result

    def _parsed(self, location: Location, name: str, backend: BackendChoice | None) -> _Side:
        self._progress.say(f"parsing image {location}")
        folder = _fresh(self._root / name)
        self._stack.callback(shutil.rmtree, folder / "image", ignore_errors=True)
        endpoint = self._stack.enter_context(location.prepare(folder / "image").open(self._connections))
        found = load_images(endpoint, [self._options.platform] if self._options.platform else None)
        if name == "target":
            return _Side(found, *pick_nydus(found), folder, backend)
        plain = [image for image in found.images if not image.is_nydus and not image.artifact_type]
        return _Side(found, plain[0] if plain else found.images[0], None, folder, backend)

    def _manifest_rules(self, target: _Side, source: _Side | None) -> Iterator[str]:
        if target.image.is_nydus or source is None or not source.image.is_nydus:
            yield from rules.check_manifest(target.image)
        else:
            yield from rules.check_plain(target.image)  # made by the way back
        if self._options.multi_platform and target.beside is None:
            yield "index: holds no plain image beside the Nydus one"
        if target.beside is not None:
            yield from rules.check_oci_half(target.beside, target.image)
        if source is not None:
            yield from rules.check_config(source.image, target.image)
        yield from _missing_blobs(target.image)

    @contextmanager
    def _view(self, side: _Side) -> Iterator[View]:
        image, progress = side.image, self._progress
        if side.nydus is not None:
            folder = side.folder / "nydusd"
            config = daemon_config(side.nydus, folder, backend=side.backend, progress=progress)
            try:
                if self._mount:
                    progress.say(f"mounting image {image.name}")
                    program = find_nydusd(self._options.nydusd)
                    with mounted(program, side.nydus.bootstrap, config, side.folder / "mnt", side.folder):
                        yield MountView(side.folder / "mnt")
                else:
                    with reader_view(side.nydus.bootstrap, config, image.name) as view:
                        yield view
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return
        progress.say(f"reading image {image.name} ({size_text(image.size)})")
        if self._mount:
            with overlay_mounted(image, side.folder, progress) as mountpoint:
                yield MountView(mountpoint)
        else:
            yield TreeView(source_tree(image, progress))


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
        progress.note(f"read layer {layer.hex[:12]} ({size_text(layer.size)})")
    return root


def _missing_blobs(image: Image) -> Iterator[str]:
    wanted = {layer.digest: f"layer {layer.digest}" for layer in image.layers}
    for layer in image.layers:
        if reference := layer.annotations.get(mt.ANNOTATION_REF):
            wanted.setdefault(reference, f"plain layer {reference}, which layer {layer.digest} refers to,")
    for digest, what in wanted.items():
        if not image.endpoint.has_blob(digest):
            yield f"manifest: {what} does not exist in {image.endpoint.name}"


def _bootstrap_rules(side: _Side) -> list[str]:
    """Violations; the bootstrap is unpacked and described beside the other files."""
    from bootstrap.cli.check import report
    from bootstrap.errors import RafsError
    from bootstrap.reader import open_bootstrap

    path, found = fetch_bootstrap(side.image, side.folder / "nydus_bootstrap")
    side.nydus = NydusImage(side.image, path, [])
    started = time.perf_counter()
    try:
        with open_bootstrap(str(path)) as bootstrap:
            found += rules.check_bootstrap(bootstrap, side.image)
            _write(side.folder / "nydus_output.json", report(bootstrap, str(path), time.perf_counter() - started))
    except RafsError as error:
        found.append(f"bootstrap: {error}")
    return found


def _dump(side: _Side) -> None:
    """Index, manifest and config as upstream leaves them for whoever wants to look."""
    for image in filter(None, (side.image, side.beside)):
        kind = "nydus" if image.is_nydus else "oci"
        if side.found.index is not None:
            _write(side.folder / f"{kind}_index.json", side.found.index)
        _write(side.folder / f"{kind}_manifest.json", image.manifest)
        _write(side.folder / f"{kind}_config.json", image.config)


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")


def _fresh(folder: Path) -> Path:
    """The folder of one side, without what an earlier check left. (Upstream deletes all of the working directory,
    whatever is in it.)"""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _LEFT:
        with suppress(FileNotFoundError):
            (folder / name).unlink()
    for name in _LEFT_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    return folder
