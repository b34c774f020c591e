"""The routes of the daemon's HTTP API and the shape of their answers."""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from nydusfs import stacks
from nydusfs.config import load_config
from nydusfs.daemon.caches import Caches
from nydusfs.daemon.errors import (
    DOES_NOT_EXIST,
    ApiError,
    BadRequestError,
    MountFailedError,
    NoCounterError,
    NoRouteError,
    UnexpectedEventError,
    rust_string,
)
from nydusfs.daemon.http import Request, Response
from nydusfs.daemon.logs import LEVELS, ErrorRing
from nydusfs.daemon.mounted import MountedImage, MountRequest
from nydusfs.daemon.mounts import MountTable, sole
from nydusfs.daemon.state import State
from nydusfs.daemon.superblock import superblock_info
from nydusfs.daemon.version import build_info
from nydusfs.drivers.fuse import InFlightInfo
from nydusfs.errors import CacheError, ConfigError, NydusError
from nydusfs.redact import HIDDEN, public_url

log = logging.getLogger("nydusfs.api")

SLOWEST = 20
RUNTIME_KEYS = ("registry_auth", "proxy_url", "dragonfly_scheduler_endpoint")


class DaemonControl(Protocol):
    """What the API needs of the daemon around it."""

    id: str | None
    supervisor: str | None
    mounts: MountTable
    events: ErrorRing

    @property
    def state(self) -> State: ...
    @property
    def keeper_pid(self) -> int | None: ...
    def start(self) -> None: ...
    async def send_fd(self) -> None: ...
    async def take_over(self) -> None: ...
    async def upgrade(self) -> Callable[[], None]:
        """Has the keeper get ready for a worker of the installed code; the returned call retires this one."""

    async def exit(self) -> Callable[[], None]:
        """Change to STOPPED; the returned call ends the process without unmounting."""

    def inflight(self) -> list[InFlightInfo]: ...
    async def drop_blob(self, blob_id: str) -> bool:
        """Delete what is cached of a blob. False: an image has it that is mounted or about to be, so it stays."""

    @property
    def caches(self) -> Caches: ...
    def sources(self) -> list[dict[str, Any]]:
        """What is known of each mirror, proxy and origin in use."""

    def set_log_level(self, level: str) -> None: ...
    def set_runtime_config(self, config_id: str, values: dict[str, str]) -> None: ...
    def runtime_config(self, config_id: str) -> dict[str, str]: ...


Route = Callable[[Request], Awaitable[Response]]


def _json(value: Any) -> Response:
    return Response(200, json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode())


_EXPECTED: dict[type, str] = {str: "a string", dict: "a map", list: "a sequence"}
_FOUND = ((dict, "map"), (list, "sequence"), (str, "string"))


def _bad_body(body: bytes, message: str, line: int = 1, column: int | None = None) -> BadRequestError:
    place = f"line: {line}, column: {len(body.rstrip()) if column is None else column}"
    return BadRequestError(f"ParseBody(Error({rust_string(message)}, {place}))")


def _invalid_type(value: Any, expected: type) -> str:
    """As serde words it."""
    if isinstance(value, bool):
        found = f"boolean `{str(value).lower()}`"
    elif isinstance(value, int):
        found = f"integer `{value}`"
    elif isinstance(value, float):
        found = f"floating point `{value}`"
    else:
        found = next((name for kind, name in _FOUND if isinstance(value, kind)), "null")
    return f"invalid type: {found}, expected {_EXPECTED[expected]}"


def parse_body(body: bytes, **fields: type) -> dict[str, Any]:
    """A JSON object with at least these fields, of these types; messages as serde words them, but without strings that
    were sent: they may be secrets."""
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        what = "expected value"
        if error.msg == "Extra data":
            what = "trailing characters"
        elif error.pos >= len(body.rstrip()):
            what = "EOF while parsing " + ("an object" if "property name" in error.msg else "a value")
        raise _bad_body(body, what, error.lineno, error.colno) from None
    except (UnicodeDecodeError, RecursionError, ValueError):
        raise _bad_body(body, "expected value", 1, 1) from None
    if not isinstance(value, dict):
        raise _bad_body(body, _invalid_type(value, dict))
    for name, kind in fields.items():
        if name not in value:
            raise _bad_body(body, f"missing field `{name}`")
        if not isinstance(value[name], kind):
            raise _bad_body(body, _invalid_type(value[name], kind))
    return value


