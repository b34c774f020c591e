"""What all sources of one process share: connections, tokens, the standing of mirrors, and tasks that look after them.

Images of one registry are many; their connections and what was learnt about a mirror belong to the node.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Any

import trio

from nydusfs.config import ConnectionConfig, MirrorConfig
from nydusfs.http import HttpClient, HttpError, Origin, parse_url
from nydusfs.http.connection import Tls
from nydusfs.sources.auth import Authenticator
from nydusfs.sources.dragonfly import Peer
from nydusfs.sources.limits import ExtraBudget, TokenBucket
from nydusfs.sources.probe import Prober
from nydusfs.sources.standing import Standing
from nydusfs.sources.tokens import TokenStore

log = logging.getLogger("nydusfs.sources")

# `timeout: 0` means no limit upstream. A reader must get its errno in bounded time, so ours is a minute.
NO_LIMIT = 60.0


def seconds(value: int) -> float:
    return float(value) if value else NO_LIMIT


def environment_headers(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Headers for every request to a source: NYDUS_HEADER_<Name>=value (reference 1.8). Illegal ones are left out."""
    found = []
    for variable, value in environment.items():
        name = variable.removeprefix("NYDUS_HEADER_")
        if name == variable:
            continue
        if re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) and value.isprintable() and value.isascii():
            found.append((name, value))
        else:
            log.warning("environment: %s is no legal header, it is not sent", variable)
    return tuple(found)


def _digest(key: tuple[object, ...]) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()


class SourceHub:
    """Keyed by settings, so that two mounts with different credentials or roots share nothing they should not.

    `nursery`: where background work runs (renewal of tokens, probes of sources that are down). It outlives all reads.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.learned: Callable[[], None] = lambda: None  # see `leave`
        self.tokens = TokenStore(lambda: self.learned())
        self._left: dict[str, dict[str, Any]] = {}
        self.extras = ExtraBudget()
        self.prober = Prober(nursery)
        self.headers = environment_headers(os.environ)
        self._clients: dict[Tls, HttpClient] = {}
        self._authenticators: dict[tuple[object, ...], Authenticator] = {}
        self._standings: dict[tuple[object, ...], Standing] = {}
        self._peers: dict[int, Peer] = {}  # by standing
        self._buckets: dict[tuple[Origin, float], TokenBucket] = {}
        nursery.start_soon(self.tokens.renew_forever)

    def client(self, tls: Tls) -> HttpClient:
        if tls not in self._clients:
            self._clients[tls] = HttpClient(tls)
        return self._clients[tls]

    def authenticator(
        self,
        connection: ConnectionConfig,
        tls: Tls,
        registry: Origin,
        repo: str,
        auth: str,
        registry_token: str,
        through: Origin | None = None,
    ) -> Authenticator:
        key = (tls, registry, repo, auth, registry_token, through)
        if key not in self._authenticators:
            self._authenticators[key] = Authenticator(
                self.client(tls),
                self.tokens,
                auth,
                registry_token,
                connect_timeout=seconds(connection.connect_timeout),
                timeout=seconds(connection.timeout),
                through=through,
                plain_allowed=registry.scheme == "http" or connection.skip_verify,
            )
            self._recall(key)
        return self._authenticators[key]

    # -- what the next worker is to know

    def leave(self) -> bytes:
        """Tokens by repository, for the next worker: it needs no challenge and no token before its first read. What it
        has to say again is said by `learned`. Secret: for memory only."""
        now = time.time()
        found = {name: one for name, one in self._left.items() if one["times"][1] > now}  # not asked for yet
        for key, authenticator in self._authenticators.items():
            if (known := authenticator.known()) is not None:
                at, (value, renew, expires) = known
                times = [now + renew if renew < inf else None, now + expires]
                found[_digest(key)] = {"realm": at.realm.full, "of": [at.service, at.scope], "t": value, "times": times}
        return json.dumps(found).encode()

    def take_over(self, left: bytes) -> None:
        """What another worker did `leave`. One that says it in another way has said nothing."""
        try:
            self._left = {name: one for name, one in json.loads(left).items() if float(one["times"][1])}
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            self._left = {}

    def _recall(self, key: tuple[object, ...]) -> None:
        one = self._left.pop(_digest(key), None)
        if one is None:
            return
        try:
            renew, expires = (inf if when is None else float(when) - time.time() for when in one["times"])
            service, scope = one["of"]
            if expires > 0:
                token = (str(one["t"]), renew, expires)
                self._authenticators[key].recall(parse_url(one["realm"]), service, scope, token)
        except (ValueError, TypeError, KeyError, HttpError):
            pass  # of another release

    def forget(self, authenticator: Authenticator) -> None:
        """Its credentials were replaced: whoever still uses it does, nobody new gets it."""
        self._authenticators = {key: one for key, one in self._authenticators.items() if one is not authenticator}

    def standing(
        self,
        address: str,
        headers: Iterable[tuple[str, str]] = (),
        failure_limit: int = 5,
        interval: float = 0.0,
        idle: float = 300.0,
    ) -> Standing:
        """Of one server as it is used: with other headers a mirror may serve from another registry."""
        key = (address, tuple(sorted(headers)), failure_limit, interval, idle)
        if key not in self._standings:
            self._standings[key] = Standing(failure_limit, interval, idle)
        return self._standings[key]

    def mirror_standing(
        self, origin: Origin, query: str, headers: Iterable[tuple[str, str]], mirror: MirrorConfig
    ) -> Standing:
        """`health_check_interval` counts where it is written down; ours is shorter than upstream's default."""
        interval = float(max(1, mirror.health_check_interval)) if mirror.health_keys_given else 0.0
        idle = float(mirror.health_check_pause_elapsed)
        return self.standing(f"{origin}{query}", headers, mirror.failure_limit, interval, idle)

    def peer(self, standing: Standing) -> Peer:
        """Of a mirror or proxy, which may turn out to be a Dragonfly."""
        return self._peers.setdefault(id(standing), Peer())

    def bucket(self, origin: Origin, rate: float) -> TokenBucket:
        key = (origin, rate)
        if key not in self._buckets:
            self._buckets[key] = TokenBucket(rate, burst=2 * rate)
        return self._buckets[key]

    def report(self) -> list[dict[str, Any]]:
        """What is known about each source, for operators. Header values may be secret: only their digest is shown."""
        found = []
        for (address, headers, *_), standing in self._standings.items():
            latency = standing.latency
            entry: dict[str, Any] = {
                "address": address,
                "state": standing.state.value,
                "in_flight": standing.in_flight,
                "error_rate": round(standing.error_rate, 4),
                "first_byte_millis": round(latency.first * 1000, 1) if latency.samples else None,
                "bytes_per_second": int(latency.rate) if latency.samples else None,
                "last_failure": standing.reason,
                "requests": standing.tally.requests,
                "failures": standing.tally.failures,
                "bytes": standing.tally.bytes,
            }
            if headers:
                entry["headers"] = hashlib.sha256(repr(headers).encode()).hexdigest()[:8]
            found.append(entry)
        return found

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
