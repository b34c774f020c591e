"""The system controller: upstream's HTTP API for operators (snapshotter.md 5.1), and what `nydusctl` asks beyond it.

It is served on two sockets: upstream's (`system.address`, when `system.enable`), and always on `<root>/system.sock`, so
that `nydusctl` finds each snapshotter by its root. Both are root's alone.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nydusfs import stacks
from snapshotter import httpd, logs
from snapshotter.daemons import Daemon
from snapshotter.errors import NotFound, SnapshotterError
from snapshotter.httpd import Reply, Request, as_json, as_text, failure
from snapshotter.images import Images
from snapshotter.nydusd_api import ApiError, ApiUnreachable
from snapshotter.records import Records
from snapshotter.settings import Settings
from snapshotter.tally import tally

log = logging.getLogger(__name__)

SOCKET = "system.sock"  # below the root
MAX_PROFILE_SECONDS = 120.0


class Controller:
    """`records` is read by the threads of the server."""

    def __init__(self, settings: Settings, images: Images, records: Records) -> None:
        self._settings = settings
        self._images = images
        self._records = records
        self._upgrading = threading.Lock()
        self.routes: httpd.Routes = {
            r"/api/v1/daemons": {"GET": self._daemons},
            # the second path is what nydus' documentation calls it
            r"/api/v1/daemons/upgrade": {"PUT": self._upgrade},
            r"/api/v1/nydusd/upgrade": {"PUT": self._upgrade},
            r"/api/v1/daemons/records": {"GET": self._all_records},
            r"/api/v1/daemons/(?P<id>[^/]+)/backend": {"GET": self._backend},
            r"/api/v1/daemons/(?P<id>[^/]+)/stacks": {"GET": self._daemon_stacks},
            r"/api/v1/prefetch": {"PUT": self._prefetch},
            r"/api/v1/images": {"GET": self._list_images},
            r"/api/v1/times": {"GET": self._times},
            r"/api/v1/log": {"GET": self._get_log, "PUT": self._put_log},
            r"/api/v1/stacks": {"GET": lambda _: as_json({"pid": os.getpid(), **stacks.report()})},
        }
        self.debug_routes: httpd.Routes = {
            r"/debug/pprof/?": {"GET": lambda _: as_text(_INDEX)},
            r"/debug/pprof/goroutine": {"GET": lambda _: as_text(stacks.as_text(stacks.report()))},
            r"/debug/pprof/threads": {"GET": lambda _: as_text(stacks.as_text(stacks.report()))},
            r"/debug/pprof/cmdline": {"GET": _cmdline},
            r"/debug/pprof/profile": {"GET": _profile},
            r"/debug/pprof/daemons/(?P<id>[^/]+)": {"GET": self._daemon_stacks_text},
        }

    # ---- upstream's

    def _daemons(self, request: Request) -> Reply:
        return as_json([self._describe(daemon) for daemon in self._images.daemons()])

    def _describe(self, daemon: Daemon) -> dict[str, Any]:
        instances = self._images.instances(daemon.id)
        read = 0
        for one in instances:
            try:
                read += daemon.api.metrics(identity=f"/{one.name}" if daemon.shared else None)["data_read"]
            except ApiUnreachable:
                break  # one that hangs costs one wait, not one for each of its images
            except (SnapshotterError, TypeError, KeyError):
                pass
        return {
            "id": daemon.id,
            "pid": daemon.pid,
            "api_socket": str(daemon.record.socket),
            "supervisor_path": "",
            "reference": len(instances) + daemon.shared,
            "mountpoint": str(daemon.mountpoint),
            "startup_cpu_utilization": daemon.startup_cpu,
            "memory_rss_kb": float(daemon.memory_kb()),
            "read_data_kb": read / 1024,
            "instances": {
                one.name: {
                    "snapshot_id": one.name,
                    "snapshot_dir": str(_snapshot_directory(one.bootstrap)),
                    "mountpoint": str(self._images.mountpoint(one)),
                    "image_id": one.image,
                }
                for one in instances
            },
        }

    def _upgrade(self, request: Request) -> Reply:
        """Every daemon goes over to the code that is installed now, one after the other, under its mounts."""
        value = _body(request, dict)
        if value is None:
            return failure(400, 'the body is not JSON such as {"nydusd_path": "...", "policy": "rolling"}')
        path = str(value.get("nydusd_path") or "")
        if path and not _same_program(path, self._settings.nydusd):
            return failure(
                500,
                f"nydusd_path {path} is another installation than {self._settings.nydusd}, which runs: install the new "
                "version there and ask again, with or without its path",
            )
        with self._upgrading:
            try:
                self._images.upgrade()
            except SnapshotterError as error:
                log.error("not upgraded: %s", error)
                return failure(500, str(error))
        return Reply()

    def _all_records(self, request: Request) -> Reply:
        """Upstream answers 501 here."""
        daemons = [
            {
                "id": one.id,
                "shared": one.shared,
                "pid": one.pid,
                "api_socket": str(one.socket),
                "mountpoint": str(one.mountpoint),
            }
            for one in self._records.daemons()
        ]
        instances = [
            {
                "snapshot_id": one.name,
                "daemon_id": one.daemon,
                "image_id": one.image,
                "bootstrap": str(one.bootstrap),
            }
            for one in self._records.instances()
        ]
        return as_json({"daemons": daemons, "instances": instances})

    def _prefetch(self, request: Request) -> Reply:
        """As upstream's: 200 whatever is wrong, which is logged."""
        value = _body(request, list)
        for entry in value or []:
            if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
                log.warning("PUT /api/v1/prefetch: %r names no image", entry)
                continue
            paths = [path for path in str(entry.get("prefetch") or "").splitlines() if path.strip()]
            if wrong := [path for path in paths if not path.startswith("/")]:
                log.warning("PUT /api/v1/prefetch: %s of %s is not an absolute path", wrong[0], entry["image"])
                continue
            self._images.prefetch(entry["image"], paths)
            if self._images.fetches_ahead:
                log.info("%d paths are fetched first at the next mount of %s", len(paths), entry["image"])
            else:
                why = "fs_prefetch.enable is off in nydusd's template"
                log.warning("%s: %d paths of %s will not be fetched ahead", why, len(paths), entry["image"])
        if value is None:
            log.warning("PUT /api/v1/prefetch: the body is not a JSON list")
        return Reply()

    def _backend(self, request: Request) -> Reply:
        return as_json(self._images.backend(request.found["id"]))

    # ---- ours

    def _find(self, request: Request) -> Daemon:
        for daemon in self._images.daemons():
            if daemon.id == request.found["id"]:
                return daemon
        raise NotFound(f"no nydusd {request.found['id']}")

    def _daemon_stacks(self, request: Request) -> Reply:
        return as_json(self._find(request).api.get("daemon/stacks"))

    def _daemon_stacks_text(self, request: Request) -> Reply:
        value = self._find(request).api.get("daemon/stacks")
        return as_text(stacks.as_text({"threads": value["threads"], "tasks": value["tasks"]}))

    def _list_images(self, request: Request) -> Reply:
        sockets = {daemon.id: str(daemon.record.socket) for daemon in self._images.daemons()}
        return as_json(
            [
                {
                    "image": one.image,
                    "snapshot": one.snapshot,
                    "daemon": one.daemon,
                    "api_socket": sockets.get(one.daemon, ""),
                    "mountpoint": str(self._images.mountpoint(one)),
                    "serving": self._images.serves(one),
                    "times": tally.remembered(f"image {one.name}"),
                }
                for one in self._images.instances()
            ]
        )

    def _times(self, request: Request) -> Reply:
        """`?key=KEY`: how long the Prepare of a snapshot took, {} when it was before this program's start."""
        return as_json(tally.remembered(f"snapshot {request.query.get('key', '')}"))

    def _get_log(self, request: Request) -> Reply:
        return as_json({"level": logs.level()})

    def _put_log(self, request: Request) -> Reply:
        """`{"level": "debug", "daemons": true}`: with `daemons` every nydusd follows."""
        value = _body(request, dict)
        if value is None or not isinstance(value.get("level"), str):
            return failure(400, 'the body is not JSON such as {"level": "debug"}')
        logs.set_level(value["level"])
        log.info("log level %s, by the API", value["level"])
        if value.get("daemons"):
            nydusd_level = logs.NYDUSD_LEVELS.get(value["level"].lower(), value["level"].lower())
            for daemon in self._images.daemons():
                try:
                    daemon.api.set_level(nydusd_level)
                except ApiError as error:
                    return failure(500, str(error))
        return Reply()


