"""`nydusctl cache import`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from nydusfs.cachetools.gather import Gatherer, Source, remember
from nydusfs.cachetools.images import blob_sizes
from nydusfs.errors import CacheError
from snapshotter.cachectl.place import Place
from snapshotter.cachectl.progress import bar
from snapshotter.explain.show import size


def run(place: Place, path: Path, *, threads: int, quiet: bool) -> dict[str, Any]:
    """Prints unless `quiet`; the same as an object. Raises CacheError, OSError."""
    source = Source(path)
    place.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    images = place.blob_table()
    own, unreadable = blob_sizes(Path(os.path.realpath(one)) for one in source.bootstraps())
    images |= {one: blobs for one, blobs in own.items() if one not in images}
    present = source.blob_ids()
    wanted = {one: blobs for one, blobs in images.items() if present & blobs.keys()}
    total = sum(sum(size for blob, size in blobs.items() if blob in present) for blobs in wanted.values())
    with bar("importing", total, quiet=quiet) as advance:
        gatherer = Gatherer(place.cache, place.holder, threads=threads, room=partial(_room, place), advance=advance)
        result = gatherer.run(source, wanted)
    problems = [*unreadable.values(), *place.problems, *result.problems]
    _remember(place, result.blobs, problems)
    if result.full:
        problems.append(f"ended early: {result.full}")
    if not present:
        problems.append(f"{path}: no blob, no cache file of upstream's and no segments are in it")
    blobs = [
        {"blob": one.blob_id, "image": _name(place, one.image), "taken": one.taken, "bytes": one.bytes,
         "there": one.there, "absent": one.absent, "damaged": one.damaged, "problem": one.problem}
        for one in result.blobs
    ]  # fmt: skip
    wrong = problems or any(one["damaged"] or one["problem"] for one in blobs)
    nothing = not any(one["taken"] or one["there"] for one in blobs)
    found = {
        "cache": str(place.cache), "source": str(path), "blobs": blobs, "unclaimed": result.unclaimed,
        "problems": problems, "ok": not wrong and not nothing,
    }  # fmt: skip
    if not quiet:
        _show(found)
    return found


def _room(place: Place, taken: int) -> int | None:
    """Without a nydusd; one that runs counts for itself."""
    return None if place.holder(place.cache) is not None else place.room(taken)


def _name(place: Place, path: Path) -> str:
    return place.images[path].name if path in place.images else str(path)


def _remember(place: Place, results: list[Any], problems: list[str]) -> None:
    """Images that no snapshot has yet: their data must not look like nobody's."""
    for path in {one.image for one in results if one.taken or one.there}:
        image = place.images.get(path)
        if image is None or image.kind in ("given", "mounted"):
            try:
                remember(place.cache, path)
            except OSError as error:
                problems.append(f"{place.cache}: {path} cannot be kept beside its data, which the next clean-up may "
                                f"delete: {error.strerror or error}")  # fmt: skip


def _show(found: dict[str, Any]) -> None:
    for one in found["blobs"]:
        parts = [f"{one['taken']} segments taken ({size(one['bytes'])})"]
        if one["there"]:
            parts.append(f"{one['there']} were here")
        if one["absent"]:
            parts.append(f"{one['absent']} the source does not have")
        click.echo(f"blob {one['blob'][:16]} of {one['image']}: {one['problem'] or ', '.join(parts)}",
                   err=bool(one["problem"]))  # fmt: skip
        for line in one["damaged"]:
            click.echo(f"damaged, left out: {line}", err=True)
    for blob in found["unclaimed"]:
        click.echo(f"blob {blob}: no bootstrap here names it, so nothing of it can be verified: pull its image's "
                   "metadata or give --bootstrap", err=True)  # fmt: skip
    for problem in found["problems"]:
        click.echo(problem, err=True)
    taken = sum(one["taken"] for one in found["blobs"])
    click.echo(f"{taken} segments, {size(sum(one['bytes'] for one in found['blobs']))} imported into {found['cache']}")


__all__ = ["CacheError", "run"]
