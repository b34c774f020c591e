"""Lines between marks in a TOML file, and the file as it was before, to the byte.

A key that is set already is not deleted: its lines stay in the block as comments behind `#- ` and come back with
`restored`. What is written is parsed again and compared with what was meant; a file that cannot be edited by lines
is refused and never damaged.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from snapshotter.errors import InstallError
from snapshotter.install.tomlfile import Statement, dumped, header, lookup, name_of, parse, statements

BEGIN = "# >>> nydusctl node install"
END = "# <<< nydusctl node install"
_HELP = "; nydusctl node uninstall takes these lines away and brings back those behind `#- `"
_NO_NEWLINE = "; no newline at the end before"
_KEPT = "#- "


def restored(text: str, file: object) -> str:
    """Without our blocks. Raises InstallError for one whose end is missing."""
    out: list[str] = []
    begun = 0
    no_newline = False
    for number, line in enumerate(_lines(text), 1):
        word = line.strip()
        if word.startswith(BEGIN):
            if begun:
                raise InstallError(f"{file}:{begun}: `{END}` is missing behind this line: put it where the block ends")
            begun = number
            no_newline |= word.endswith(_NO_NEWLINE)
        elif word == END:
            if not begun:
                raise InstallError(f"{file}:{number}: `{BEGIN}` is missing before this line: delete it or put it there")
            begun = 0
        elif not begun:
            out.append(line)
        elif line.startswith(_KEPT):
            out.append(line.removeprefix(_KEPT))
    if begun:
        raise InstallError(f"{file}:{begun}: `{END}` is missing behind this line: put it where the block ends")
    before = "".join(out)
    return before.removesuffix("\n") if no_newline else before


def has_block(text: str) -> bool:
    return any(line.strip().startswith(BEGIN) for line in text.splitlines())


def _lines(text: str) -> list[str]:
    """At newlines alone: TOML knows no other line ends, `splitlines` does."""
    parts = text.split("\n")
    lines = [f"{part}\n" for part in parts[:-1]]
    return [*lines, parts[-1]] if parts[-1] else lines


class Editor:
    """Changes to one file, collected; `text()` is the outcome. Every method raises InstallError."""

    def __init__(self, text: str, file: object) -> None:
        self.file = file
        self._lines = _lines(text)
        self._ends_open = bool(text) and not text.endswith("\n")
        if self._ends_open:
            self._lines[-1] += "\n"
        self.value = parse(text, file)
        self._meant = copy.deepcopy(self.value)
        self._statements = statements(self._lines, file)
        self._replaced: dict[int, tuple[int, list[str]]] = {}  # first line -> last line, what stands there instead
        self._behind: dict[int, list[str]] = {}  # line of a table's header -> keys
        self._top: list[str] = []
        self._tables: dict[tuple[str, ...], list[str]] = {}
        self._arrays: list[str] = []

    def find(self, path: tuple[str, ...]) -> Statement | None:
        """The statement that sets a key, or opens a table."""
        return next((one for one in self._statements if one.path == path), None)

    def where(self, path: tuple[str, ...]) -> str:
        """`FILE:LINE` of a key or of the first thing below it."""
        found = self.find(path) or next((one for one in self._statements if one.path[: len(path)] == path), None)
        return f"{self.file}:{found.line}" if found else str(self.file)

    def set(self, path: tuple[str, ...], value: Any, over: Collection[Any] | None) -> None:
        """`over`: values that may be replaced, None: any. A value that is there already is left alone."""
        now = lookup(self._meant, path)
        if now == value and type(now) is type(value):
            return
        if now is not None and over is not None and now not in over:
            raise InstallError(
                f"{self.where(path)}: {name_of(path[-1])} is {dumped(now)} there, not {dumped(value)}: "
                "somebody wants it so. Change it, or allow it with --replace"
            )
        table, line = path[:-1], f"{name_of(path[-1])} = {dumped(value)}\n"
        if now is not None:
            self._replace(path, line)
        elif not table:
            self._top.append(line)
        elif (found := self.find(table)) is not None and found.kind == "table":
            self._behind.setdefault(found.last, []).append(self._indent(found) + line)
        elif (beside := self._dotted(table)) is not None:
            prefix = "".join(f"{name_of(name)}." for name in table[len(beside.table) :])
            self._behind.setdefault(beside.last, []).append(f"{self._indent(beside)}{prefix}{line}")
        else:
            self._tables.setdefault(table, []).append(line)
        below = self._meant
        for name in table:
            below = below.setdefault(name, {})
            if not isinstance(below, dict):
                raise InstallError(f"{self.where(path[:1])}: {header(table)} cannot be made: a part of it is no table")
        below[path[-1]] = value

    def append(self, path: tuple[str, ...], entry: dict[str, str]) -> None:
        """One more table of an array of tables."""
        below = self._meant
        for name in path[:-1]:
            below = below.setdefault(name, {})
        below.setdefault(path[-1], []).append(dict(entry))
        self._arrays.append(f"{header(path, array=True)}\n")
        self._arrays += [f"  {name_of(key)} = {dumped(value)}\n" for key, value in entry.items()]

    def _dotted(self, table: tuple[str, ...]) -> Statement | None:
        """A key of the table that is written with dots: TOML forbids to open such a table once more."""
        for one in self._statements:
            if one.kind == "key" and one.path[:-1] == table and len(one.table) < len(table) and self._alone(one):
                return one
        return None

    def _alone(self, found: Statement) -> bool:
        return sum(one.first == found.first for one in self._statements) == 1

    def _indent(self, found: Statement) -> str:
        line = self._lines[found.first]
        return line[: len(line) - len(line.lstrip())] + ("  " if found.kind == "table" else "")

    def _replace(self, path: tuple[str, ...], line: str) -> None:
        found = self.find(path)
        if found is None or not self._alone(found):
            raise InstallError(
                f"{self.where(path)}: {header(path[:-1])} is written in one line with other keys, which is not edited: "
                f"set {name_of(path[-1])} = {line.partition(' = ')[2].strip()} there by hand and run this again"
            )
        start = self._lines[found.first]
        indent = start[: len(start) - len(start.lstrip())]
        relative = ".".join(name_of(name) for name in path[len(found.table) :])
        kept = [f"{_KEPT}{one}" for one in self._lines[found.first : found.last]]
        self._replaced[found.first] = (found.last, [*kept, f"{indent}{relative} = {line.partition(' = ')[2]}"])

    def text(self) -> str:
        """The file with all changes, as blocks; the same text where nothing was to be changed."""
        out: list[str] = []
        if self._top:
            out += self._block(self._top)
        skip = 0
        for number, line in enumerate([*self._lines, ""]):
            if number in self._behind:
                out += self._block(self._behind[number])
            if number in self._replaced:
                skip, lines = self._replaced[number]
                out += self._block(lines)
            if number >= skip:
                out.append(line)
        tail: list[str] = []
        for table, lines in self._tables.items():
            tail += [f"{header(table)}\n", *(f"  {line}" for line in lines)]
        if tail or self._arrays:
            out += self._block([*tail, *self._arrays])
        after = "".join(out)
        if self._ends_open and after == "".join(self._lines):
            return after.removesuffix("\n")
        self._check(after)
        return after

    def _block(self, lines: list[str]) -> list[str]:
        mark = BEGIN + _HELP + (_NO_NEWLINE if self._ends_open else "")
        return [f"{mark}\n", *lines, f"{END}\n"]

    def _check(self, after: str) -> None:
        try:
            good = parse(after, self.file) == self._meant
        except InstallError as failure:
            good, why = False, f" ({failure})"
        else:
            why = ""
        if not good:
            raise InstallError(
                f"{self.file} is written in a way that is not edited by lines{why}: add the lines of "
                "examples/containerd by hand, then run this again"
            )