def _check_auth(text: str) -> None:
    """Upstream takes any text and learns of a bad one from the registry; ours says so at once, takes it all the same,
    and refuses only what could break out of a header."""
    if not all("!" <= character <= "~" for character in text):
        raise ApiError("ResponsePayloadType")
    try:
        usable = not text or b":" in base64.b64decode(text, validate=True)
    except ValueError:
        usable = False
    if not usable:
        log.warning("registry_auth is not base64 of user:password: registries will refuse it")


def _is_text(value: str) -> bool:
    """False with half a surrogate pair in it, which JSON may hold."""
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


class Api:
    def __init__(self, daemon: DaemonControl) -> None:
        self._daemon = daemon
        # path -> (name in error messages, {(method, has a body): handler})
        self._routes: dict[str, tuple[str, dict[tuple[str, bool], Route]]] = {
            "/api/v1/daemon": (
                "DaemonInfo",
                {("GET", False): self._info, ("PUT", True): self._configure},
            ),
            "/api/v1/daemon/start": ("Configure", {("PUT", False): self._start}),
            "/api/v1/daemon/exit": ("Configure", {("PUT", False): self._exit}),
            "/api/v1/daemon/upgrade": ("Upgrade", {("PUT", False): self._upgrade}),
            "/api/v1/daemon/stacks": ("Stacks", {("GET", False): self._stacks}),
            "/api/v1/daemon/events": ("Events", {("GET", False): self._events}),
            "/api/v1/daemon/backend": ("FsBackendInfo", {("GET", False): self._backend}),
            "/api/v1/daemon/fuse/sendfd": ("Upgrade", {("PUT", False): self._send_fd}),
            "/api/v1/daemon/fuse/takeover": ("Upgrade", {("PUT", False): self._takeover}),
            "/api/v1/mount": (
                "Mount",
                {("POST", True): self._mount, ("PUT", True): self._remount, ("DELETE", False): self._umount},
            ),
            "/api/v1/mounts": ("Mounts", {("POST", True): self._mount_all}),
            "/api/v1/mount/expected": ("Mount", {("POST", True): self._expect}),
            "/api/v1/mount/attached": ("Mount", {("POST", False): self._attached}),
            "/api/v1/metrics": ("GlobalMetrics", {("GET", False): self._fs_metrics}),
            "/api/v1/metrics/files": ("FsFilesMetrics", {("GET", False): self._files_metrics}),
            "/api/v1/metrics/pattern": ("Pattern", {("GET", False): self._pattern_metrics}),
            "/api/v1/metrics/backend": ("BackendMetrics", {("GET", False): self._backend_metrics}),
            "/api/v1/metrics/blobcache": ("BlobcacheMetrics", {("GET", False): self._cache_metrics}),
            "/api/v1/metrics/sources": ("SourcesMetrics", {("GET", False): self._sources}),
            "/api/v1/metrics/slow": ("SlowMetrics", {("GET", False): self._slow}),
            "/api/v1/metrics/inflight": ("InflightMetrics", {("GET", False): self._inflight}),
            "/api/v1/config": (
                "Configure",
                {("GET", False): self._get_config, ("PUT", True): self._put_config},
            ),
            "/api/v1/cache": (
                "Cache",
                {("GET", False): self._cache, ("PUT", True): self._change_cache},
            ),
            "/api/v1/profile": (
                "Profile",
                {("GET", False): self._profile, ("PUT", True): self._set_profile},
            ),
            "/api/v2/daemon": (
                "DaemonInfo",
                {("GET", False): self._info_v2, ("PUT", True): self._configure},
            ),
            "/api/v2/blobs": ("GetBlobObjects", {}),
        }
        blobs = self._routes["/api/v2/blobs"][1]
        blobs[("GET", False)] = self._list_blobs
        blobs[("PUT", True)] = self._put_blob
        blobs[("DELETE", False)] = self._delete_blob

    async def handle(self, request: Request) -> Response:
        """One request; every failure becomes the error body with its status."""
        outer = ""
        try:
            if request.path not in self._routes:
                raise NoRouteError("NoRoute")
            outer, methods = self._routes[request.path]
            if request.method == "PUT" and outer == "DaemonInfo":
                outer = "Configure"
            if outer == "Mount":
                self._mountpoint(request)
            handler = methods.get((request.method, bool(request.body)))
            if handler is None:
                raise BadRequestError("BadRequest")
            return await handler(request)
        except (BadRequestError, NoRouteError) as error:
            return self._failure(error.status, error.detail)
        except ApiError as error:
            return self._failure(error.status, f"{outer}({error.detail})")
        except Exception as error:
            # The cause is for the log; what reaches a client must not carry internals.
            debugging = log.isEnabledFor(logging.DEBUG)
            log.error("%s %s: %s: %s", request.method, request.path, type(error).__name__, error, exc_info=debugging)
            return self._failure(500, f"{outer}(Internal)")

    @staticmethod
    def _failure(status: int, message: str) -> Response:
        body = json.dumps({"code": "UNDEFINED", "message": message}, separators=(",", ":"), ensure_ascii=False)
        # JSON may hold half a surrogate pair, which is no text: escaped again it is what was sent.
        return Response(status, body.encode("utf-8", "backslashreplace"))

    # -- the daemon itself

    async def _info(self, request: Request) -> Response:
        collection = {path: mounted.public() for path, mounted in self._daemon.mounts.images.items()}
        return _json(self._daemon_info(collection))

    async def _info_v2(self, request: Request) -> Response:
        return _json(self._daemon_info(None))

    def _daemon_info(self, collection: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "version": build_info(),
            "id": self._daemon.id,
            "supervisor": self._daemon.supervisor,
            "state": self._daemon.state.value,
            "keeper_pid": self._daemon.keeper_pid,
            "worker_pid": os.getpid(),
            "backend_collection": collection,
        }

    async def _configure(self, request: Request) -> Response:
        level = parse_body(request.body, log_level=str)["log_level"]
        if level.lower() not in LEVELS:
            raise ApiError("ResponsePayloadType")
        self._daemon.set_log_level(level)
        return Response()

    async def _start(self, request: Request) -> Response:
        self._daemon.start()
        return Response()

    async def _exit(self, request: Request) -> Response:
        return Response(204, then=await self._daemon.exit())

    async def _events(self, request: Request) -> Response:
        return _json(self._daemon.events.public())

    async def _stacks(self, request: Request) -> Response:
        return _json({"pid": os.getpid(), **stacks.report()})

    async def _send_fd(self, request: Request) -> Response:
        await self._daemon.send_fd()
        return Response()

    async def _takeover(self, request: Request) -> Response:
        if self._daemon.state is not State.INIT:
            raise UnexpectedEventError("Takeover")
        await self._daemon.take_over()
        return Response()

    async def _upgrade(self, request: Request) -> Response:
        return Response(204, then=await self._daemon.upgrade())

    async def _backend(self, request: Request) -> Response:
        mounted = self._daemon.mounts.get(self._mountpoint(request))
        if mounted is None:
            raise ApiError(f"Metrics(Daemon(Other({rust_string(DOES_NOT_EXIST)})))")
        return _json(superblock_info(mounted.image.metadata))

    # -- mounts

    @staticmethod
    def _mountpoint(request: Request) -> str:
        if "mountpoint" not in request.query:
            raise BadRequestError("QueryString(\"'mountpoint' should be specified in query string\")")
        return request.query["mountpoint"]

    def _mount_request(self, request: Request) -> MountRequest:
        mountpoint = self._mountpoint(request)
        body = parse_body(request.body, source=str, config=str)
        kind = body.get("fs_type", "")
        if not isinstance(kind, str):
            raise _bad_body(request.body, _invalid_type(kind, str))
        if kind in ("passthroughfs", "passthrough", "passthrough_fs"):
            raise MountFailedError("invalid argument `passthrough file systems are not supported by this daemon`")
        if kind != "rafs":
            raise MountFailedError(
                f"invalid argument `only 'rafs' and 'passthrough_fs' are supported, but {kind} was specified`"
            )
        prefetch, text = body.get("prefetch_files"), body["config"]
        prefetch = [] if prefetch is None else prefetch
        if not isinstance(prefetch, list):
            raise _bad_body(request.body, _invalid_type(prefetch, list))
        for path in prefetch:
            if not isinstance(path, str):
                raise _bad_body(request.body, _invalid_type(path, str))
            if not path.startswith("/") or not _is_text(path):
                raise MountFailedError("invalid prefetch file list")
        if request.method == "PUT" and self._daemon.mounts.get(mountpoint) is None:
            raise MountFailedError(DOES_NOT_EXIST)
        try:
            config = load_config(text, f"configuration of {mountpoint}")
        except ConfigError as error:
            log.error("mount at %s refused: %s", mountpoint, error)
            raise MountFailedError(f"RAFS failed to handle request, Failed to load config: {error}") from None
        return MountRequest(mountpoint, body["source"], config, tuple(prefetch), text)

    async def _mount(self, request: Request) -> Response:
        later = request.query.get("attach") == "later"
        await self._daemon.mounts.mount(self._mount_request(request), later=later)
        return Response()

    async def _mount_all(self, request: Request) -> Response:
        """Bodies of mounts, each with its `mountpoint`. The answer has null or an error's message for each."""
        try:
            items = json.loads(request.body)
        except (ValueError, RecursionError):
            items = None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise _bad_body(request.body, "expected a sequence of mounts")
        failed: dict[int, ApiError] = {}
        wanted: dict[int, MountRequest] = {}
        for number, item in enumerate(items):
            query = {"mountpoint": at} if isinstance(at := item.get("mountpoint"), str) else {}
            try:
                body = json.dumps(item).encode()
                wanted[number] = self._mount_request(Request("POST", request.path, query, body))
            except ApiError as error:
                failed[number] = error
        done = await self._daemon.mounts.mount_all(list(wanted.values()))
        failed |= {number: one for number, one in zip(wanted, done, strict=True) if isinstance(one, MountFailedError)}
        return _json([f"Mount({failed[number].detail})" if number in failed else None for number in range(len(items))])

    async def _expect(self, request: Request) -> Response:
        self._daemon.mounts.expect(self._mount_request(request))
        return Response()

    async def _attached(self, request: Request) -> Response:
        await self._daemon.mounts.attached(self._mountpoint(request))
        return Response()

    async def _remount(self, request: Request) -> Response:
        await self._daemon.mounts.remount(self._mount_request(request))
        return Response()

    async def _umount(self, request: Request) -> Response:
        await self._daemon.mounts.umount(self._mountpoint(request))
        return Response()

    # -- metrics

    def _counted(self, request: Request, *, by_config: bool = False) -> MountedImage:
        images = list(self._daemon.mounts.images.values())
        if "id" not in request.query:
            found = sole(images)
        elif by_config:
            wanted = request.query["id"]
            found = next((m for m in images if m.request.config.id == wanted), None)
        else:
            found = self._daemon.mounts.get(request.query["id"])
        if found is None:
            raise NoCounterError()
        return found  # type: ignore[no-any-return]

    async def _fs_metrics(self, request: Request) -> Response:
        return _json(self._counted(request).stats.public())

    async def _files_metrics(self, request: Request) -> Response:
        stats = self._counted(request).stats
        return _json(stats.take_latest() if request.query.get("latest") == "true" else stats.files())

    async def _pattern_metrics(self, request: Request) -> Response:
        return _json(self._counted(request).stats.pattern())

    async def _backend_metrics(self, request: Request) -> Response:
        return _json(self._counted(request).image.backend_metrics())

    async def _sources(self, request: Request) -> Response:
        return _json(self._daemon.sources())

    async def _cache_metrics(self, request: Request) -> Response:
        return _json(self._counted(request, by_config=True).image.cache_metrics())

    async def _slow(self, request: Request) -> Response:
        """The files that readers waited for longest, those that could not be read, and when the first read was."""
        mounted = self._counted(request)
        stats = mounted.stats
        slow = sorted(stats.slow.items(), key=lambda item: -item[1][1])[:SLOWEST]
        failed = sorted(stats.failed.items(), key=lambda item: -item[1])[:SLOWEST]
        paths = await mounted.image.paths({ino for ino, _ in slow} | {ino for ino, _ in failed})
        return _json(
            {
                "mounted_at": mounted.mounted_ns / 1e9,
                "first_read_at": stats.first_read / 1e9 if stats.first_read else None,
                "first_read_micros": stats.first_took // 1000,
                "files": [
                    {
                        "path": paths[ino],
                        "reads": reads,
                        "waited_micros": total // 1000,
                        "longest_micros": longest // 1000,
                    }
                    for ino, (reads, total, longest) in slow
                ],
                "failed": [{"path": paths[ino], "reads": count} for ino, count in failed],
            }
        )

    async def _profile(self, request: Request) -> Response:
        try:
            return _json(await self._counted(request).image.profile())
        except NydusError as error:
            raise ApiError(f"Other({rust_string(str(error))})", 404) from None

    async def _set_profile(self, request: Request) -> Response:
        try:
            await self._counted(request).image.set_profile(request.body)
        except NydusError as error:
            raise ApiError(f"Other({rust_string(str(error))})", 400) from None
        return Response()

    async def _inflight(self, request: Request) -> Response:
        requests = [
            {"inode": item.node, "opcode": item.opcode, "unique": item.unique, "timestamp_secs": int(item.started)}
            for item in self._daemon.inflight()
        ]
        return _json(requests) if requests else Response()

    # -- settings changed while running

    async def _get_config(self, request: Request) -> Response:
        config_id = request.query.get("id", "")
        values = self._daemon.runtime_config(config_id)
        # Secrets go in and never come out; upstream shows them.
        return _json({key: HIDDEN if key == "registry_auth" else public_url(value) for key, value in values.items()})

    async def _put_config(self, request: Request) -> Response:
        values = parse_body(request.body)
        for value in values.values():
            if not isinstance(value, str):
                raise _bad_body(request.body, _invalid_type(value, str))
        if not all(key in RUNTIME_KEYS for key in values):
            raise ApiError("ResponsePayloadType")
        _check_auth(values.get("registry_auth", ""))
        self._daemon.set_runtime_config(request.query.get("id", ""), values)
        return Response()

    # -- the caches, for `nydusctl cache`

    async def _cache(self, request: Request) -> Response:
        return _json(self._daemon.caches.report())

    async def _change_cache(self, request: Request) -> Response:
        """Segments of one blob of one store that go (`drop`), or come from a staging directory (`adopt`)."""
        body = parse_body(request.body, store=str, blob_id=str)
        names = body.get("adopt" if "staged" in body else "drop")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _bad_body(request.body, "expected names of segments in `drop`, or in `adopt` with `staged`")
        caches, store, blob_id = self._daemon.caches, body["store"], body["blob_id"]
        try:
            if "staged" in body:
                return _json(await caches.adopt(store, blob_id, names, str(body["staged"])))
            return _json(await caches.drop(store, blob_id, names, damaged=body.get("damaged") is True))
        except CacheError as error:
            raise ApiError(f"Other({rust_string(str(error))})") from None

    # -- blobs for the kernel's fscache driver, which this daemon does not have

    async def _list_blobs(self, request: Request) -> Response:
        if "domain_id" not in request.query:
            raise BadRequestError("BadRequest")
        return _json([])

    async def _put_blob(self, request: Request) -> Response:
        entry = parse_body(request.body, type=str, id=str)
        config = entry.get("config")
        if isinstance(config, dict):
            parse_body(json.dumps(config).encode(), backend_type=str)
        elif not isinstance(entry.get("config_v2"), dict):
            raise BadRequestError("BadRequest")
        return self._failure(501, "CreateBlobObject(DaemonAbnormal(Unsupported))")

    async def _delete_blob(self, request: Request) -> Response:
        if "domain_id" in request.query:
            return self._failure(501, "DeleteBlobObject(DaemonAbnormal(Unsupported))")
        if "blob_id" in request.query:
            dropped = await self._daemon.drop_blob(request.query["blob_id"])
            return Response() if dropped else _json({"kept": True})
        raise BadRequestError("BadRequest")
