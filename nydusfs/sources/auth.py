"""The registry's token dance for one repository, shared by every reader of it.

Tokens are fetched from the realm directly, whatever mirrors are configured, unless a mirror has `auth_through`. One
task refreshes at a time; the others go on with the old token while it is valid.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from urllib.parse import urlencode

import trio

from nydusfs.errors import AuthError
from nydusfs.http import HttpClient, HttpError, Origin, Response, Url, parse_url
from nydusfs.registry.challenge import Challenge, choose, parse_challenges, parse_token_reply

log = logging.getLogger("nydusfs.sources")

_CLIENT_ID = "nydus-registry-client"
_MARGIN = 20.0  # seconds before expiry at which a token is renewed, or a quarter of its life if that is less


class Authenticator:
    """`header()` gives the Authorization value to send, "" for none."""

    def __init__(
        self,
        client: HttpClient,
        auth: str,
        registry_token: str,
        *,
        connect_timeout: float,
        timeout: float,
        through: Origin | None = None,
    ) -> None:
        self._client = client
        self._basic = f"Basic {auth}" if auth else ""
        self._connect_timeout = connect_timeout
        self._timeout = timeout
        self.through = through
        self._lock = trio.Lock()
        self._value = f"Bearer {registry_token}" if registry_token else ""
        self._renew_at = self._expires_at = float("inf")
        self._challenge: Challenge | None = None
        self._post_first = True

    def take_over(self, other: Authenticator) -> None:
        """Go on with the token of another one for the same repository; the next is fetched with our credentials."""
        if self._value:
            return  # others have it in use already
        self._value = self._basic if other._value.startswith("Basic ") else other._value
        self._renew_at, self._expires_at = other._renew_at, other._expires_at
        self._challenge, self._post_first = other._challenge, other._post_first

    async def header(self) -> str:
        """The value to send now, renewed when it is about to expire. A failed renewal leaves it to the 401 path."""
        now = time.monotonic()
        if now < self._renew_at or self._challenge is None:
            return self._value
        if self._lock.locked() and now < self._expires_at:
            return self._value  # someone is at it, the old one is still good
        async with self._lock:
            if time.monotonic() >= self._renew_at:
                try:
                    await self._fetch(self._challenge)
                except (AuthError, HttpError) as error:
                    log.warning("cannot renew the registry token: %s", error)
                    self._renew_at = time.monotonic() + 5.0
                    if time.monotonic() >= self._expires_at:
                        self._value = ""
        return self._value

    async def answer(self, response: Response, sent: str, where: Url) -> str:
        """Deal with a 401 to a request that carried `sent`; the value to try next. Raises AuthError or HttpError."""
        async with self._lock:
            if self._value and self._value != sent:
                return self._value  # another reader has been through it meanwhile
            challenge = choose(parse_challenges(response.get("www-authenticate")))
            if challenge is None:
                raise AuthError(f"{where}: 401 without a Bearer or Basic challenge", url=str(where))
            if challenge.scheme == "basic":
                if not self._basic:
                    raise AuthError(f"{where} wants a user and password, and none are configured", url=str(where))
                if sent == self._basic:
                    raise AuthError(f"{where} does not accept the user and password", url=str(where))
                self._value, self._renew_at, self._expires_at = self._basic, float("inf"), float("inf")
                return self._value
            await self._fetch(challenge)
            if self._value == sent:
                raise AuthError(f"{where} does not accept the token it asked for", url=str(where))
            return self._value

    async def _fetch(self, challenge: Challenge) -> None:
        try:
            realm = parse_url(challenge.get("realm"))
        except HttpError as error:
            raise AuthError(f"token realm {challenge.get('realm')[:80]!r}: {error}") from None
        if self.through is not None:
            realm = Url(self.through, realm.target)
        fields = [(name, challenge.get(name)) for name in ("service", "scope") if challenge.get(name)]
        response = await self._ask(realm, fields)
        if response.status in (401, 403):
            raise AuthError(f"{realm}: {response.status}, the credentials are not accepted", url=str(realm))
        if response.status != 200:
            raise AuthError(f"{realm}: token request answered with status {response.status}", url=str(realm))
        reply = parse_token_reply(bytes(response.body), str(realm))
        now = time.monotonic()
        self._value = f"Bearer {reply.token}"
        self._challenge = challenge
        self._expires_at = now + reply.expires_in
        self._renew_at = self._expires_at - min(_MARGIN, reply.expires_in / 4)
        log.info("cached bearer auth, next time: %d", time.time() + reply.expires_in)

    async def _ask(self, realm: Url, fields: Sequence[tuple[str, str]]) -> Response:
        """POST first with credentials and GET when that is refused, as upstream; without credentials only GET."""
        headers = [("Authorization", self._basic)] if self._basic else []
        if self._basic and self._post_first:
            form = urlencode([*fields, ("client_id", _CLIENT_ID)]).encode()
            typed = [*headers, ("Content-Type", "application/x-www-form-urlencoded")]
            response = await self._send("POST", realm, typed, form)
            if response.status == 200:
                return response
            self._post_first = False
        joint = "&" if "?" in realm.target else "?"
        target = f"{realm.target}{joint}{urlencode(fields)}" if fields else realm.target
        return await self._send("GET", Url(realm.origin, target), headers, b"")

    async def _send(self, method: str, url: Url, headers: list[tuple[str, str]], body: bytes) -> Response:
        return await self._client.request(
            method, url, headers, body, connect_timeout=self._connect_timeout, timeout=self._timeout
        )
