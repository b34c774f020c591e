"""Blobs from an OCI registry: mirrors or a proxy in configured order, the registry itself as the last resort.

Where this goes beyond upstream 2.1 (`nydusd.md` 4.7): mirrors are also used for registries that need no
authentication; failures decay; 5xx, short and wrong answers count as failures; a mirror that lacks one blob, or has it
wrong, is left out for that blob only; no token ever comes from a realm that a mirror names.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass, field

import trio

from nydusfs.config import ConnectionConfig, MirrorConfig, RegistryBackend
from nydusfs.counters import BackendCounters
from nydusfs.errors import AuthError, ConfigError, SourceError
from nydusfs.http import HttpError, HttpTimeout, ProtocolViolation, Response, Url, parse_url
from nydusfs.http.client import Via
from nydusfs.http.connection import basic_auth
from nydusfs.http.errors import TlsFailed
from nydusfs.http.url import parse_authority
from nydusfs.sources.auth import Authenticator
from nydusfs.sources.base import Buffer, Check, Priority, WrongBytes
from nydusfs.sources.health import Health
from nydusfs.sources.hub import SourceHub, seconds

USER_AGENT = "nydusd/1.0.0"  # what upstream sends: registries and mirrors have rules for it
# A mirror that hangs (a frozen Dragonfly scheduler does for 30 s to 5 min, its ping fine) is passed over after this.
MIRROR_PATIENCE = 3.0
TRIAL_PATIENCE = 1.0  # of a mirror that was down: one reader pays for finding out
MIRROR_SLOWEST = 256 * 1024  # bytes per second below which a mirror is not worth waiting for
PING_PATIENCE = 1.0
MAX_REDIRECTS = 5
RETRY_PAUSE = 0.2  # doubles per attempt at the origin, plus jitter
MAX_RETRY_PAUSE = 5.0


class _Refused(Exception):
    """One attempt failed. `retry`: the same source may do better later; `blame`: it counts against its health;
    `damaged`: it answered with something that is not this range of the blob."""

    def __init__(
        self, reason: str, *, retry: bool = True, blame: bool = True, hung: bool = False, damaged: bool = False
    ) -> None:
        self.retry = retry
        self.damaged = damaged
        self.blame = blame
        self.hung = hung
        super().__init__(reason)


class _Tried(list[tuple[str, str]]):
    """Sources tried for one read, with reasons."""

    damaged = False

    def note(self, name: str, reason: _Refused, label: str = "") -> None:
        self.append((name, f"{reason}{label}"))
        self.damaged |= reason.damaged


@dataclass(slots=True)
class _Route:
    """One way to the registry's content. `health` is None for the origin, which is never left out."""

    name: str
    base: Url
    authenticator: Authenticator
    headers: tuple[tuple[str, str], ...] = ()
    via: Via | None = None
    health: Health | None = None
    ping: Url | None = None
    asks_origin: bool = False  # a 401 here is answered with the origin's challenge
    redirects: dict[str, Url] = field(default_factory=dict)


