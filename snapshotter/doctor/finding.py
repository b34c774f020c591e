"""What a check found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from snapshotter.node import Node


class Level(IntEnum):
    OK = 0
    NOTE = 1  # worth knowing; nothing to be done
    WARNING = 2  # something works worse than it could, or soon will
    ERROR = 3  # something does not work


@dataclass(frozen=True, slots=True)
class Finding:
    """`check`: area and name, for scripts (`containerd.annotations`). `remedy`: what to do, "" for OK."""

    check: str
    level: Level
    text: str
    remedy: str = ""


Check: TypeAlias = "Callable[[Node], Iterator[Finding]]"


def ok(check: str, text: str) -> Finding:
    return Finding(check, Level.OK, text)


def note(check: str, text: str, remedy: str = "") -> Finding:
    return Finding(check, Level.NOTE, text, remedy)


def warning(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, Level.WARNING, text, remedy)


def error(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, Level.ERROR, text, remedy)
