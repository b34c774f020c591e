"""Which lines of a TOML file say what: containerd's configuration is edited by lines, so that comments stay.

`tomllib` alone decides what a statement is and means: lines are added to one until it parses. Nothing here knows
TOML's quoting, and what a scan gets wrong shows when the edited file is compared with what was meant.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any, Literal

from snapshotter.errors import InstallError


@dataclass(frozen=True, slots=True)
class Statement:
    """Lines [`first`, `last`), counted from 0. `path` is absolute; `value` is that of a key, else None."""

    first: int
    last: int
    kind: Literal["table", "array", "key"]
    path: tuple[str, ...]
    table: tuple[str, ...]
    value: Any = None

    @property
    def line(self) -> int:
        """As editors count."""
        return self.first + 1


def parse(text: str, file: object) -> dict[str, Any]:
    """Raises InstallError."""
    try:
        return tomllib.loads(text)
    except ValueError as failure:
        raise InstallError(f"{file}: not TOML: {failure}") from None


def statements(lines: list[str], file: object) -> list[Statement]:
    """Of a text that parses as a whole, split with its line ends. Raises InstallError."""
    found: list[Statement] = []
    table: tuple[str, ...] = ()
    at = 0
    while at < len(lines):
        start = lines[at].lstrip()
        if not start.strip() or start.startswith("#"):
            at += 1
            continue
        last, value = _statement(lines, at, file)
        if start.startswith("["):
            array = start.startswith("[[")
            path = _path(value, array)
            table = path
            found.append(Statement(at, last, "array" if array else "table", path, table))
        else:
            found.extend(_keys(value, at, last, table))
        at = last
    return found


def _statement(lines: list[str], at: int, file: object) -> tuple[int, dict[str, Any]]:
    text = ""
    for last in range(at, len(lines)):
        text += lines[last]
        try:
            return last + 1, tomllib.loads(text)
        except ValueError:
            continue
    raise InstallError(f"{file}:{at + 1}: this line cannot be told apart from the ones behind it")


def _path(value: Any, array: bool) -> tuple[str, ...]:
    """Of the one header that was parsed: tables with one key each, at the end an empty one."""
    path = []
    while isinstance(value, dict) and value:
        ((name, value),) = value.items()
        path.append(name)
        if array and isinstance(value, list):
            value = value[0]
    return tuple(path)


def _keys(value: dict[str, Any], first: int, last: int, table: tuple[str, ...]) -> list[Statement]:
    """One for each leaf: an inline table is as many keys as it has."""
    found = []
    waiting: list[tuple[tuple[str, ...], Any]] = [(table, value)]
    while waiting:
        path, one = waiting.pop(0)
        if isinstance(one, dict) and one:
            waiting += [((*path, name), below) for name, below in one.items()]
        else:
            found.append(Statement(first, last, "key", path, table, one))
    return found


def dumped(value: Any) -> str:
    """A value as TOML writes it in one line. For what comes out of TOML; raises InstallError for dates."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(dumped(one) for one in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name_of(key)} = {dumped(one)}" for key, one in value.items()) + "}"
    raise InstallError(f"{value!r} cannot be written into containerd's configuration")


def _quoted(text: str) -> str:
    escaped = "".join(f"\\u{ord(one):04x}" if ord(one) < 32 or ord(one) == 127 else one for one in
                      text.replace("\\", "\\\\").replace('"', '\\"'))  # fmt: skip
    return f'"{escaped}"'


def name_of(key: str) -> str:
    bare = key and all(one.isascii() and (one.isalnum() or one in "-_") for one in key)
    return key if bare else _quoted(key)


def header(path: tuple[str, ...], array: bool = False) -> str:
    inside = ".".join(name_of(name) for name in path)
    return f"[[{inside}]]" if array else f"[{inside}]"


def lookup(value: Any, path: tuple[str, ...]) -> Any:
    """None where nothing is."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value
