"""What a compiled Python module imports when it is run, from the bytes of its .pyc file.

CPython 3.8 to 3.13. Only the code of the module itself counts, not that of its functions. Nothing is executed, and
nothing here is believed further than that other files of the image are fetched early. 400 modules of the standard
library, 13 MB, take 0.1 s of processor time: everything is jumped over but what an import names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

MARK = b"\r\n"  # bytes 2 and 3 of every such file
MAX_SIZE = 2 << 20  # larger ones are tables of data
# What a hostile module may claim: the largest of numpy, pandas and Django names 300 things.
MAX_NAMES = 2000  # modules and what is wanted of them
MAX_LEVEL = 64
MAX_NAME = 1024  # bytes
_HEAD = 16
# Value types of `marshal`, by what follows the type byte.
_PLAIN = dict(zip(b"0NFTS.iIgyr", (0, 0, 0, 0, 0, 0, 4, 8, 8, 16, 4), strict=True))
_SHORT, _LONG, _HOLDS = frozenset(b"zZ"), frozenset(b"stuaA"), frozenset(b"([<>")
_SMALL_TUPLE, _REF, _INTEGER, _CODE, _INT = ord(")"), ord("r"), ord("l"), ord("c"), ord("i")
_KEPT = 128  # this bit of the type byte: a later _REF may stand for it
# What a value takes up by its type byte: so many bytes, or one of these. 400 modules hold half a million values.
_IS_SHORT, _IS_LONG, _IS_SMALL_TUPLE, _IS_TUPLE, _IS_CODE, _IS_INTEGER, _IS_NONE = range(0, -7, -1)


def _step(kind: int) -> int:
    if kind in _PLAIN:
        return 1 + _PLAIN[kind]
    known = ((_SHORT, _IS_SHORT), (_LONG, _IS_LONG), (_HOLDS, _IS_TUPLE))
    single = {_SMALL_TUPLE: _IS_SMALL_TUPLE, _CODE: _IS_CODE, _INTEGER: _IS_INTEGER}
    return next((step for kinds, step in known if kind in kinds), single.get(kind, _IS_NONE))


_STEPS = [_step(byte & ~_KEPT) for byte in range(256)]
_CODE_AT, _CONSTS, _NAMES = 0, 1, 2  # parts of a code object, the same in all versions
_MAX_DEPTH = 200  # of functions in functions
_LOADED_BEFORE = 8  # instructions before one that imports, among which are those that load its two constants


class Version(NamedTuple):
    """`tag`: in names of files; `magic`: the first one that is not this version's any more. Of a code object: bytes of
    numbers at its begin, parts, index of its file name, parts behind the number of its first line."""

    tag: str
    magic: int
    numbers: int
    parts: int
    filename: int
    behind_line: int
    load_const: int = 100
    import_name: int = 108
    extended: int = 144


_VERSIONS = (
    Version("cpython-38", 3420, 24, 9, 6, 1),
    Version("cpython-39", 3430, 24, 9, 6, 1),
    Version("cpython-310", 3450, 24, 9, 6, 1),
    Version("cpython-311", 3500, 20, 10, 5, 2),
    Version("cpython-312", 3550, 20, 10, 5, 2),
    Version("cpython-313", 3600, 20, 10, 5, 2, 83, 75, 71),
)
_FIRST_MAGIC = 3400


class Import(NamedTuple):
    """`from <level dots><name> import <wanted>`; level 0 and nothing wanted: `import <name>`."""

    level: int
    name: bytes
    wanted: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Module:
    """`filename`: of its source, where it was compiled."""

    tag: bytes
    filename: bytes
    imports: tuple[Import, ...]


def read(data: bytes) -> Module | None:
    """None for what is no module of a version that is known here."""
    version = _version(data)
    if version is None:
        return None
    try:
        values = _Values(data, version)
        filename = values.string(values.parts[version.filename])
        if filename is None:
            return None
        return Module(version.tag.encode(), filename, tuple(_few(_imports(values, version))))
    except (IndexError, ValueError):
        return None


def _version(data: bytes) -> Version | None:
    if len(data) < _HEAD + 2 or data[2:4] != MARK:
        return None
    magic = int.from_bytes(data[:2], "little")
    if magic < _FIRST_MAGIC:
        return None
    return next((version for version in _VERSIONS if magic < version.magic), None)


class _Values:
    """The marshalled code object of a module. Values are places in its bytes; only those asked for are made, all others
    are jumped over, in their order, since each may be one that another place refers to. Raises IndexError for data that
    is cut short, ValueError for what is none."""

    def __init__(self, data: bytes, version: Version) -> None:
        self._data = data
        self._version = version
        self._kept: list[int] = []  # places, in the order by which _REF counts
        if data[_HEAD] & ~_KEPT != _CODE:
            raise ValueError("no code object")
        self._keep(_HEAD)
        at = _HEAD + 1 + version.numbers
        self.parts: list[int] = []
        self._items: dict[int, list[int]] = {}  # place of a tuple -> those of what it holds
        self._strings: dict[int, tuple[bytes, ...]] = {}
        for number in range(version.parts):
            self.parts.append(at)
            at = self._list(at) if number in (_CONSTS, _NAMES) else self._skip(at)
            if number == version.parts - version.behind_line - 1:
                at += 4

    def _keep(self, at: int) -> None:
        if self._data[at] & _KEPT:
            self._kept.append(at)

    def _number(self, at: int, size: int = 4) -> int:
        if at + size > len(self._data):
            raise IndexError(at)
        return int.from_bytes(self._data[at : at + size], "little")

    def _list(self, at: int) -> int:
        """Over a tuple, noting where what it holds is; over anything else."""
        step = _STEPS[self._data[at]]
        if step not in (_IS_SMALL_TUPLE, _IS_TUPLE):
            return self._skip(at)
        size = 1 if step == _IS_SMALL_TUPLE else 4
        self._keep(at)
        items = self._items[at] = []
        count, at = self._number(at + 1, size), at + 1 + size
        while count:
            items.append(at)
            at = self._skip(at)
            count -= 1
        return at

    def _skip(self, at: int) -> int:
        """Over one value, whatever it is."""
        data, steps, keep = self._data, _STEPS, self._kept.append
        left = 1  # values to jump over
        lines: list[int] = []  # how many of them are left where a code object has the number of its first line
        line = -1
        while left:
            kind = data[at]
            if kind >= _KEPT:
                keep(at)
            step = steps[kind]
            if step > 0:
                at += step
            elif step == _IS_SHORT:
                at += 2 + data[at + 1]
            elif step == _IS_LONG:
                at += 5 + self._number(at + 1)
            elif step == _IS_SMALL_TUPLE:
                left += data[at + 1]
                at += 2
            elif step == _IS_CODE:
                lines.append(line)
                if len(lines) > _MAX_DEPTH:
                    raise ValueError("too deep")
                left += self._version.parts
                line = left - 1 - (self._version.parts - self._version.behind_line)
                at += 1 + self._version.numbers
            elif step == _IS_TUPLE:
                left += self._number(at + 1)
                at += 5
            elif step == _IS_INTEGER:
                at += 5 + 2 * abs(int.from_bytes(data[at + 1 : at + 5], "little", signed=True))
            else:
                raise ValueError("no value")
            left -= 1
            if left == line:
                at += 4
                line = lines.pop()
        return at

    # -- values

    def _there(self, at: int) -> int:
        """Where the value is that this place stands for."""
        return self._kept[self._number(at + 1)] if self._data[at] == _REF else at

    def string(self, at: int) -> bytes | None:
        """None for anything else."""
        at = self._there(at)
        kind = self._data[at] & ~_KEPT
        if kind not in _SHORT and kind not in _LONG:
            return None
        size = 1 if kind in _SHORT else 4
        begin = at + 1 + size
        return self._data[begin : begin + self._number(at + 1, size)]

    def integer(self, at: int) -> int | None:
        at = self._there(at)
        return self._number(at + 1) if self._data[at] & ~_KEPT == _INT else None

    def items(self, at: int) -> list[int]:
        """Places of what a tuple holds; none of anything else."""
        at = self._there(at)
        if at not in self._items:
            kept, self._kept = self._kept, []  # counted already
            try:
                self._list(at)
            finally:
                self._kept = kept
        return self._items.get(at, [])

    def strings(self, at: int) -> tuple[bytes, ...]:
        """Those at the begin of a tuple, but none that is no name. Looks at nothing twice."""
        at = self._there(at)
        found = self._strings.get(at)
        if found is None:
            found = self._strings[at] = tuple(self._begin(at))
        return found

    def _begin(self, at: int) -> Iterator[bytes]:
        step = _STEPS[self._data[at]]
        if step not in (_IS_SMALL_TUPLE, _IS_TUPLE):
            return
        size = 1 if step == _IS_SMALL_TUPLE else 4
        count, at = self._number(at + 1, size), at + 1 + size
        for _ in range(min(count, MAX_NAMES)):
            text = self.string(at)
            if text is None:
                return
            if len(text) <= MAX_NAME:
                yield text
            step = _STEPS[self._data[at]]
            at += step if step > 0 else 2 + self._data[at + 1] if step == _IS_SHORT else 5 + self._number(at + 1)


def _imports(values: _Values, version: Version) -> Iterator[Import]:
    """By the instructions that import, and the two constants that each has loaded before."""
    consts, names = values.items(values.parts[_CONSTS]), values.items(values.parts[_NAMES])
    text = values.string(values.parts[_CODE_AT]) or b""
    operations = text[: len(text) & ~1 : 2]
    at = operations.find(version.import_name)
    while at >= 0:
        argument, before = _argument(text, at, version)
        loaded: list[int] = []
        for _ in range(_LOADED_BEFORE):
            if before < 0 or len(loaded) == 2:
                break
            operation = operations[before]
            constant, before = _argument(text, before, version)
            if operation == version.load_const:
                loaded.append(constant)
        if len(loaded) == 2:
            level, name = values.integer(consts[loaded[1]]), values.string(names[argument])
            if level is not None and level <= MAX_LEVEL and name is not None and len(name) <= MAX_NAME:
                yield Import(level, name, values.strings(consts[loaded[0]]))
        at = operations.find(version.import_name, at + 1)


def _argument(text: bytes, number: int, version: Version) -> tuple[int, int]:
    """Of an instruction, up to 32 bits, and the number of the instruction before."""
    value, before = text[2 * number + 1], number - 1
    for bits in (8, 16, 24):
        if before < 0 or text[2 * before] != version.extended:
            break
        value |= text[2 * before + 1] << bits
        before -= 1
    return value, before


def _few(imports: Iterator[Import]) -> dict[Import, None]:
    """Each once, until there are too many to be looked at."""
    found: dict[Import, None] = {}
    left = MAX_NAMES
    for one in imports:
        left -= 1 if one in found else 1 + len(one.wanted)
        if left < 0:
            break
        found[one] = None
    return found
