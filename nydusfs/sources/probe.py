"""Looking after sources that are down, in the background, so that no reader pays for finding out.

A source is back when it answers its ping and then gives a small range that another source has given before, byte for
byte: a frozen Dragonfly scheduler answers pings for minutes while every read hangs.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

import trio

from nydusfs.config import ProxyConfig
from nydusfs.sources.endpoint import Endpoint, Range, Refused
from nydusfs.sources.race import Racer, Sample
from nydusfs.sources.standing import State

log = logging.getLogger("nydusfs.sources")

PATIENCE = 1.0  # of a probe, in seconds without progress; as a whole three times that


@dataclass(slots=True)
class _Watched:
    endpoint: Endpoint
    racer: Racer


class Prober:
    """One task per source that is down, and one per proxy with a `ping_url`, which is checked all the time."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._watched: dict[int, _Watched] = {}  # by standing: images share it

    def watch(self, endpoint: Endpoint, racer: Racer) -> None:
        """Probe this source, which is down, until it is back. Whoever used it last lends the prober its way there."""
        key = id(endpoint.standing)
        known = self._watched.get(key)
        if known is not None:
            known.endpoint, known.racer = endpoint, racer
            return
        self._watched[key] = watched = _Watched(endpoint, racer)
        self._nursery.start_soon(self._until_back, watched, key)

    async def _until_back(self, watched: _Watched, key: int) -> None:
        try:
            standing = watched.endpoint.standing
            while standing.state is State.DOWN:
                await trio.sleep_until(standing.probe_at)
                if trio.current_time() - watched.racer.last_read > standing.idle:
                    return  # the next read starts this anew
                await _probe(watched.endpoint, watched.racer)
        except Exception:  # a bug here must not end the worker that serves every mount
            log.exception("probing %s failed unexpectedly", watched.endpoint.name)
        finally:
            del self._watched[key]

    def check_proxy(self, endpoint: Endpoint, racer: Racer, proxy: ProxyConfig) -> None:
        """Ping it every `check_interval` seconds while it is used, whatever its state, if it has a `ping_url`."""
        if not proxy.ping_url:
            return
        key = -id(endpoint.standing)
        known = self._watched.get(key)
        if known is not None:
            known.endpoint, known.racer = endpoint, racer
            return
        self._watched[key] = watched = _Watched(endpoint, racer)
        times = float(max(1, proxy.check_interval)), float(proxy.check_pause_elapsed)
        self._nursery.start_soon(self._check_forever, watched, *times)

    async def _check_forever(self, watched: _Watched, interval: float, idle: float) -> None:
        while True:
            await trio.sleep(interval)
            standing = watched.endpoint.standing
            if trio.current_time() - standing.last_used > idle:  # by whichever image
                continue
            if standing.state is State.DOWN:
                continue  # looked after by `watch`, once somebody reads
            try:
                await watched.endpoint.ping()
            except Refused as reason:
                log.warning("%s: %s", watched.endpoint.name, reason)
                standing.probed(trio.current_time(), False, str(reason))
                self.watch(watched.endpoint, watched.racer)
            except Exception:
                log.exception("checking %s failed unexpectedly", watched.endpoint.name)


async def _probe(endpoint: Endpoint, racer: Racer) -> None:
    """One look; what comes out of it is in the standing."""
    standing = endpoint.standing
    reason = ""
    try:
        with trio.move_on_after(3 * PATIENCE) as limit:
            await endpoint.ping()
            sample = racer.sample
            if sample is not None:
                wanted, data = _part(sample)
                answer = await endpoint.fetch(wanted, PATIENCE)
                if answer.body != data:
                    endpoint.forget(sample.wanted.blob_id)
                    reason = "probe answered with wrong bytes"
        if limit.cancelled_caught:
            reason = "probe took too long"
    except Refused as refused:
        # A blob it does not have says nothing about the server, which answered.
        reason = str(refused) if refused.blame else ""
    standing.probed(trio.current_time(), not reason, reason)


def _part(sample: Sample) -> tuple[Range, bytes]:
    """Another range of it each time: one that was asked for before a classic Dragonfly has, its scheduler frozen or
    not."""
    skip = random.randrange(len(sample.data) // 2 or 1)
    wanted = sample.wanted
    return Range(wanted.blob_id, wanted.offset + skip, wanted.size - skip), sample.data[skip:]
