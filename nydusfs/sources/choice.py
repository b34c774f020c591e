"""Which source a request goes to. A pure function of what is known about each of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

from nydusfs.sources.standing import Standing, State

# Requests in flight at which a source's answers are taken to need twice as long.
_CROWD = 16
# A source with as many requests as it may be trusted with comes behind the other mirrors; seconds for each of them.
_CROWDED_SECONDS = 0.1
_ANSWERS_SECONDS = 0.3  # at most, for one that has answered: being asked a lot at once is no reason for the origin
# A source must be this much faster than one listed before it to be preferred: the list's order is the user's.
_RANK_FACTOR, _RANK_SECONDS = 0.25, 0.005
# Mirrors are there to spare the origin. It is preferred only to mirrors that take a second and ten times as long.
_ORIGIN_FACTOR, _ORIGIN_SECONDS = 10.0, 1.0


class Option(Protocol):
    """`rank`: place in the configured order; `last`: the origin."""

    @property
    def standing(self) -> Standing: ...
    @property
    def rank(self) -> int: ...
    @property
    def last(self) -> bool: ...


_Option = TypeVar("_Option", bound=Option)


def score(option: Option, size: int, now: float) -> float:
    """Seconds, more or less; smaller is better."""
    standing = option.standing
    seconds = standing.latency.estimate(size, now) * (1 + standing.in_flight / _CROWD)
    if standing.crowded():
        most = _ANSWERS_SECONDS if standing.latency.samples else math.inf
        seconds += min(_CROWDED_SECONDS * (1 + standing.in_flight), most)
    if option.last:
        return seconds * _ORIGIN_FACTOR + _ORIGIN_SECONDS
    return seconds * (1 + option.rank * _RANK_FACTOR) + option.rank * _RANK_SECONDS


def choose(
    options: Sequence[_Option], blob: str, size: int, now: float, without: Collection[_Option], *, proven: bool = False
) -> _Option | None:
    """The best source for a request of `size` bytes of `blob`, None when every one is down, used up or left out.

    `proven`: only sources that are UP (for hedges: a source on trial is no help).
    """
    possible = [
        option
        for option in options
        if option not in without
        and option.standing.admits(blob, now)
        and not (proven and option.standing.state is not State.UP)
    ]
    ranked = possible if len(possible) < 2 else sorted(possible, key=lambda option: score(option, size, now))
    for option in ranked:
        if option.standing.share():
            return option
    return min(ranked, key=lambda option: option.standing.error_rate, default=None)
