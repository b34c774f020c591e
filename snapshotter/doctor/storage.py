"""Cache, disk, database, and what crashes left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from nydusfs.drivers import kernel
from nydusfs.trees import disk_usage
from snapshotter.doctor.finding import Finding, error, note, ok, warning
from snapshotter.doctor.services import listens
from snapshotter.errors import InvalidArgument, SnapshotterError
from snapshotter.idmapped import FOLDER
from snapshotter.labels import TARFS, IdMapping, id_mapping
from snapshotter.node import Node, Unreadable, nydusds
from snapshotter.records import instance_of
from snapshotter.system import start_time

FULL, LOW = 0.02, 0.10  # of the disk free
FULL_BYTES, LOW_BYTES = 256 << 20, 1 << 30
ANSWER_SECONDS = 3.0
YOUNG_SECONDS = 60.0  # younger things may be under way
SHOWN = 3


def disk(node: Node) -> Iterator[Finding]:
    settings = node.need()
    seen: set[int] = set()
    for what, path in (("cache", settings.cache_dir), ("root", settings.root)):
        while not path.exists() and path != path.parent:
            path = path.parent
        device = path.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        usage, nodes = shutil.disk_usage(path), os.statvfs(path)
        free = f"{usage.free / 1e9:.1f} GB of {usage.total / 1e9:.1f} GB free for the {what} ({path})"
        share = usage.free / max(1, usage.total)
        remedy = "free some space, or limit the cache: device.cache.config.limit in the nydusd template"
        if (share < FULL and usage.free < LOW_BYTES) or (usage.free < FULL_BYTES and usage.total > 4 * FULL_BYTES):
            if node.template.fs_driver != "fuse":
                remedy += " (EROFS mounts answer EIO for what is not cached where others take all room)"
            yield error("disk.space", f"the disk is full: {free}", remedy)
        elif share < LOW and usage.free < 10 * LOW_BYTES:
            yield warning("disk.space", f"the disk is nearly full: {free}", remedy)
        else:
            yield ok("disk.space", free)
        if nodes.f_files and nodes.f_favail < nodes.f_files * FULL:
            yield error("disk.inodes", f"{nodes.f_favail} of {nodes.f_files} inodes free for the {what} ({path})",
                        "delete files, or another file system")  # fmt: skip


def cache(node: Node) -> Iterator[Finding]:
    folder = node.need().cache_dir
    if not folder.is_dir():
        yield note("cache.size", f"no cache yet: {folder}")
        return
    size = disk_usage(folder)[0]
    blobs = sum(len(entry.name) == 64 for entry in os.scandir(folder))
    try:
        config = (node.template.document["device"].get("cache") or {}).get("config") or {}
    except (SnapshotterError, AttributeError):
        config = {}
    limits = [f"{key} {config[key]}" for key in ("limit", "min_free") if config.get(key)]
    told = f"{size / 1e6:.0f} MB of {blobs} blobs in {folder}, " + (", ".join(limits) or "no limit is set")
    yield ok("cache.size", told)


def database(node: Node) -> Iterator[Finding]:
    try:
        (verdict,) = node.query("PRAGMA quick_check(1)") or [("ok",)]
        if verdict[0] != "ok":
            yield error(
                "root.database", f"the snapshot database is damaged: {verdict[0]}", "docs/errors.md: snapshot database"
            )
            return
        rows = {row[0] for row in node.query("SELECT id FROM snapshots")}
    except Unreadable as failure:
        yield error("root.database", str(failure), "docs/errors.md: snapshot database")
        return
    folder = node.root / "snapshots"
    there = {int(name): name for name in os.listdir(folder) if name.isdecimal()} if folder.is_dir() else {}
    if missing := sorted(rows - set(there)):
        yield error(
            "root.directories",
            f"{len(missing)} snapshots have no directory ({_some(missing)})",
            "remove their images in containerd and pull them again",
        )
    old = time.time() - YOUNG_SECONDS
    left = sorted(number for number in set(there) - rows if _mtime(folder / there[number]) < old)
    if left:
        yield note(
            "root.left",
            f"{len(left)} directories of removed snapshots wait to be deleted ({_some(left)})",
            "containerd's next garbage collection does it",
        )
    if not missing:
        yield ok("root.database", f"{len(rows)} snapshots, each with its directory")


def mounts(node: Node) -> Iterator[Finding]:
    """Mounts below the root: dead ones, and images that no record knows."""
    root = f"{node.root}/"
    try:
        layers = [(row[0], json.loads(row[1])) for row in node.query("SELECT id, labels FROM snapshots")]
        images = {one.snapshot for one in node.instances()} | {layer for layer, labels in layers if TARFS in labels}
        daemons = {str(one.mountpoint): one.id for one in node.daemons()}
        needed = _mapped(layers)
    except SnapshotterError:
        return
    dead, silent, unknown, unneeded = [], [], [], []
    points = {one.mountpoint: one for one in kernel.mounts() if one.mountpoint.startswith(root)}
    for path, entry in points.items():
        if entry.fstype.startswith("fuse"):
            answer = kernel.call_with_deadline(partial(os.statvfs, path), ANSWER_SECONDS)
            if isinstance(answer, OSError) and answer.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                dead.append(path)
                continue
            if isinstance(answer, TimeoutError):
                silent.append(path)
                continue
        number = os.path.basename(path) if path.startswith(f"{root}mnt/") else os.path.basename(os.path.dirname(path))
        if (entry.fstype.startswith("fuse") and path not in daemons) or (
            entry.fstype == "erofs" and number.isdecimal() and int(number) not in images
        ):
            unknown.append(path)
        elif path.startswith(f"{root}{FOLDER}/") and instance_of(os.path.basename(path)) not in needed:
            unneeded.append(path)
    if dead:
        yield error(
            "leftover.mount",
            f"mounts of a dead nydusd: {_some(dead)}; whoever uses them gets ENOTCONN",
            f"restart the snapshotter, which replaces them; or umount -l {dead[0]}",
        )
    if silent:
        yield error(
            "leftover.silent",
            f"mounts that do not answer: {_some(silent)}",
            "nydusctl --sock SOCKET stacks says what hangs",
        )
    if unknown:
        yield warning("leftover.unknown", f"mounts that no record knows: {_some(unknown)}", f"umount -l {unknown[0]}")
    if unneeded:
        yield note(
            "leftover.idmapped",
            f"layers are mounted for user namespaces that no container has any more: {_some(unneeded)}",
            "containerd's next garbage collection unmounts them",
        )
    if not (dead or silent or unknown):
        yield ok("leftover.mount", f"{len(points)} mounts below {node.root}, all of them alive and known")


def _mapped(layers: list[tuple[int, dict[str, str]]]) -> set[tuple[int, IdMapping | None]]:
    """Layers with user namespaces that they may be mounted for. Raises SnapshotterError."""
    mappings = set()
    for _, labels in layers:
        with suppress(InvalidArgument):  # an update made them so
            mappings.add(id_mapping(labels))
    return {(identity, mapping) for identity, _ in layers for mapping in mappings}


def processes_and_sockets(node: Node) -> Iterator[Finding]:
    root = node.root
    try:
        known = {str(one.socket): one for one in node.daemons()}
    except SnapshotterError:
        return
    orphans: dict[str, list[int]] = {}
    for pid, socket in nydusds():
        if socket.startswith(f"{root}/socket/") and socket not in known and start_time(pid):
            orphans.setdefault(socket, []).append(pid)
    for socket, pids in orphans.items():
        yield warning(
            "leftover.process",
            f"nydusd at {socket} (pid {', '.join(map(str, pids))}) belongs to no record: nobody will end it",
            f"look whether something uses its mount, then kill {' '.join(map(str, pids))}",
        )
    folder = root / "socket"
    stale = []
    for path in folder.glob("*/*.sock") if folder.is_dir() else ():
        if (
            str(path) not in known
            and str(path) not in orphans
            and stat.S_ISSOCK(path.lstat().st_mode)
            and not listens(path)
        ):
            stale.append(str(path))
    if stale:
        yield note("leftover.socket", f"sockets of dead daemons: {_some(stale)}", f"rm {stale[0]}")
    if not orphans and not stale:
        yield ok("leftover.process", "no process and no socket without a record")
    trash = root / "trash"
    waiting = [entry.path for entry in os.scandir(trash)] if trash.is_dir() else []
    old = [path for path in waiting if _mtime(Path(path)) < time.time() - 600]
    if old:
        yield note("leftover.trash", f"{len(old)} removed directories are not deleted yet in {trash}",
                   "the snapshotter deletes them at its next start")  # fmt: skip


def _mtime(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return time.time()


def _some(values: list[int] | list[str]) -> str:
    shown = ", ".join(map(str, values[:SHOWN]))
    return shown + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")


CHECKS = (disk, cache, database, mounts, processes_and_sockets)
