"""One way to an OCI registry's blobs: the registry itself, a mirror or a proxy before it.

Where this goes beyond upstream 2.1 (`nydusd.md` 4.3 to 4.8): mirrors are also used for registries that need no
authentication; no token ever comes from a realm that a mirror names; redirect targets are forgotten when their
signature ends.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

import trio

from nydusfs.config import RegistryBackend
from nydusfs.errors import AuthError
from nydusfs.http import HttpClient, HttpError, HttpTimeout, ProtocolViolation, Response, Url, parse_url
from nydusfs.http.client import Via
from nydusfs.http.connection import Progress, basic_auth
from nydusfs.http.errors import TlsFailed
from nydusfs.http.url import parse_authority
from nydusfs.redact import public_url
from nydusfs.sources import dragonfly
from nydusfs.sources.athand import AtHand
from nydusfs.sources.auth import Authenticator
from nydusfs.sources.base import Priority
from nydusfs.sources.dragonfly import Generation
from nydusfs.sources.endpoint import Answer, Range, Refused, judge, refusal
from nydusfs.sources.redirects import Redirects
from nydusfs.sources.standing import Standing
from nydusfs.sources.tokens import TokenLate

log = logging.getLogger("nydusfs.sources")

USER_AGENT = "nydusd/1.0.0"  # what upstream sends: registries and mirrors have rules for it
SLOWEST = 64 * 1024  # bytes per second that the last resort must keep
MIRROR_SLOWEST = 256 * 1024  # below that a mirror is not worth waiting for
# A mirror that hangs (a frozen Dragonfly scheduler does for 30 s to 5 min, its ping fine) is passed over after this.
MIRROR_PATIENCE = 3.0
PING_PATIENCE = 1.0
# Seconds to the first byte of a mirror that readers' threads may ask, and after which (or twice what is late) they
# leave it to the event loop to wait. With one that took 30 ms, and one time in ten 150, 140 reads took 7.3 s so and 6.7
# by the loop: the late ones were asked for twice.
SOON_HERE, LATE_HERE = 0.015, 0.1
TOKEN_PATIENCES = 2  # of the registry's, for a token request of a reader who waits for long
MAX_REDIRECTS = 5
# Config headers win over ours, except those the range protocol rests on.
_OURS = {"host", "range", "accept-encoding", "connection", "content-length", "transfer-encoding", "accept"}

# Refusals of a registry. A server that wants TLS answers plain HTTP with 400, or leads to https.
_MEANT = (401, 403, 404, 416)

_PLAIN = (Generation.NONE, Generation.CLASSIC)  # are asked for just what is wanted

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Way:
    """How to get there. `base`: scheme, host, port and a path prefix; `query` is added to every blob's address;
    `dragonfly`: send the headers of a Dragonfly proxy (reference 4.8); `asks_origin`: a 401 is answered with the
    registry's own challenge."""

    name: str
    base: Url
    headers: Headers = ()
    query: str = ""
    via: Via | None = None
    ping: Url | None = None
    asks_origin: bool = False
    dragonfly: bool = False
    api: str = "/v2"  # before the repository's name
    ping_below: int = 500  # answers of the ping from this status on mean that it is not well
    foreign: str = ""  # another registry that the headers name: a Dragonfly peer will look there


@dataclass(frozen=True, slots=True)
class Times:
    """Limits in seconds: for a connection, and without progress of a request."""

    connect: float
    patience: float

    def brief(self) -> Times:
        """For a source that is not the last resort."""
        return Times(self.connect, min(self.patience, MIRROR_PATIENCE))

    def slowest(self, patience: float, *, last: bool) -> int:
        """Bytes per second that an attempt of this patience must keep: who is given more time may be slower."""
        return int((SLOWEST if last else MIRROR_SLOWEST) * min(1.0, self.patience / patience))


