"""The chain: sources in order, the first with credentials that nydusd can use wins (order as upstream's)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nydusfs.errors import NydusError
from nydusfs.registry.credentials import Credentials
from nydusfs.registry.reference import Reference
from snapshotter.auth.base import Answer, Question, Source
from snapshotter.errors import InvalidArgument

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """What one source said. `outcome`: used, nothing, failed, or not asked."""

    source: str
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """`credentials` None: anonymous. `failed`: some source that came before could not say."""

    source: str
    credentials: Credentials | None
    expires: float | None
    failed: bool
    steps: tuple[Step, ...]


class Chain:
    """Thread-safe, as its sources are."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        self._said: dict[str, str] = {}  # image -> source last logged: a renewal need not say it again

    def find(self, reference: Reference, labels: Mapping[str, str] | None = None) -> Found:
        """Asks one source after the other. Blocks as long as they do."""
        question = Question(reference, labels or {})
        steps: list[Step] = []
        winner: tuple[str, Answer] | None = None
        failed = False
        for source in self._sources:
            if winner is not None:
                steps.append(Step(source.name, "not asked", f"{winner[0]} comes first"))
                continue
            answer = source.ask(question)
            failed = failed or answer.failed
            found = answer.credentials
            if found is None:
                steps.append(Step(source.name, "failed" if answer.failed else "nothing", answer.reason))
            elif not found.registry_token and not (found.username and found.password):
                steps.append(Step(source.name, "nothing", f"{answer.reason}, but only an identity token: not usable"))
            else:
                steps.append(Step(source.name, "used", answer.reason))
                winner = source.name, answer
        name = winner[0] if winner else ""
        if self._said.get(question.image) != name:
            self._said[question.image] = name
            reason = winner[1].reason if winner else "none found, going on without"
            log.info("credentials for %s: %s%s", question.image, f"{name}: " if name else "", reason)
        if winner is None:
            return Found("", None, None, failed, tuple(steps))
        return Found(name, winner[1].credentials, winner[1].expires, failed, tuple(steps))

    def forget(self, image: str) -> None:
        """What was logged of an image that is gone."""
        self._said.pop(image, None)

    def explain(self, image: str, labels: Mapping[str, str] | None = None) -> dict[str, object]:
        """For `nydusctl auth explain`: who answered, and what the others said. Raises InvalidArgument."""
        reference = parse(image)
        found = self.find(reference, labels)
        who = found.credentials
        kind = "anonymous" if who is None else "registry token" if who.registry_token else "user and password"
        return {
            "image": str(reference),
            "registry": reference.host,
            "source": found.source or None,
            "kind": kind,
            "username": who.username if who and not who.registry_token else None,
            "expires": found.expires,
            "steps": [{"source": step.source, "outcome": step.outcome, "reason": step.reason} for step in found.steps],
        }


def parse(image: str) -> Reference:
    """Raises InvalidArgument."""
    try:
        return Reference.parse(image)
    except NydusError as error:
        raise InvalidArgument(f"the image's own label names no image: {error}") from None
