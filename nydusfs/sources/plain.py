"""Blobs below plain URLs: object stores (signed requests) and the http-proxy backend, over TCP or a unix socket."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from urllib.parse import quote

import trio

from nydusfs.config import ConnectionConfig, HttpProxyBackend, ObjectBackend
from nydusfs.errors import ObjectStoreError
from nydusfs.http import HttpClient, HttpError, Origin, Response, Url, parse_url
from nydusfs.http.client import Via
from nydusfs.http.connection import Progress, Tls
from nydusfs.http.url import parse_authority
from nydusfs.objects import Bucket, CredentialChain
from nydusfs.redact import public_url
from nydusfs.sources.dragonfly import proxy_headers
from nydusfs.sources.endpoint import Answer, Range, Refused, judge, refusal
from nydusfs.sources.hub import SourceHub, seconds
from nydusfs.sources.race import Racer
from nydusfs.sources.registry import USER_AGENT, Times, ping, proxy_via
from nydusfs.sources.remote import RemoteSource
from nydusfs.sources.standing import Standing

_CODE = re.compile(rb"<Code>\s*([A-Za-z0-9.]{1,60})")

Headers = Sequence[tuple[str, str]]
Prepare = Callable[[str], tuple[Url, Headers]]  # blob id -> where it is, and headers to send. Raises ObjectStoreError


class PlainEndpoint:
    """Implements `Endpoint`. `mirror`: another server to ask with the same path and headers."""

    by_range = False

    def __init__(
        self,
        name: str,
        prepare: Prepare,
        client: HttpClient,
        standing: Standing,
        times: Times,
        *,
        mirror: Origin | None = None,
        headers: Headers = (),
        via: Via | None = None,
        ping_url: Url | None = None,
        ping_below: int = 500,
        rank: int = 0,
        last: bool = False,
        attempts: int = 1,
        credentials: CredentialChain | None = None,
        sloppy: bool = False,
    ) -> None:
        """`credentials`: what `prepare` signs with; there may be others after a refusal."""
        self.name = name
        self.address = name.partition(" ")[2]
        self.standing = standing
        self.rank = rank
        self.last = last
        self.attempts = attempts
        self.patience = times.patience
        self._prepare = prepare
        self._client = client
        self._times = times
        self._mirror = mirror
        self._headers = headers
        self._via = via
        self._ping_url = ping_url
        self._ping_below = ping_below
        self._credentials = credentials
        self._sloppy = sloppy

    async def fetch(self, wanted: Range, patience: float, progress: Progress | None = None) -> Answer:
        started = trio.current_time()
        try:
            chain = self._credentials
            used = chain.keys() if chain else None
            response = await self._get(wanted, patience, progress)
            if response.status in (400, 401, 403) and chain is not None and chain.others_than(used):
                response = await self._get(wanted, patience, progress)
        except HttpError as error:
            raise refusal(error) from None
        except ObjectStoreError as error:
            raise Refused(str(error), retry=False, blame=False) from None
        code = _CODE.search(response.body) if response.status >= 400 else None
        judge(response, code[1].decode() if code else "")
        total = trio.current_time() - started
        return Answer(response.body, max(0.0, total - response.body_seconds))

    async def _get(self, wanted: Range, patience: float, progress: Progress | None) -> Response:
        url, headers = self._prepare(wanted.blob_id)
        if self._mirror is not None:
            url = Url(self._mirror, url.target)
        extra = proxy_headers(wanted.priority) if self._via is not None else []
        return await self._client.get_range(
            url,
            wanted.offset,
            wanted.size,
            [*headers, *self._headers, *extra, ("User-Agent", USER_AGENT), ("Accept", "*/*")],
            connect_timeout=min(self._times.connect, patience),
            timeout=patience,
            slowest=self._times.slowest(patience, last=self.last),
            patient=self.last,
            via=self._via,
            sloppy=self._sloppy,
            progress=progress,
        )

    async def ping(self) -> None:
        url = self._ping_url or Url(self._mirror or self._prepare("")[0].origin, "/")
        await ping(self._client, url, (), None if self._ping_url else self._via, self._times.connect, self._ping_below)

    def forget(self, blob_id: str) -> None:
        """Nothing is remembered of a blob's way."""


