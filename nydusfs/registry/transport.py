"""One registry's HTTP: connection reuse, address choice, authentication, redirects, retries with back-off.

Two rules matter. Credentials go only to the registry and its token server, never to where a redirect leads. HTTPS never
silently becomes HTTP: plain HTTP needs a loopback address, `plain_http`, `insecure` or a hosts.toml that says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, NoReturn, Self

import httpx

from nydusfs.errors import AuthError, NotFoundError, RegistryError
from nydusfs.redact import public_url
from nydusfs.registry.auth import Authenticator, web_address
from nydusfs.registry.credentials import Credentials, docker_credentials
from nydusfs.registry.hosts import ClientOptions, Endpoint, route
from nydusfs.registry.reference import is_loopback

log = logging.getLogger(__name__)

RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_REDIRECTS = 5
MAX_RETRY_AFTER = 30.0
_ERROR_BODY = 64 * 1024
_ASKED_BY = "nydus_authenticator"  # among an answer's extensions

Body = Callable[[], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    url: str
    headers: dict[str, str]
    body: Body | None
    size: int | None
    timeout: float | None


class Transport:
    """Thread-safe. `host` is what image references say (docker.io included)."""

    def __init__(
        self,
        host: str,
        options: ClientOptions | None = None,
        credentials: Callable[[], Credentials | None] | None = None,
    ) -> None:
        self.host = host
        self.options = options or ClientOptions()
        self._route = route(host, self.options)
        self._lock = threading.Lock()
        self._server: Endpoint | None = self._route.server[0] if len(self._route.server) == 1 else None
        self._clients_lock = threading.Lock()
        self._clients: dict[tuple[object, ...], httpx.Client] = {}
        self._authenticators: dict[str, Authenticator] = {}
        self._distrusted: set[str] = set()
        self._credentials = credentials or (lambda: docker_credentials(host))

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def server(self) -> Endpoint:
        """The registry's own address. The first use may probe. Raises RegistryError if nothing answers there."""
        with self._lock:
            if self._server is None:
                self._server = self._probe()
            return self._server

    def mirrors(self) -> list[Endpoint]:
        """Those of hosts.toml in order."""
        return [one for one in self._route.mirrors if one.url not in self._distrusted]

    def pull_endpoints(self) -> Iterator[Endpoint]:
        """Mirrors, then the registry itself: it may be out of reach of who has mirrors, and is looked for only then."""
        yield from self.mirrors()
        yield self.server

    @contextlib.contextmanager
    def request(
        self,
        method: str,
        path: str,
        *,
        scope: str,
        endpoint: Endpoint | None = None,
        headers: dict[str, str] | None = None,
        body: Body | None = None,
        size: int | None = None,
        retry: bool = True,
        timeout: float | None = None,
    ) -> Iterator[httpx.Response]:
        """Sends and yields an answer whose body is still to be read, whatever its status (401 has been dealt with).

        `path` starts with "/v2/", or is an absolute address (an upload location). `body` is called anew for each try
        and must give `size` bytes in all. `timeout` (seconds) replaces the usual one for the answer. Raises
        RegistryError when no answer comes after all tries, AuthError when the credentials are not accepted.
        """
        target = endpoint or self.server
        url = path if path.startswith(("http://", "https://")) else target.address(path)
        request = _Request(method, url, headers or {}, body, size, timeout)
        response = self._attempts(request, target, scope, retry)
        try:
            yield response
        except httpx.HTTPError as error:
            raise RegistryError(f"{method} {_shown(url)}: {_reason(error)}", url=_shown(url)) from error
        finally:
            response.close()

    def raise_for(self, response: httpx.Response, what: str) -> NoReturn:
        """The error that an unwelcome answer stands for; `what` begins the sentence."""
        status, url = response.status_code, _shown(str(response.request.url))
        said = read_error(response)
        said = f" ({said})" if said else ""
        if status == 404:
            raise NotFoundError(f"{what} does not exist in registry {self.host}{said}", status=status, url=url)
        if status == 403:
            authenticator: Authenticator = response.extensions[_ASKED_BY]
            raise AuthError(authenticator.refusal(f"{what}: registry answers 403{said}"), status=status, url=url)
        raise RegistryError(
            f"{what}: registry {self.host} answers {status}{said}",
            status=status,
            url=url,
            retry_after=retry_after(response),
        )

    def location(self, response: httpx.Response, otherwise: str = "") -> str:
        """Where an upload goes on. Registries behind a TLS proxy often name themselves with http://: the scheme we came
        with stays. Raises RegistryError for another host without TLS."""
        location = response.headers.get("location") or otherwise
        if not location:
            raise RegistryError(f"registry {self.host} names no upload location")
        here = response.request.url
        there = self._led_to(here, location)
        if here.scheme == "https" and there.scheme != "https":
            if there.host == here.host:
                there = there.copy_with(scheme="https", port=here.port)
            elif not self.options.insecure:
                raise RegistryError(
                    f"registry {self.host} sends uploads from HTTPS to {_shown(str(there))}: refused",
                    url=_shown(str(here)),
                )
        return str(there)

    def next_page(self, response: httpx.Response) -> str:
        """Where a list goes on (RFC 5988), "" at its end. Raises RegistryError."""
        link = response.links.get("next", {}).get("url")
        return str(self._led_to(response.request.url, link)) if link else ""

    def _led_to(self, here: httpx.URL, location: str) -> httpx.URL:
        there = web_address(location, here)
        if there is None:
            raise RegistryError(
                f"registry {self.host} leads from {_shown(str(here))} to {_shown(location)[:100]!r}, "
                "which is no http or https address",
                url=_shown(str(here)),
            )
        return there

    def distrust(self, endpoint: Endpoint) -> None:
        """A mirror that gave wrong bytes is asked no more."""
        log.warning("mirror %s gave wrong bytes: not used any more", _shown(endpoint.url))
        self._distrusted.add(endpoint.url)

    def _attempts(self, request: _Request, target: Endpoint, scope: str, retry: bool) -> httpx.Response:
        tries = self.options.retries + 1 if retry else 1
        for number in range(1, tries + 1):
            pause = self.options.retry_delay * 2 ** (number - 1) * random.uniform(0.75, 1.25)
            try:
                response = self._once(request, target, scope)
            except httpx.HTTPError as error:
                if number == tries:
                    raise RegistryError(
                        f"registry {self.host} cannot be reached at {_shown(target.url)}: {_reason(error)}",
                        url=_shown(request.url),
                    ) from error
                reason = _reason(error)
            else:
                if response.status_code not in RETRY_STATUS or number == tries:
                    return response
                pause = max(pause, retry_after(response))
                reason = f"status {response.status_code}"
                response.close()
            log.debug("%s %s: %s; next try in %.1f s", request.method, _shown(request.url), reason, pause)
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _once(self, request: _Request, target: Endpoint, scope: str) -> httpx.Response:
        authenticator = self._authenticator(target)
        used = authenticator.header(scope)
        for _ in range(2):
            response = self._redirected(request, target, used)
            response.extensions[_ASKED_BY] = authenticator
            if response.status_code != 401 or not _same_origin(response.request.url, target):
                return response  # whoever a redirect led to may not ask for credentials
            read_error(response)
            header = authenticator.answer(response, scope, used)
            if header is None:
                break
            used = header
        raise AuthError(
            authenticator.refusal(f"registry {self.host} answers 401 for {_shown(request.url)}"),
            status=401,
            url=_shown(request.url),
        )

    def _redirected(self, request: _Request, target: Endpoint, authorization: str | None) -> httpx.Response:
        address = httpx.URL(request.url)
        for _ in range(MAX_REDIRECTS + 1):
            # hosts.toml says Latin-1, repeats names and writes them as it likes
            sent = httpx.Headers({"Accept-Encoding": "identity", **request.headers}, encoding="latin-1")
            same = _same_origin(address, target)
            if same:
                sent.update(httpx.Headers(target.headers, encoding="latin-1"))
                if authorization:
                    sent["Authorization"] = authorization
            if request.size is not None:
                sent["Content-Length"] = str(request.size)
            client = self._client(target if same else replace(target, url=str(address), headers=(), client=()))
            content = request.body() if request.body else None
            timeout = self._timeout(request.timeout)
            built = client.build_request(request.method, address, headers=sent, content=content, timeout=timeout)
            response = _send(client, built, stream=True)
            location = response.headers.get("location")
            # what is sent may be sent again only where the answer says so: 301 to 303 would turn it into a GET
            followed = request.method in ("GET", "HEAD") or response.status_code in (307, 308)
            if not response.is_redirect or location is None or not followed:
                return response
            response.close()
            following = self._led_to(address, location)
            if address.scheme == "https" and following.scheme != "https" and not self.options.insecure:
                raise RegistryError(
                    f"registry {self.host} redirects from HTTPS to {_shown(str(following))}: refused",
                    url=_shown(request.url),
                )
            address = following
        raise RegistryError(f"registry {self.host} redirects for ever", url=_shown(request.url))

    def _timeout(self, answer: float | None = None) -> httpx.Timeout:
        usual = self.options.read_timeout
        return httpx.Timeout(usual, connect=self.options.connect_timeout, read=max(usual, answer or 0.0))

    def _authenticator(self, target: Endpoint) -> Authenticator:
        with self._lock:
            found = self._authenticators.get(target.url)
            if found is None:
                # a mirror gets only credentials of its own name
                own = target in self._route.server or target == self._server
                lookup = self._credentials if own else (lambda: docker_credentials(target.host))
                found = Authenticator(
                    self.host if own else target.host,
                    lookup,
                    lambda request: self._token_request(request, target),
                    plain_allowed=target.url.startswith("http://"),
                )
                self._authenticators[target.url] = found
            return found

    def _token_request(self, request: httpx.Request, target: Endpoint) -> httpx.Response:
        client = self._client(replace(target, url=str(request.url), headers=(), client=()))
        for number in range(1, self.options.retries + 2):
            try:
                # built anew by the client: its timeouts belong to the request
                fresh = client.build_request(
                    request.method, request.url, headers=request.headers, content=request.read() or None
                )
                response = _send(client, fresh)
            except httpx.TransportError:
                if number > self.options.retries:
                    raise
            else:
                if response.status_code not in RETRY_STATUS or number > self.options.retries:
                    return response
            time.sleep(self.options.retry_delay * 2 ** (number - 1))
        raise AssertionError("unreachable")

    def _client(self, endpoint: Endpoint) -> httpx.Client:
        """Shared by all addresses with the same TLS rules; loopback addresses never go through a proxy."""
        loopback = is_loopback(endpoint.host)
        secure = endpoint.url.startswith("https://")
        key = (secure, endpoint.verify, endpoint.ca_files, endpoint.client, loopback)
        with self._clients_lock:
            client = self._clients.get(key)
            if client is None:
                limits = httpx.Limits(max_connections=32, max_keepalive_connections=16)
                verify: Any = _tls(endpoint) if secure else False
                try:
                    client = httpx.Client(verify=verify, timeout=self._timeout(), limits=limits, trust_env=not loopback)
                except (httpx.InvalidURL, ValueError, ImportError) as error:  # the last is of SOCKS
                    # what httpx takes for a port may be a part of the password
                    reason = "no address" if isinstance(error, httpx.InvalidURL) else str(error)
                    raise RegistryError(
                        f"registry {self.host}: a proxy of the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, "
                        f"NO_PROXY) cannot be used: {reason}",
                        url=_shown(endpoint.url),
                    ) from None
                client.headers["User-Agent"] = "nydus-py"
                self._clients[key] = client
            return client

    def _probe(self) -> Endpoint:
        """The first address of several that speaks the distribution protocol; called with the lock held."""
        failures: list[str] = []
        for candidate in self._route.server:
            try:
                client = self._client(candidate)
                response = _send(client, client.build_request("GET", candidate.address("/v2/")))
            except httpx.HTTPError as error:
                failures.append(f"{_shown(candidate.url)}: {_reason(error)}")
                continue
            # Go servers answer plain HTTP on a TLS port with this 400
            if response.status_code == 400 and b"HTTPS" in response.content[:_ERROR_BODY]:
                failures.append(f"{_shown(candidate.url)}: the server wants HTTPS")
                continue
            if failures:
                log.info("registry %s is reached at %s (%s)", self.host, _shown(candidate.url), "; ".join(failures))
            return candidate
        raise RegistryError(f"registry {self.host} cannot be reached: {'; '.join(failures)}", url=_shown(candidate.url))