def _body(request: Request, kind: type) -> Any:
    """None when it is not JSON of this type."""
    try:
        value = json.loads(request.body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, kind) else None


def _same_program(one: str, other: str) -> bool:
    found = [os.path.realpath(shutil.which(path) or path) for path in (one, other)]
    return found[0] == found[1]


def _snapshot_directory(bootstrap: Path) -> Path:
    folder = bootstrap.parent
    return folder.parent.parent if folder.name == "image" else folder.parent


_INDEX = """/debug/pprof/goroutine        what every thread of the snapshotter does
/debug/pprof/profile?seconds=30   the same over a time, as folded stacks for flame graphs
/debug/pprof/cmdline          its command line
/debug/pprof/daemons/ID       what every thread and task of one nydusd does
"""


def _cmdline(request: Request) -> Reply:
    return Reply(200, Path("/proc/self/cmdline").read_bytes().rstrip(b"\0"), "text/plain; charset=utf-8")


def _profile(request: Request) -> Reply:
    try:
        seconds = float(request.query.get("seconds", "30"))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_PROFILE_SECONDS:
        return failure(400, f"seconds must be a number up to {MAX_PROFILE_SECONDS:.0f}")
    return as_text(stacks.sample(seconds))


def serve(
    settings: Settings, root: Path, controller: Controller, metrics: Callable[[Request], Reply]
) -> list[httpd.Server]:
    """All listeners for operators that the settings ask for. Raises StartError; then none is left open."""
    servers: list[httpd.Server] = []
    try:
        servers.append(httpd.Server("system-root", root / SOCKET, controller.routes))
        if settings.system.enable:
            system = settings.system
            servers.append(httpd.Server("system", system.address, controller.routes, uid=system.uid, gid=system.gid))
        if settings.system.pprof_address:
            servers.append(httpd.Server("pprof", settings.system.pprof_address, controller.debug_routes))
        if settings.metrics.address:
            routes = {path: {"GET": metrics} for path in ("/v1/metrics", "/metrics")}
            servers.append(httpd.Server("metrics", settings.metrics.address, routes))
    except BaseException:
        for server in servers:
            server.close()
        raise
    return servers
