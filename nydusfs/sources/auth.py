"""What to send as Authorization for one repository: found out from the registry's challenges.

Tokens are fetched from the realm directly, whatever mirrors are configured, unless a mirror has `auth_through`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from nydusfs.errors import AuthError
from nydusfs.http import HttpClient, HttpError, Origin, Response, Url, parse_url
from nydusfs.registry.challenge import choose, parse_challenges
from nydusfs.registry.reference import is_loopback
from nydusfs.sources.tokens import TokenKey, TokenLate, TokenStore

# The first request to a registry nothing is known of goes alone: else each of a hundred readers would get a 401. One
# that takes long does not hold the others up.
_FIRST_ALONE = 1.0


class Authenticator:
    """Shared by every reader of one repository with the same credentials."""

    def __init__(
        self,
        client: HttpClient,
        tokens: TokenStore,
        auth: str,
        registry_token: str,
        *,
        connect_timeout: float,
        timeout: float,
        through: Origin | None = None,
        plain_allowed: bool = False,
    ) -> None:
        """`through`: the mirror that tokens are had from. `plain_allowed`: user and password may go over plain HTTP."""
        self._client = client
        self._tokens = tokens
        self._basic = f"Basic {auth}" if auth else ""
        self.has_user = bool(auth)
        self._connect_timeout = connect_timeout
        self._timeout = timeout
        # A token server that hangs, with hundreds waiting for it, must not hold a reader longer than this.
        self._limit = connect_timeout + 2 * timeout
        self.through = through
        self._plain_allowed = plain_allowed
        # What is sent when there is no bearer token: nothing, the configured token, or user and password.
        self._fixed = f"Bearer {registry_token}" if registry_token else ""
        self._key: TokenKey | None = None
        self._old: TokenKey | None = None  # of replaced credentials: its token is used up first
        self.settled = bool(registry_token)  # what to send is known: no need for `first`
        self._lock = trio.Lock()
        # By server: set when the first request to it has found out what is to be sent.
        self._leaders: dict[str, trio.Event] = {}

    def take_over(self, other: Authenticator) -> None:
        """Go on with the token of another one for the same repository; the next is fetched with our credentials."""
        if self.settled:
            return  # others have it in use already
        self.settled = other.settled
        self._fixed = self._basic if other._fixed.startswith("Basic ") else other._fixed
        if other._key is not None:
            self._old = other._key
            if other._key.basic != self._basic:
                self._tokens.retire(other._key)
            self._key = TokenKey(other._key.realm, other._key.service, other._key.scope, self._basic)

    def known(self) -> tuple[TokenKey, tuple[str, float, float]] | None:
        """Where the registry has tokens fetched, and the token that is good now."""
        token = self._tokens.known(self._key) if self._key is not None else None
        return None if self._key is None or token is None else (self._key, token)

    def recall(self, realm: Url, service: str, scope: str, token: tuple[str, float, float]) -> None:
        """Go on with what an earlier worker knew of this repository."""
        self._key = TokenKey(realm, service, scope, self._basic)
        self._tokens.adopt(self._key, token, self._client, self._connect_timeout, self._timeout)
        self.settled = True

    @asynccontextmanager
    async def first(self, address: str) -> AsyncIterator[None]:
        """Around a request: lets the first one to a server of an unknown registry go ahead of the others. One mirror
        that hangs does not hold up the next."""
        if self.settled:
            yield
        elif (leader := self._leaders.get(address)) is not None:
            with trio.move_on_after(_FIRST_ALONE):
                await leader.wait()
            yield
        else:
            self._leaders[address] = leader = trio.Event()
            try:
                yield
            finally:
                leader.set()
                self._leaders.pop(address, None)

    def ready(self) -> str | None:
        """What `header` gives where it need not wait, else None."""
        if self._key is None:
            return self._fixed
        if self._old is not None:
            if value := self._tokens.current(self._old):
                return value
            self._old = None
        return self._tokens.ready(self._key)

    async def header(self) -> str:
        """The value to send now, "" for none. A failed renewal leaves it to the 401 path."""
        value = self.ready()
        if value is not None:
            return value
        assert self._key is not None
        with trio.move_on_after(self._limit):
            return await self._tokens.fresh(self._key)
        return self._tokens.current(self._key)

    def accepted(self) -> None:
        """The head of an answer that is no 401 is here: what is sent is right."""
        self.settled = True
        for leader in self._leaders.values():
            leader.set()

    async def answer(
        self,
        sent: str,
        refusal: Callable[[], Awaitable[Response]],
        where: Url,
        patience: float = 0.0,
        scope: str | None = None,
    ) -> str:
        """Deal with a 401 to a request that carried `sent`; the value to try next. Raises AuthError or HttpError.

        `refusal` gives the answer with the challenge; it is called only when nobody else has dealt with it meanwhile.
        `patience`: seconds without progress of a token request, if they are to be more than usual. `scope`: of the
        token, where the challenge is not about what it is for.
        """
        timeout = max(self._timeout, patience)
        limit = self._limit + 2 * (timeout - self._timeout)
        with trio.move_on_after(limit):
            return await self._answer(sent, refusal, where, timeout, scope)
        raise TokenLate(f"{where}: no token within {limit:g} s", url=str(where))

    def _may_be_plain(self, realm: Url) -> bool:
        return self._plain_allowed or is_loopback(realm.origin.netloc)

    async def _answer(
        self, sent: str, refusal: Callable[[], Awaitable[Response]], where: Url, timeout: float, scope: str | None
    ) -> str:
        async with self._lock:
            self._old = None
            value = await self.header()
            if value and value != sent:
                return value
            response = await refusal()
            challenge = choose(parse_challenges(response.get("www-authenticate")))
            if challenge is None:
                raise AuthError(f"{where}: 401 without a Bearer or Basic challenge", url=str(where))
            if challenge.scheme == "basic":
                if not self._basic:
                    raise AuthError(f"{where} wants a user and password, and none are configured", url=str(where))
                if sent == self._basic:
                    raise AuthError(f"{where} does not accept the user and password", url=str(where))
                self._key = None
                self._fixed = self._basic
                return self._fixed
            try:
                realm = parse_url(challenge.get("realm"))
            except HttpError as error:
                raise AuthError(f"token realm {challenge.get('realm')[:80]!r}: {error}") from None
            if self.through is not None:
                realm = Url(self.through, realm.target)
            elif self._basic and realm.origin.scheme == "http" and not self._may_be_plain(realm):
                raise AuthError(
                    f"token server {realm.origin} of {where} would get user and password over plain HTTP: refused, "
                    "unless `skip_verify` allows it",
                    url=str(where),
                )
            scope = challenge.get("scope") if scope is None else scope
            self._key = TokenKey(realm, challenge.get("service"), scope, self._basic)
        # outside: readers of one repository meet again at the token's own lock
        value = await self._tokens.replace(self._key, sent, self._client, self._connect_timeout, timeout)
        if value == sent:
            raise AuthError(f"{where} does not accept the token it asked for", url=str(where))
        return value
