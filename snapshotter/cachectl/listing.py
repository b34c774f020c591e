"""`nydusctl cache ls`."""

from __future__ import annotations

import os
import time
from typing import Any

from nydusfs.cachetools.images import cached_bytes
from snapshotter.cachectl.place import Image, Place


def look(place: Place, sort: str) -> dict[str, Any]:
    """Raises CacheError. Sizes in bytes: `cached` plain bytes of what is complete, `disk` what all its files take,
    `size` the plain size of the blob, None where no bootstrap tells."""
    images = place.images
    stores = place.stores()
    users: dict[str, list[Image]] = {}
    sizes: dict[str, int] = {}
    for image in images.values():
        for blob_id, size in image.blobs.items():
            users.setdefault(blob_id, []).append(image)
            sizes[blob_id] = max(size, sizes.get(blob_id, 0))
    cached = cached_bytes(stores, place.blob_table())
    blobs = []
    for store in stores:
        report = place.store_report(store.path)
        for blob in store.blobs.values():
            using = users.get(blob.blob_id, [])
            blobs.append(
                {
                    "blob": blob.blob_id,
                    "store": str(store.path),
                    "images": sorted({image.name for image in using}),
                    "mounted": any(image.mounted for image in using),
                    "segments": len(blob.segments),
                    "cached": cached[store.path, blob.blob_id],
                    "size": sizes.get(blob.blob_id),
                    "disk": blob.allocated,
                    "upstream": sum(file.allocated for file in blob.foreign),
                    "last_use": max(blob.used, report.get("blobs", {}).get(blob.blob_id, 0.0)),
                }
            )
    keys: dict[str, Any] = {
        "size": lambda one: (-one["disk"], one["blob"]),
        "used": lambda one: (-one["last_use"], one["blob"]),
        "blob": lambda one: (one["blob"], one["store"]),
        "image": lambda one: (one["images"] or ["~"], -one["disk"]),
    }
    blobs.sort(key=keys[sort])
    limit, floor = place.limits()
    found: dict[str, Any] = {
        "cache": str(place.cache),
        "blobs": blobs,
        "unknown": [str(path) for store in stores for path in store.unknown],
        "total": {
            "blobs": len(blobs),
            "segments": sum(one["segments"] for one in blobs),
            "cached": sum(one["cached"] for one in blobs),
            "disk": sum(one["disk"] for one in blobs),
        },
        "limit": limit,
        "min_free": floor,
        "free": None,
        "problems": place.problems,
    }
    if stores:
        info = os.statvfs(place.cache)
        found["free"] = info.f_bavail * info.f_frsize
    return found


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from snapshotter.explain.show import size

    console = Console(soft_wrap=True)
    several = len({one["store"] for one in found["blobs"]}) > 1
    if found["blobs"]:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", expand=False)
        for column in ("blob", ">cached", ">of", ">segments", ">on disk", "last use", "images"):
            right = column.startswith(">")
            table.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=column != "images",
                             overflow="fold")  # fmt: skip
        if several:
            table.add_column("store", overflow="fold")
        for one in found["blobs"]:
            share = f"{size(one['size'])} {100 * one['cached'] // one['size']:.0f} %" if one["size"] else "?"
            images = Text(", ".join(one["images"]) or "none", style="" if one["images"] else "yellow")
            if one["mounted"]:
                images.append("  mounted", style="green")
            if one["upstream"]:
                images.append(f"  upstream's files {size(one['upstream'])}", style="blue")
            row = [one["blob"][:16], size(one["cached"]), share, str(one["segments"]), size(one["disk"]),
                   _ago(one["last_use"]), images]  # fmt: skip
            table.add_row(*row, *([os.path.relpath(one["store"], found["cache"])] if several else []))
        console.print(table)
        console.print()
    total = found["total"]
    limit = f"limit {size(found['limit'])}" if found["limit"] else "no limit"
    if found["min_free"]:
        limit += f", {size(found['min_free'])} to stay free"
    free = f", {size(found['free'])} free on its disk" if found["free"] is not None else ", which is not there yet"
    held = f"{size(total['disk'])} of {total['blobs']} blobs in {total['segments']} segments"
    console.print(f"{held}, {limit}{free}: {found['cache']}", highlight=False)
    for path in found["unknown"]:
        console.print(f"not nydusd's: {path}", highlight=False)
    for problem in found["problems"]:
        console.print(Text(f"not readable, so what it uses is not known: {problem}", style="bold red"))


def _ago(when: float) -> str:
    seconds = max(0, time.time() - when)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"
