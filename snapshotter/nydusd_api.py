"""nydusd's HTTP API over its unix socket: the calls of snapshotter.md 6, blocking, one connection a call."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nydusfs.unixhttp import UnixConnection
from snapshotter.errors import SnapshotterError, Unavailable

DIAL_SECONDS = 5.0
REQUEST_SECONDS = 30.0
MAX_REPLY = 16 << 20
_WRAPPED = re.compile(r'(?:\w+\()+("(?:[^"\\]|\\.)*")\)+')


class ApiError(SnapshotterError):
    """nydusd answered with an error. `message` is its own text."""

    def __init__(self, what: str, status: int, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(f"{what}: nydusd answered {status}: {message}")

    @property
    def reason(self) -> str:
        """The innermost text of `Mount(MountFilesystem(Other("...")))`, the whole message if it has another form."""
        found = _WRAPPED.fullmatch(self.message)
        if found is None:
            return self.message
        try:
            return str(json.loads(found[1])).removeprefix("RAFS failed to handle request, ")
        except ValueError:
            return self.message


class ApiUnreachable(Unavailable):
    """Nobody answers on the socket. `hung`: somebody is there, and says nothing."""

    def __init__(self, message: str, *, hung: bool = False) -> None:
        super().__init__(message)
        self.hung = hung


def _mount(bootstrap: Path, config: str, prefetch: Sequence[str] = ()) -> dict[str, Any]:
    body: dict[str, Any] = {"fs_type": "rafs", "source": str(bootstrap), "config": config}
    return {**body, "prefetch_files": list(prefetch)} if prefetch else body


class NydusdApi:
    """One daemon's API. Every method raises ApiUnreachable or ApiError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def info(self, timeout: float = REQUEST_SECONDS) -> dict[str, Any]:
        reply = self.call("GET", "/api/v1/daemon", timeout=timeout)
        if not isinstance(reply, dict):
            raise ApiError("GET /api/v1/daemon", 200, "the body is not a JSON object")
        return reply

    def mounted(self) -> set[str] | None:
        """Mountpoints served now (`/12`); None if this daemon does not tell."""
        collection = self.info().get("backend_collection")
        return set(collection) if isinstance(collection, dict) else None

    def mount(
        self, mountpoint: str, bootstrap: Path, config: str, prefetch: Sequence[str] = (), *, later: bool = False
    ) -> None:
        """`mountpoint` is a path inside the daemon's tree; `config` is JSON text and may hold secrets; `prefetch`:
        absolute paths in the image. `later`: it is enough for now that FUSE shows it, see `attached`."""
        query = f"mountpoint={quote(mountpoint)}" + ("&attach=later" if later else "")
        self.call("POST", f"/api/v1/mount?{query}", _mount(bootstrap, config, prefetch))

    def attached(self, mountpoint: str) -> None:
        """Returns when the kernel's mount of an image that was mounted `later` is there, or will not be."""
        try:
            self.call("POST", f"/api/v1/mount/attached?mountpoint={quote(mountpoint)}")
        except ApiError as error:
            if error.status != 404:  # of a daemon that knows nothing of kernel mounts
                raise

    def mount_all(self, wanted: Sequence[tuple[str, Path, str, Sequence[str]]]) -> list[str | None] | None:
        """Arguments of `mount`, many times. For each None or nydusd's own text of why not; None for the whole if this
        daemon cannot be asked so."""
        body = [{"mountpoint": at, **_mount(source, config, prefetch)} for at, source, config, prefetch in wanted]
        try:
            reply = self.call("POST", "/api/v1/mounts", body)
        except ApiError as error:
            if error.status in (400, 404):
                return None
            raise
        return reply if isinstance(reply, list) and len(reply) == len(body) else None

    def expect(self, mountpoint: str, bootstrap: Path, config: str) -> None:
        """`mount` with these arguments is likely to follow."""
        self.call("POST", f"/api/v1/mount/expected?mountpoint={quote(mountpoint)}", _mount(bootstrap, config))

    def metrics(self, kind: str = "", identity: str | None = None, timeout: float = 5.0) -> Any:
        """`kind`: "", backend, blobcache, sources, inflight, slow; `identity`: `/12`. None where there is nothing."""
        path = f"/api/v1/metrics/{kind}".rstrip("/")
        return self.call("GET", path if identity is None else f"{path}?id={quote(identity)}", timeout=timeout)

    def get(self, path: str, timeout: float = 5.0) -> Any:
        """GET /api/v1/`path`."""
        return self.call("GET", f"/api/v1/{path}", timeout=timeout)

    def set_level(self, level: str) -> None:
        self.call("PUT", "/api/v1/daemon", {"log_level": level})

    def upgrade(self) -> None:
        """Has the code installed now serve in place of the running one."""
        self.call("PUT", "/api/v1/daemon/upgrade", timeout=60.0)

    def send_state(self, timeout: float) -> None:
        """Has its state and its connection to the kernel sent to the supervisor it was started with."""
        self.call("PUT", "/api/v1/daemon/fuse/sendfd", timeout=timeout)

    def take_over(self, timeout: float) -> None:
        """Has it ask the supervisor for what another one sent."""
        self.call("PUT", "/api/v1/daemon/fuse/takeover", timeout=timeout)

    def start(self) -> None:
        """After `take_over`: readers are served."""
        self.call("PUT", "/api/v1/daemon/start")

    def drop_blob(self, blob_id: str) -> bool:
        """Have what is cached of a blob deleted. False: an image uses it that is mounted there or about to be."""
        reply = self.call("DELETE", f"/api/v2/blobs?blob_id={quote(blob_id)}")
        return not (isinstance(reply, dict) and reply.get("kept"))

    def set_registry_auth(self, config_id: str, auth: str) -> None:
        """Credentials (base64 of user:password) that count from the next token on; nydusd 2.4.1 and later."""
        self.call("PUT", f"/api/v1/config?id={quote(config_id)}", {"registry_auth": auth})

    def umount(self, mountpoint: str, timeout: float = REQUEST_SECONDS) -> None:
        self.call("DELETE", f"/api/v1/mount?mountpoint={quote(mountpoint)}", timeout=timeout)

    def call(self, method: str, url: str, body: object = None, timeout: float = REQUEST_SECONDS) -> Any:
        what = f"{method} {url.partition('?')[0]} on {self.path}"
        connection = UnixConnection(self.path, timeout, DIAL_SECONDS)
        try:
            data = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"} if data else {}
            connection.request(method, url, body=data, headers=headers)
            response = connection.getresponse()
            text = response.read(MAX_REPLY)
        except (OSError, http.client.HTTPException) as error:
            hung = isinstance(error, TimeoutError)
            raise ApiUnreachable(f"{what}: {error or type(error).__name__}", hung=hung) from None
        finally:
            connection.close()
        if response.status == 204 or (response.status == 200 and not text):
            return None
        try:
            decoded = json.loads(text)
        except (ValueError, RecursionError):
            decoded = None
        if response.status != 200:
            message = decoded.get("message") if isinstance(decoded, dict) else None
            raise ApiError(what, response.status, str(message or text[:200].decode(errors="replace")))
        return decoded