def _send(client: httpx.Client, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
    """Follows no redirect. Raises httpx.HTTPError alone."""
    try:
        return client.send(request, stream=stream, follow_redirects=False)
    except (httpx.InvalidURL, UnicodeError) as error:  # httpx looks at where a redirect leads all the same
        raise httpx.RemoteProtocolError(f"it redirects to what is no address: {error}", request=request) from error


def read_error(response: httpx.Response) -> str:
    """Codes and messages of an error answer's body (bounded), or ""; keeps the connection usable."""
    data = b""
    try:
        for piece in response.iter_raw():
            data += piece
            if len(data) > _ERROR_BODY:
                return ""
        errors = json.loads(data)["errors"]
        texts = [f"{one.get('code', '')}: {one.get('message', '')}".strip(": ") for one in errors]
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    return "; ".join(text for text in texts if text)[:500]


def retry_after(response: httpx.Response) -> float:
    """Seconds that a Retry-After header (a number or a date) asks for, at most MAX_RETRY_AFTER; 0.0 without one."""
    text = response.headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, min(seconds, MAX_RETRY_AFTER)) if seconds == seconds else 0.0


def _same_origin(address: httpx.URL, endpoint: Endpoint) -> bool:
    own = httpx.URL(endpoint.url)
    return (address.scheme, address.host, address.port) == (own.scheme, own.host, own.port)


def _tls(endpoint: Endpoint) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for path in endpoint.ca_files:
        try:
            context.load_verify_locations(cafile=path)
        except (OSError, ssl.SSLError) as error:
            raise RegistryError(f"certificate file {path} cannot be used: {error}", url=_shown(endpoint.url)) from error
    for certificate, key in endpoint.client:
        try:
            context.load_cert_chain(certificate, key or None, lambda: b"")
        except (OSError, ssl.SSLError) as error:
            raise RegistryError(
                f"client certificate {certificate} with key {key or certificate} cannot be used: {error}",
                url=_shown(endpoint.url),
            ) from error
    if not endpoint.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"no answer in time ({type(error).__name__})"
    return str(error) or type(error).__name__


def _shown(url: str) -> str:
    """Without query, user and password: a query may hold a signature, and hosts.toml a mirror's password."""
    return public_url(url.partition("?")[0])
