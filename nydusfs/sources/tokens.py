"""Registry tokens of the whole node: each realm, service, scope and user has one, fetched by one task, renewed in time.

Tokens are fetched when a 401 asks for them and renewed in the background while they are used, each at its own moment
before its end, one after the other: a node with a thousand images never asks a token server in a burst.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlencode

import trio

from nydusfs.errors import AuthError
from nydusfs.http import HttpClient, HttpError, Response, Url
from nydusfs.registry.challenge import parse_token_reply
from nydusfs.sources.endpoint import is_temporary

log = logging.getLogger("nydusfs.sources")

_CLIENT_ID = "nydus-registry-client"
_MARGIN = 20.0  # seconds before expiry at which a token is renewed, or a quarter of its life if that is less
_MAX_JITTER = 300.0  # and as much earlier at random, or a tenth of its life
_FIRST_PAUSE, _MAX_PAUSE = 5.0, 600.0  # after a failed renewal, doubling
_AT_ONCE = 4  # first tokens fetched at the same time from one realm

now = trio.current_time


class TokenLate(AuthError):
    """No token now, and perhaps soon: the server for them takes too long, or says that it has no time."""


@dataclass(frozen=True, slots=True)
class TokenKey:
    """`basic`: value of the Authorization header of the token request, "" for anonymous ones."""

    realm: Url
    service: str
    scope: str
    basic: str = field(repr=False)


@dataclass(slots=True)
class _Slot:
    client: HttpClient
    connect_timeout: float
    timeout: float
    value: str = ""
    renew_at: float = math.inf
    expires_at: float = -math.inf
    used_at: float = -math.inf
    asked_at: float = -math.inf  # by a renewal, or when it came
    pause: float = 0.0
    post_first: bool = True
    lock: trio.Lock = field(default_factory=trio.Lock)

    @property
    def in_use(self) -> bool:
        return self.used_at > self.asked_at

    @property
    def due(self) -> float:
        """Its renewal; once that is over, and nobody has read since, its end."""
        return self.renew_at if self.in_use or now() < self.renew_at else self.expires_at


class TokenStore:
    def __init__(self, learned: Callable[[], None] = lambda: None) -> None:
        """`learned` is called when there is a new token."""
        self._learned = learned
        self._slots: dict[TokenKey, _Slot] = {}
        self._realms: dict[Url, trio.CapacityLimiter] = {}
        self._changed = trio.Event()

    def current(self, key: TokenKey) -> str:
        """The token as it is, "" when there is none that is still good."""
        slot = self._slots.get(key)
        if slot is None or now() >= slot.expires_at:
            return ""
        slot.used_at = now()
        return slot.value

    def known(self, key: TokenKey) -> tuple[str, float, float] | None:
        """Token, seconds until it is to be renewed and until it ends."""
        slot = self._slots.get(key)
        if slot is None or not slot.value or now() >= slot.expires_at:
            return None
        return slot.value, slot.renew_at - now(), slot.expires_at - now()

    def adopt(
        self, key: TokenKey, token: tuple[str, float, float], client: HttpClient, connect_timeout: float, timeout: float
    ) -> None:
        """A token of an earlier worker, as `known` gave it and with what is left of its time."""
        if key not in self._slots:
            value, renew, expires = token
            slot = self._slots[key] = _Slot(client, connect_timeout, timeout, value)
            slot.asked_at = now()
            slot.renew_at, slot.expires_at = now() + renew, now() + expires
            self._changed.set()

    def ready(self, key: TokenKey) -> str | None:
        """What `fresh` gives where it need not wait, else None."""
        slot = self._slots.get(key)
        if slot is None:
            return ""
        moment = now()
        if moment >= slot.renew_at:
            return None
        slot.used_at = moment
        return slot.value if moment < slot.expires_at else ""

    async def fresh(self, key: TokenKey) -> str:
        """The token, renewed first where that is due and nobody is at it. "" when it could not be had."""
        slot = self._slots.get(key)
        if slot is None:
            return ""
        slot.used_at = now()
        due = now() >= slot.renew_at
        if due and (not slot.lock.locked() or now() >= slot.expires_at):
            await self._renew(key, slot)
        return slot.value if now() < slot.expires_at else ""

    async def replace(
        self, key: TokenKey, refused: str, client: HttpClient, connect_timeout: float, timeout: float
    ) -> str:
        """A token other than `refused`, which the registry did not accept. Raises AuthError or HttpError. `timeout`: of
        this request, and of renewals if there is no token yet."""
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = _Slot(client, connect_timeout, timeout)
        slot.used_at = now()
        async with slot.lock:
            if not slot.value or slot.value == refused or now() >= slot.expires_at:
                await self._fetch(key, slot, timeout)
        return slot.value

    def retire(self, key: TokenKey) -> None:
        """Its user and password were replaced: the token is good to its end, but nobody asks for another with them."""
        if slot := self._slots.get(key):
            slot.renew_at, slot.asked_at = slot.expires_at, math.inf
            self._changed.set()

    async def renew_forever(self) -> None:
        """Renew what is used before it ends, one after the other."""
        while True:
            self._changed = trio.Event()
            due = min((slot.due for slot in self._slots.values()), default=math.inf)
            with trio.move_on_at(due):
                await self._changed.wait()
                continue
            for key, slot in list(self._slots.items()):
                if now() < slot.due:
                    continue
                if slot.in_use:
                    await self._renew(key, slot)
                else:
                    del self._slots[key]  # the next reader will ask for one

    async def _renew(self, key: TokenKey, slot: _Slot) -> None:
        async with slot.lock:
            began = now()
            if began < slot.renew_at:
                return
            try:
                await self._fetch(key, slot, slot.timeout)
            except (AuthError, HttpError) as error:
                log.warning("cannot renew the registry token: %s", error)
                slot.pause = min(_MAX_PAUSE, slot.pause * 2 or _FIRST_PAUSE)
                slot.renew_at = now() + slot.pause
                slot.asked_at = began
                self._changed.set()

    async def _fetch(self, key: TokenKey, slot: _Slot, timeout: float) -> None:
        limiter = self._realms.setdefault(key.realm, trio.CapacityLimiter(_AT_ONCE))
        async with limiter:
            response = await _ask(key, slot, timeout)
        if response.status in (401, 403):
            raise AuthError(f"{key.realm}: {response.status}, the credentials are not accepted", url=str(key.realm))
        if response.status != 200:
            what = f"{key.realm}: token request answered with status {response.status}"
            raise (TokenLate if is_temporary(response.status) else AuthError)(what, url=str(key.realm))
        reply = parse_token_reply(bytes(response.body), str(key.realm))
        life = reply.expires_in
        slot.value = f"Bearer {reply.token}"
        slot.asked_at = now()
        slot.expires_at = slot.asked_at + life
        jitter = random.random() * min(life / 10, _MAX_JITTER)
        slot.renew_at = slot.expires_at - min(_MARGIN, life / 4) - jitter
        slot.pause = 0.0
        self._changed.set()
        self._learned()
        log.info("cached bearer auth, next time: %d", time.time() + life)


async def _ask(key: TokenKey, slot: _Slot, timeout: float) -> Response:
    """POST first with credentials and GET when that is refused, as upstream; without credentials only GET."""
    headers = [("Authorization", key.basic)] if key.basic else []
    fields = [(name, value) for name, value in (("service", key.service), ("scope", key.scope)) if value]
    if key.basic and slot.post_first:
        form = urlencode([*fields, ("client_id", _CLIENT_ID)]).encode()
        typed = [*headers, ("Content-Type", "application/x-www-form-urlencoded")]
        response = await _send(slot, timeout, "POST", key.realm, typed, form)
        if response.status == 200:
            return response
        slot.post_first = False
    joint = "&" if "?" in key.realm.target else "?"
    target = f"{key.realm.target}{joint}{urlencode(fields)}" if fields else key.realm.target
    return await _send(slot, timeout, "GET", Url(key.realm.origin, target), headers, b"")


async def _send(
    slot: _Slot, timeout: float, method: str, url: Url, headers: Sequence[tuple[str, str]], body: bytes
) -> Response:
    return await slot.client.request(method, url, headers, body, connect_timeout=slot.connect_timeout, timeout=timeout)
