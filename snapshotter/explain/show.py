"""An explanation on one screen."""

from __future__ import annotations

import time

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from snapshotter.explain.facts import Explanation

SHOWN_LAYERS = 12
SHOWN_FILES = 8
LATENCIES = ("0.2 ms", "1 ms", "20 ms", "50 ms", "500 ms", "1 s", "2 s", "more")


def size(value: float) -> str:
    """Decimal units, as networks and registries count."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def show(found: Explanation, console: Console) -> None:
    head = Text()
    head.append(f"{found.kind} {found.name}\n", style="bold")
    if found.kind == "container":
        head.append(f"image {found.image}\n")
    head.append(f"namespace {found.namespace}, snapshotter {found.snapshotter}\n")
    if found.lazy:
        head.append("lazy", style="bold green")
        head.append(f": mounted by {found.driver}" if found.driver else ": its data layers are left in the registry")
        head.append(f" at {found.mountpoint}" if found.mountpoint else "")
    else:
        head.append("not lazy", style="bold yellow")
    for reason in found.why:
        head.append(f"\n{reason}")
    parts: list[RenderableType] = [head, _layers(found)]
    if found.phases:
        parts.append(_phases(found))
    if found.reads:
        parts.append(_reads(found))
    if found.sources:
        parts.append(_sources(found))
    if found.slowest or found.failed:
        parts.append(_files(found))
    for part in parts:
        console.print(part)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold")
    return table


def _layers(found: Explanation) -> Table:
    table = _table("\nLayers, lowest first", "digest", ">size", "state", ">in the cache", "")
    styles = {"lazy": "green", "bootstrap": "cyan", "unpacked": "yellow", "absent": "red"}
    for layer in found.layers[:SHOWN_LAYERS]:
        state = Text(layer.state, style=styles.get(layer.state, ""))
        digest = layer.digest.removeprefix("sha256:")[:12]
        table.add_row(digest, size(layer.size), state, size(layer.cached) if layer.cached else "", layer.why)
    rest = found.layers[SHOWN_LAYERS:]
    if rest:
        table.add_row(f"{len(rest)} more", size(sum(layer.size for layer in rest)), "", "", "")
    total = sum(layer.size for layer in found.layers)
    table.add_row("all", size(total), "", size(sum(layer.cached for layer in found.layers)), "decoded, on disk")
    return table


def _phases(found: Explanation) -> Table:
    table = _table("\nTime by phase", "phase", "at", ">took", "")
    for phase in found.phases:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(phase.at)) if phase.at else ""
        table.add_row(phase.name, when, seconds(phase.seconds), phase.note)
    return table


def _reads(found: Explanation) -> Table:
    reads, cache, backend = found.reads, found.cache, found.backend
    table = _table("\nReads", "", "")
    asked = ", that nydusd was asked for" if found.driver.startswith("EROFS") else ""
    table.add_row("by containers", f"{reads['count']} reads, {size(reads['bytes'])}, {reads['errors']} failed{asked}")
    spread = [f"{count} up to {edge}" if edge != "more" else f"{count} longer"
              for edge, count in zip(LATENCIES, reads["latency"], strict=False) if count]  # fmt: skip
    table.add_row("time of a read", ", ".join(spread) or "none yet")
    if cache.get("total"):
        served = cache["partial_hits"] + cache["whole_hits"]
        table.add_row("from the cache", f"{served} pieces for {cache['total']} reads")
    if backend:
        table.add_row(
            "fetched", f"{size(backend['read_amount_total'])} in {backend['read_count']} requests of "
            f"{backend['backend_type']}, {backend['read_errors']} failed")  # fmt: skip
    ahead = cache.get("prefetch_segments", 0)
    if ahead:
        used = cache.get("prefetch_used", 0)
        table.add_row("fetched ahead", f"{ahead} segments, {used} of them read since ({100 * used // ahead} %)")
    else:
        table.add_row("fetched ahead", "nothing: no prefetch, no profile of an earlier start, or all was here")
    return table


def _sources(found: Explanation) -> Table:
    table = _table("\nBytes by source", "source", ">bytes", ">requests", ">failed")
    for one in found.sources:
        table.add_row(one["address"], size(one["bytes"]), str(one["requests"]), str(one["failures"]))
    return table


def _files(found: Explanation) -> Group:
    tables = []
    if found.slowest:
        table = _table("\nSlowest files", "file", ">waited", ">slow reads", ">longest")
        for one in found.slowest[:SHOWN_FILES]:
            waited, longest = seconds(one["waited_micros"] / 1e6), seconds(one["longest_micros"] / 1e6)
            table.add_row(one["path"], waited, str(one["reads"]), longest)
        tables.append(table)
    if found.failed:
        table = _table("\nFiles that could not be read", "file", ">reads")
        for one in found.failed[:SHOWN_FILES]:
            table.add_row(one["path"], str(one["reads"]))
        tables.append(table)
    return Group(*tables)
