"""Compares two file systems, entry by entry and byte by byte."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from nydusfs.convert.facts import differences, shown
from nydusfs.convert.threads import DaemonPool
from nydusfs.convert.views import View
from nydusfs.errors import ConvertError

log = logging.getLogger(__name__)

_READERS = 4
_AHEAD = 64

T = TypeVar("T")


@dataclass(slots=True)
class Comparison:
    """`differences` are lines fit for a user, at most `limit`; `count` is their true number; `content` counts bytes."""

    limit: int = 100
    count: int = 0
    entries: int = 0
    content: int = 0
    differences: list[str] = field(default_factory=list)

    def add(self, path: bytes, text: str) -> None:
        self.count += 1
        if len(self.differences) < self.limit:
            self.differences.append(f"{shown(path)}: {text}")


def compare(source: View, target: View, limit: int = 100) -> Comparison:
    """The root directory's own attributes are left out, as containers never see them. Raises nothing for what the
    target does wrong: an unreadable entry is a difference. Raises ConvertError for a source that cannot be read."""
    result = Comparison(limit)
    with DaemonPool(_READERS, "compare") as pool:
        _Comparer(source, target, result, pool).run()
    return result


class _Comparer:
    def __init__(self, source: View, target: View, result: Comparison, pool: DaemonPool) -> None:
        self._source = source
        self._target = target
        self._result = result
        self._pool = pool
        self._reads: deque[tuple[bytes, Future[str], Future[str]]] = deque()
        self._files: dict[object, object] = {}  # file of the source -> file of the target, for hard links

    def run(self) -> None:
        stack: list[tuple[bytes, object, object]] = [(b"", self._source.root(), self._target.root())]
        while stack:
            path, mine, theirs = stack.pop()
            wanted = self._of_source(path or b"/", lambda mine=mine: self._source.children(mine))  # type: ignore[misc]
            try:
                children = self._target.children(theirs)
            except Exception as error:
                self._failed(path or b"/", "cannot be listed", error)
                continue
            for name in sorted(children.keys() - wanted.keys()):
                self._result.add(path + b"/" + name, "only in the target")
            for name in sorted(wanted):
                below = path + b"/" + name
                if name not in children:
                    self._result.add(below, "missing in the target")
                elif self._entry(below, wanted[name], children[name]):
                    stack.append((below, wanted[name], children[name]))
        self._drain(0)

    def _entry(self, path: bytes, mine: object, theirs: object) -> bool:
        """Compares one entry; whether it is a directory in both."""
        self._result.entries += 1
        expected, file = self._of_source(path, lambda: self._source.facts(mine))
        try:
            facts, other = self._target.facts(theirs)
        except Exception as error:
            self._failed(path, "cannot be examined", error)
            return False
        for text in differences(expected, facts):
            self._result.add(path, text)
        if expected.kind != facts.kind:
            return False
        if facts.kind == "file":
            if self._files.setdefault(file, other) != other:
                self._result.add(path, "is a hard link in the source, a file of its own in the target")
            if expected.size == facts.size:
                self._result.content += facts.size
                digests = (self._pool.submit(self._source.digest, mine), self._pool.submit(self._target.digest, theirs))
                self._reads.append((path, *digests))
                self._drain(_AHEAD)
        return facts.kind == "directory"

    def _drain(self, left: int) -> None:
        while len(self._reads) > left:
            path, mine, theirs = self._reads.popleft()
            expected = self._of_source(path, mine.result)
            try:
                found = theirs.result()
            except Exception as error:
                self._failed(path, "cannot be read", error)
                continue
            if found != expected:
                self._result.add(path, f"content: source sha256 {expected}, target sha256 {found}")

    def _of_source(self, path: bytes, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except Exception as error:
            raise ConvertError(f"{shown(path)} cannot be read in the source: {_reason(error)}") from error

    def _failed(self, path: bytes, what: str, error: Exception) -> None:
        log.debug("%s: %s", shown(path), what, exc_info=True)
        self._result.add(path, f"{what} in the target: {_reason(error)}")


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return reason or type(error).__name__