def open_objects(backend: ObjectBackend, hub: SourceHub) -> RemoteSource:
    """Raises `ConfigError` for an endpoint that is no host[:port]."""
    bucket = Bucket(backend)

    def prepare(blob_id: str) -> tuple[Url, Headers]:
        request = bucket.request("GET", blob_id)
        return Url(request.origin, request.target), request.headers

    return _open(bucket.name, backend.type, bucket.origin, prepare, backend.connection, hub, bucket.credentials)


def open_http_proxy(backend: HttpProxyBackend, hub: SourceHub) -> RemoteSource:
    name = f"http-proxy {public_url(backend.addr)}"
    if not backend.addr.startswith(("http://", "https://")):
        # one server per blob (reference 4.9): path and id are not sent
        url = Url(Origin("unix", backend.addr, 0), "/")
        return _open(name, "http-proxy", url.origin, lambda _: (url, ()), backend.connection, hub, sloppy=True)
    base = f"{backend.addr.rstrip('/')}/{backend.path.strip('/')}".rstrip("/")

    def prepare(blob_id: str) -> tuple[Url, Headers]:
        return parse_url(f"{base}/" + quote(blob_id, safe="")), ()  # one part, whatever a bootstrap's author called it

    return _open(name, "http-proxy", parse_url(base).origin, prepare, backend.connection, hub, sloppy=True)


def _open(
    name: str,
    kind: str,
    origin: Origin,
    prepare: Prepare,
    connection: ConnectionConfig,
    hub: SourceHub,
    credentials: CredentialChain | None = None,
    sloppy: bool = False,
) -> RemoteSource:
    """Mirrors or a proxy before the origin, as for registries."""
    client = hub.client(Tls(connection.ca_cert_files, connection.skip_verify))
    patient = Times(seconds(connection.connect_timeout), seconds(connection.timeout))
    endpoints: list[PlainEndpoint] = []
    for mirror in connection.mirrors:
        address = parse_url(mirror.host).origin
        headers = tuple(mirror.headers.items())
        endpoints.append(
            PlainEndpoint(
                f"mirror {address}",
                prepare,
                client,
                hub.mirror_standing(address, "", headers, mirror),
                patient.brief(),
                mirror=address,
                headers=(*headers, *hub.headers),
                ping_url=parse_url(mirror.ping_url) if mirror.ping_url else None,
                rank=len(endpoints),
            )
        )
    proxy = connection.proxy
    if proxy.url and origin.scheme != "unix":
        via = proxy_via(proxy.url)
        endpoints.append(
            PlainEndpoint(
                f"proxy {via.origin}",
                prepare,
                client,
                hub.standing(f"proxy {via.origin}"),
                patient.brief() if proxy.fallback else patient,
                mirror=parse_authority("http", origin.netloc) if proxy.use_http else None,
                via=via,
                headers=hub.headers,
                ping_url=parse_url(proxy.ping_url) if proxy.ping_url else None,
                ping_below=400 if proxy.ping_url else 500,
                last=not proxy.fallback,
                attempts=1 if proxy.fallback else 1 + connection.retry_limit,
                credentials=credentials,
            )
        )
    checked = endpoints[0] if proxy.url and endpoints else None
    if not proxy.url or proxy.fallback or origin.scheme == "unix":
        endpoints.append(
            PlainEndpoint(
                f"{kind} {origin}",
                prepare,
                client,
                hub.standing(str(origin)),
                patient,
                headers=hub.headers,
                last=True,
                attempts=1 + connection.retry_limit,
                credentials=credentials,
                sloppy=sloppy,
            )
        )
    bucket = hub.bucket(origin, float(connection.origin_rate_limit))
    racer = Racer(endpoints, name, extras=hub.extras, bucket=bucket, watcher=hub.prober)
    if checked is not None:
        hub.prober.check_proxy(checked, racer, proxy)
    return RemoteSource(name, "oss" if kind == "s3" else kind, racer)  # upstream's metrics call both oss
