"""`nydusctl cache verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from nydusfs.cachetools import holder
from nydusfs.cachetools.verify import Damage, verify_stores
from nydusfs.errors import CacheError
from snapshotter.cachectl.place import Place
from snapshotter.cachectl.progress import bar
from snapshotter.explain.show import size


def run(place: Place, wanted: Sequence[str], *, threads: int, keep: bool, quiet: bool) -> dict[str, Any]:
    """Prints unless `quiet`; the same as an object. Raises CacheError."""
    images = place.blob_table()
    stores = place.stores()
    if not stores:
        raise CacheError(f"cache {place.cache}: no such directory")
    if wanted:
        for store in stores:
            store.blobs = {name: blob for name, blob in store.blobs.items() if name.startswith(tuple(wanted))}
        known = {name for store in stores for name in store.blobs}
        for one in wanted:
            if not any(name.startswith(one) for name in known):
                raise CacheError(f"cache {place.cache}: it has nothing of a blob {one}; nydusctl cache ls shows them")
    problems = list(place.problems)
    found: dict[str, Any] = {"cache": str(place.cache), "damaged": [], "unsure": [], "problems": problems}

    def damaged(one: Damage) -> None:
        deleted = False
        if not keep:
            try:
                holder.drop(place.holder, one.store, one.blob_id, [one.name], damaged=True)
                deleted = True
            except CacheError as failure:
                problems.append(f"{one.path} stays: {failure}")
        found["damaged"].append(
            {"store": str(one.store), "blob": one.blob_id, "segment": one.name, "file": str(one.path), "what": one.what,
             "deleted": deleted}
        )  # fmt: skip
        if not quiet:
            end = "deleted, the next read fetches it again" if deleted else "it stays"
            click.echo(f"damaged: {one.path}: {one.what}; {end}", err=True)

    total = sum(blob.filed for store in stores for blob in store.blobs.values())
    with bar("verifying", total, quiet=quiet) as advance:
        verdict = verify_stores(stores, images, threads=threads, advance=advance, found=damaged)
    found |= {"segments": verdict.segments, "bytes": verdict.bytes, "gone": verdict.gone}
    found["unsure"] = [
        {"store": str(path), "blob": blob_id, "segments": count, "why": why}
        for (path, blob_id), (count, why) in sorted(verdict.unsure.items())
    ]
    if not quiet:
        for one in found["unsure"]:
            which = f"{one['segments']} segments of blob {one['blob']} in {one['store']}"
            click.echo(f"not verified: {which}: {one['why']}")
        for problem in problems:
            click.echo(problem, err=True)
        gone = f", {verdict.gone} went away meanwhile" if verdict.gone else ""
        click.echo(f"{verdict.segments} segments, {size(verdict.bytes)}: {len(verdict.damaged)} damaged{gone}, "
                   f"{sum(one['segments'] for one in found['unsure'])} that cannot be verified")  # fmt: skip
    return found
