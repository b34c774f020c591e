"""`nydusctl cache gc`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import click

from nydusfs.cachetools import holder
from nydusfs.cachetools.inventory import BlobFiles
from nydusfs.cachetools.places import device_folders
from nydusfs.cachetools.unused import Unused, allocated, find_unused
from nydusfs.errors import CacheError
from snapshotter.cachectl.place import Place
from snapshotter.explain.show import size


def run(place: Place, *, dry_run: bool, imported: bool, quiet: bool) -> dict[str, Any]:
    """Prints unless `quiet`; the same as an object. Raises CacheError, RafsError, OSError."""
    if not place.users_known():
        raise CacheError(
            f"cache {place.cache}: which images use it is not known, so nothing is deleted: name the snapshotter's "
            "directory (--root DIR), or every image (--bootstrap FILE)"
        )
    stores = place.stores()  # before the images are read: none may come between
    images = place.images
    table = place.blob_table()
    gone_imports = [path for path, image in images.items() if image.kind == "imported" and imported]
    for path in gone_imports:
        table.pop(path)
    found: dict[str, Any] = {
        "cache": str(place.cache), "dry_run": dry_run, "blobs": [], "segments": [], "files": [], "kept": [],
        "unknown": [str(path) for store in stores for path in store.unknown],
        "freed": 0, "problems": list(place.problems),
    }  # fmt: skip
    if place.unknown_use:
        found["problems"].append("nothing is deleted: what images that are mounted use is not known")
    else:
        for unused in find_unused(stores, table):
            _one_store(place, unused, found, dry_run=dry_run)
        if not dry_run:
            for path in gone_imports:
                path.unlink(missing_ok=True)
    if not quiet:
        _show(found)
    return found


def _one_store(place: Place, unused: Unused, found: dict[str, Any], *, dry_run: bool) -> None:
    store = str(unused.store)
    found["kept"] += [{"store": store, "blob": blob, "why": why} for blob, why in sorted(unused.unproven.items())]
    for blob in unused.blobs.values():
        size_of_it = blob.allocated
        if dry_run or _try(found, f"blob {blob.blob_id}", lambda blob=blob: _delete(place, unused.store, blob)):
            found["blobs"].append({"store": store, "blob": blob.blob_id, "bytes": size_of_it})
            found["freed"] += size_of_it
    for blob_id, files in unused.segments.items():
        names = [file.name.partition(".")[0] for file in files]
        if dry_run or _try(
            found,
            f"segments of blob {blob_id}",
            lambda blob_id=blob_id, names=names: holder.drop(place.holder, unused.store, blob_id, names, damaged=False),
        ):
            size_of_them = sum(file.allocated for file in files)
            found["segments"].append({"store": store, "blob": blob_id, "segments": names, "bytes": size_of_them})
            found["freed"] += size_of_them
    for path in unused.files:
        size_of_it = allocated(path)
        if dry_run or _try(found, str(path), lambda path=path: _remove(path)):
            found["files"].append({"file": str(path), "bytes": size_of_it})
            found["freed"] += size_of_it


def _try(found: dict[str, Any], what: str, work: Any) -> bool:
    try:
        work()
    except (CacheError, OSError) as failure:
        found["problems"].append(f"{what} stays: {getattr(failure, 'strerror', None) or failure}")
        return False
    return True


def _delete(place: Place, store: Path, blob: BlobFiles) -> None:
    """All of a blob: by the nydusd that has the store, then what it left."""
    if (nydusd := place.holder(store)) is not None:
        nydusd.drop_blob(blob.blob_id)
    for folder in device_folders(store, blob.blob_id):
        shutil.rmtree(folder, ignore_errors=True)
    for file in blob.files():
        file.path.unlink(missing_ok=True)
    for folder in blob.folders:
        try:
            os.rmdir(folder)
        except OSError:
            pass  # gone, or it holds what is not nydusd's


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _show(found: dict[str, Any]) -> None:
    verb = "would go" if found["dry_run"] else "deleted"
    for one in found["blobs"]:
        click.echo(f"{verb}: blob {one['blob']}, {size(one['bytes'])}: no image names it")
    for one in found["segments"]:
        which = f"{len(one['segments'])} segments of blob {one['blob']}"
        click.echo(f"{verb}: {which}, {size(one['bytes'])}: no image has them")
    for one in found["files"]:
        click.echo(f"{verb}: {one['file']}, {size(one['bytes'])}: left over")
    for one in found["kept"]:
        click.echo(f"kept: segments of blob {one['blob']}: {one['why']}")
    for path in found["unknown"]:
        click.echo(f"kept: {path}: not nydusd's")
    for problem in found["problems"]:
        click.echo(problem, err=True)
    end = "would be freed" if found["dry_run"] else "freed"
    click.echo(f"{size(found['freed'])} {end} in {found['cache']}")
