"""What a source of credentials is asked and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from nydusfs.registry.credentials import Credentials
from nydusfs.registry.reference import Reference


@dataclass(frozen=True, slots=True)
class Question:
    """`image` as a client wrote it; `labels` of its snapshot, with which older agents carried credentials."""

    reference: Reference
    labels: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def image(self) -> str:
        return str(self.reference)


@dataclass(frozen=True, slots=True)
class Answer:
    """`reason` is for people and never holds a secret. Without `credentials` the next source is asked.

    `expires`: seconds since the epoch at which the credentials should be asked for again, None if unknown.
    `failed`: the source could not say, which is not the same as having nothing.
    """

    reason: str
    credentials: Credentials | None = None
    expires: float | None = None
    failed: bool = False


class Source(Protocol):
    """May block for a bounded time. Raises nothing."""

    @property
    def name(self) -> str: ...

    def ask(self, question: Question) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Off:
    """A source that is switched off, kept in the chain so that people see what would switch it on."""

    name: str
    setting: str

    def ask(self, question: Question) -> Answer:
        return Answer(f"switched off ({self.setting} is not set)")
