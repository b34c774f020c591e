"""A registry's configuration as endpoints: its mirrors, those of containerd's hosts.toml, its proxy, and itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from urllib.parse import quote, urlsplit

import trio

from nydusfs.config import MirrorConfig, RegistryBackend
from nydusfs.counters import SourceTally
from nydusfs.errors import AuthError, ConfigError
from nydusfs.hands import Hands
from nydusfs.http import HttpClient, HttpError, Origin, Url, parse_url
from nydusfs.http.connection import Tls
from nydusfs.http.url import parse_authority
from nydusfs.redact import public_url
from nydusfs.registry.hosts import ClientOptions, route
from nydusfs.registry.hosts import Endpoint as HostsEntry
from nydusfs.registry.reference import DOCKER_HUB_HOSTS
from nydusfs.sources.auth import Authenticator
from nydusfs.sources.base import Buffer, ThreadSource
from nydusfs.sources.hub import SourceHub, seconds
from nydusfs.sources.race import Racer
from nydusfs.sources.registry import RegistryEndpoint, Times, Way, proxy_via
from nydusfs.sources.remote import RemoteSource
from nydusfs.sources.standing import GOOD, State

log = logging.getLogger("nydusfs.sources")


class RegistrySource(RemoteSource, ThreadSource):
    """Implements `Source` for one repository."""

    def __init__(self, backend: RegistryBackend, hub: SourceHub) -> None:
        """Raises `ConfigError` for a host that is no host[:port]."""
        self._backend = backend
        self._hub = hub
        self._auth = backend.auth
        try:
            self._origin = parse_authority(backend.connection.scheme, backend.host)
        except HttpError:
            raise ConfigError("device.backend.config.host", f"{backend.host!r} is not a host[:port]") from None
        self._endpoints = self._open_endpoints()
        connection = backend.connection
        racer = Racer(
            self._endpoints,
            f"{self._origin}/{backend.repo}",
            extras=hub.extras,
            bucket=hub.bucket(self._server, float(connection.origin_rate_limit)),
            watcher=hub.prober,
        )
        super().__init__(f"registry {backend.host}/{backend.repo}", "registry", racer)
        if connection.proxy.url:
            hub.prober.check_proxy(self._endpoints[0], racer, connection.proxy)

    def use_auth(self, auth: str) -> None:
        """Other credentials (base64 of user:password, "" for the configured ones) from the next token on.

        A token that is still good is used up first, as upstream does; requests under way are not disturbed.
        """
        auth = auth or self._backend.auth
        if auth == self._auth:
            return
        self._auth = auth
        replaced: dict[int, Authenticator] = {}
        for endpoint in self._endpoints:
            old = endpoint.authenticator
            if id(old) not in replaced:
                fresh = self._authenticator(auth, old.through)
                fresh.take_over(old)
                self._hub.forget(old)
                replaced[id(old)] = fresh
            endpoint.authenticator = replaced[id(old)]

    async def greet(self) -> None:
        # Who is asked first; and the registry behind it, whose token that one wants.
        first = next((one for one in self._endpoints if one.standing.state is not State.DOWN), self._endpoints[-1])
        async with trio.open_nursery() as nursery:
            for endpoint in self._endpoints:
                if endpoint is first or (endpoint.unsettled and endpoint.authenticator is first.authenticator):
                    nursery.start_soon(self._greet, endpoint)

    async def _greet(self, endpoint: RegistryEndpoint) -> None:
        try:
            await endpoint.greet()
        except (HttpError, AuthError) as error:
            log.debug("%s: %s", endpoint.name, error)

    # -- threads that read by themselves: only where it is plain who is asked first

    def at_hand(self, blob_id: str) -> bool:
        return self._plain() and self._endpoints[0].at_hand.way(blob_id) is not None

    def _plain(self) -> bool:
        if len(self._endpoints) == 1:
            return True
        standing = self._endpoints[0].standing
        return len(self._endpoints) == 2 and standing.state is State.UP and standing.error_rate <= GOOD

    def read_here(
        self, blob_id: str, offset: int, size: int, hands: Hands, meanwhile: Callable[[], None]
    ) -> Buffer | None:
        endpoint = self._endpoints[0]
        way = endpoint.at_hand.way(blob_id)
        if way is None:
            return None
        try:
            got = way.get(offset, size, hands, meanwhile)
        except (HttpError, OSError):
            if not hands.stopped:
                endpoint.at_hand.forbid()
            raise
        if got is None:
            return None
        endpoint.at_hand.had(got)
        for tally in endpoint.standing.tally, self.racer.sources.setdefault(endpoint.address, SourceTally()):
            tally.requests += 1
            tally.bytes += size
        return got.body

    def doubt(self, blob_id: str, size: int) -> None:
        endpoint = self._endpoints[0]
        endpoint.forget(blob_id)
        endpoint.standing.wrong(f"{self.racer.scope} {blob_id}", trio.current_time(), errors=True)
        for tally in endpoint.standing.tally, self.racer.sources[endpoint.address]:
            tally.failures += 1
            tally.bytes -= size

    def learn(self) -> Iterable[tuple[int, float]]:
        return self._endpoints[0].at_hand.learn()

    def _authenticator(self, auth: str, through: Origin | None = None) -> Authenticator:
        backend = self._backend
        return self._hub.authenticator(
            backend.connection, self._tls, self._server, backend.repo, auth, backend.registry_token, through
        )

    def _open_endpoints(self) -> list[RegistryEndpoint]:
        backend, connection = self._backend, self._backend.connection
        own, listed = self._hosts_entries()
        ca_files = (*connection.ca_cert_files, *own.ca_files)
        self._tls = Tls(ca_files, connection.skip_verify or not own.verify, own.client)
        itself = self._listed_way(own, "registry")
        self._server = itself.base.origin
        shared = self._authenticator(self._auth)
        client = self._hub.client(self._tls)
        patient = Times(seconds(connection.connect_timeout), seconds(connection.timeout))
        brief = patient.brief()
        origin = RegistryEndpoint(
            itself,
            backend,
            client,
            shared,
            self._hub.standing(itself.base.full.rstrip("/") + itself.query),
            patient,
            last=True,
            attempts=1 + connection.retry_limit,
            extra=self._hub.headers,
        )
        if connection.proxy.url:
            proxy = self._proxy(itself, client, shared, brief if connection.proxy.fallback else patient)
            return [proxy, origin] if connection.proxy.fallback else [proxy]
        endpoints: list[RegistryEndpoint] = []
        extra = self._hub.headers
        for mirror in connection.mirrors:
            way = self._mirror_way(mirror)
            through = way.base.origin if mirror.auth_through else None
            auth = self._authenticator(self._auth, through) if through else shared
            standing = self._hub.mirror_standing(way.base.origin, way.query, way.headers, mirror)
            rank = len(endpoints)
            peer = self._hub.peer(standing)
            endpoints.append(
                RegistryEndpoint(
                    way, backend, client, auth, standing, brief, rank=rank, origin=origin, extra=extra, peer=peer
                )
            )
        for entry in listed:
            way = replace(self._listed_way(entry, "mirror"), asks_origin=True)
            standing = self._hub.standing(way.base.full + way.query, way.headers)
            client = self._hub.client(Tls(entry.ca_files, not entry.verify, entry.client))
            rank = len(endpoints)
            peer = self._hub.peer(standing)
            endpoints.append(
                RegistryEndpoint(
                    way, backend, client, shared, standing, brief, rank=rank, origin=origin, extra=extra, peer=peer
                )
            )
        return [*endpoints, origin]

    def _mirror_way(self, mirror: MirrorConfig) -> Way:
        base = parse_url(mirror.host)
        return Way(
            f"mirror {base.origin}",
            Url(base.origin, "/"),
            self._filled(tuple(mirror.headers.items())),
            foreign=self._foreign(mirror),
            query=self._ns() if mirror.ns else "",
            ping=parse_url(mirror.ping_url) if mirror.ping_url else None,
            asks_origin=not mirror.auth_through,
        )

    def _listed_way(self, entry: HostsEntry, kind: str) -> Way:
        return Way(
            f"{kind} {public_url(entry.url)}",
            parse_url(entry.url),
            self._filled(entry.headers),
            query=f"?{entry.query}" if entry.query else "",
            api="" if entry.override_path else "/v2",
        )

    def _proxy(self, itself: Way, client: HttpClient, authenticator: Authenticator, times: Times) -> RegistryEndpoint:
        proxy = self._backend.connection.proxy
        via = proxy_via(proxy.url)
        base = itself.base
        if proxy.use_http and base.origin.scheme == "https":
            base = Url(parse_authority("http", base.origin.netloc), base.target)
        way = replace(
            itself,
            name=f"proxy {via.origin}",
            base=base,
            via=via,
            ping=parse_url(proxy.ping_url) if proxy.ping_url else None,
            dragonfly=True,
            ping_below=400 if proxy.ping_url else 500,
        )
        standing = self._hub.standing(f"proxy {via.origin}")
        return RegistryEndpoint(
            way,
            self._backend,
            client,
            authenticator,
            standing,
            times,
            last=not proxy.fallback,
            extra=self._hub.headers,
            attempts=1 if proxy.fallback else 1 + self._backend.connection.retry_limit,
            peer=self._hub.peer(standing),
        )

    # -- several registries behind one mirror

    def _filled(self, headers: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        """`{registry}` in a value stands for this image's registry with its scheme, `{host}` for its host[:port]."""
        registry, host = str(self._origin), self._origin.netloc
        return tuple((name, value.replace("{registry}", registry).replace("{host}", host)) for name, value in headers)

    def _foreign(self, mirror: MirrorConfig) -> str:
        """The registry that the mirror is told to serve from, if it is another machine than the image's."""
        for name, value in mirror.headers.items():
            if name.lower() != "x-dragonfly-registry" or "{" in value:
                continue
            try:
                host = urlsplit(value).hostname or ""
            except ValueError:
                return value
            both_hub = host in DOCKER_HUB_HOSTS and self._origin.host in DOCKER_HUB_HOSTS
            return "" if host == self._origin.host or both_hub else value
        return ""

    def _ns(self) -> str:
        host = self._backend.host
        return f"?ns={quote('docker.io' if host in DOCKER_HUB_HOSTS else host, safe='')}"

    # -- containerd's hosts.toml

    def _hosts_entries(self) -> tuple[HostsEntry, list[HostsEntry]]:
        """The registry itself, or what is asked in its place, and mirrors. A file that cannot be used costs these, not
        the mount."""
        backend = self._backend
        url = f"{backend.connection.scheme}://{backend.host}"
        if not backend.hosts_dir:
            return HostsEntry(url), []
        options = ClientOptions(
            insecure=backend.connection.skip_verify,
            plain_http=backend.connection.scheme == "http",
            hosts_dir=backend.hosts_dir,
        )
        try:
            found = route(backend.host, options)
        except ConfigError as error:
            log.warning("%s: going on without it", error)
            return HostsEntry(url), []
        return found.origin(url), found.mirrors
