"""Authorization headers for one registry: challenges answered, tokens fetched, kept per scope and renewed in time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import httpx

from nydusfs.errors import AuthError, RegistryError
from nydusfs.redact import public_url
from nydusfs.registry.challenge import Challenge, choose, parse_challenges, parse_token_reply
from nydusfs.registry.credentials import Credentials
from nydusfs.registry.reference import is_loopback

log = logging.getLogger(__name__)

_CLIENT_ID = "nydus-registry-client"
# a token is renewed this share of its life before it ends, so that a long upload does not start on its last second
_RENEW_SHARE = 0.2


def web_address(text: str, base: httpx.URL | None = None) -> httpx.URL | None:
    """What a server names, as seen from `base`; None if that is no http or https address."""
    try:
        url = base.join(text) if base is not None else httpx.URL(text)
        usable = url.scheme in ("http", "https") and bool(url.host) and (url.port is None or 0 < url.port < 65536)
    except (httpx.InvalidURL, ValueError):  # the latter is of host names
        return None
    return url if usable else None


class Authenticator:
    """Thread-safe. `fetch` sends the token request (other host, other TLS rules than the registry's connection)."""

    def __init__(
        self,
        host: str,
        credentials: Callable[[], Credentials | None],
        fetch: Callable[[httpx.Request], httpx.Response],
        *,
        plain_allowed: bool = False,
    ) -> None:
        self._host = host
        self._plain_allowed = plain_allowed
        self._lookup = credentials
        self._fetch = fetch
        self._lock = threading.Lock()
        self._looked_up = False
        self._credentials: Credentials | None = None
        self._headers: dict[str, tuple[str, float]] = {}  # scope -> header, monotonic end of life

    def header(self, scope: str) -> str | None:
        """The header to send at once, if one is known for this scope."""
        with self._lock:
            value, end = self._headers.get(scope) or self._headers.get("") or ("", 0.0)
            return value if value and time.monotonic() < end else None

    def answer(self, response: httpx.Response, scope: str, used: str | None) -> str | None:
        """A new header after a 401 to a request that was sent with `used`; None if there is nothing left to try.

        Raises AuthError when the token server refuses.
        """
        challenge = choose(parse_challenges(response.headers.get_list("www-authenticate")))
        if challenge is None:
            return None
        with self._lock:
            known, end = self._headers.get(scope, ("", 0.0))
            if known and known != used and time.monotonic() < end:
                return known  # another thread has just done it
            credentials = self.credentials()
            if credentials and credentials.registry_token:
                given = f"Bearer {credentials.registry_token}"
                self._headers[""] = given, float("inf")
                return given if given != used else None
            if challenge.scheme == "basic":
                header = f"Basic {credentials.basic}" if credentials and credentials.username else None
                if header is None or header == used:
                    return None
                self._headers[""] = header, float("inf")
                return header
            token, life = self._token(challenge, scope)
            header = f"Bearer {token}"
            self._headers[scope] = header, time.monotonic() + life * (1 - _RENEW_SHARE)
            return header

    def credentials(self) -> Credentials | None:
        if not self._looked_up:
            self._credentials = self._lookup()
            self._looked_up = True
        return self._credentials

    def _token(self, challenge: Challenge, scope: str) -> tuple[str, float]:
        realm = challenge.get("realm")
        address = web_address(realm)
        if address is None:
            named = public_url(realm)
            raise AuthError(f"registry {self._host}: names {named!r} as its token server, which is no address")
        netloc = address.netloc.decode()
        where = f"token server {netloc} of registry {self._host}"
        credentials = self.credentials()
        if credentials and address.scheme == "http" and not (self._plain_allowed or is_loopback(netloc)):
            raise AuthError(f"{where} would get the password over plain HTTP: refused", url=realm)
        fields = {"service": challenge.get("service")} if challenge.get("service") else {}
        scopes = _scopes(challenge.get("scope"), scope)
        if credentials and credentials.identity_token:
            form = {
                **fields,
                "scope": " ".join(scopes),
                "grant_type": "refresh_token",
                "refresh_token": credentials.identity_token,
                "client_id": _CLIENT_ID,
            }
            response = self._send(httpx.Request("POST", realm, data=form), where)
        else:
            headers = {"Authorization": f"Basic {credentials.basic}"} if credentials else {}
            query: dict[str, str | list[str]] = {**fields, "scope": scopes}
            response = self._send(
                httpx.Request("GET", address.copy_merge_params(httpx.QueryParams(query)), headers=headers),
                where,
            )
            if response.status_code in (404, 405) and credentials:  # OAuth2-only servers
                form = {
                    **fields,
                    "scope": " ".join(scopes),
                    "grant_type": "password",
                    "username": credentials.username,
                    "password": credentials.password,
                    "client_id": _CLIENT_ID,
                }
                response = self._send(httpx.Request("POST", realm, data=form), where)
        if response.status_code in (400, 401, 403):
            raise AuthError(
                self.refusal(f"{where} answers {response.status_code}"), status=response.status_code, url=realm
            )
        if response.status_code != 200:
            raise RegistryError(f"{where} answers {response.status_code}", status=response.status_code, url=realm)
        reply = parse_token_reply(response.content, where)
        return reply.token, reply.expires_in

    def _send(self, request: httpx.Request, where: str) -> httpx.Response:
        try:
            return self._fetch(request)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise RegistryError(
                f"{where} cannot be reached: {reason}", url=str(request.url.copy_with(query=None))
            ) from error

    def refusal(self, what: str) -> str:
        """The sentence for credentials that were refused or missing."""
        credentials = self.credentials()
        if credentials is None:
            return (
                f"{what}: authentication required, and docker's config.json has no credentials for {self._host}: "
                f"run `docker login {self._host}` or set DOCKER_CONFIG"
            )
        who = f"user {credentials.username!r}" if credentials.username else "the identity token"
        return f"{what}: wrong credentials, or no right to do this, for {who} of docker's config.json"


def _scopes(challenged: str, wanted: str) -> list[str]:
    """What the server asks for and what we need, each once, ours last."""
    listed = [one for one in f"{challenged} {wanted}".split(" ") if one]
    covered = [one for one in listed if not any(other != one and _covers(other, one) for other in listed)]
    return list(dict.fromkeys(covered))


def _covers(larger: str, smaller: str) -> bool:
    left, right = larger.rsplit(":", 1), smaller.rsplit(":", 1)
    return left[0] == right[0] and set(right[-1].split(",")) < set(left[-1].split(","))
