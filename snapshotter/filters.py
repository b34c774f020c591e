"""containerd's filter language for List, as a small parser that gives a predicate.

Grammar (snapshotter.md 1.6): selectors joined by "," are AND-ed; several filters are OR-ed; a selector is a dotted
field path, alone (presence) or with `==`, `!=`, `~=` and a value. Fields and values may be double-quoted Go strings,
the value of `~=` may also stand between slashes or bars.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from snapshotter.errors import InvalidArgument

# field path -> (value, present)
Adaptor = Callable[[Sequence[str]], tuple[str, bool]]
Predicate = Callable[[Adaptor], bool]
# field -> value of the `==` selectors of one filter; labels as ("labels", name)
Equals = dict[tuple[str, ...], str]

MAX_FILTER = 64 << 10
_FIELD = re.compile(r"[A-Za-z0-9_]+")
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_BARE = re.compile(r"[^\s.,=!~\"/|][^\s,]*")
_ESCAPE = re.compile(
    r"\\(?:([abfnrtv\\'\"])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.?))", re.S
)
_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"'}


class Filter:
    """A predicate for a request's filters. `alternatives`: of each, equalities that hold for all it matches."""

    def __init__(self, filters: Iterable[str]) -> None:
        """Raises InvalidArgument for text outside the grammar."""
        self.alternatives: list[Equals] = []
        self._alternatives: list[list[Predicate]] = []
        for text in filters:
            equals: Equals = {}
            self._alternatives.append(_parse_one(text, equals))
            self.alternatives.append(equals)
        if not self._alternatives:
            self._alternatives, self.alternatives = [[]], [{}]

    def __call__(self, adaptor: Adaptor) -> bool:
        return any(all(matches(adaptor) for matches in selectors) for selectors in self._alternatives)


def parse(filters: Iterable[str]) -> Filter:
    """One predicate for a request's filters. Raises InvalidArgument for text outside the grammar."""
    return Filter(filters)


def _parse_one(text: str, equals: Equals) -> list[Predicate]:
    if not text:
        return []
    if len(text) > MAX_FILTER:
        raise InvalidArgument(f"filter is longer than {MAX_FILTER} characters")
    selectors: list[Predicate] = []
    at = 0
    while True:
        selector, at = _selector(text, at, equals)
        selectors.append(selector)
        if at == len(text):
            return selectors
        if text[at] != ",":
            raise _error(text, at, "expected ',' or the end")
        at += 1


def _selector(text: str, at: int, equals: Equals) -> tuple[Predicate, int]:
    path: list[str] = []
    while True:
        if match := _FIELD.match(text, at):
            path.append(match[0])
        elif match := _QUOTED.match(text, at):
            path.append(_unquote(match[0], text, at))
        else:
            raise _error(text, at, "expected a field name")
        at = match.end()
        if at >= len(text) or text[at] != ".":
            break
        at += 1
    operator = text[at : at + 2]
    if operator not in ("==", "!=", "~="):
        return (lambda adaptor: adaptor(path)[1]), at
    at += 2
    value, at = _value(text, at, operator == "~=")
    if operator == "==":
        equals[(path[0], ".".join(path[1:])) if len(path) > 1 else (path[0],)] = value
        return (lambda adaptor: adaptor(path) == (value, True)), at
    if operator == "!=":
        return (lambda adaptor: adaptor(path) != (value, True)), at
    try:
        pattern = re.compile(value)
    except (re.error, OverflowError, RecursionError):
        return (lambda adaptor: False), at

    def search(adaptor: Adaptor) -> bool:
        found, present = adaptor(path)
        return present and pattern.search(found) is not None

    return search, at


def _value(text: str, at: int, regex: bool) -> tuple[str, int]:
    if match := _QUOTED.match(text, at):
        return _unquote(match[0], text, at), match.end()
    if regex and at < len(text) and text[at] in "/|":
        delimiter, end, out = text[at], at + 1, []
        while end < len(text) and text[end] != delimiter:
            if text[end] == "\\" and text[end + 1 : end + 2] == delimiter:
                end += 1
            out.append(text[end])
            end += 1
        if end == len(text):
            raise _error(text, at, f"no closing {delimiter}")
        return "".join(out), end + 1
    if match := _BARE.match(text, at):
        if not match[0].isprintable():
            raise _error(text, at, "a value must be printable or quoted")
        return match[0], match.end()
    raise _error(text, at, "expected a value")


def _unquote(quoted: str, text: str, at: int) -> str:
    # Go strings are bytes: \x and octal escapes may spell UTF-8
    out = bytearray()
    end = 1
    for match in _ESCAPE.finditer(quoted, 1, len(quoted) - 1):
        out += quoted[end : match.start()].encode()
        simple, two, four, eight, octal, bad = match.groups()
        if bad is not None or simple == "'":
            raise _error(text, at, f"bad escape {match[0]!r}")
        if simple:
            out += _SIMPLE[simple].encode()
        elif two or octal:
            number = int(two, 16) if two else int(octal, 8)
            if number > 255:
                raise _error(text, at, f"bad escape {match[0]!r}")
            out.append(number)
        else:
            try:
                out += chr(int(four or eight, 16)).encode()
            except (ValueError, OverflowError):
                raise _error(text, at, f"bad escape {match[0]!r}") from None
        end = match.end()
    out += quoted[end:-1].encode()
    return out.decode(errors="surrogateescape")


def _error(text: str, at: int, message: str) -> InvalidArgument:
    return InvalidArgument(f"filter {text!r}: {message} at position {at}")