class RegistryEndpoint:
    """Implements `Endpoint`. `origin` is the registry's own, None for itself."""

    def __init__(
        self,
        way: Way,
        backend: RegistryBackend,
        client: HttpClient,
        authenticator: Authenticator,
        standing: Standing,
        times: Times,
        *,
        rank: int = 0,
        origin: RegistryEndpoint | None = None,
        last: bool = False,
        attempts: int = 1,
        extra: Headers = (),
        peer: dragonfly.Peer | None = None,
    ) -> None:
        """`extra`: headers of every request, also to where redirects lead. `peer`: it may be a Dragonfly."""
        self.name = way.name
        self.address = str(way.via.origin if way.via else way.base.origin)
        self.way = way
        self.authenticator = authenticator
        self.standing = standing
        self.rank = rank
        self.last = last
        self.attempts = attempts
        self.patience = times.patience
        self._base = way.base
        self._extra = extra
        self._backend = backend
        self._client = client
        self._origin = origin
        self._times = times
        self._blobs = parse_url(f"http://x{way.api}/{backend.repo}/blobs/").target
        self._redirects = Redirects()
        self._last: tuple[str, Url | None, Url] = "", None, way.base  # address of a blob, as it was made last
        self._last_headers: tuple[Headers | None, Headers] = None, ()
        self._told = False
        self._peer = peer
        self.at_hand = AtHand(standing)
        # Who configures the length of pieces has it as it says, and requests as they are wanted.
        names = {name.lower() for name, _ in (*way.headers, *extra)}
        self._in_pieces = peer is not None and dragonfly.PIECE_HEADER[0].lower() not in names
        self._says_dragonfly = way.dragonfly or dragonfly.names_dragonfly(way.headers)
        self._own_credentials = any(name.lower() == "authorization" for name, _ in way.headers)

    # -- Endpoint

    @property
    def by_range(self) -> bool:
        return self._peer is not None and self._peer.by_range

    async def fetch(self, wanted: Range, patience: float, progress: Progress | None = None) -> Answer:
        """One attempt, redirects and a token dance included."""
        try:
            return await self._fetch_once(wanted, patience, progress)
        except Refused:
            self.at_hand.forbid()
            raise

    async def _fetch_once(self, wanted: Range, patience: float, progress: Progress | None) -> Answer:
        started = trio.current_time()
        # Each exchange has its limits; this one is for redirects and tokens one after the other.
        slowest = self._times.slowest(patience, last=self.last)
        limit = 4 * patience + (wanted.offset * self.last + wanted.size) / slowest
        if self._peer is not None:
            limit += dragonfly.PIECE / MIRROR_SLOWEST
        try:
            response = await self._at_once(wanted, patience, progress)
            if response is not None and response.status == 206:
                self._put_at_hand(wanted, response.sent)
            elif response is None or not response.has_data:
                with trio.fail_after(limit):
                    response = await self._fetch(wanted, patience, progress, response)
        except trio.TooSlowError:
            raise Refused(f"not done within {limit:.3g} s", hung=True) from None
        except HttpError as error:
            if self._peer is not None:
                self._peer.forget()
            raise refusal(error) from None
        except TokenLate as error:
            raise Refused(str(error), busy=True, blame=False) from None
        except AuthError as error:
            raise Refused(str(error), retry=False, blame=False) from None
        self._judge_proxy(response, wanted)
        if response.status == 404 and self.way.foreign and not self._told:
            self._told = True
            log.warning(
                "%s looks for blobs of %s/%s in %s: write {registry} in its header to let it serve every registry",
                self.name,
                self._backend.host,
                self._backend.repo,
                self.way.foreign,
            )
        judge(response)
        total = trio.current_time() - started
        return Answer(response.body, max(0.0, total - response.body_seconds))

    async def ping(self) -> None:
        way = self.way
        url, headers, via = (way.ping, (), None) if way.ping else (self._v2(), way.headers, way.via)
        await ping(self._client, url, headers, via, self._times.connect, way.ping_below)

    @property
    def unsettled(self) -> bool:
        """Whether it may want a token that is still to be fetched. Who speaks plain HTTP to all the world gives none,
        as a rule."""
        guarded = self._base.origin.scheme == "https" or self.authenticator.has_user
        return self.last and guarded and not self.authenticator.settled

    async def greet(self) -> None:
        """Have a connection to it, and a token if it wants one. Raises HttpError or AuthError."""
        if not self.unsettled:
            await self._client.prepare(self._base.origin, self._times.connect, self.way.via)
            return
        authenticator, times = self.authenticator, self._times
        url = Url(self._base.origin, self._v2().target + self.way.query)
        sent = await authenticator.header()
        response = await self._client.request(
            *("GET", url, self._merged(self._headers(sent))),
            connect_timeout=times.connect,
            timeout=times.patience,
            via=self.way.via,
        )
        if response.status == 401:

            async def challenge() -> Response:
                return response

            await authenticator.answer(sent, challenge, url, scope=f"repository:{self._backend.repo}:pull")

    def forget(self, blob_id: str) -> None:
        self._redirects.drop(blob_id)
        self.at_hand.forbid()

    # -- requests

    def _judge_proxy(self, response: Response, wanted: Range) -> None:
        """Dragonfly's own refusals: 403 is for good, and what it does not want prefetched the registry shall not
        prefetch instead (reference 4.2)."""
        if response.get("x-dragonfly-error-type") != "proxy":
            return
        if response.status == 403:
            raise Refused("Dragonfly refuses: status 403", retry=False, blame=False)
        if response.status == 429:
            prefetch = wanted.priority is Priority.PREFETCH
            raise Refused("Dragonfly is at its limit: status 429", retry=not prefetch, final=prefetch)

    def _v2(self) -> Url:
        return Url(self._base.origin, self._prefixed(f"{self.way.api}/"))

    def _prefixed(self, path: str) -> str:
        return self._base.target.rstrip("/") + path

    async def _at_once(self, wanted: Range, patience: float, progress: Progress | None) -> Response | None:
        """The answer to one request, where the registry itself is to be asked and what to send is known: most of all
        reads end here, without a limit of their own for redirects and tokens."""
        if self._peer is not None or not self.authenticator.settled or self._redirects.get(wanted.blob_id) is not None:
            return None
        sent = self.authenticator.ready()
        if sent is None:
            return None
        response = await self._get_shared(self._url(wanted), self._headers(sent), wanted, patience, progress)
        response.sent = sent
        return response

    def _put_at_hand(self, wanted: Range, sent: str) -> None:
        latency = self.standing.latency
        if self.way.via is None and (self.last or latency.first < SOON_HERE):
            url, headers = self._url(wanted), self._headers(sent)
            patience = math.inf if self.last else max(LATE_HERE, 2 * (latency.hedge_after() or 0.0))
            self.at_hand.allow(wanted.blob_id, lambda: self._client.direct(url, self._merged(headers), patience))

    def _url(self, wanted: Range) -> Url:
        blob_id, base, url = self._last
        if blob_id != wanted.blob_id or base is not self._base:
            blob_id, base = wanted.blob_id, self._base
            url = Url(base.origin, f"{self._prefixed(self._blobs)}sha256:{_part(blob_id)}{self.way.query}")
            self._last = blob_id, base, url
        return url

    async def _fetch(
        self, wanted: Range, patience: float, progress: Progress | None, first: Response | None
    ) -> Response:
        """Redirects, tokens and all, behind the `first` answer if there was one."""
        known = self._redirects.get(wanted.blob_id) if first is None else None
        if known is not None:
            try:
                response = await self._get(known, (), wanted, patience, progress)
                if response.status == 206 and self._peer is None and self.way.via is None:
                    self.at_hand.allow(wanted.blob_id, lambda: self._client.direct(known, self._merged(())))
                if response.status in (200, 206):
                    return response
            except HttpError as error:
                if isinstance(error, HttpTimeout) and not self.last:  # others may have it sooner
                    self._redirects.drop(wanted.blob_id)
                    raise
            # Signed targets live 5 to 20 minutes, and servers behind them come and go; whatever the failure, it is not
            # yet this source's: the full way is gone once.
            self._redirects.drop(wanted.blob_id)
            log.info("The redirected link has expired: %s, will retry read", known)
        url = self._url(wanted)
        if self.authenticator.settled:
            response = await self._authorized(url, wanted, patience, progress, first)
        else:
            async with self.authenticator.first(self.address):
                response = await self._authorized(url, wanted, patience, progress, first)
        here = True  # still the same server; who was elsewhere stays a stranger, wherever that one sends him
        for _ in range(MAX_REDIRECTS):
            location = response.get("location")
            if not 300 <= response.status < 400 or not location:
                return response
            target = self._redirect_target(url, location)
            here = here and target.origin == url.origin
            headers = self._headers(await self.authenticator.header()) if here else ()
            response = await self._get(target, headers, wanted, patience, progress)
            url = target
            if response.status in (200, 206):
                if not headers:
                    self._redirects.keep(wanted.blob_id, target)
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
            raise ProtocolViolation(f"redirect to {public_url(location)[:60]!r}: {error}") from None
        scheme = self._backend.blob_url_scheme or target.origin.scheme
        host = self._backend.blob_redirected_host
        if scheme != target.origin.scheme or host:
            named = target.origin.netloc  # with a port only where that is not its scheme's own
            origin = parse_authority(scheme, host or named)
            if named.endswith(f":{target.origin.port}") and urlsplit(f"//{host}").port is None:
                origin = origin._replace(port=target.origin.port)  # upstream changes the scheme or the host, no more
            return Url(origin, target.target)
        return target

    async def _authorized(
        self, url: Url, wanted: Range, patience: float, progress: Progress | None, first: Response | None
    ) -> Response:
        if first is None:
            sent = await self.authenticator.header()
            response = await self._get_shared(url, self._headers(sent), wanted, patience, progress)
        else:
            response, sent = first, first.sent
        for _ in range(2):
            if response.status != 401 or self._own_credentials:
                if response.status == 206 and self._peer is not None and self._peer.generation in _PLAIN:
                    self._put_at_hand(wanted, sent)
                return response
            refused = response

            async def challenge(refused: Response = refused) -> Response:
                return await self._origin_challenge(wanted, patience) if self.way.asks_origin else refused

            # All readers of a repository wait for one token request: a lost one must not hold them for long.
            token_patience = min(patience, TOKEN_PATIENCES * self._times.patience)
            value = await self.authenticator.answer(sent, challenge, url, token_patience if self.last else 0.0)
            response = await self._get_shared(url, self._headers(value), wanted, patience, progress)
            sent = value
        return response

    async def _origin_challenge(self, wanted: Range, patience: float) -> Response:
        """A mirror's challenge could name any realm; credentials go only where the registry itself says."""
        origin = self._origin
        assert origin is not None
        url = origin._url(wanted)
        response = await origin._get(url, origin.way.headers, Range(wanted.blob_id, 0, 1), patience, None)
        if response.status != 401:
            raise AuthError(f"{self.name}: 401, though the registry wants no credentials", url=str(url))
        return response

    def _note_status(self, status: int) -> None:
        if status < 400:
            self.authenticator.accepted()

    def _headers(self, authorization: str) -> Headers:
        """Those of this server. One that has credentials of its own gets no token besides."""
        ours = authorization and not self._own_credentials
        return (*self.way.headers, ("Authorization", authorization)) if ours else self.way.headers

    async def _get_shared(
        self, url: Url, headers: Headers, wanted: Range, patience: float, progress: Progress | None
    ) -> Response:
        """`_get` in the form in which a Dragonfly peer shares it with others, if this is one."""
        peer = self._peer
        if peer is None:
            return await self._get(url, headers, wanted, patience, progress)
        asked = None
        if self._in_pieces:
            address, end = url.full, wanted.offset + wanted.size
            if peer.generation is Generation.MODERN or (peer.generation is Generation.UNKNOWN and self._says_dragonfly):
                headers = (*headers, dragonfly.PIECE_HEADER)
            while (coming := peer.coming(address, wanted.offset, end)) is not None:
                if progress is not None:
                    progress.excused = True
                await coming.wait()
            asked = peer.widened(address, wanted.offset, end, trio.current_time())
            if progress is not None:
                progress.excused = asked is not None
        if asked is None:
            response = await self._get(url, headers, wanted, patience, progress)
        else:
            arrived, began = False, trio.current_time()
            peer.begin(address, asked)
            try:
                response = await self._get(url, headers, wanted, patience, progress, asked)
                arrived = response.status == 206
            finally:
                now = trio.current_time()
                peer.end(address, asked, now - began, now, arrived=arrived)
        if response.status < 400:
            peer.hear(url.full, response.headers)
        return response

    def _merged(self, headers: Headers) -> Headers:
        """All that is sent with these."""
        last, merged = self._last_headers
        if last != headers:
            names = {name.lower() for name, _ in headers}
            every = (*headers, *(one for one in self._extra if one[0].lower() not in names))
            given = {name.lower() for name, _ in every}
            ours = (("Accept", "*/*"),) if "user-agent" in given else (("User-Agent", USER_AGENT), ("Accept", "*/*"))
            merged = (*((name, value) for name, value in every if name.lower() not in _OURS), *ours)
            self._last_headers = headers, merged
        return merged

    async def _get(
        self,
        url: Url,
        headers: Headers,
        wanted: Range,
        patience: float,
        progress: Progress | None,
        around: tuple[int, int] | None = None,
    ) -> Response:
        merged = self._merged(headers)
        if self.way.dragonfly:
            merged = (*merged, *dragonfly.proxy_headers(wanted.priority))
        try:
            return await self._client.get_range(
                url,
                wanted.offset,
                wanted.size,
                merged,
                connect_timeout=min(self._times.connect, patience),
                timeout=patience,
                slowest=self._times.slowest(patience, last=self.last),
                patient=self.last,
                via=self.way.via,
                on_status=self._note_status,
                around=around,
                progress=progress,
            )
        except TlsFailed as failure:
            # Upstream's rule (since 2.3): plain HTTP instead of TLS only where certificates are not checked anyway.
            plain = self._backend.connection.skip_verify and self.last and url.origin == self.way.base.origin
            if not plain or url.origin.scheme == "http":
                raise
            origin = parse_authority("http", url.origin.netloc)
            try:
                response = await self._get(Url(origin, url.target), headers, wanted, patience, progress, around)
            except HttpError:
                raise failure from None
            if response.status >= 300 and response.status not in _MEANT:
                raise  # it does speak TLS, and just now could not
            if self._base.origin == url.origin:  # else another request, sent at the same time, has found it out
                log.warning("%s does not speak TLS; skip_verify allows plain HTTP from here on", self._base.origin)
                self._base = Url(origin, self._base.target)
            return response


async def ping(
    client: HttpClient,
    url: Url,
    headers: Iterable[tuple[str, str]],
    via: Via | None,
    connect_timeout: float,
    below: int,
) -> None:
    """GET, never HEAD: Dragonfly answers 404 to that. Raises `Refused` for a status from `below` on."""
    limit = min(PING_PATIENCE, connect_timeout)
    try:
        response = await client.request("GET", url, headers, connect_timeout=limit, timeout=limit, via=via)
    except HttpError as error:
        raise Refused(f"ping {url}: {error}") from None
    if response.status >= below:
        raise Refused(f"ping {url}: status {response.status}")


def proxy_via(url: str) -> Via:
    """A proxy's URL, which may hold user and password."""
    user_info = url.partition("://")[2].partition("/")[0].rpartition("@")[0]
    user, _, password = user_info.partition(":")
    return Via(parse_url(url).origin, basic_auth(unquote(user), unquote(password)) if user_info else "")


def _part(blob_id: str) -> str:
    """One part of a path, whatever a bootstrap's author called the blob."""
    return quote(blob_id, safe="")
