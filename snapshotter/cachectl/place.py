"""Which cache directory, whose images, and the nydusd processes at work on it; with or without a snapshotter."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nydusfs.cachetools.images import blob_sizes
from nydusfs.cachetools.inventory import Inventory, take
from nydusfs.cachetools.places import lock_holder, remembered, stores
from nydusfs.config.amount import parse_amount
from nydusfs.errors import CacheError
from snapshotter.cachegc import bootstraps
from snapshotter.errors import SnapshotterError
from snapshotter.labels import IMAGE_REF
from snapshotter.node import Node, nydusds
from snapshotter.nydusd_api import ApiError, NydusdApi

ANSWER_SECONDS = 5.0


@dataclass
class Image:
    """A bootstrap with the blobs it names (id -> plain bytes). `mounted`: where, by which nydusd. `kind`: snapshot,
    mounted (outside of the snapshotter), imported, given."""

    path: Path
    kind: str
    blobs: Mapping[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    mounted: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0] if self.names else str(self.path)


class DaemonHolder:
    """A running nydusd, told by its API."""

    def __init__(self, api: NydusdApi) -> None:
        self.api = api

    def drop(self, store: Path, blob_id: str, names: Sequence[str], damaged: bool) -> list[str]:
        answer = self._change({"store": str(store), "blob_id": blob_id, "drop": list(names), "damaged": damaged})
        return list(answer["dropped"])

    def adopt(self, store: Path, blob_id: str, names: Sequence[str], staged: str) -> tuple[list[str], str]:
        answer = self._change({"store": str(store), "blob_id": blob_id, "adopt": list(names), "staged": staged})
        return list(answer["adopted"]), str(answer["refused"])

    def drop_blob(self, blob_id: str) -> None:
        """All of it. Raises CacheError, also where an image that is open there has it."""
        try:
            gone = self.api.drop_blob(blob_id)
        except SnapshotterError as failure:
            raise CacheError(str(failure)) from None
        if not gone:
            raise CacheError("an image has it that is mounted, or about to be")

    def _change(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return dict(self.api.call("PUT", "/api/v1/cache", body, timeout=60.0))
        except ApiError as failure:
            raise CacheError(failure.reason) from None
        except SnapshotterError as failure:
            raise CacheError(str(failure)) from None


@dataclass
class Daemon:
    """`report` None: it does not answer, or is too old to tell of its cache."""

    socket: Path
    pid: int
    report: dict[str, Any] | None
    problem: str = ""


class Place:
    """`cache_dir` and `given` (bootstraps) replace or add to what the node says. Raises SnapshotterError."""

    def __init__(self, node: Node | None, cache_dir: str = "", given: Iterable[Path] = ()) -> None:
        self._node = node
        if not cache_dir and node is None:
            raise SnapshotterError("no snapshotter and no --cache-dir")
        self.cache = Path(os.path.realpath(cache_dir)) if cache_dir else self._settings_cache()
        self._given = [Path(os.path.realpath(path)) for path in given]
        self._holders: dict[Path, DaemonHolder] = {}

    def _settings_cache(self) -> Path:
        assert self._node is not None
        return Path(os.path.realpath(self._node.need().cache_dir))

    def stores(self) -> list[Inventory]:
        """Raises CacheError."""
        try:
            return [take(path) for path in stores(self.cache)]
        except OSError as error:
            raise CacheError(f"cache {error.filename or self.cache}: {error.strerror or error}") from None

    def users_known(self) -> bool:
        """Whether there is anything that tells which images use this cache."""
        return bool(self._given) or (self._node is not None and (self._node.root / "snapshots").is_dir())

    # ---- nydusd

    @cached_property
    def daemons(self) -> list[Daemon]:
        """Those on record and all others that run here."""
        sockets: dict[Path, int] = {}
        if self._node is not None:
            try:
                sockets = {one.socket: one.pid for one in self._node.daemons()}
            except SnapshotterError:
                pass  # `verify` of a node whose database is lost is as good as any
        for pid, socket in nydusds():
            try:
                path = Path(os.readlink(f"/proc/{pid}/cwd"), socket)
            except OSError:
                continue
            sockets.setdefault(path, pid)
        found = []
        for path, pid in sockets.items():
            try:
                found.append(Daemon(path, pid, NydusdApi(path).get("cache", timeout=ANSWER_SECONDS)))
            except SnapshotterError as failure:
                found.append(Daemon(path, pid, None, str(failure)))
        return found

    def holder(self, store: Path) -> DaemonHolder | None:
        """`nydusfs.cachetools.holder.FindHolder`."""
        pid = lock_holder(store)
        if pid is None:
            return None
        if store in self._holders:
            return self._holders[store]
        wanted = os.path.realpath(store)
        for attempt in range(2):
            if attempt:
                vars(self).pop("daemons", None)
            for daemon in self.daemons:
                for one in (daemon.report or {}).get("stores", ()):
                    if os.path.realpath(one["path"]) == wanted:
                        self._holders[store] = DaemonHolder(NydusdApi(daemon.socket))
                        return self._holders[store]
        if lock_holder(store) is None:
            return None
        raise CacheError(
            f"cache {store} belongs to process {pid}, which cannot be told what changes: a nydusd of an older version, "
            "or one without an API socket; upgrade it (nydusctl snapshotter upgrade) or stop it, and try again"
        )

    def store_report(self, store: Path) -> dict[str, Any]:
        """What the nydusd that has this store says of it, {} when there is none."""
        for daemon in self.daemons:
            for one in (daemon.report or {}).get("stores", ()):
                if os.path.realpath(one["path"]) == os.path.realpath(store):
                    return dict(one)
        return {}

    # ---- images

    @cached_property
    def _read(self) -> tuple[dict[Path, Image], dict[Path, str], set[Path]]:
        images: dict[Path, Image] = {}
        if self._node is not None:
            names, mounted = self._names()
            folder = self._node.root / "snapshots"
            for path in bootstraps(folder) if folder.is_dir() else ():
                directory = path.relative_to(folder).parts[0]
                snapshot = int(directory) if directory.isdecimal() else 0
                name = names.get(snapshot, f"snapshot {directory}")
                images[path] = Image(path, "snapshot", names=[name], mounted=mounted.get(snapshot, []))
        for daemon in self.daemons:
            for one in (daemon.report or {}).get("images", ()) if self._uses(daemon) else ():
                path = Path(os.path.realpath(one["source"]))
                if path not in images:
                    images[path] = Image(path, "mounted")
                if images[path].kind == "mounted":
                    images[path].mounted.append(f"{one['mountpoint']} of nydusd {daemon.pid}")
        for path in remembered(self.cache):
            images.setdefault(path, Image(path, "imported"))
        for path in self._given:
            images.setdefault(path, Image(path, "given"))
        sizes, problems = blob_sizes(images)
        for path, blobs in sizes.items():
            images[path].blobs = blobs
        mounted_here = {path for path in problems if images[path].mounted}
        return {path: images[path] for path in sizes}, problems, mounted_here

    def _uses(self, daemon: Daemon) -> bool:
        """Whether a nydusd has this cache, or a directory of its own below it."""
        paths = [Path(os.path.realpath(one["path"])) for one in (daemon.report or {}).get("stores", ())]
        return any(self.cache in (path, path.parent) for path in paths)

    @property
    def images(self) -> dict[Path, Image]:
        """Every bootstrap of this node that can be read."""
        return self._read[0]

    @property
    def problems(self) -> list[str]:
        """Bootstraps that cannot."""
        return list(self._read[1].values())

    @property
    def unknown_use(self) -> list[str]:
        """Those of them that are mounted: what they use is not known. Others cannot be mounted either."""
        return [problem for path, problem in self._read[1].items() if path in self._read[2]]

    def blob_table(self) -> dict[Path, Mapping[str, int]]:
        return {path: image.blobs for path, image in self.images.items()}

    def _names(self) -> tuple[dict[int, str], dict[int, list[str]]]:
        assert self._node is not None
        names: dict[int, str] = {}
        mounted: dict[int, list[str]] = {}
        try:
            for snapshot, labels in self._node.query("SELECT id, labels FROM snapshots"):
                if name := json.loads(labels).get(IMAGE_REF):
                    names[snapshot] = name
            daemons = {one.id: one for one in self._node.daemons()}
            for one in self._node.instances():
                names[one.snapshot] = one.image
                if one.daemon in daemons:
                    mounted[one.snapshot] = [f"nydusd {daemons[one.daemon].pid}"]
        except (SnapshotterError, ValueError):
            pass
        return names, mounted

    # ---- limits

    def limits(self) -> tuple[int, int]:
        """Bytes that the configuration allows and bytes to leave free, 0: not bounded."""
        running = self.store_report(self.cache)
        if running:
            return int(running["limit"]), int(running["min_free"])
        if self._node is None:
            return 0, 0
        try:
            config = (self._node.template.document["device"].get("cache") or {}).get("config") or {}
            keys = (config.get("limit"), config.get("min_free"))
            limit, floor = (parse_amount(value, str(self.cache)) if value else 0 for value in keys)
        except (SnapshotterError, AttributeError, KeyError, TypeError, ValueError):
            return 0, 0  # what is wrong with it, its nydusd will say
        return limit, floor

    @cached_property
    def _filed(self) -> int:
        """Bytes that the cache held when this was first asked: to look at all its files takes a second."""
        return sum(blob.filed for store in self.stores()[:1] for blob in store.blobs.values())

    def room(self, taken: int) -> int | None:
        """Bytes that may be added beside no nydusd, after so many that were. None: any number."""
        limit, floor = self.limits()
        rooms = []
        if limit:
            rooms.append(limit - self._filed - taken)
        info = os.statvfs(self.cache)
        if floor:
            rooms.append(info.f_bavail * info.f_frsize - floor)
        return max(0, min(rooms)) if rooms else None


__all__ = ["Daemon", "DaemonHolder", "Image", "Place"]
