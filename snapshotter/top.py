"""`nydusctl top`: what all nydusd of a node do at this moment."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from snapshotter.doctor.ctl import where_to_look

if TYPE_CHECKING:
    from rich.console import RenderableType

    from snapshotter.node import Node

READ, LOOKUP = 4, 9


def look(node: Node) -> dict[str, Any]:
    """Counters of every image, source and nydusd, with the time at which they were taken. Raises SnapshotterError."""
    from snapshotter.errors import SnapshotterError
    from snapshotter.nydusd_api import NydusdApi
    from snapshotter.system import proportional_kb

    instances = node.instances()
    taken: dict[str, Any] = {"at": time.time(), "daemons": [], "images": [], "sources": []}
    for daemon in node.daemons():
        api = NydusdApi(daemon.socket)
        entry: dict[str, Any] = {"id": daemon.id, "pid": daemon.pid, "state": "no answer", "waiting": 0}
        taken["daemons"].append(entry)
        try:
            info = api.info(timeout=3)
            waiting = api.metrics("inflight") or []
            sources = api.metrics("sources") or []
        except SnapshotterError:
            continue
        worker = info.get("worker_pid") or daemon.pid
        entry |= {
            "state": info.get("state"),
            "pid": worker,
            "memory_kb": proportional_kb(worker),
            "waiting": len(waiting),
        }
        ages = [taken["at"] - one.get("timestamp_secs", taken["at"]) for one in waiting]
        entry["oldest_seconds"] = round(max(0.0, *ages), 1) if ages else 0.0
        taken["sources"] += [{"daemon": daemon.id, **one} for one in sources]
        for one in instances:
            if one.daemon != daemon.id:
                continue
            where = f"/{one.name}" if daemon.shared else "/"
            try:
                stats = api.metrics("", where)
                cache = api.metrics("blobcache", f"/{one.name}")
                backend = api.metrics("backend", where)
            except SnapshotterError:
                continue
            taken["images"].append(
                {
                    "image": one.image,
                    "snapshot": one.snapshot,
                    "mount": one.name,  # of one snapshot there is one for each user namespace
                    "daemon": daemon.id,
                    "reads": stats["fop_hits"][READ],
                    "read_bytes": stats["data_read"],
                    "read_errors": stats["fop_errors"][READ],
                    "read_micros": stats["fop_cumulative_latency_total"][READ],
                    "lookups": stats["fop_hits"][LOOKUP],
                    "cache_hits": cache["partial_hits"] + cache["whole_hits"],
                    "cache_asked": cache["total"],
                    "prefetched": cache.get("prefetch_segments", 0),
                    "prefetch_used": cache.get("prefetch_used", 0),
                    "fetched_bytes": backend["read_amount_total"],
                    "fetches": backend["read_count"],
                    "fetch_errors": backend["read_errors"],
                }
            )
    return taken


_COUNTERS = (
    *("reads", "read_bytes", "read_errors", "read_micros", "lookups"),
    *("cache_hits", "cache_asked", "fetched_bytes", "fetches", "fetch_errors"),
)


def rates(before: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """The images of `now`, busiest first, with `per_second` of each counter since `before`."""
    elapsed = max(0.001, now["at"] - before["at"])
    old = {(one["daemon"], one["mount"]): one for one in before["images"]}
    found = []
    for one in now["images"]:
        was = old.get((one["daemon"], one["mount"]), {})
        # after a worker's death counters begin at 0 again
        speed = {name: max(0, one[name] - was.get(name, 0)) / elapsed for name in _COUNTERS}
        found.append({**one, "per_second": {name: round(value, 3) for name, value in speed.items()}})
    return sorted(found, key=lambda one: (-one["per_second"]["read_bytes"], -one["read_bytes"]))


WIDE = 130  # columns of a terminal; below, the names and what changes are shown


def render(before: dict[str, Any], now: dict[str, Any], width: int = WIDE) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from snapshotter.explain.show import seconds, size

    def table(columns: Mapping[str, bool]) -> tuple[Table, Callable[..., None]]:
        """The table and what adds a row. Column -> whether it is there on a narrow terminal too; names are folded."""
        made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", expand=False)
        shown = [always or width >= WIDE for always in columns.values()]
        for at, column in enumerate(columns):
            if shown[at]:
                made.add_column(
                    column.lstrip(">"),
                    justify="right" if column.startswith(">") else "left",
                    no_wrap=at > 0,
                    overflow="fold",
                )

        def add(*cells: str | Text) -> None:
            made.add_row(*(cell for cell, there in zip(cells, shown, strict=True) if there))

        return made, add

    head = Text(time.strftime("%H:%M:%S", time.localtime(now["at"])), style="bold")
    for one in now["daemons"]:
        style = "" if one["state"] == "RUNNING" else "bold red"
        waits = f", {one['waiting']} waiting (oldest {one['oldest_seconds']:.1f} s)" if one["waiting"] else ""
        memory = f", {one['memory_kb'] / 1024:.0f} MiB" if "memory_kb" in one else ""
        head.append(f"   nydusd {one['id'][-6:]} pid {one['pid']} {one['state']}{memory}{waits}", style=style)
    images, add_image = table(
        {"image": True, ">reads/s": True, ">read/s": True, ">avg": False, ">failed": True, ">cache": True,
         ">ahead used": False, ">fetched/s": True, ">fetched": False}
    )  # fmt: skip
    for one in rates(before, now):
        speed = one["per_second"]
        average = one["read_micros"] / one["reads"] / 1e6 if one["reads"] else None
        asked = one["cache_hits"] + one["fetches"]  # pieces of files; `cache_asked` are reads, of several pieces each
        cache = f"{100 * one['cache_hits'] / asked:.0f} %" if asked else ""
        ahead = f"{one['prefetch_used']}/{one['prefetched']}" if one["prefetched"] else ""
        failed = Text(str(one["read_errors"]), style="bold red" if one["read_errors"] else "")
        reads = f"{speed['reads']:.0f}"
        add_image(one["image"], reads, size(speed["read_bytes"]), seconds(average), failed, cache, ahead,
                  size(speed["fetched_bytes"]), size(one["fetched_bytes"]))  # fmt: skip
    sources, add_source = table(
        {"source": True, "state": True, ">first byte": True, ">speed": True, ">errors": True, ">in flight": False,
         ">bytes": True, "last failure": False}
    )  # fmt: skip
    for one in now["sources"]:
        state = Text(str(one["state"]), style={"up": "green", "down": "bold red"}.get(one["state"], "yellow"))
        first = seconds(one["first_byte_millis"] / 1000) if one["first_byte_millis"] is not None else ""
        fast = f"{size(one['bytes_per_second'])}/s" if one["bytes_per_second"] is not None else ""
        add_source(one["address"], state, first, fast, f"{100 * one['error_rate']:.1f} %", str(one["in_flight"]),
                   size(one.get("bytes", 0)), one["last_failure"][:60])  # fmt: skip
    return Group(head, Text(), images, Text(), sources)


@click.command("top")
@where_to_look
@click.option("--interval", "-d", type=click.FloatRange(0.1), default=2.0, show_default=True, metavar="SECONDS")
@click.option("--once", is_flag=True, help="Show one interval and end.")
@click.option("--json", "as_json", is_flag=True, help="One object an interval, a line each; with --once one object.")
def command(
    root: str, config: str, containerd: str, containerd_config: str, namespace: str, interval: float, once: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Images, mirrors and daemons at work, again and again. Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    from snapshotter.errors import SnapshotterError
    from snapshotter.node import Choices, Node

    arguments = ("--config", config) if config else ()
    try:
        node = Node(Choices(root, arguments, containerd, containerd_config, "", namespace))
        before = look(node)
        if as_json or once:
            while True:
                time.sleep(interval)
                now = look(node)
                if as_json:
                    click.echo(json.dumps({**now, "images": rates(before, now)}))
                else:
                    console = Console() if sys.stdout.isatty() else Console(width=WIDE)
                    console.print(render(before, now, console.width))
                if once:
                    return
                before = now
        with Live(screen=True, auto_refresh=False) as live:
            live.update(render(before, before, live.console.width), refresh=True)
            while True:
                time.sleep(interval)
                now = look(node)
                live.update(render(before, now, live.console.width), refresh=True)
                before = now
    except SnapshotterError as failure:
        raise click.ClickException(str(failure)) from None
    except KeyboardInterrupt:  # the way it ends
        return