class RegistrySource:
    """Implements `Source` for one repository."""

    def __init__(self, backend: RegistryBackend, hub: SourceHub) -> None:
        connection = backend.connection
        self.counters = BackendCounters("registry")
        self.name = f"registry {backend.host}/{backend.repo}"
        self._backend = backend
        self._hub = hub
        self._auth = backend.auth
        self._connection: ConnectionConfig = connection
        self._client = hub.client(connection)
        self._log = logging.getLogger("nydusfs.sources")
        self._connect_timeout = seconds(connection.connect_timeout)
        self._timeout = seconds(connection.timeout)
        try:
            self._origin = parse_authority(connection.scheme, backend.host)
        except HttpError:
            raise ConfigError("device.backend.config.host", f"{backend.host!r} is not a host[:port]") from None
        self._prefix = parse_url(f"{self._origin}/v2/{backend.repo}/blobs/").target
        credentials = (self._origin, backend.repo, backend.auth, backend.registry_token)
        shared = hub.authenticator(connection, *credentials)
        self._last = _Route(f"registry {self._origin}", Url(self._origin, "/"), shared)
        self._routes: list[_Route] = []
        for mirror in connection.mirrors:
            base = parse_url(mirror.host)
            own = hub.authenticator(connection, *credentials, base.origin) if mirror.auth_through else shared
            self._routes.append(self._mirror_route(mirror, base, own, hub))
        if connection.proxy.url:
            self._routes.append(self._proxy_route(shared, hub))

    def use_auth(self, auth: str) -> None:
        """Other credentials (base64 of user:password, "" for the configured ones) from the next token on.

        A token that is still good is used up first, as upstream does; requests under way are not disturbed.
        """
        auth = auth or self._backend.auth
        if auth == self._auth:
            return
        self._auth = auth
        replaced: dict[int, Authenticator] = {}
        for route in (self._last, *self._routes):
            old = route.authenticator
            if id(old) not in replaced:
                fresh = self._hub.authenticator(
                    self._connection, self._origin, self._backend.repo, auth, self._backend.registry_token, old.through
                )
                fresh.take_over(old)
                self._hub.forget(old)
                replaced[id(old)] = fresh
            route.authenticator = replaced[id(old)]

    def _mirror_route(self, mirror: MirrorConfig, base: Url, authenticator: Authenticator, hub: SourceHub) -> _Route:
        return _Route(
            f"mirror {base.origin}",
            Url(base.origin, "/"),
            authenticator,
            tuple(mirror.headers.items()),
            health=hub.mirror_health(mirror),
            ping=parse_url(mirror.ping_url) if mirror.ping_url else None,
            asks_origin=not mirror.auth_through,
        )

    def _proxy_route(self, authenticator: Authenticator, hub: SourceHub) -> _Route:
        proxy = self._connection.proxy
        address = parse_url(proxy.url)
        user_info = proxy.url.partition("://")[2].partition("/")[0].rpartition("@")[0]
        user, _, password = user_info.partition(":")
        base = Url(self._origin, "/")
        if proxy.use_http and self._origin.scheme == "https":
            base = Url(parse_authority("http", self._origin.netloc), "/")
        health = hub.mirror_health(MirrorConfig(str(address.origin), health_check_interval=proxy.check_interval))
        return _Route(
            f"proxy {address.origin}",
            base,
            authenticator,
            via=Via(address.origin, basic_auth(user, password) if user_info else ""),
            health=health,
            ping=parse_url(proxy.ping_url) if proxy.ping_url else None,
        )

    async def read(
        self, blob_id: str, offset: int, size: int, priority: Priority, check: Check | None = None
    ) -> Buffer:
        started = time.monotonic()
        failed = True
        try:
            data = await self._read(blob_id, offset, size, priority, check)
            failed = False
            return data
        finally:
            self.counters.record(size, started, failed)

    async def _read(self, blob_id: str, offset: int, size: int, priority: Priority, check: Check | None) -> Buffer:
        tried = _Tried()
        for route in self._routes:
            assert route.health is not None
            admitted = route.health.admit(time.monotonic(), blob_id, MIRROR_PATIENCE)
            if admitted == "no":
                tried.append((route.name, "left out after failures"))
                continue
            patience = min(self._timeout, TRIAL_PATIENCE if admitted == "trial" else MIRROR_PATIENCE)
            try:
                if admitted == "trial" and route.ping is not None:
                    await self._ping(route.ping)
                data = await self._from_route(route, blob_id, offset, size, check, patience)
            except _Refused as reason:
                tried.note(route.name, reason)
                self._note_failure(route, route.health, blob_id, reason)
                continue
            if route.health.success():
                self._log.info("Mirror server %s recovered", route.base.origin)
            return data
        if self._connection.proxy.url and not self._connection.proxy.fallback:
            raise self._error(blob_id, offset, size, tried)
        if any(reason != "left out after failures" for _, reason in tried):
            self._log.warning(
                "Request to all mirror server failed, fallback to original server. blob %s, %s",
                blob_id,
                "; ".join(f"{name}: {reason}" for name, reason in tried),
            )
        return await self._from_origin(blob_id, offset, size, priority, check, tried)

    async def _from_origin(
        self,
        blob_id: str,
        offset: int,
        size: int,
        priority: Priority,
        check: Check | None,
        tried: _Tried,
    ) -> Buffer:
        attempts = 1 + self._connection.retry_limit
        pause = RETRY_PAUSE
        for attempt in range(1, attempts + 1):
            try:
                return await self._from_route(self._last, blob_id, offset, size, check, self._timeout, last=True)
            except _Refused as reason:
                label = f" (attempt {attempt} of {attempts})" if attempts > 1 else ""
                tried.note(self._last.name, reason, label)
                if not reason.retry:
                    break
            if attempt < attempts:
                await trio.sleep(pause * (0.75 + random.random() / 2))
                pause = min(MAX_RETRY_PAUSE, pause * 2)
        raise self._error(blob_id, offset, size, tried)

    def _error(self, blob_id: str, offset: int, size: int, tried: _Tried) -> SourceError:
        what = f"cannot read {size} bytes at {offset} of blob {blob_id} from {self.name}"
        return SourceError(what, tried, damaged=tried.damaged)

    def _note_failure(self, route: _Route, health: Health, blob_id: str, reason: _Refused) -> None:
        now = time.monotonic()
        if not reason.blame:
            health.shun_blob(blob_id, now)
        elif health.failure(now, hung=reason.hung):
            self._log.warning(
                "%s: %s; reach to failure limit %d, disable mirror", route.name, reason, health.failure_limit
            )

    async def _ping(self, url: Url) -> None:
        """GET, never HEAD: Dragonfly answers 404 to that."""
        limit = min(PING_PATIENCE, self._connect_timeout)
        try:
            response = await self._client.request("GET", url, connect_timeout=limit, timeout=limit)
        except HttpError as error:
            raise _Refused(f"ping {url}: {error}") from None
        if response.status >= 500:
            raise _Refused(f"ping {url}: status {response.status}")

    async def _from_route(
        self,
        route: _Route,
        blob_id: str,
        offset: int,
        size: int,
        check: Check | None,
        patience: float,
        last: bool = False,
    ) -> Buffer:
        """One attempt, redirects and a token dance included. Raises `_Refused`."""
        try:
            response = await self._fetch(route, blob_id, offset, size, patience, last)
        except HttpTimeout as error:
            raise _Refused(str(error), hung=True) from None
        except ProtocolViolation as error:
            raise _Refused(str(error), damaged=True) from None
        except HttpError as error:
            raise _Refused(str(error)) from None
        except AuthError as error:
            raise _Refused(str(error), retry=False, blame=False) from None
        if response.status not in (200, 206):
            status = response.status
            temporary = status >= 500 or status in (408, 425, 429)
            raise _Refused(f"status {status}", retry=temporary, blame=temporary, damaged=status == 416)
        if check is not None:
            try:
                await check(response.body)
            except WrongBytes as error:
                route.redirects.pop(blob_id, None)
                raise _Refused(str(error), blame=False, damaged=True) from None
        return response.body

    async def _fetch(
        self, route: _Route, blob_id: str, offset: int, size: int, patience: float, last: bool
    ) -> Response:
        known = route.redirects.get(blob_id)
        if known is not None:
            try:
                response = await self._get(route, known, (), offset, size, patience, last)
            except HttpError:
                route.redirects.pop(blob_id, None)
                raise
            if response.status in (200, 206):
                return response
            # Signed targets live 5 to 20 minutes; whatever the refusal, the full way is gone once.
            route.redirects.pop(blob_id, None)
            self._log.info("The redirected link has expired: %s, will retry read", known)
        url = Url(route.base.origin, f"{self._prefix}sha256:{blob_id}")
        response = await self._authorized(route, url, offset, size, patience, last)
        for _ in range(MAX_REDIRECTS):
            location = response.get("location")
            if not 300 <= response.status < 400 or not location:
                return response
            target = self._redirect_target(url, location)
            headers: tuple[tuple[str, str], ...] = ()
            if target.origin == url.origin and (value := await route.authenticator.header()):
                headers = (*route.headers, ("Authorization", value))  # still the same server
            response = await self._get(route, target, headers, offset, size, patience, last)
            url = target
            if response.status in (200, 206):
                if not headers:
                    route.redirects[blob_id] = target
                return response
        return response

    def _redirect_target(self, base: Url, location: str) -> Url:
        if location.startswith("/") and not location.startswith("//"):
            location = f"{base.origin}{location}"
        elif location.startswith("//"):
            location = f"{base.origin.scheme}:{location}"
        try:
            target = parse_url(location)
        except ProtocolViolation as error:
            raise ProtocolViolation(f"redirect to {location[:60]!r}: {error}") from None
        scheme = self._backend.blob_url_scheme or target.origin.scheme
        host = self._backend.blob_redirected_host
        if scheme != target.origin.scheme or host:
            netloc = host or (target.origin.host if scheme != target.origin.scheme else target.origin.netloc)
            return Url(parse_authority(scheme, netloc), target.target)
        return target

    async def _authorized(
        self, route: _Route, url: Url, offset: int, size: int, patience: float, last: bool
    ) -> Response:
        sent = await route.authenticator.header()
        response = await self._get(route, url, self._headers(route, sent), offset, size, patience, last)
        for _ in range(2):
            if response.status != 401:
                return response
            refusal = response
            if route.asks_origin:
                # A mirror's challenge could name any realm; credentials go only where the registry itself says.
                origin_url = Url(self._origin, url.target)
                refusal = await self._get(self._last, origin_url, self._headers(self._last, ""), 0, 1, patience, False)
                if refusal.status != 401:
                    raise AuthError(f"{route.name}: 401, though the registry wants no credentials", url=str(url))
            value = await route.authenticator.answer(refusal, sent, url)
            response = await self._get(route, url, self._headers(route, value), offset, size, patience, last)
            sent = value
        return response

    def _headers(self, route: _Route, authorization: str) -> tuple[tuple[str, str], ...]:
        return (*route.headers, ("Authorization", authorization)) if authorization else route.headers

    async def _get(
        self,
        route: _Route,
        url: Url,
        headers: tuple[tuple[str, str], ...],
        offset: int,
        size: int,
        patience: float,
        last: bool,
    ) -> Response:
        given = {name.lower() for name, _ in headers}
        # Config headers win over ours, except those the range protocol rests on.
        merged = [(name, value) for name, value in headers if name.lower() not in _OURS]
        if "user-agent" not in given:
            merged.append(("User-Agent", USER_AGENT))
        merged.append(("Accept", "*/*"))
        try:
            return await self._client.get_range(
                url,
                offset,
                size,
                merged,
                connect_timeout=min(self._connect_timeout, patience),
                timeout=patience,
                slowest=64 * 1024 if last else MIRROR_SLOWEST,
                patient=last,
                via=route.via,
            )
        except TlsFailed:
            # Upstream's rule (since 2.3): plain HTTP instead of TLS only where certificates are not checked anyway.
            if not (last and self._connection.skip_verify and url.origin == self._origin == route.base.origin):
                raise
            self._log.warning("%s does not speak TLS; skip_verify allows plain HTTP from here on", self._origin)
            self._origin = parse_authority("http", self._backend.host)
            route.base = Url(self._origin, "/")
            plain = Url(self._origin, url.target)
            return await self._get(route, plain, headers, offset, size, patience, last)

    async def aclose(self) -> None:
        """Connections belong to the hub; nothing of its own to close."""


_OURS = {"host", "range", "accept-encoding", "connection", "content-length", "transfer-encoding", "accept"}
